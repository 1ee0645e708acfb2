"""The product ``P M (P^T v)`` in chunks of tokens, forward and backward. ``P = g(q, l)`` is never held whole."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernel import compute_dtype, gaussian_kernel, without_autocast
from .recording import is_compiling, needs_standard_operators

# Number of entries of P per chunk. On a CPU, a chunk should fit in the cache. An accelerator needs large products to be
# fast: 2^24 entries in float32 are 64 MiB.
_CHUNK_ENTRIES = {'cpu': 2**19}
_ACCELERATOR_ENTRIES = 2**24


def chunk_slices(q: Tensor, landmarks: Tensor) -> list[slice]:
    """Return slices that split the tokens into chunks of nearly equal size.

    Args:
        q (Tensor): Queries ``(B, h, n, d)``.
        landmarks (Tensor): ``(B, h, m, d)``.

    Returns:
        list[slice]: Slices of the ``n`` tokens. The chunk size depends on the device type.
    """
    tokens, entries = q.shape[-2], q.shape[:-1].numel() * landmarks.shape[-2]
    count = min(-(-entries // _CHUNK_ENTRIES.get(q.device.type, _ACCELERATOR_ENTRIES)), tokens)
    return [slice(i * tokens // count, (i + 1) * tokens // count) for i in range(count)]


def _append_ones(tokens: Tensor) -> Tensor:
    return torch.cat([tokens, tokens.new_ones(*tokens.shape[:-1], 1)], dim=-1)


def _empty_tokens(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an empty tensor ``(B, h, n, d)`` in which the heads of a token are adjacent in memory."""
    B, heads, n, d = like.shape
    return torch.empty(B, n, heads, d, dtype=dtype, device=like.device).transpose(1, 2)


