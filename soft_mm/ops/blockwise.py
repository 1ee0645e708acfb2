"""The product ``P_q M (P_k^T v)`` in chunks of tokens, forward and backward. ``P_q = g(q, l)`` is never held whole.

Self-attention is the case ``k = q``. It computes every chunk of the kernel once for both.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernel import compute_dtype, gaussian_kernel, no_autocast, without_autocast
from .recording import is_batch_of_gradients, is_compiling, needs_standard_operators

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


def _empty_tokens(tokens: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Return an empty tensor ``(B, h, n, channels)`` in which the heads of a token are adjacent in memory."""
    B, heads, n, _ = tokens.shape
    return torch.empty(B, n, heads, channels, dtype=dtype, device=tokens.device).transpose(1, 2)


def _factorise(matrix: Tensor) -> Tensor:
    """Return the Cholesky factor of each matrix, NaN if it is not positive definite, without a host synchronisation."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    succeeded = (failed == 0).to(factor.dtype)[..., None, None]
    # 1 or 0 / 0, because a file of `torch.export` cannot hold a constant NaN.
    return factor * (succeeded / succeeded)


def _gather(tokens: Tensor, landmarks: Tensor, values: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return ``P^T values`` with ``P = g(tokens, landmarks)``, and ``P`` if it is a single chunk."""
    dtype, cross = landmarks.dtype, None
    chunks = chunk_slices(tokens, landmarks)
    gathered = landmarks.new_zeros(*landmarks.shape[:-1], values.shape[-1])
    for chunk in chunks:
        cross = gaussian_kernel(tokens[:, :, chunk].to(dtype), landmarks)
        gathered += torch.matmul(cross.transpose(-2, -1), values[:, :, chunk].to(dtype))
    return gathered, cross if len(chunks) == 1 else None


