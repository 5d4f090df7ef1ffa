"""Bytes that are alive and FLOPs that were done, of torch code that runs on fake tensors: shapes without numbers."""

import weakref
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


aten = torch.ops.aten
_FLASH_ON_CPU = aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_ON_CPU_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward


# sigma_kernels' loss without logits: where its hidden states and its weight are among the arguments.
_FUSED_LOSS = {
    "linear_cross_entropy": lambda args: args[:2],
    "linear_cross_entropy_backward": lambda args: args[1:3],
}
_BLOCK = 2**19 * 4  # bytes of a block of its logits


class LiveBytes(TorchDispatchMode):
    """Every storage made by an operator inside, until it is freed; and what each operator computes.

    Attributes:
        now (`int`), peak (`int`): bytes alive, and their maximum since [`start_window`].
        gradients (`int`): the part of `now` that [`gradient`] has named.
        flops (`Counter`): by `"attention_scores"` (half of the square where attention is causal), `"experts"` (grouped
            products), `"head"` (products inside a fused loss), `"projections"` (all others).

    Args:
        kept_fraction: `nonzero` finds this share of its input: the numbers that decide are not there.
    """

    def __init__(self, *, kept_fraction: float = 1.0):
        super().__init__()
        self.kept_fraction = kept_fraction
        self.now = self.peak = self.gradients = 0
        self.flops: Counter[str] = Counter()
        self._sizes: dict[int, int] = {}

    def ignore(self, tensor: torch.Tensor) -> None:
        """Never count this storage: it was there before, and somebody else counts it."""
        self._sizes[tensor.untyped_storage()._cdata] = 0

    def gradient(self, tensor: torch.Tensor) -> None:
        """From now on this storage is a gradient that stays."""
        self.gradients += self._sizes.get(tensor.untyped_storage()._cdata, 0)

    def start_window(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet is aten._grouped_mm:
            out = _grouped_mm_output(*args)
        elif packet is aten._local_scalar_dense and args[0].dtype == torch.bool:
            return True  # "is everything visible?", asked of masks
        elif packet is aten.nonzero:
            out = args[0].new_empty((round(self.kept_fraction * args[0].numel()), args[0].dim()), dtype=torch.int64)
        else:
            out = func(*args, **kwargs)
        self._count(packet, args, kwargs, out)
        self.peak = max(self.peak, self.now + _inside(packet, args))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor)
        return out

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += self._sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def _count(self, packet, args, kwargs, out) -> None:
        if packet is aten._grouped_mm:
            rows, inner = args[0].shape
            self.flops["experts"] += 2 * rows * inner * out.shape[-1]
        elif packet is _FLASH_ON_CPU:
            flops = sdpa_flop_count(*(each.shape for each in args[:3]))
            self.flops["attention_scores"] += flops // 2 if _is_causal(args, kwargs, 4) else flops
        elif packet is _FLASH_ON_CPU_BACKWARD:
            flops = sdpa_backward_flop_count(*(each.shape for each in args[:4]))
            self.flops["attention_scores"] += flops // 2 if _is_causal(args, kwargs, 7) else flops
        elif packet.__name__ in _FUSED_LOSS:
            hiddens, weight = _FUSED_LOSS[packet.__name__](args)
            products = 2 * sum(each.numel() for each in hiddens) * weight.shape[0]
            self.flops["head"] += products * (3 if packet.__name__.endswith("backward") else 1)
        elif packet in flop_registry:
            kind = "attention_scores" if "attention" in packet.__name__ else "projections"
            self.flops[kind] += flop_registry[packet](*args, **kwargs, out_val=out)


def _inside(packet, args: tuple) -> int:
    """Bytes that an operator takes and frees inside, unseen: the fused loss in torch has blocks of logits, and in its
    backward the hidden states and their gradients in fp32."""
    if packet.__name__ not in _FUSED_LOSS:
        return 0
    hiddens, _ = _FUSED_LOSS[packet.__name__](args)
    backward = packet.__name__.endswith("backward")
    return 2 * _BLOCK + backward * sum(4 * each.numel() * (1 + (each.dtype != torch.float32)) for each in hiddens)


def _is_causal(args: tuple, kwargs: dict, position: int) -> bool:
    return kwargs.get("is_causal", args[position] if len(args) > position else False)


def _grouped_mm_output(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor, *_) -> torch.Tensor:
    """torch's own rule for shapes refuses fp32, which its kernels compute."""
    if b.dim() == 3:  # rows of `a` are grouped: (S, H) x (E, H, I) -> (S, I)
        return a.new_empty(a.shape[0], b.shape[2])
    return a.new_empty(len(offsets), a.shape[0], b.shape[1])  # the gradient of the weights
