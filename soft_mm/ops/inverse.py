"""Inverses of the landmark kernel ``A``: truncated Newton, ridge (by Cholesky) and exact (pseudo-inverse)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_choice
from .kernel import compute_dtype, gaussian_kernel, no_autocast, product_dtype, without_autocast
from .recording import is_batch_of_gradients, is_recorded, is_tracing, needs_standard_operators

NEWTON_BACKWARDS = ('one_step', 'exact')
# Below 2, so that rounding cannot lift an eigenvalue to 2.
_START = 1.999


def add_ridge(kernel: Tensor, ridge: float | Tensor) -> Tensor:
    """Compute ``kernel + ridge * I``.

    Args:
        kernel (Tensor): ``(..., m, m)``.
        ridge (float | Tensor): Number, or tensor ``(..., 1, 1)``.

    Returns:
        Tensor: ``(..., m, m)``.
    """
    return kernel + ridge * torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)


def with_identity(kernel: Tensor, present: Tensor) -> Tensor:
    """Replace the rows and columns of absent landmarks by rows and columns of the identity.

    The inverse of the result is the inverse of the kernel of the present landmarks, next to an identity.

    Args:
        kernel (Tensor): ``A``, ``(B, h, m, m)``.
        present (Tensor): Ones and zeros in the dtype of ``kernel``, ``(m,)`` or ``(B, 1, m)``.

    Returns:
        Tensor: ``(B, h, m, m)``.
    """
    rows, columns = present.unsqueeze(-1), present.unsqueeze(-2)
    return kernel * (rows * columns) + torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device) * (
        1 - rows
    )


def _iterate(kernel: Tensor, inverse: Tensor, iterations: int) -> Tensor:
    """Iterate ``V <- 2V - V A V`` from a symmetric ``V`` that commutes with the symmetric ``A``."""
    shape = kernel.shape
    kernel, inverse = (matrix.reshape(-1, *shape[-2:]) for matrix in (kernel, inverse))
    if not needs_standard_operators():
        return _ExactNewton.apply(kernel, inverse, iterations).view(shape)
    for _ in range(iterations):
        product = torch.bmm(inverse, kernel)
        if is_tracing():
            # mmengine counts the multiply-adds in a trace. It does not know baddbmm.
            inverse = 2 * inverse - torch.bmm(product, inverse)
        else:
            inverse = torch.baddbmm(inverse, product, inverse, beta=2, alpha=-1)
    return inverse.view(shape)


def _norms(matrices: Tensor) -> Tensor:
    """Return the Frobenius norm of each matrix, computed so that the squares of small entries do not vanish."""
    largest = matrices.abs().amax((-2, -1), keepdim=True)
    return largest.flatten() * (matrices / largest.clamp(min=torch.finfo(matrices.dtype).tiny)).flatten(1).norm(dim=1)


class _ExactNewton(torch.autograd.Function):
    """Newton iterations ``V <- 2V - V A V`` with their exact gradient, for a symmetric start that commutes with ``A``.

    Every ``V`` then is symmetric and commutes with ``A``, so only the symmetric part ``G`` of the gradient of a ``V``
    matters. One iteration adds ``-V G V`` to the gradient of ``A``, and the gradient of its input is
    ``2G - G P - (G P)^T`` with ``P = V A``. These are three products instead of autograd's four.

    After convergence ``P = I`` up to rounding, so the last iterations reduce ``G`` to its rounding error. The others at
    most double its Frobenius norm, because the eigenvalues of ``P`` lie in [0, 2]. On a CPU the loop ends when the
    terms that remain are of the order of the rounding error. Many would be products of denormal numbers, which are
    slow.
    """

    @staticmethod
    def forward(ctx: Any, kernel: Tensor, inverse: Tensor, iterations: int) -> Tensor:
        saved = []
        for _ in range(iterations):
            product = torch.bmm(inverse, kernel)
            if any(ctx.needs_input_grad):
                saved += [inverse, product]
            inverse = torch.baddbmm(inverse, product, inverse, beta=2, alpha=-1)
        ctx.save_for_backward(*saved)
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        with no_autocast(grad):
            grad = (grad + grad.transpose(-2, -1)) / 2
            grad_kernel = torch.zeros_like(grad)
            # Read once, because gradient checkpointing recomputes them for each access.
            saved = ctx.saved_tensors
            # A GPU would have to wait for the comparison.
            stops = grad.is_cpu and grad.numel() > 0 and not (is_recorded() or is_batch_of_gradients(grad))
            negligible: Any = torch.finfo(grad.dtype).eps * _norms(grad) if stops else None
            # Infinite gradients pass through all iterations.
            stops = stops and bool(negligible.isfinite().all())
            for remaining, inverse, product in zip(range(len(saved) // 2, 0, -1), saved[-2::-2], saved[::-2]):
                if stops and (_norms(grad) <= negligible * 0.5**remaining).all():
                    break
                grad_kernel.baddbmm_(torch.bmm(inverse, grad), inverse, alpha=-1)
                change = torch.bmm(grad, product)
                grad = (2 * grad).sub_(change).sub_(change.transpose(-2, -1))
        return grad_kernel, grad, None


def _plain_step(kernel: Tensor, ridge: float) -> Tensor:
    bound = kernel.sum(-1).amax(-1)[..., None, None]
    # The iterations diverge if the step exceeds 2 / (largest eigenvalue)^2, as 1.8 / bound^2 does with a large ridge.
    return torch.minimum(1.8 / bound.square(), 1.9 / (bound + ridge).square())


class _OneStepNewton(torch.autograd.Function):
    """Newton iterations with the gradient of the true inverse, ``dL/dA = -V^T (dL/dV) V^T``."""

    @staticmethod
    def forward(ctx: Any, kernel: Tensor, iterations: int, ridge: float) -> Tensor:
        step = _plain_step(kernel, ridge)
        kernel = add_ridge(kernel, ridge)
        inverse = _iterate(kernel, step * kernel, iterations)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _one_step_gradient(grad, *ctx.saved_tensors), None, None


@without_autocast
def _one_step_gradient(grad: Tensor, inverse: Tensor) -> Tensor:
    transposed = inverse.transpose(-2, -1)
    return -transposed @ grad @ transposed


@without_autocast
def newton_inverse(kernel: Tensor, iterations: int = 20, ridge: float = 0.01, backward: str = 'one_step') -> Tensor:
    """Compute the truncated Newton inverse of each matrix plus a ridge (SOFT, section 3.2).

    ``V_0 = alpha A'`` with ``A' = A + ridge * I`` and ``alpha = 1.8 / b^2`` for the largest row sum ``b`` of ``A``,
    then ``V <- 2V - V A' V``. The authors' ``alpha`` diverges where the ridge is large next to ``b``. There it is
    ``1.9 / (b + ridge)^2``, which is smaller only if ``ridge > 0.027 b``. If some landmarks are nearly equal, 20
    iterations are too few to converge, and the result differs from the inverse.

    Args:
        kernel (Tensor): ``A``, ``(..., m, m)``, symmetric with entries in [0, 1].
        iterations (int): Number of iterations. Defaults to 20.
        ridge (float): Added to the diagonal. Defaults to 0.01.
        backward (str): ``'one_step'``: the authors' gradient, which is the gradient of the true inverse. ``'exact'``:
            the gradient of the computed result, for symmetric changes of ``A``. Defaults to ``'one_step'``.

    Returns:
        Tensor: ``(..., m, m)`` in float32 or wider, even inside autocast. The exact gradient has no second derivative.

    Raises:
        ValueError: If ``backward`` is unknown.
    """
    check_choice('backward', backward, NEWTON_BACKWARDS)
    dtype, kernel = compute_dtype(kernel), kernel.to(product_dtype(kernel))
    if backward == 'one_step' and not needs_standard_operators():
        return _OneStepNewton.apply(kernel, iterations, ridge).to(dtype)
    step = _plain_step(kernel, ridge)
    matrix = add_ridge(kernel, ridge)
    if backward == 'exact' or torch.onnx.is_in_onnx_export():
        return _iterate(matrix, step * matrix, iterations).to(dtype)
    # An exported program may be trained, even if gradients are disabled now.
    inverse = _iterate(matrix.detach(), (step * matrix).detach(), iterations)
    # The added term is 0. Its gradient is that of the true inverse.
    return (inverse - inverse @ (kernel - kernel.detach()) @ inverse).to(dtype)


@without_autocast
def newton_inverse_per_image(kernel: Tensor, iterations: int = 20) -> Tensor:
    """Compute the truncated Newton inverse without a ridge, with one step size per image (SOFT++).

    The step size is ``alpha = 2 / (largest row sum)^2``. It is halved up to ten times while the largest column sum of
    ``|I - alpha A^2|`` exceeds 1.01. Both maxima are taken over the heads of one image, so the result of an image does
    not depend on the other images of its batch. ``alpha`` is chosen without a host synchronisation.

    ``A^2`` is never formed. Its entries are not negative, so the column sums of ``|I - alpha A^2|`` can be computed
    from its diagonal and its own column sums.

    Args:
        kernel (Tensor): ``A``, ``(B, h, m, m)``, symmetric with entries in [0, 1].
        iterations (int): Number of iterations. Defaults to 20.

    Returns:
        Tensor: ``(B, h, m, m)`` in float32 or wider. The gradient is that of the iterations and the step size, for
        symmetric changes of ``A``. It has no second derivative.
    """
    dtype, kernel = compute_dtype(kernel), kernel.to(product_dtype(kernel))
    step = 2 / kernel.sum(-1).amax((-2, -1)).square()
    with torch.no_grad():
        halvings = 0.5 ** torch.arange(11, dtype=kernel.dtype, device=kernel.device)
        candidates = (step[:, None] * halvings)[:, :, None, None]
        square_diagonal = kernel.square().sum(-2).unsqueeze(1)
        square_sum = torch.matmul(kernel.sum(-1).unsqueeze(-2), kernel).squeeze(-2).unsqueeze(1)
        column_sum = (1 - candidates * square_diagonal).abs() + candidates * (square_sum - square_diagonal)
        too_large = column_sum.amax((-2, -1)) > 1.01
        # The first candidate within the bound, or the last one if none is.
        # A cumulative sum, because ONNX has no cumulative product. It has integers, because CUDA sums other numbers in
        # no fixed order.
        before = (~too_large[:, :-1]).long().cumsum(1) == 0
        halving = 0.5 ** before.to(kernel.dtype).sum(1)
    return _iterate(kernel, (step * halving)[:, None, None, None] * kernel, iterations).to(dtype)


@without_autocast
def pseudo_inverse(landmarks: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute the Moore-Penrose inverse of the landmark kernel in float64 from its singular values.

    It is the exact reference for the other inverses, and many times slower.

    Args:
        landmarks (Tensor): ``(..., m, d)``.
        present (Tensor | None): See :func:`with_identity`. Defaults to None: all.

    Returns:
        tuple[Tensor, Tensor]: Inverse and kernel, each ``(..., m, m)`` in float32 or wider.
    """
    kernel = gaussian_kernel(landmarks.double(), landmarks.double())
    if present is not None:
        kernel = with_identity(kernel, present.double())
    dtype = compute_dtype(landmarks)
    # The decomposition of a matrix with NaN raises an error, also for the other matrices of the batch.
    finite = kernel.isfinite().all(-1).all(-1)[..., None, None]
    inverse = torch.linalg.pinv(torch.where(finite, kernel, 0), hermitian=True)
    return torch.where(finite, inverse, torch.nan).to(dtype), kernel.to(dtype)


