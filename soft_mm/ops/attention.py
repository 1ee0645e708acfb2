"""Softmax-free attention over landmarks, and its local branch."""

import torch
from torch import Tensor, nn

from .blockwise import blockwise_attention
from .checks import check_choice, check_integer, check_positive
from .inverse import (
    NEWTON_BACKWARDS,
    converged_newton_inverse,
    newton_inverse,
    newton_inverse_per_image,
    pseudo_inverse,
    ridge_matrix,
    scales_to_converge,
    with_identity,
)
from .kernel import compute_dtype, gaussian_kernel

SOLVERS = ('newton', 'cholesky', 'svd')
# The entries of A are at most 1, and float32 rounds them away next to a much larger ridge.
MAX_RIDGE = 1000
_DEFAULTS = dict(newton_iterations=20, newton_backward='one_step', ridge=0.01)


def check_solver(solver: str, normalized: bool = False, **options: object) -> None:
    """Check the options of the inverse. Options without effect on the chosen solver must keep their defaults.

    Args:
        solver (str): ``'newton'``, ``'cholesky'`` or ``'svd'``.
        normalized (bool): Whether the attention is normalised. Defaults to False.
        **options: ``newton_iterations``, ``newton_backward`` and ``ridge``, see :func:`softmax_free_attention`.

    Raises:
        ValueError: If an option is out of its range, or has no effect and differs from its default.
    """
    check_choice('solver', solver, SOLVERS)
    options = {**_DEFAULTS, **options}
    check_integer('newton_iterations', options['newton_iterations'])
    check_choice('newton_backward', options['newton_backward'], NEWTON_BACKWARDS)
    check_positive('ridge', options['ridge'], MAX_RIDGE)
    plain = solver == 'newton' and not normalized
    used = dict(newton_iterations=solver == 'newton', newton_backward=plain, ridge=plain or solver == 'cholesky')
    for name, value in options.items():
        if not used[name] and value != _DEFAULTS[name]:
            raise ValueError(
                f'{name}={value!r} has no effect with solver={solver!r}, normalized={normalized}: leave it out, or '
                f'set {name}={_DEFAULTS[name]!r}'
            )


