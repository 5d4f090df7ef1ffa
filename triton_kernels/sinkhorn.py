r"""Entropic optimal transport of a batch by Sinkhorn's iterations, in the log domain: `sinkhorn`.

    Q = argmin_{Q >= 0} <Q, D> + eps KL(Q | theta gamma^T),   Q 1 = theta,   Q^T 1 = gamma

and with `rho` the two equations are penalties, rho KL(Q 1 | theta) + rho KL(Q^T 1 | gamma). With C = D / eps and
k = rho / (rho + eps), which is 1 without `rho`, the plan is

    phi_i = -k log sum_j gamma_j exp(psi_j - C_ij)        psi_j = -k log sum_i theta_i exp(phi_i - C_ij)
    Q_ij = theta_i gamma_j exp(phi_i + psi_j - C_ij)

iterated from psi = 0. Marginals stand beside the exponentials, so that one of zero needs no logarithm.

On a CPU the sums are products with K = exp(-C), ten times cheaper than exponentials of a whole matrix, where fp32 can
hold them: for a cosine distance at eps = 0.025 and above always. Elsewhere each sum is of exponentials whose largest
is 1. K, the exponentials and at last the plan are in the place of the plan.

Gradients. `"implicit"` differentiates the equations that hold at the end, where with per unit of mass x and y

    m_i x_i = sum_j Q_ij (U_ij - k y_j)        n_j y_j = sum_i Q_ij (U_ij - k x_i)
    dD_ij = -Q_ij (U_ij - k x_i - k y_j) / eps

for a gradient U of the plan and the marginals m, n that it has. Without x, that is a system of M unknowns, solved by
conjugate gradients with products by Q, as many steps as there were iterations: their error is never above what so
many iterations leave of it. `"unrolled"` goes back through every iteration, of which only potentials are kept.
Backward passes are torch on a GPU too: the first is a few products, the second there to be compared with.
"""

import torch

from .polar import _full_precision


GRADIENTS = ("detached", "unrolled", "implicit")
BLOCK = 2**18  # numbers of the images that are worked on at a time: what a core's cache holds
BLOCK_GPU = 2**24
MAX_COLUMNS = 4096  # of the kernel, whose programs hold what belongs to columns in registers
# Largest range of C, and |log| of the scalings that have been found, for products: in fp32, K and what counts of sums
# are then normal numbers.
LARGEST = 80.0
LARGEST_SCALING = 60.0


def sinkhorn(
    cost: torch.Tensor,
    theta: torch.Tensor,
    gamma: torch.Tensor,
    *,
    eps: float = 0.1,
    num_iterations: int = 30,
    rho: float | None = None,
    gradient: str = "detached",
    return_potentials: bool = False,
):
    """The plan `(B, N, M)` that moves `theta` to `gamma` at the least cost, smoothed by an entropy.

    Args:
        cost: `(B, N, M)`, any strides. Infinity forbids a pair.
        theta: `(B, N)` or `(N,)`, mass of the rows, not negative. 0 takes a row out: it has no mass and no gradient.
        gamma: `(B, M)` or `(M,)`, the same of the columns.
        eps: weight of the entropy, in units of the cost.
        num_iterations: updates of all rows and then all columns. Ending on these, the sums of columns are exact, and
            what is missing to convergence is in those of the rows.
        rho: price of mass that is made or lost, in units of the cost; `None` or infinity: none is.
        gradient: `"detached"`, the plan is a constant; `"implicit"`, of the converged plan; `"unrolled"`, of the
            iterations. The last two reach cost, theta and gamma.
        return_potentials: return `(plan, f (B, N), g (B, M))` with `plan = exp((f + g - cost) / eps)`, constants,
            -infinity where there is no mass.

    All is computed in fp32, whatever autocast says, and in float64 if one of the operands is; the plan has that dtype.
    An image whose masses are all 0 has a plan of zeros, never NaN. Nothing waits for a GPU.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an eps, a rho or a number of iterations that is not
            positive, an unknown gradient.
    """
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient={gradient!r} is not known. Choose one of {', '.join(GRADIENTS)}.")
    if not 0 < eps < float("inf") or num_iterations < 1 or (rho is not None and not rho > 0):
        raise ValueError(f"eps={eps}, num_iterations={num_iterations} and rho={rho} must be positive.")
    _check(cost, theta, gamma)
    theta, gamma = theta.expand(cost.shape[:2]), gamma.expand(cost.shape[0], cost.shape[2])
    damping = 1.0 if rho is None or rho == float("inf") else rho / (rho + eps)
    if gradient == "detached":
        cost, theta, gamma = cost.detach(), theta.detach(), gamma.detach()
    plan, phi, psi = torch.ops.sigma_kernels.sinkhorn(
        cost, theta, gamma, eps, num_iterations, damping, gradient == "unrolled"
    )
    if not return_potentials:
        return plan
    f, g = ((log[-1] + mass.detach().to(plan.dtype).log()) * eps for log, mass in ((phi, theta), (psi, gamma)))
    return plan, f, g


