"""Inverses of the landmark kernel ``A``: truncated Newton iterations, the ridge inverse solved directly, and the exact
pseudo-inverse."""

import torch

from .kernel import compute_dtype, gaussian_kernel, without_autocast


def add_ridge(kernel, ridge):
    """``kernel + ridge * I`` for ``(..., m, m)``; ``ridge`` is a number or a tensor ``(..., 1, 1)``."""
    return kernel + ridge * torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)


def _iterate(kernel, inverse, iterations):
    shape = kernel.shape
    kernel, inverse = (matrix.reshape(-1, *shape[-2:]) for matrix in (kernel, inverse))
    for _ in range(iterations):
        inverse = torch.baddbmm(inverse, torch.bmm(inverse, kernel), inverse, beta=2, alpha=-1)
    return inverse.view(shape)


def _plain_step(kernel):
    return 1.8 / kernel.sum(-1).amax(-1)[..., None, None].square()


class _OneStepNewton(torch.autograd.Function):
    """Newton iterations whose backward is that of a true inverse, ``dL/dA = -V^T (dL/dV) V^T``."""

    @staticmethod
    def forward(ctx, kernel, iterations, ridge):
        step = _plain_step(kernel)
        kernel = add_ridge(kernel, ridge)
        inverse = _iterate(kernel, step * kernel, iterations)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx, grad):
        return _one_step_gradient(grad, *ctx.saved_tensors), None, None


@without_autocast
def _one_step_gradient(grad, inverse):
    transposed = inverse.transpose(-2, -1)
    return -transposed @ grad @ transposed


@without_autocast
def newton_inverse(kernel, iterations=20, ridge=0.01, backward='one_step'):
    """Truncated Newton inverse of each matrix plus a ridge (SOFT, section 3.2).

    ``V_0 = alpha A'`` with ``A' = A + ridge * I`` and ``alpha = 1.8 / (largest row sum of A)^2``, then
    ``V <- 2V - V A' V``. Where landmarks are alike the iterations stop short of the inverse: the result is a
    function of its own.

    Args:
        kernel (Tensor): ``A``, ``(..., m, m)``, symmetric with entries in [0, 1].
        iterations (int): number of iterations.
        ridge (float): added to the diagonal.
        backward (str): ``'one_step'``, the authors' gradient, which is that of the inverse and not of its
            truncation; or ``'exact'``, the gradient of what was computed.

    Returns:
        Tensor: ``(..., m, m)`` in float32 or wider, inside autocast too, as of the other inverses here.

    Raises:
        ValueError: for another ``backward``.
    """
    kernel = kernel.to(compute_dtype(kernel))
    if backward == 'one_step':
        return _OneStepNewton.apply(kernel, iterations, ridge)
    if backward == 'exact':
        step = _plain_step(kernel)
        kernel = add_ridge(kernel, ridge)
        return _iterate(kernel, step * kernel, iterations)
    raise ValueError(f"backward={backward!r} of the Newton inverse is unknown; choose 'one_step' or 'exact'")


@without_autocast
def newton_inverse_per_image(kernel, iterations=20):
    """Truncated Newton inverse without a ridge, with one step size for all heads of an image (SOFT++).

    The step size is ``alpha = 2 / (largest row sum)^2``, halved up to ten times while the largest column sum of
    ``|I - alpha A^2|`` exceeds 1.01, both maxima over the heads of one image, so that an image's result does not
    depend on its batch. ``A`` has no negative entry, so the column sums follow from those of ``A^2`` and from its
    diagonal: nothing but vectors is needed to choose ``alpha``, and no decision is taken on the host.

    Args:
        kernel (Tensor): ``A``, ``(B, h, m, m)``, symmetric with entries in [0, 1].
        iterations (int): number of iterations.

    Returns:
        Tensor: ``(B, h, m, m)``, differentiable through the iterations and the step size.
    """
    kernel = kernel.to(compute_dtype(kernel))
    step = 2 / kernel.sum(-1).amax((-2, -1)).square()
    with torch.no_grad():
        halvings = 0.5 ** torch.arange(11, dtype=kernel.dtype, device=kernel.device)
        candidates = (step[:, None] * halvings)[:, :, None, None]
        square_diagonal = kernel.square().sum(-2).unsqueeze(1)
        square_sum = torch.matmul(kernel.sum(-1).unsqueeze(-2), kernel).squeeze(-2).unsqueeze(1)
        column_sum = (1 - candidates * square_diagonal).abs() + candidates * (square_sum - square_diagonal)
        too_large = column_sum.amax((-2, -1)) > 1.01
        # The first candidate that is small enough, else the last one.
        halving = 0.5 ** too_large[:, :-1].to(kernel.dtype).cumprod(1).sum(1)
    return _iterate(kernel, (step * halving)[:, None, None, None] * kernel, iterations)


@without_autocast
def pseudo_inverse(landmarks):
    """Moore-Penrose inverse of the kernel between landmarks, taken in float64 by its singular values: what the other
    inverses approximate, at many times their cost.

    Args:
        landmarks (Tensor): ``(..., m, d)``.

    Returns:
        tuple[Tensor, Tensor]: the inverse and the kernel, each ``(..., m, m)`` in float32 or wider.
    """
    kernel = gaussian_kernel(landmarks.double(), landmarks.double())
    dtype = compute_dtype(landmarks)
    return torch.linalg.pinv(kernel, hermitian=True).to(dtype), kernel.to(dtype)


def safe_ridge(kernel, ridge, square_norm=0.0):
    """The ridge with which ``kernel`` can be factorised in its dtype: ``max(ridge, eps r (8 + 2 s))``, ``r`` its
    largest row sum and ``s`` the largest squared norm of the tokens that it was made of.

    ``r`` bounds the largest eigenvalue, and ``eps r`` is the size of the rounding errors of a factorisation, which
    may make the smallest eigenvalue negative; the exponents of the entries are differences of numbers of the size of
    ``s``, which makes ``2 eps s`` of them uncertain. The rule needs no look at the outcome.

    Args:
        kernel (Tensor): ``(..., m, m)`` with no negative entry.
        ridge (float): the wanted ridge.
        square_norm (float | Tensor): ``s``, a number or ``(...)``. Defaults to 0.

    Returns:
        Tensor: ``(...)``, without gradient.
    """
    with torch.no_grad():
        bound = torch.finfo(kernel.dtype).eps * kernel.sum(-1).amax(-1) * (8 + 2 * square_norm)
        return bound.clamp(min=ridge)


def ridge_matrix(kernel, ridge=0.01, square_norm=0.0):
    """``A + ridge * I``, positive definite in its dtype: the ridge is raised where that asks for it, see
    :func:`safe_ridge`.

    Args:
        kernel (Tensor): ``A``, ``(..., m, m)``, symmetric positive semidefinite with entries in [0, 1].
        ridge (float): added to the diagonal, positive.
        square_norm (float | Tensor): see :func:`safe_ridge`. Defaults to 0.

    Returns:
        Tensor: ``(..., m, m)`` in float32 or wider.
    """
    kernel = kernel.to(compute_dtype(kernel))
    return add_ridge(kernel, safe_ridge(kernel, ridge, square_norm)[..., None, None])
