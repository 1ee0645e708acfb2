"""Softmax-free attention over landmarks, and its local branch."""

import torch
import torch.nn.functional as F

from .inverse import newton_inverse, newton_inverse_per_image, ridge_solve
from .kernel import gaussian_kernel, without_autocast

SOLVERS = ('newton', 'cholesky')
NEWTON_BACKWARDS = ('one_step', 'exact')


def check_solver(solver, newton_iterations, newton_backward):
    """Raise a ``ValueError`` that names what is allowed if an option of the inverse is not."""
    if solver not in SOLVERS:
        raise ValueError(f'solver={solver!r} is unknown; choose one of {SOLVERS}')
    if newton_backward not in NEWTON_BACKWARDS:
        raise ValueError(f'newton_backward={newton_backward!r} is unknown; choose one of {NEWTON_BACKWARDS}')
    if not isinstance(newton_iterations, int) or isinstance(newton_iterations, bool) or newton_iterations < 1:
        raise ValueError(f'newton_iterations={newton_iterations!r} must be a whole number from 1 up')


def softmax_free_attention(
    q,
    landmarks,
    v,
    solver='newton',
    newton_iterations=20,
    newton_backward='one_step',
    ridge=0.01,
):
    """Plain attention ``P (A_inv (P^T v))`` with ``P = g(q, l)`` and ``A = g(l, l)`` (SOFT, section 3.2).

    The products are taken from the right, ``n m d`` multiply-adds each: nothing of size ``n x n`` is formed and
    nothing of size ``n x m`` meets one of size ``m x m``.

    Args:
        q (Tensor): queries, which are the keys too, already divided by ``d^(1/4)``, ``(B, h, n, d)``.
        landmarks (Tensor): ``(B, h, m, d)``.
        v (Tensor): values ``(B, h, n, d_v)``.
        solver (str): ``'newton'``, the authors' truncated iterations on ``A + ridge * I``, or ``'cholesky'``, its
            inverse.
        newton_iterations (int): see :func:`~soft_mm.ops.newton_inverse`.
        newton_backward (str): see :func:`~soft_mm.ops.newton_inverse`.
        ridge (float): see there.

    Returns:
        Tensor: ``(B, h, n, d_v)`` in the dtype of ``v``; computed in float32 or wider.

    Raises:
        ValueError: for an unknown ``solver`` or ``newton_backward``, or fewer than one iteration.
    """
    check_solver(solver, newton_iterations, newton_backward)

    def apply_inverse(kernel, right):
        if solver == 'cholesky':
            return ridge_solve(kernel, right, ridge)
        return newton_inverse(kernel, newton_iterations, ridge, newton_backward) @ right

    return _attend(q, landmarks, v, apply_inverse)


def normalized_softmax_free_attention(
    q,
    landmarks,
    v,
    solver='newton',
    newton_iterations=20,
    ridge=0.01,
    degree_scale=1.0,
):
    """Normalised attention ``P (D^-1/2 A_inv D^-1/2 (P^T v))`` with ``D = diag(A 1)`` (SOFT++, attention
    normalisation).

    Args:
        q (Tensor): as in :func:`softmax_free_attention`.
        landmarks (Tensor): ``(B, h, m, d)``.
        v (Tensor): ``(B, h, n, d_v)``.
        solver (str): ``'newton'``, the authors' truncated iterations without a ridge and with one step size per
            image, or ``'cholesky'``, the inverse of ``A + ridge * I``.
        newton_iterations (int): number of iterations of ``'newton'``, which is differentiated through.
        ridge (float): of ``'cholesky'``.
        degree_scale (float): multiplies ``D``: how many landmarks each of the given ones stands for.

    Returns:
        Tensor: ``(B, h, n, d_v)`` in the dtype of ``v``; computed in float32 or wider.

    Raises:
        ValueError: for an unknown ``solver`` or fewer than one iteration.
    """
    check_solver(solver, newton_iterations, NEWTON_BACKWARDS[0])

    def apply_inverse(kernel, right):
        scale = (degree_scale * kernel.sum(-1, keepdim=True)).rsqrt()
        if solver == 'cholesky':
            return scale * ridge_solve(kernel, scale * right, ridge)
        return scale * (newton_inverse_per_image(kernel, newton_iterations) @ (scale * right))

    return _attend(q, landmarks, v, apply_inverse)


@without_autocast
def _attend(q, landmarks, v, apply_inverse):
    cross = gaussian_kernel(q, landmarks)
    gathered = torch.matmul(cross.transpose(-2, -1), v.to(cross.dtype))
    return torch.matmul(cross, apply_inverse(gaussian_kernel(landmarks, landmarks), gathered)).to(v.dtype)


def local_branch(v, grid, weight):
    """Depthwise convolution of the values, one filter per head shared by the head's channels (the authors' code).

    Args:
        v (Tensor): values as tokens ``(B, n, C)``, the channels of a head side by side.
        grid (tuple[int, int]): ``(H, W)`` with ``n = H * W``.
        weight (Tensor): ``(h, 1, c, c)`` with ``c`` odd.

    Returns:
        Tensor: ``(B, n, C)``.
    """
    B, n, C = v.shape
    maps = v.transpose(1, 2).reshape(B, C, *grid)
    filters = weight.repeat_interleave(C // weight.shape[0], dim=0)
    return F.conv2d(maps, filters, padding=weight.shape[-1] // 2, groups=C).flatten(2).transpose(1, 2)