def _check(cost, theta, gamma) -> None:
    shapes = [tuple(t.shape) for t in (cost, theta, gamma)]
    images, *sizes = shapes[0] if cost.dim() == 3 else (0, 0, 0)
    if min(sizes) == 0 or any(shape not in ((images, n), (n,)) for shape, n in zip(shapes[1:], sizes)):
        raise ValueError(
            f"Expected cost (B, N, M), theta (B, N) or (N,) and gamma (B, M) or (M,), N and M from 1, got "
            f"{', '.join(map(str, shapes))}."
        )
    if not all(t.is_floating_point() for t in (cost, theta, gamma)):
        raise ValueError(f"All must be floating point, got {cost.dtype}, {theta.dtype} and {gamma.dtype}.")
    if not cost.device == theta.device == gamma.device:
        raise ValueError(f"All must be on one device, got {cost.device}, {theta.device} and {gamma.device}.")


# --- the operator


@torch.library.custom_op("sigma_kernels::sinkhorn", mutates_args=())
def _forward(
    cost: torch.Tensor,
    theta: torch.Tensor,
    gamma: torch.Tensor,
    eps: float,
    num_iterations: int,
    damping: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Plan, phi `(steps, B, N)` and psi `(steps, B, M)`: the last ones, or with `keep` those of each iteration."""
    compute, out = _forward_by_torch, _new_outputs(cost, theta, gamma, num_iterations if keep else 1)
    if _has_kernels(out[0]):
        from .sinkhorn_kernels import forward as compute
    theta, gamma = theta.to(out[0].dtype), gamma.to(out[0].dtype)
    with _full_precision(cost.device.type), torch.cuda.device_of(cost):
        compute(cost, theta, gamma, eps, num_iterations, damping, *out)
    return out


@_forward.register_fake
def _(cost, theta, gamma, eps, num_iterations, damping, keep):
    return _new_outputs(cost, theta, gamma, num_iterations if keep else 1)


def _new_outputs(cost, theta, gamma, steps):
    dtype = torch.float64 if torch.float64 in (cost.dtype, theta.dtype, gamma.dtype) else torch.float32
    images, rows, columns = cost.shape
    shapes = (images, rows, columns), (steps, images, rows), (steps, images, columns)
    return tuple(cost.new_empty(shape, dtype=dtype) for shape in shapes)


@torch.library.custom_op("sigma_kernels::sinkhorn_backward", mutates_args=())
def _backward(
    grad: torch.Tensor,
    cost: torch.Tensor,
    theta: torch.Tensor,
    gamma: torch.Tensor,
    phi: torch.Tensor,
    psi: torch.Tensor,
    eps: float,
    num_iterations: int,
    damping: float,
    unrolled: bool,
    of_cost: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of cost, theta and gamma for one of the plan; that of cost is empty without `of_cost`."""
    dcost = cost.new_empty(cost.shape if of_cost else 0)
    dtheta, dgamma = torch.empty_like(phi[0]), torch.empty_like(psi[0])
    with _full_precision(cost.device.type), torch.cuda.device_of(cost):
        for part in _parts(cost):
            images = grad[part], cost[part], theta[part].to(phi.dtype), gamma[part].to(phi.dtype)
            in_place = of_cost and dcost.dtype == phi.dtype
            out = dcost[part] if in_place else phi.new_empty(cost[part].shape)
            if unrolled:
                found = _unrolled(*images, phi[:, part], psi[:, part], eps, damping, out)
            else:
                found = _implicit(*images, phi[0, part], psi[0, part], eps, damping, out, num_iterations)
            for per_mass, (of_images, masses) in zip(found, ((dtheta, theta), (dgamma, gamma))):
                of_images[part] = per_mass.masked_fill_(masses[part] == 0, 0.0)
            if of_cost and not in_place:
                dcost[part] = out
    return dcost, dtheta.to(theta.dtype), dgamma.to(gamma.dtype)


@_backward.register_fake
def _(grad, cost, theta, gamma, phi, psi, eps, num_iterations, damping, unrolled, of_cost):
    dcost = cost.new_empty(cost.shape if of_cost else 0)
    return dcost, theta.new_empty(theta.shape), gamma.new_empty(gamma.shape)


def _setup_context(ctx, inputs, output):
    cost, theta, gamma, *ctx.options = inputs
    _, phi, psi = output
    ctx.save_for_backward(cost, theta, gamma, phi, psi)
    ctx.mark_non_differentiable(phi, psi)


def _autograd(ctx, grad, *_):
    of_cost, of_theta, of_gamma, *_ = ctx.needs_input_grad
    dcost, dtheta, dgamma = torch.ops.sigma_kernels.sinkhorn_backward(grad, *ctx.saved_tensors, *ctx.options, of_cost)
    found = dcost if of_cost else None, dtheta if of_theta else None, dgamma if of_gamma else None
    return *found, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _has_kernels(plan: torch.Tensor) -> bool:
    if plan.dtype == torch.float64 or plan.shape[2] > MAX_COLUMNS or plan.device.type not in ("cpu", "cuda"):
        return False
    try:
        import triton
    except ImportError:  # no wheels for macOS and Windows
        return False
    return plan.is_cuda or triton.knobs.runtime.interpret


def _parts(cost: torch.Tensor) -> list[slice]:
    """Slices of the batch of at most [`BLOCK`] numbers, or of one image."""
    images, rows, columns = cost.shape
    step = max(1, (BLOCK_GPU if cost.is_cuda else BLOCK) // (rows * columns))
    return [slice(at, min(at + step, images)) for at in range(0, images, step)]


# --- the iterations in torch


def _forward_by_torch(cost, theta, gamma, eps, num_iterations, damping, plan, phi, psi) -> None:
    for part in _parts(cost):
        images = cost[part], theta[part], gamma[part], eps, num_iterations, damping
        out = plan[part], phi[:, part], psi[:, part]
        if not (cost.device.type == "cpu" and _by_products(*images, *out)):
            _by_exponentials(*images, *out)


def _by_products(cost, theta, gamma, eps, num_iterations, damping, plan, phi, psi) -> bool:
    """False, and nothing of use, where fp32 does not hold the numbers."""
    low, high = (bound.item() for bound in cost.aminmax())
    # Without penalties, what all costs have in common goes into phi and nowhere else.
    common = low if damping == 1 else 0.0
    if not max(high, common) - min(low, common) <= LARGEST * eps:
        return False
    plan.copy_(cost).sub_(common).mul_(-1 / eps).exp_()
    of_columns = torch.ones_like(gamma)
    for step in range(num_iterations):
        of_rows = _product(plan, gamma * of_columns).pow_(-damping)
        of_columns = _product(plan.mT, theta * of_rows).pow_(-damping)
        if step >= num_iterations - len(phi):
            torch.log(of_rows, out=phi[step - num_iterations])
            torch.log(of_columns, out=psi[step - num_iterations])
    if not max(phi[-1].abs().max().item(), psi[-1].abs().max().item()) <= LARGEST_SCALING:
        return False
    phi.add_(common / eps)
    plan.mul_((theta * of_rows).unsqueeze(2)).mul_((gamma * of_columns).unsqueeze(1))
    return True


def _by_exponentials(cost, theta, gamma, eps, num_iterations, damping, plan, phi, psi) -> None:
    log_theta, log_gamma = theta.log(), gamma.log()
    of_columns = torch.zeros_like(gamma)
    for step in range(num_iterations):
        total, top = _exponentials(log_gamma + of_columns, cost, eps, plan, dim=2)
        of_rows = _potential(total, top, damping)
        total, top = _exponentials(log_theta + of_rows, cost, eps, plan, dim=1)
        of_columns = _potential(total, top, damping)
        if step >= num_iterations - len(phi):
            phi[step - num_iterations], psi[step - num_iterations] = of_rows, of_columns
    # exp(top + psi), without the difference of large numbers that it would be.
    scale = total.masked_fill(total == 0, 1.0).pow_(-damping).mul_(top.mul_(1 - damping).exp_())
    plan.mul_(scale.mul_(gamma).unsqueeze(1))


def _product(matrices: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    # Two to three times faster on CPUs than from the left.
    return torch.bmm(vectors.unsqueeze(1), matrices.mT).squeeze(1)


def _exponentials(potentials, cost, eps, out, *, dim):
    """`exp(p - C - top)` in `out`; its sums over `dim`, along which the potentials lie, and `top`. Where there is no
    mass at all the sum is 0."""
    torch.add(potentials.unsqueeze(3 - dim), cost, alpha=-1 / eps, out=out)
    top = out.amax(dim, keepdim=True).clamp_(min=torch.finfo(out.dtype).min)
    return out.sub_(top).exp_().sum(dim), top.squeeze(dim)


def _potential(total, top, damping):
    return total.log().add_(top).mul_(-damping).masked_fill_(total == 0, 0.0)


# --- gradients


def _unrolled(grad, cost, theta, gamma, phi, psi, eps, damping, out):
    """Gradients of theta and gamma; that of cost is left in `out`."""
    log_theta, log_gamma = theta.log(), gamma.log()
    work = torch.empty_like(out)

    def shares(of_rows, of_columns):
        torch.add(of_rows.unsqueeze(2), cost, alpha=-1 / eps, out=work)
        return work.add_(of_columns.unsqueeze(1)).exp_()

    torch.mul(shares(log_theta + phi[-1], log_gamma + psi[-1]), grad, out=out)
    of_theta, of_gamma = out.sum(2), out.sum(1)  # of their logarithms
    of_phi, of_psi = of_theta.clone(), of_gamma.clone()
    out.neg_()
    for step in reversed(range(len(phi))):
        of_psi.mul_(damping)
        columns = shares(log_theta + phi[step], psi[step] / damping)
        out.addcmul_(columns, of_psi.unsqueeze(1))
        change = _product(columns, of_psi)
        of_theta.sub_(change)
        of_phi.sub_(change).mul_(damping)
        rows = shares(phi[step] / damping, log_gamma + psi[step - 1] if step else log_gamma)
        out.addcmul_(rows, of_phi.unsqueeze(2))
        of_psi = _product(rows.mT, of_phi).neg_()
        of_gamma.add_(of_psi)
        of_phi.zero_()
    out.div_(eps)
    return of_theta.div_(theta), of_gamma.div_(gamma)


def _implicit(grad, cost, theta, gamma, phi, psi, eps, damping, out, steps):
    """Gradients of theta and gamma; that of cost is left in `out`."""
    rows = torch.empty_like(out)  # the plan, each row divided by its sum
    total, top = _exponentials(gamma.log() + psi, cost, eps, rows, dim=2)
    rows.div_(total.masked_fill(total == 0, 1.0).unsqueeze(2))
    mass = (theta.log() + phi + top).exp_().mul_(total)
    of_rows = torch.mul(rows, grad, out=out).sum(2)
    mass_of_columns = _product(rows.mT, mass)
    known = _product(out.mT, mass) - damping * _product(rows.mT, mass * of_rows)

    def product(y):
        return mass_of_columns * y - damping**2 * _product(rows.mT, mass * _product(rows, y))

    y = _conjugate_gradients(product, known, mass_of_columns, steps, singular=damping == 1)
    x = of_rows - damping * _product(rows, y)
    if damping == 1:
        # All of theta times a number is the same plan: of the solutions, x + c and y - c, the one that says so.
        shift = (mass * x).sum(1, keepdim=True) / mass.sum(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        x, y = x - shift, y + shift
    torch.sub(grad, x.unsqueeze(2), alpha=damping, out=out).sub_(y.unsqueeze(1), alpha=damping)
    out.mul_(rows).mul_(mass.unsqueeze(2)).div_(-eps)
    # Times the mass that the plan has, for one of theta and of gamma.
    return x.mul_((phi + top).exp_().mul_(total)), y.mul_((psi * (1 - 1 / damping)).exp_())


def _conjugate_gradients(product, known, weight, steps, *, singular):
    """The solution of `product(y) = known`, which has `weight` on its diagonal; `singular` for constants y."""
    tiny = torch.finfo(known.dtype).tiny
    inverse = torch.where(weight > tiny, 1 / weight, 0.0)
    share = weight / weight.sum(1, keepdim=True).clamp_min(tiny)
    y, residual = torch.zeros_like(known), known.clone()
    direction, size = torch.zeros_like(known), torch.full_like(known[:, :1], torch.inf)
    enough = None
    for _ in range(steps):
        if singular:  # rounding
            residual.sub_(share * residual.sum(1, keepdim=True))
        scaled = inverse * residual
        before, size = size, (scaled * residual).sum(1, keepdim=True)
        enough = size * torch.finfo(known.dtype).eps ** 2 if enough is None else enough
        direction = scaled + direction * torch.where(before > 0, size / before, 0.0)
        image = product(direction)
        curvature = (direction * image).sum(1, keepdim=True)
        step = torch.where((size > enough) & (curvature > 0), size / curvature, 0.0)
        y.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
    return y