def _forward(q: Tensor, landmarks: Tensor, v: Tensor, matrix: Tensor, inverted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``P M G``, ``G = P^T v`` and ``M G``. With ``inverted``, ``matrix`` is the Cholesky factor of ``M^-1``."""
    dtype = landmarks.dtype
    chunks = chunk_slices(q, landmarks)
    gathered = landmarks.new_zeros(*landmarks.shape[:-1], v.shape[-1])
    for chunk in chunks:
        cross = gaussian_kernel(q[:, :, chunk].to(dtype), landmarks)
        gathered += torch.matmul(cross.transpose(-2, -1), v[:, :, chunk].to(dtype))
    weights = torch.cholesky_solve(gathered, matrix) if inverted else torch.matmul(matrix, gathered)
    out = _empty_tokens(v, v.dtype)
    for chunk in chunks:
        if len(chunks) > 1:
            cross = gaussian_kernel(q[:, :, chunk].to(dtype), landmarks)
        out[:, :, chunk] = torch.matmul(cross, weights)
    return out, gathered, weights


def _forward_shapes(q: Tensor, landmarks: Tensor, v: Tensor, matrix: Tensor, inverted: bool) -> tuple[Tensor, ...]:
    gathered = landmarks.new_empty(*landmarks.shape[:-1], v.shape[-1])
    weights = gathered.mT.contiguous().mT if inverted else torch.empty_like(gathered)
    return _empty_tokens(v, v.dtype), gathered, weights


def _backward(
    grad: Tensor,
    q: Tensor,
    landmarks: Tensor,
    v: Tensor,
    matrix: Tensor,
    gathered: Tensor,
    weights: Tensor,
    inverted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of ``q``, ``landmarks``, ``v`` and ``M`` (with ``inverted``: ``M^-1``)."""
    dtype = landmarks.dtype
    chunks = chunk_slices(q, landmarks)
    grad_weights = torch.zeros_like(weights)
    for chunk in chunks:
        cross = gaussian_kernel(q[:, :, chunk].to(dtype), landmarks)
        grad_weights += torch.matmul(cross.transpose(-2, -1), grad[:, :, chunk].to(dtype))
    if inverted:
        grad_gathered = torch.cholesky_solve(grad_weights, matrix)
        grad_matrix = -torch.matmul(grad_gathered, weights.transpose(-2, -1))
    else:
        grad_gathered = torch.matmul(matrix.transpose(-2, -1), grad_weights)
        grad_matrix = torch.matmul(grad_weights, gathered.transpose(-2, -1))
    both = torch.cat([weights, grad_gathered], dim=-1).transpose(-2, -1)
    landmarks_and_one = _append_ones(landmarks)
    grad_q, grad_v = _empty_tokens(q, q.dtype), _empty_tokens(v, v.dtype)
    sums = torch.zeros_like(landmarks_and_one)
    for chunk in chunks:
        tokens, values = q[:, :, chunk].to(dtype), v[:, :, chunk].to(dtype)
        if len(chunks) > 1:
            cross = gaussian_kernel(tokens, landmarks)
        grad_v[:, :, chunk] = torch.matmul(cross, grad_gathered)
        outer = torch.matmul(torch.cat([grad[:, :, chunk].to(dtype), values], dim=-1), both).mul_(cross)
        pulls = torch.matmul(outer, landmarks_and_one)
        grad_q[:, :, chunk] = pulls[..., :-1] - pulls[..., -1:] * tokens
        sums += torch.matmul(outer.transpose(-2, -1), _append_ones(tokens))
    grad_landmarks = sums[..., :-1] - sums[..., -1:] * landmarks
    return grad_q, grad_landmarks, grad_v, grad_matrix


def _backward_shapes(grad: Tensor, q: Tensor, landmarks: Tensor, v: Tensor, matrix: Tensor, *rest: Any) -> Any:
    grads = [tensor.new_empty(tensor.shape) for tensor in (landmarks, matrix)]
    return _empty_tokens(q, q.dtype), grads[0], _empty_tokens(v, v.dtype), grads[1]


def _compiled(function: Callable[..., Any], shapes: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``function`` as a custom operator, because ``torch.compile`` would otherwise unroll its loops."""
    # PyTorch before 2.4 has no `custom_op`.
    if not hasattr(torch.library, 'custom_op'):
        return function
    operator = torch.library.custom_op(f'soft_mm::blockwise{function.__name__}', function, mutates_args=())
    operator.register_fake(shapes)
    return lambda *args: (operator if is_compiling() else function)(*args)


_FORWARD = _compiled(_forward, _forward_shapes)
_BACKWARD = _compiled(_backward, _backward_shapes)


class _BlockwiseAttention(torch.autograd.Function):
    """The product ``P M (P^T v)``, where ``M`` is given or is the inverse of a given matrix.

    The backward pass recomputes ``P``, one chunk at a time, so it holds its inputs, its outputs and one chunk. With
    ``G = P^T v``, ``W = M G`` and the incoming gradient ``dO``: ``dW = P^T dO``, ``dG = M^T dW`` and
    ``dP = dO W^T + v dG^T``. The exponents ``E_ij = -||q_i - l_j||^2 / 2`` have the gradient ``dE = dP * P``, so
    ``dq_i = sum_j dE_ij (l_j - q_i)`` and ``dl_j = sum_i dE_ij (q_i - l_j)``.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, landmarks: Tensor, v: Tensor, matrix: Tensor, inverted: bool) -> Tensor:
        if inverted:
            matrix, _ = torch.linalg.cholesky_ex(matrix)
        out, gathered, weights = _FORWARD(q, landmarks, v, matrix, inverted)
        ctx.save_for_backward(q, landmarks, v, matrix, gathered, weights)
        ctx.inverted = inverted
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            return (*_BACKWARD(grad, *ctx.saved_tensors, ctx.inverted), None)


@without_autocast
def whole_attention(
    q: Tensor, landmarks: Tensor, v: Tensor, matrix: Tensor, inverted: bool = False, present: Tensor | None = None
) -> Tensor:
    """Compute ``P M (P^T v)`` in standard operators, for exports, traces and transforms. ``P`` is held whole.

    Args:
        q (Tensor): Scaled queries ``(B, h, n, d)``.
        landmarks (Tensor): ``(B, h, m, d)``.
        v (Tensor): Values ``(B, h, n, d_v)``.
        matrix (Tensor): See :func:`blockwise_attention`.
        inverted (bool): See :func:`blockwise_attention`. Defaults to False.
        present (Tensor | None): Mask of the slots that hold a landmark, see :func:`~soft_mm.ops.pool_to_slots`.
            Defaults to None: all.

    Returns:
        Tensor: ``(B, h, n, d_v)`` in the dtype of ``v``.
    """
    cross = gaussian_kernel(q, landmarks)
    if present is not None:
        cross = cross * present
    gathered = torch.matmul(cross.transpose(-2, -1), v.to(cross.dtype))
    if inverted:
        weights = torch.cholesky_solve(gathered, torch.linalg.cholesky_ex(matrix)[0])
    else:
        weights = torch.matmul(matrix, gathered)
    return torch.matmul(cross, weights).to(v.dtype)


@without_autocast
def blockwise_attention(q: Tensor, landmarks: Tensor, v: Tensor, matrix: Tensor, inverted: bool = False) -> Tensor:
    """Compute ``P M (P^T v)`` with ``P = g(q, l)``. The memory grows with ``n d + m^2``, not with ``n m``.

    The product is evaluated from right to left, so that nothing of size ``n x n`` is formed (SOFT, section 3.2). Each
    product with ``P`` takes ``n m d`` multiply-adds.

    Args:
        q (Tensor): Scaled queries ``(B, h, n, d)``.
        landmarks (Tensor): ``(B, h, m, d)``.
        v (Tensor): Values ``(B, h, n, d_v)``.
        matrix (Tensor): ``(B, h, m, m)``: ``M``, or with ``inverted`` its inverse. The inverse must be symmetric
            positive definite. Its gradient is correct for symmetric changes of the matrix only.
        inverted (bool): Whether ``matrix`` is the inverse of ``M``. Defaults to False.

    Returns:
        Tensor: ``(B, h, n, d_v)`` in the dtype of ``v``, computed in float32 or wider. Second derivatives are not
        supported.
    """
    dtype = compute_dtype(q)
    if needs_standard_operators():
        return whole_attention(q, landmarks.to(dtype), v, matrix.to(dtype), inverted)
    return _BlockwiseAttention.apply(q, landmarks.to(dtype), v, matrix.to(dtype), inverted)