@without_autocast
def converged_newton_inverse(matrix: Tensor, ridge: float, scales: Sequence[float]) -> Tensor:
    """Compute the inverse of ``A + ridge * I`` by Newton iterations to convergence, for ONNX, which has no Cholesky.

    The iterations start at ``V = alpha I`` with ``alpha = 1.999 / (largest row sum + ridge)``, not at a multiple of the
    matrix, whose condition number would be squared. Each result is multiplied by a scale, which saves iterations
    (Pan and Schreiber, SIAM J. Sci. Stat. Comput. 12(5), 1991).

    Args:
        matrix (Tensor): ``A + ridge * I``, ``(..., m, m)``, symmetric positive definite without negative entries.
        ridge (float): Lower bound of the smallest eigenvalue.
        scales (Sequence[float]): One scale per iteration, see :func:`scales_to_converge`.

    Returns:
        Tensor: ``(..., m, m)``.
    """
    shape = matrix.shape
    start = _START / (matrix.sum(-1).amax(-1)[..., None, None] + ridge)
    inverse = (start * torch.eye(shape[-1], dtype=matrix.dtype, device=matrix.device)).reshape(-1, *shape[-2:])
    matrix = matrix.reshape(-1, *shape[-2:])
    for scale in scales:
        inverse = torch.baddbmm(inverse, torch.bmm(inverse, matrix), inverse, beta=2 * scale, alpha=-scale)
    return inverse.view(shape)