def _kernel_and_ridge_matrix(landmarks: Tensor, ridge: float, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return ``A`` and ``A + ridge * I``. The latter is positive definite even after rounding."""
    landmarks = landmarks.to(compute_dtype(landmarks))
    # Centring does not change distances, and it reduces their rounding errors.
    if present is None:
        landmarks = landmarks - landmarks.mean(-2, keepdim=True)
    else:
        mask = present.unsqueeze(-1)
        mean = (landmarks * mask).sum(-2, keepdim=True) / mask.sum(-2, keepdim=True).clamp(min=1)
        landmarks = (landmarks - mean) * mask
    kernel = _landmark_kernel(landmarks, present)
    return kernel, ridge_matrix(kernel, ridge, landmarks.detach().square().sum(-1).amax(-1))


def _landmark_kernel(landmarks: Tensor, present: Tensor | None) -> Tensor:
    """Return ``A``. Slots without a landmark get the rows and columns of the identity, so they change no other slot."""
    kernel = gaussian_kernel(landmarks, landmarks)
    return kernel if present is None else with_identity(kernel, present)


def _degree_roots(kernel: Tensor, degree_scale: float | Tensor) -> Tensor:
    root = (degree_scale * kernel.sum(-1, keepdim=True)).sqrt()
    return root * root.transpose(-2, -1)


def middle_matrix(
    landmarks: Tensor,
    normalized: bool = False,
    solver: str = 'newton',
    newton_iterations: int = 20,
    newton_backward: str = 'one_step',
    ridge: float = 0.01,
    degree_scale: float | Tensor = 1.0,
    present: Tensor | None = None,
) -> tuple[Tensor, bool]:
    """Compute the matrix ``M`` of the attention ``P M (P^T v)`` from the landmarks.

    ``M`` is ``A_inv``, or with ``normalized`` ``D^-1/2 A_inv D^-1/2`` with ``D = degree_scale * diag(A 1)``.

    Args:
        landmarks (Tensor): ``(B, h, m, d)``.
        normalized (bool): Normalise as SOFT++ does. Defaults to False.
        solver (str): See :func:`softmax_free_attention` and :func:`normalized_softmax_free_attention`.
        newton_iterations (int): Number of iterations of ``'newton'``. Defaults to 20.
        newton_backward (str): See :func:`~soft_mm.ops.newton_inverse`. Defaults to ``'one_step'``.
        ridge (float): Added to the diagonal of ``A``, by ``'cholesky'`` and plain ``'newton'`` only. Defaults to 0.01.
        degree_scale (float | Tensor): Factor of the degrees, used with ``normalized`` only: a number, or one per image,
            ``(B, 1, 1, 1)``. Defaults to 1.
        present (Tensor | None): Ones and zeros, ``(m,)`` or ``(B, 1, m)``: which slots hold a landmark. The others
            become rows and columns of the identity in ``A``, whatever they hold, as long as it is finite. Defaults to
            None: all.

    Returns:
        tuple[Tensor, bool]: A matrix ``(B, h, m, m)`` in float32 or wider, and the flag ``inverted``: False if the
        matrix is ``M``, True if it is the inverse of ``M`` (with ``'cholesky'``). Pass both to
        :func:`~soft_mm.ops.blockwise_attention`.

    Raises:
        ValueError: See :func:`check_solver`.
    """
    check_solver(solver, normalized, newton_iterations=newton_iterations, newton_backward=newton_backward, ridge=ridge)
    if present is not None:
        present = present.to(compute_dtype(landmarks))
    if solver == 'cholesky':
        kernel, matrix = _kernel_and_ridge_matrix(landmarks, ridge, present)
        if torch.onnx.is_in_onnx_export():
            scales = scales_to_converge(landmarks.shape[-2], ridge)
            inverse = converged_newton_inverse(matrix, ridge, scales)
            return (inverse / _degree_roots(kernel, degree_scale) if normalized else inverse), False
        return (matrix * _degree_roots(kernel, degree_scale) if normalized else matrix), True
    if solver == 'svd':
        inverse, kernel = pseudo_inverse(landmarks, present)
    else:
        kernel = _landmark_kernel(landmarks, present)
        if normalized:
            inverse = newton_inverse_per_image(kernel, newton_iterations)
        else:
            inverse = newton_inverse(kernel, newton_iterations, ridge, newton_backward)
    return (inverse / _degree_roots(kernel, degree_scale) if normalized else inverse), False


def softmax_free_attention(
    q: Tensor,
    landmarks: Tensor,
    v: Tensor,
    solver: str = 'newton',
    newton_iterations: int = 20,
    newton_backward: str = 'one_step',
    ridge: float = 0.01,
    k: Tensor | None = None,
) -> Tensor:
    """Compute plain attention ``P_q (A_inv (P_k^T v))`` with ``P_q = g(q, l)`` and ``A = g(l, l)`` (SOFT, section 3.2).

    It approximates ``g(q, k) v``, and equals it if the landmarks are the keys or the queries and the inverse is exact.
    ``P_q`` and ``P_k`` are formed in chunks of tokens (:mod:`soft_mm.ops.blockwise`). Nothing of size ``n x n_k`` or
    ``n x m`` is held.

    Args:
        q (Tensor): Scaled queries ``(B, h, n, d)``.
        landmarks (Tensor): ``(B, h, m, d)``.
        v (Tensor): Values ``(B, h, n_k, d_v)``, one for each key.
        solver (str): ``'newton'``: the authors' truncated iterations on ``A + ridge * I``. ``'cholesky'``: the inverse
            of ``A + ridge * I``. ``'svd'``: the exact pseudo-inverse of ``A``, slow. Defaults to ``'newton'``.
        newton_iterations (int): See :func:`~soft_mm.ops.newton_inverse`. Defaults to 20.
        newton_backward (str): See :func:`~soft_mm.ops.newton_inverse`. Defaults to ``'one_step'``.
        ridge (float): Added to the diagonal of ``A`` by ``'newton'`` and ``'cholesky'``. Defaults to 0.01.
        k (Tensor | None): Scaled keys ``(B, h, n_k, d)``, for attention between two sets of tokens. Defaults to None:
            the queries, as in SOFT.

    Returns:
        Tensor: ``(B, h, n, d_v)`` in the dtype of ``v``, computed in float32 or wider.

    Raises:
        ValueError: If an option is out of its range, or has no effect with this solver and differs from its default,
            or if there is not one value for each key.
    """
    matrix = middle_matrix(
        landmarks,
        normalized=False,
        solver=solver,
        newton_iterations=newton_iterations,
        newton_backward=newton_backward,
        ridge=ridge,
    )
    return blockwise_attention(q, landmarks, v, *matrix, k=k)


def normalized_softmax_free_attention(
    q: Tensor,
    landmarks: Tensor,
    v: Tensor,
    solver: str = 'newton',
    newton_iterations: int = 20,
    ridge: float = 0.01,
    degree_scale: float = 1.0,
    k: Tensor | None = None,
) -> Tensor:
    """Compute normalised attention ``P_q (D^-1/2 A_inv D^-1/2 (P_k^T v))`` (SOFT++, attention normalisation).

    ``D`` is ``degree_scale * diag(A 1)``.

    Args:
        q (Tensor): As in :func:`softmax_free_attention`.
        landmarks (Tensor): ``(B, h, m, d)``.
        v (Tensor): ``(B, h, n_k, d_v)``.
        solver (str): ``'newton'``: the authors' truncated iterations, without a ridge and with one step size per image;
            the gradient passes through the iterations. ``'cholesky'``: the inverse of ``A + ridge * I``. ``'svd'``: the
            exact pseudo-inverse of ``A``, slow. Defaults to ``'newton'``.
        newton_iterations (int): Number of iterations of ``'newton'``. Defaults to 20.
        ridge (float): Added to the diagonal of ``A`` by ``'cholesky'``. Defaults to 0.01.
        degree_scale (float): Factor of ``D``: the number of landmarks that were averaged to form each given landmark.
            Defaults to 1.
        k (Tensor | None): As in :func:`softmax_free_attention`. Defaults to None: the queries.

    Returns:
        Tensor: ``(B, h, n, d_v)`` in the dtype of ``v``, computed in float32 or wider.

    Raises:
        ValueError: See :func:`softmax_free_attention`.
    """
    matrix = middle_matrix(
        landmarks,
        normalized=True,
        solver=solver,
        newton_iterations=newton_iterations,
        ridge=ridge,
        degree_scale=degree_scale,
    )
    return blockwise_attention(q, landmarks, v, *matrix, k=k)


def local_branch(v: Tensor, grid: tuple[int, int], weight: Tensor) -> Tensor:
    """Convolve the values depthwise with one filter per head, as the authors' code does.

    Args:
        v (Tensor): Values as tokens ``(B, n, C)``. The channels of a head are adjacent.
        grid (tuple[int, int]): ``(H, W)`` with ``n = H * W``. A sequence has the grid ``(1, n)``.
        weight (Tensor): ``(h, 1, c, c)`` with ``c`` odd, or ``(h, 1, 1, c)`` for a sequence.

    Returns:
        Tensor: ``(B, n, C)``.
    """
    channels = v.shape[-1]
    maps = v.unflatten(1, grid).permute(0, 3, 1, 2)
    filters = weight.repeat_interleave(channels // weight.shape[0], dim=0)
    padding = (weight.shape[-2] // 2, weight.shape[-1] // 2)
    out = nn.functional.conv2d(maps, filters, padding=padding, groups=channels)
    return out.permute(0, 2, 3, 1).flatten(1, 2)
