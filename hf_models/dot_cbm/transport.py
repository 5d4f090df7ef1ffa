"""Entropic optimal transport between patches and concepts, whoever computes it."""

from collections.abc import Callable

import torch
from transformers.utils import logging
from transformers.utils.generic import maybe_autocast


logger = logging.get_logger(__name__)


def transport_plan(
    cost: torch.Tensor,
    theta: torch.Tensor,
    gamma: torch.Tensor,
    *,
    eps: float = 0.1,
    num_iterations: int = 30,
    rho: float | None = None,
    gradient: str = "detached",
) -> torch.Tensor:
    """Plan `(batch, N, M)` of least cost with row sums theta `(batch, N)` and column sums gamma `(M,)`, in fp32
    (float64 of float64) whatever autocast says.

    The columns are exact, what is left of the error is in the rows. `gradient="detached"`: the plan is a constant.
    `sigma_kernels` computes it where it is installed, a loop in torch elsewhere, and in what `torch.export` exports,
    ONNX too, which is to run without us; the loop has no implicit gradient and unrolls instead.
    """
    arguments = {"eps": eps, "num_iterations": num_iterations, "rho": rho}
    with maybe_autocast(device_type=cost.device.type, enabled=False):
        if cost.dtype != torch.float64:
            cost, theta, gamma = cost.float(), theta.float(), gamma.float()
            kernel = None if torch.compiler.is_exporting() else _installed_kernel()
            if kernel is not None:
                return kernel(cost, theta, gamma, gradient=gradient, **arguments)
        if gradient == "detached":
            cost, theta, gamma = cost.detach(), theta.detach(), gamma.detach()
        return sinkhorn_loop(cost, theta.to(cost.dtype), gamma.to(cost.dtype), **arguments)


def _installed_kernel() -> Callable | None:
    try:
        from sigma_kernels import sinkhorn
    except ImportError:
        logger.warning_once("hf-sigma's kernels are not installed; a loop in torch computes the transport.")
        return None
    return sinkhorn


def sinkhorn_loop(
    cost: torch.Tensor,
    theta: torch.Tensor,
    gamma: torch.Tensor,
    *,
    eps: float,
    num_iterations: int,
    rho: float | None = None,
) -> torch.Tensor:
    """The plan `(batch, N, M)` for `cost (batch, N, M)`, `theta (batch, N)` and `gamma (M,)`, in the dtype of `cost`:
    the fixed point in the log domain, from g = 0 and with k = rho / (rho + eps), or 1 without rho:

        f_i = -k LSE_j(log gamma_j + g_j - c_ij / eps),   then   g_j = -k LSE_i(log theta_i + f_i - c_ij / eps)
        q_ij = theta_i gamma_j exp(f_i + g_j - c_ij / eps)

    A marginal of zero has no mass and takes part in no sum.
    """
    damping = 1.0 if rho is None else rho / (rho + eps)
    rows = theta.log().unsqueeze(2) - cost / eps  # (batch, N, M)
    columns = gamma.log() - cost / eps
    f = torch.zeros_like(theta).unsqueeze(2)
    g = torch.zeros_like(cost[:, :1])
    for _ in range(num_iterations):
        f = -damping * (columns + g).logsumexp(2, keepdim=True)
        g = -damping * (rows + f).logsumexp(1, keepdim=True)
    return (rows + f + g + gamma.log()).exp()


__all__ = ["sinkhorn_loop", "transport_plan"]
