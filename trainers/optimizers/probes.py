r"""What MSign is about (arXiv 2602.01734), measured: alignment of matrices and of the Jacobians of adjacent layers.

    Align(A, B) = |<v_1(A), u_1(B)>|                                        (definition 3.2)
    Align(l+1, l) = Align(J(l+1), J(l)),   J(l) = d vec H(l) / d vec H(l-1)

The paper does not say how it obtains the singular vectors of a Jacobian, nor on which batch: power iteration with
Jacobian-vector products on one given sequence is ours. Random blocks have about 0.1, the floor to compare with.

Theorem 4.2, `||J(L)...J(1)|| >= (aM)^L / a` from pairwise alignment `a` and norms of at least `M`, holds for a = 1
only; for a < 1 its proof needs the alignment with the product of all earlier layers. So aM is a score, not a bound.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from .restoration import stable_rank


@dataclass(frozen=True)
class JacobianAlignment:
    """Of L layers on one sequence."""

    norms: list[float]  # (L,) spectral norms of the Jacobians
    pairs: list[float]  # (L - 1,) Align(l+1, l)

    @property
    def mean(self) -> float:
        """Over adjacent pairs, as the paper plots it."""
        return sum(self.pairs) / len(self.pairs)


def align(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """`Align(A, B)` `(...,)` of `A (..., m, n)` and `B (..., n, k)`, between 0 and 1, by singular vectors. Meaningless
    where the two largest singular values of either are equal, as after MSign."""
    v = torch.linalg.svd(first.detach(), full_matrices=False).Vh[..., 0, :]
    u = torch.linalg.svd(second.detach(), full_matrices=False).U[..., :, 0]
    return (v * u).sum(dim=-1).abs()


def layer_functions(
    model: nn.Module, layers: Sequence[nn.Module], **inputs
) -> list[tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]]:
    """For each layer a function of its hidden states alone, and those that it gets, `(batch, tokens, d)`, when
    `model(**inputs)` runs.

    Layers take them first and return them, alone or first in a tuple. The model must be in eval mode, and must not
    cache (`use_cache=False`). Raises `ValueError` if it is training, or for a layer that does not run.
    """
    if model.training:
        raise ValueError("The model is in training mode, whose dropout changes with every product: call model.eval().")
    seen: dict[int, tuple] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, i=i: seen.setdefault(i, (args, kwargs)) and None, with_kwargs=True
        )
        for i, layer in enumerate(layers)
    ]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if missing := [i for i in range(len(layers)) if i not in seen]:
        raise ValueError(f"layers {missing} did not run in model(**inputs).")
    return [_as_function(layer, *seen[i]) for i, layer in enumerate(layers)]


def _as_function(layer: nn.Module, args: tuple, kwargs: dict):
    kwargs = dict(kwargs)
    first = args[0] if args else kwargs.pop("hidden_states")
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def function(hidden: torch.Tensor) -> torch.Tensor:
        out = functional_call(layer, parameters, (hidden, *args[1:]), kwargs)
        return out[0] if isinstance(out, tuple) else out

    return function, first.detach()


def jacobian_alignment(
    functions: Sequence[tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]], *, iterations: int = 20
) -> JacobianAlignment:
    """Norms and alignments of the Jacobians of layers, from [`layer_functions`], in the order of the forward pass.

    Each iteration costs one Jacobian-vector product forward and one backward per layer. Take one sequence of at most
    64 tokens in fp32. Attention runs on torch's math kernel here: the fused ones have no forward derivative.
    """
    tops = [_top_singular(function, hidden, iterations) for function, hidden in functions]
    pairs = [float((later[2] * earlier[1]).sum().abs()) for earlier, later in zip(tops, tops[1:], strict=False)]
    return JacobianAlignment([float(norm) for norm, _, _ in tops], pairs)


def _top_singular(function, hidden: torch.Tensor, iterations: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`s_1`, `u_1` and `v_1` of the Jacobian at `hidden`, the vectors in its shape."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(hidden.shape, generator=generator).to(hidden)
    v = v / v.norm()
    with sdpa_kernel(SDPBackend.MATH):
        _, backward = vjp(function, hidden)
        for _ in range(iterations):
            (v,) = backward(jvp(function, (hidden,), (v,))[1])
            v = v / v.norm()
        u = jvp(function, (hidden,), (v,))[1]
    return u.norm(), u / u.norm(), v


__all__ = ["JacobianAlignment", "align", "jacobian_alignment", "layer_functions", "stable_rank"]