def _forward(
    q: Tensor,
    landmarks: Tensor,
    v: Tensor,
    matrix: Tensor,
    inverted: bool,
    k: Tensor | None = None,
    present: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``P_q M G``, ``G = P_k^T v`` and ``M G``. ``G`` is 0 at slots that are not ``present``.

    With ``inverted``, ``matrix`` is the Cholesky factor of ``M^-1``.
    """
    gathered, whole = _gather(q if k is None else k, landmarks, v)
    if present is not None:
        gathered *= present.unsqueeze(-1)
    weights = torch.cholesky_solve(gathered, matrix) if inverted else torch.matmul(matrix, gathered)
    out = _empty_tokens(q, v.shape[-1], v.dtype)
    for chunk in chunk_slices(q, landmarks):
        # The kernel of the keys is also that of the queries.
        shared = whole if k is None else None
        cross = gaussian_kernel(q[:, :, chunk].to(landmarks.dtype), landmarks) if shared is None else shared
        out[:, :, chunk] = torch.matmul(cross, weights)
    return out, gathered, weights


def _forward_shapes(
    q: Tensor, landmarks: Tensor, v: Tensor, matrix: Tensor, inverted: bool, *optional: Tensor | None
) -> tuple[Tensor, ...]:
    gathered = landmarks.new_empty(*landmarks.shape[:-1], v.shape[-1])
    weights = gathered.mT.contiguous().mT if inverted else torch.empty_like(gathered)
    return _empty_tokens(q, v.shape[-1], v.dtype), gathered, weights


def _pull(
    tokens: Tensor, landmarks: Tensor, left: list[Tensor], right: list[Tensor], whole: Tensor | None, spread: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients that pass through the exponents of ``P = g(tokens, landmarks)``, one chunk at a time.

    Args:
        tokens (Tensor): ``(B, h, n, d)``.
        landmarks (Tensor): ``(B, h, m, d)``.
        left (list[Tensor]): Tensors ``L`` of the tokens, ``(B, h, n, c)`` each.
        right (list[Tensor]): Tensors ``R`` of the landmarks, ``(B, h, m, c)`` each. The gradient of ``P`` is the sum
            of all ``L R^T``.
        whole (Tensor | None): ``P``, if it is a single chunk and known.
        spread (bool): Whether to compute the third output.

    Returns:
        tuple[Tensor, Tensor, Tensor]: Gradient of the tokens; the sums ``(dE^T tokens, dE^T 1)`` over the tokens,
        ``(B, h, m, d + 1)``; ``P R`` of the last ``R``, in the dtype of the last ``L``, or an empty tensor.
    """
    dtype = landmarks.dtype
    both = torch.cat(right, dim=-1).transpose(-2, -1)
    landmarks_and_one = _append_ones(landmarks)
    grad_tokens = _empty_tokens(tokens, tokens.shape[-1], tokens.dtype)
    out = _empty_tokens(tokens, left[-1].shape[-1] if spread else 0, left[-1].dtype)
    sums = torch.zeros_like(landmarks_and_one)
    for chunk in chunk_slices(tokens, landmarks):
        part = tokens[:, :, chunk].to(dtype)
        cross = gaussian_kernel(part, landmarks) if whole is None else whole
        if spread:
            out[:, :, chunk] = torch.matmul(cross, right[-1])
        lefts = torch.cat([tensor[:, :, chunk].to(dtype) for tensor in left], dim=-1)
        outer = torch.matmul(lefts, both).mul_(cross)
        pulls = torch.matmul(outer, landmarks_and_one)
        grad_tokens[:, :, chunk] = pulls[..., :-1] - pulls[..., -1:] * part
        sums += torch.matmul(outer.transpose(-2, -1), _append_ones(part))
    return grad_tokens, sums, out


def _backward(
    grad: Tensor,
    q: Tensor,
    landmarks: Tensor,
    v: Tensor,
    matrix: Tensor,
    gathered: Tensor,
    weights: Tensor,
    inverted: bool,
    k: Tensor | None = None,
    present: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of ``q``, ``landmarks``, ``v``, ``M`` (with ``inverted``: ``M^-1``) and ``k``.

    Without ``k``, its gradient is an empty tensor.
    """
    grad_weights, whole = _gather(q, landmarks, grad)
    if inverted:
        grad_gathered = torch.cholesky_solve(grad_weights, matrix)
        grad_matrix = -torch.matmul(grad_gathered, weights.transpose(-2, -1))
    else:
        grad_gathered = torch.matmul(matrix.transpose(-2, -1), grad_weights)
        grad_matrix = torch.matmul(grad_weights, gathered.transpose(-2, -1))
    if present is not None:
        grad_gathered = grad_gathered * present.unsqueeze(-1)
    if k is None:
        grad_q, sums, grad_v = _pull(q, landmarks, [grad, v], [weights, grad_gathered], whole, spread=True)
        grad_k = q.new_empty(0)
    else:
        grad_q, sums, _ = _pull(q, landmarks, [grad], [weights], whole, spread=False)
        grad_k, key_sums, grad_v = _pull(k, landmarks, [v], [grad_gathered], None, spread=True)
        sums += key_sums
    grad_landmarks = sums[..., :-1] - sums[..., -1:] * landmarks
    return grad_q, grad_landmarks, grad_v, grad_matrix, grad_k


def _whole_backward(
    grad: Tensor,
    q: Tensor,
    landmarks: Tensor,
    v: Tensor,
    matrix: Tensor,
    _gathered: Tensor,
    _weights: Tensor,
    inverted: bool,
    k: Tensor | None = None,
    present: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Compute what :func:`_backward` returns by PyTorch's gradients of :func:`whole_attention`."""
    if inverted:
        matrix = matrix @ matrix.transpose(-2, -1)
    inputs = [q, landmarks, v, matrix] if k is None else [q, landmarks, v, matrix, k]
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    q, landmarks, v, matrix, *keys = inputs
    with torch.enable_grad():
        out = whole_attention(q, landmarks, v, matrix, inverted, present, keys[0] if keys else None)
    return torch.autograd.grad(out, inputs, grad) + (() if keys else (None,))


def _backward_shapes(
    grad: Tensor,
    q: Tensor,
    landmarks: Tensor,
    v: Tensor,
    matrix: Tensor,
    gathered: Tensor,
    weights: Tensor,
    inverted: bool,
    k: Tensor | None = None,
    present: Tensor | None = None,
) -> tuple[Tensor, ...]:
    grad_landmarks, grad_matrix = (tensor.new_empty(tensor.shape) for tensor in (landmarks, matrix))
    grad_q, grad_v = (_empty_tokens(tensor, tensor.shape[-1], tensor.dtype) for tensor in (q, v))
    grad_k = q.new_empty(0) if k is None else _empty_tokens(k, k.shape[-1], k.dtype)
    return grad_q, grad_landmarks, grad_v, grad_matrix, grad_k


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
    """The product ``P_q M (P_k^T v)``, where ``M`` is given or is the inverse of a given matrix.

    The backward pass recomputes ``P``, one chunk at a time, so it holds its inputs, its outputs and one chunk. With
    ``G = P_k^T v``, ``W = M G`` and the incoming gradient ``dO``: ``dW = P_q^T dO``, ``dG = M^T dW``,
    ``dP_q = dO W^T`` and ``dP_k = v dG^T``. The exponents ``E_ij = -||q_i - l_j||^2 / 2`` have the gradient
    ``dE = dP * P``, so ``dq_i = sum_j dE_ij (l_j - q_i)`` and ``dl_j = sum_i dE_ij (q_i - l_j)``, and the same for the
    keys. With ``k = q``, ``dP = dO W^T + v dG^T``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        landmarks: Tensor,
        v: Tensor,
        matrix: Tensor,
        inverted: bool,
        k: Tensor | None,
        present: Tensor | None,
    ) -> Tensor:
        if inverted:
            matrix = _factorise(matrix)
        out, gathered, weights = _FORWARD(q, landmarks, v, matrix, inverted, k, present)
        ctx.save_for_backward(q, landmarks, v, matrix, gathered, weights, k, present)
        ctx.inverted = inverted
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, k, present = ctx.saved_tensors
        with no_autocast(grad):
            # A loop writes its chunks into a tensor that holds one gradient.
            is_batch = not is_compiling() and is_batch_of_gradients(grad)
            compute: Callable[..., Any] = _whole_backward if is_batch else _BACKWARD
            *grads, grad_k = compute(grad, *saved, ctx.inverted, k, present)
        return (*grads, None, None if k is None else grad_k, None)


@without_autocast
def whole_attention(
    q: Tensor,
    landmarks: Tensor,
    v: Tensor,
    matrix: Tensor,
    inverted: bool = False,
    present: Tensor | None = None,
    k: Tensor | None = None,
) -> Tensor:
    """Compute ``P_q M (P_k^T v)`` in standard operators, for exports, traces and transforms. ``P`` is held whole.

    Args:
        q (Tensor): Scaled queries ``(B, h, n, d)``.
        landmarks (Tensor): ``(B, h, m, d)``.
        v (Tensor): Values ``(B, h, n_k, d_v)``.
        matrix (Tensor): See :func:`blockwise_attention`.
        inverted (bool): See :func:`blockwise_attention`. Defaults to False.
        present (Tensor | None): See :func:`blockwise_attention`. Defaults to None: all.
        k (Tensor | None): See :func:`blockwise_attention`. Defaults to None: the queries.

    Returns:
        Tensor: ``(B, h, n, d_v)`` in the dtype of ``v``.
    """
    cross = gaussian_kernel(q, landmarks)
    key_cross = cross if k is None else gaussian_kernel(k, landmarks)
    gathered = torch.matmul(key_cross.transpose(-2, -1), v.to(cross.dtype))
    if present is not None:
        gathered = gathered * present.unsqueeze(-1)
    if inverted:
        weights = torch.cholesky_solve(gathered, _factorise(matrix))
    else:
        weights = torch.matmul(matrix, gathered)
    return torch.matmul(cross, weights).to(v.dtype)


@without_autocast
def blockwise_attention(
    q: Tensor,
    landmarks: Tensor,
    v: Tensor,
    matrix: Tensor,
    inverted: bool = False,
    present: Tensor | None = None,
    k: Tensor | None = None,
) -> Tensor:
    """Compute ``P_q M (P_k^T v)`` with ``P_q = g(q, l)`` and ``P_k = g(k, l)``.

    The memory grows with ``(n + n_k) d + m^2``, not with ``n m``. The product is evaluated from right to left, so that
    nothing of size ``n x n_k`` is formed (SOFT, section 3.2). Each product with ``P_q`` takes ``n m d`` multiply-adds.

    Args:
        q (Tensor): Scaled queries ``(B, h, n, d)``.
        landmarks (Tensor): ``(B, h, m, d)``.
        v (Tensor): Values ``(B, h, n_k, d_v)``, one for each key.
        matrix (Tensor): ``(B, h, m, m)``: ``M``, or with ``inverted`` its inverse. The inverse must be symmetric
            positive definite, otherwise the output is NaN. Its gradient is correct for symmetric changes of the matrix
            only.
        inverted (bool): Whether ``matrix`` is the inverse of ``M``. Defaults to False.
        present (Tensor | None): Ones and zeros, ``(m,)`` or ``(B, 1, m)``: which slots hold a landmark. ``matrix`` must
            then come from :func:`~soft_mm.ops.middle_matrix` with the same mask. Defaults to None: all.
        k (Tensor | None): Scaled keys ``(B, h, n_k, d)``. Defaults to None: the queries, and ``n_k = n``.

    Returns:
        Tensor: ``(B, h, n, d_v)`` in the dtype of ``v``, computed in float32 or wider. Second derivatives are not
        supported.

    Raises:
        ValueError: If there is not one value for each key.
    """
    dtype = compute_dtype(q)
    landmarks, matrix = landmarks.to(dtype), matrix.to(dtype)
    present = None if present is None else present.to(dtype)
    if needs_standard_operators():
        return whole_attention(q, landmarks, v, matrix, inverted, present, k)
    keys = q if k is None else k
    if keys.shape[-2] != v.shape[-2]:
        raise ValueError(f'v of shape {tuple(v.shape)}: expected {keys.shape[-2]} tokens, one for each key')
    return _BlockwiseAttention.apply(q, landmarks, v, matrix, inverted, k, present)
