"""Softmax-free attention over landmarks, and its local branch."""

import torch.nn.functional as F

from .blockwise import blockwise_attention
from .inverse import newton_inverse, newton_inverse_per_image, pseudo_inverse, ridge_matrix
from .kernel import compute_dtype, gaussian_kernel

SOLVERS = ('newton', 'cholesky', 'svd')
NEWTON_BACKWARDS = ('one_step', 'exact')


def check_solver(solver, newton_iterations, newton_backward):
    """Raise a ``ValueError`` that names what is allowed if an option of the inverse is not."""
    if solver not in SOLVERS:
        raise ValueError(f'solver={solver!r} is unknown; choose one of {SOLVERS}')
    if newton_backward not in NEWTON_BACKWARDS:
        raise ValueError(f'newton_backward={newton_backward!r} is unknown; choose one of {NEWTON_BACKWARDS}')
    check_count('newton_iterations', newton_iterations)


def check_count(name, value, least=1):
    """Raise a ``ValueError`` that names the option if its value is no whole number from ``least`` up."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f'{name}={value!r} must be a whole number from {least} up')


def _kernel_and_ridge_matrix(landmarks, ridge):
    """``A`` and ``A + ridge * I``, the latter positive definite in its dtype."""
    landmarks = landmarks.to(compute_dtype(landmarks))
    # Distances are the same from any origin, and are rounded least from the mean.
    landmarks = landmarks - landmarks.mean(-2, keepdim=True)
    kernel = gaussian_kernel(landmarks, landmarks)
    return kernel, ridge_matrix(kernel, ridge, landmarks.detach().square().sum(-1).amax(-1))


def _degree_roots(kernel, degree_scale):
    root = (degree_scale * kernel.sum(-1, keepdim=True)).sqrt()
    return root * root.transpose(-2, -1)


def softmax_free_attention(
    q,
    landmarks,
    v,
    solver='newton',
    newton_iterations=20,
    newton_backward='one_step',
    ridge=0.01,
    scale=1.0,
):
    """Plain attention ``P (A_inv (P^T v))`` with ``P = g(q, l)`` and ``A = g(l, l)`` (SOFT, section 3.2).

    The products are taken from the right, ``n m d`` multiply-adds each, and ``P`` is formed a block of tokens at a
    time: nothing of size ``n x n`` or ``n x m`` is held, see :mod:`soft_mm.ops.blockwise`.

    Args:
        q (Tensor): queries, which are the keys too, ``(B, h, n, d)``.
        landmarks (Tensor): ``(B, h, m, d)``.
        v (Tensor): values ``(B, h, n, d_v)``.
        solver (str): ``'newton'``, the authors' truncated iterations on ``A + ridge * I``; ``'cholesky'``, its
            inverse; or ``'svd'``, the pseudo-inverse of ``A``, the exact yardstick.
        newton_iterations (int): see :func:`~soft_mm.ops.newton_inverse`.
        newton_backward (str): see :func:`~soft_mm.ops.newton_inverse`.
        ridge (float): see there.
        scale (float): multiplies the queries: ``d^(-1/4)`` where they come as projected. Defaults to 1.

    Returns:
        Tensor: ``(B, h, n, d_v)`` in the dtype of ``v``; computed in float32 or wider.

    Raises:
        ValueError: for an unknown ``solver`` or ``newton_backward``, or fewer than one iteration.
    """
    check_solver(solver, newton_iterations, newton_backward)
    if solver == 'cholesky':
        return blockwise_attention(q, landmarks, v, _kernel_and_ridge_matrix(landmarks, ridge)[1], True, scale)
    if solver == 'svd':
        return blockwise_attention(q, landmarks, v, pseudo_inverse(landmarks)[0], scale=scale)
    kernel = gaussian_kernel(landmarks, landmarks)
    inverse = newton_inverse(kernel, newton_iterations, ridge, newton_backward)
    return blockwise_attention(q, landmarks, v, inverse, scale=scale)


def normalized_softmax_free_attention(
    q,
    landmarks,
    v,
    solver='newton',
    newton_iterations=20,
    ridge=0.01,
    degree_scale=1.0,
    scale=1.0,
):
    """Normalised attention ``P (D^-1/2 A_inv D^-1/2 (P^T v))`` with ``D = diag(A 1)`` (SOFT++, attention
    normalisation).

    Args:
        q (Tensor): as in :func:`softmax_free_attention`.
        landmarks (Tensor): ``(B, h, m, d)``.
        v (Tensor): ``(B, h, n, d_v)``.
        solver (str): ``'newton'``, the authors' truncated iterations without a ridge and with one step size per
            image; ``'cholesky'``, the inverse of ``A + ridge * I``; or ``'svd'``, the pseudo-inverse of ``A``.
        newton_iterations (int): number of iterations of ``'newton'``, which is differentiated through.
        ridge (float): of ``'cholesky'``.
        degree_scale (float): multiplies ``D``: how many landmarks each of the given ones stands for.
        scale (float): multiplies the queries. Defaults to 1.

    Returns:
        Tensor: ``(B, h, n, d_v)`` in the dtype of ``v``; computed in float32 or wider.

    Raises:
        ValueError: for an unknown ``solver`` or fewer than one iteration.
    """
    check_solver(solver, newton_iterations, NEWTON_BACKWARDS[0])
    if solver == 'cholesky':
        kernel, matrix = _kernel_and_ridge_matrix(landmarks, ridge)
        return blockwise_attention(q, landmarks, v, matrix * _degree_roots(kernel, degree_scale), True, scale)
    if solver == 'svd':
        inverse, kernel = pseudo_inverse(landmarks)
    else:
        kernel = gaussian_kernel(landmarks, landmarks)
        inverse = newton_inverse_per_image(kernel, newton_iterations)
    inverse = inverse / _degree_roots(kernel, degree_scale)
    return blockwise_attention(q, landmarks, v, inverse, scale=scale)


def local_branch(v, grid, weight):
    """Depthwise convolution of the values, one filter per head shared by the head's channels (the authors' code).

    Args:
        v (Tensor): values as tokens ``(B, n, C)``, the channels of a head side by side.
        grid (tuple[int, int]): ``(H, W)`` with ``n = H * W``.
        weight (Tensor): ``(h, 1, c, c)`` with ``c`` odd, ``(h, 1, 1, c)`` for a sequence, whose grid is ``(1, n)``.

    Returns:
        Tensor: ``(B, n, C)``.
    """
    channels = v.shape[-1]
    maps = v.unflatten(1, grid).permute(0, 3, 1, 2)
    filters = weight.repeat_interleave(channels // weight.shape[0], dim=0)
    padding = (weight.shape[-2] // 2, weight.shape[-1] // 2)
    out = F.conv2d(maps, filters, padding=padding, groups=channels)
    return out.permute(0, 2, 3, 1).flatten(1, 2)
