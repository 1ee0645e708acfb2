"""``P M (P^T v)`` over blocks of tokens, forward and backward: ``P = g(q, l)`` is never held whole."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernel import compute_dtype, gaussian_kernel, is_compiling, without_autocast

# Entries of P at a time. On a CPU a block should stay in the cache while it is worked on; an accelerator wants large
# products, and 2^24 entries are 64 MiB.
_BLOCK_ENTRIES = {'cpu': 2**19}
_ACCELERATOR_ENTRIES = 2**24


def _blocks(q, landmarks):
    """Slices of the tokens, as even as whole numbers allow."""
    tokens, entries = q.shape[-2], q.shape[:-1].numel() * landmarks.shape[-2]
    count = min(-(-entries // _BLOCK_ENTRIES.get(q.device.type, _ACCELERATOR_ENTRIES)), tokens)
    return [slice(i * tokens // count, (i + 1) * tokens // count) for i in range(count)]


def _append_ones(tokens):
    return torch.cat([tokens, tokens.new_ones(*tokens.shape[:-1], 1)], dim=-1)


def _empty_tokens(like, dtype):
    """An empty tensor of the shape of tokens ``(B, h, n, d)``, with a token's heads side by side in memory."""
    B, heads, n, d = like.shape
    return torch.empty(B, n, heads, d, dtype=dtype, device=like.device).transpose(1, 2)


def _forward(
    q: Tensor, landmarks: Tensor, v: Tensor, matrix: Tensor, inverted: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``P M G`` with ``G = P^T v``, ``G`` and ``M G``; with ``inverted``, ``matrix`` is the factor of ``M^-1``."""
    dtype = landmarks.dtype
    blocks = _blocks(q, landmarks)
    gathered = landmarks.new_zeros(*landmarks.shape[:-1], v.shape[-1])
    for block in blocks:
        cross = gaussian_kernel(q[:, :, block].to(dtype) * scale, landmarks)
        gathered += torch.matmul(cross.transpose(-2, -1), v[:, :, block].to(dtype))
    weights = torch.cholesky_solve(gathered, matrix) if inverted else torch.matmul(matrix, gathered)
    out = _empty_tokens(v, v.dtype)
    for block in blocks:
        if len(blocks) > 1:
            cross = gaussian_kernel(q[:, :, block].to(dtype) * scale, landmarks)
        out[:, :, block] = torch.matmul(cross, weights)
    return out, gathered, weights


def _forward_shapes(q, landmarks, v, matrix, inverted, scale):
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
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``landmarks``, ``v``, and ``M`` or, with ``inverted``, ``M^-1``."""
    dtype = landmarks.dtype
    blocks = _blocks(q, landmarks)
    grad_weights = torch.zeros_like(weights)
    for block in blocks:
        cross = gaussian_kernel(q[:, :, block].to(dtype) * scale, landmarks)
        grad_weights += torch.matmul(cross.transpose(-2, -1), grad[:, :, block].to(dtype))
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
    for block in blocks:
        tokens, values = q[:, :, block].to(dtype) * scale, v[:, :, block].to(dtype)
        if len(blocks) > 1:
            cross = gaussian_kernel(tokens, landmarks)
        grad_v[:, :, block] = torch.matmul(cross, grad_gathered)
        outer = torch.matmul(torch.cat([grad[:, :, block].to(dtype), values], dim=-1), both).mul_(cross)
        pulls = torch.matmul(outer, landmarks_and_one)
        grad_q[:, :, block] = (pulls[..., :-1] - pulls[..., -1:] * tokens) * scale
        sums += torch.matmul(outer.transpose(-2, -1), _append_ones(tokens))
    grad_landmarks = sums[..., :-1] - sums[..., -1:] * landmarks
    return grad_q, grad_landmarks, grad_v, grad_matrix


def _backward_shapes(grad, q, landmarks, v, matrix, gathered, weights, inverted, scale):
    grads = [tensor.new_empty(tensor.shape) for tensor in (landmarks, matrix)]
    return _empty_tokens(q, q.dtype), grads[0], _empty_tokens(v, v.dtype), grads[1]


def _compiled(function, shapes):
    """``function``, and while it is compiled an operator in its place, for a compiler would unroll its loops."""
    # Not there before PyTorch 2.4.
    if not hasattr(torch.library, 'custom_op'):
        return function
    operator = torch.library.custom_op(f'soft_mm::blockwise{function.__name__}', function, mutates_args=())
    operator.register_fake(shapes)
    return lambda *args: (operator if is_compiling() else function)(*args)


_FORWARD = _compiled(_forward, _forward_shapes)
_BACKWARD = _compiled(_backward, _backward_shapes)


class _BlockwiseAttention(torch.autograd.Function):
    """``P M (P^T v)`` with ``M`` a given matrix or the inverse of a given one.

    The backward recomputes ``P`` and holds, beside tensors of the size of its inputs, what belongs to one block. With
    ``G = P^T v``, ``W = M G`` and the incoming gradient ``dO``: ``dW = P^T dO``, ``dG = M^T dW``,
    ``dP = dO W^T + v dG^T``, and with ``dE = dP * P`` the gradients of the tokens follow from those of a squared
    distance.
    """

    @staticmethod
    def forward(ctx, q, landmarks, v, matrix, inverted, scale):
        if inverted:
            matrix, _ = torch.linalg.cholesky_ex(matrix)
        out, gathered, weights = _FORWARD(q, landmarks, v, matrix, inverted, scale)
        ctx.save_for_backward(q, landmarks, v, matrix, gathered, weights)
        ctx.inverted, ctx.scale = inverted, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        with torch.autocast(grad.device.type, enabled=False):
            return (*_BACKWARD(grad, *ctx.saved_tensors, ctx.inverted, ctx.scale), None, None)


@without_autocast
def blockwise_attention(q, landmarks, v, matrix, inverted=False, scale=1.0):
    """``P M (P^T v)`` with ``P = g(scale q, l)``, in memory that grows with ``n d + m^2`` and not with ``n m``.

    Args:
        q (Tensor): queries ``(B, h, n, d)``.
        landmarks (Tensor): ``(B, h, m, d)``.
        v (Tensor): values ``(B, h, n, d_v)``.
        matrix (Tensor): ``M``, ``(B, h, m, m)``, or with ``inverted`` a symmetric positive definite matrix whose
            inverse ``M`` is; its gradient then holds for symmetric changes of it.
        inverted (bool): see ``matrix``. Defaults to False.
        scale (float): of the queries. Defaults to 1.

    Returns:
        Tensor: ``(B, h, n, d_v)`` in the dtype of ``v``, computed in float32 or wider. It can be differentiated once.
    """
    dtype = compute_dtype(q)
    return _BlockwiseAttention.apply(q, landmarks.to(dtype), v, matrix.to(dtype), inverted, scale)