def scales_to_converge(count: int, ridge: float) -> list[float]:
    """Return the scales of the Newton iterations after which the inverse of ``A + ridge * I`` is exact in float32.

    The eigenvalues of ``A`` are from 0 to ``count``, so those of ``V (A + ridge * I)`` are in ``[l, 2 - l]`` with
    ``l = 1.999 ridge / (count + 2 ridge)`` at the start. An iteration maps them to ``[l (2 - l), 1]``, and the scale
    ``2 / (1 + l (2 - l))`` makes this symmetric about 1 again. The scale is limited to 1.54, because an eigenvalue that
    it lifts close to 2 would lose its digits. While ``l`` is small, an iteration triples it.

    If the number of landmarks is a variable of an export, it is taken as 2^20, and there are no scales: over so many
    iterations, they would amplify rounding.

    Args:
        count (int): Number of landmarks ``m``.
        ridge (float): Ridge.

    Returns:
        list[float]: Scales until ``1 - l`` is at most 1e-8, and one more iteration without a scale against rounding.
    """
    known = not isinstance(count, torch.SymInt)
    count = int(count) if known else 2**20
    low, scales = _START * ridge / (count + 2 * ridge), []
    while 1 - low > 1e-8:
        low *= 2 - low
        scale = 2 / (1 + max(low, 0.3)) if known else 1.0
        low = min(scale * low, 2 - scale)
        scales.append(scale)
    return [*scales, 1.0]


def safe_ridge(kernel: Tensor, ridge: float, square_norm: float | Tensor = 0.0) -> Tensor:
    """Return a ridge that is large enough to factorise ``kernel`` in its dtype: ``max(ridge, eps r (8 + 2 s))``.

    Two rounding errors can make the smallest eigenvalue negative. The factorisation has errors of about ``eps r``,
    where ``r`` is the largest row sum, a bound on the largest eigenvalue. The entries have relative errors of about
    ``2 eps s``, where ``s`` is the largest squared norm of the landmarks. The ridge is chosen a priori, without a host
    synchronisation.

    Args:
        kernel (Tensor): ``(..., m, m)`` without negative entries.
        ridge (float): Requested ridge.
        square_norm (float | Tensor): ``s``, a number or ``(...)``. Defaults to 0.

    Returns:
        Tensor: ``(...)``, without gradient.
    """
    with torch.no_grad():
        bound = torch.finfo(kernel.dtype).eps * kernel.sum(-1).amax(-1) * (8 + 2 * square_norm)
        return bound.clamp(min=ridge)


def ridge_matrix(kernel: Tensor, ridge: float = 0.01, square_norm: float | Tensor = 0.0) -> Tensor:
    """Compute ``A + ridge * I`` with a ridge that is increased if rounding requires it, see :func:`safe_ridge`.

    Args:
        kernel (Tensor): ``A``, ``(..., m, m)``, symmetric positive semidefinite with entries in [0, 1].
        ridge (float): Smallest number to add to the diagonal, positive. Defaults to 0.01.
        square_norm (float | Tensor): See :func:`safe_ridge`. Defaults to 0.

    Returns:
        Tensor: ``(..., m, m)`` in float32 or wider, positive definite.
    """
    kernel = kernel.to(compute_dtype(kernel))
    return add_ridge(kernel, safe_ridge(kernel, ridge, square_norm)[..., None, None])
