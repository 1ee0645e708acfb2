"""``P M (P^T v)`` over blocks of tokens, forward and backward: ``P = g(q, l)`` is never held whole."""

import torch
from torch.autograd.function import once_differentiable

from .kernel import compute_dtype, gaussian_kernel, without_autocast

# Entries of P at a time. On a CPU a block should stay in the cache while it is worked on; an accelerator wants large
# products, and 2^24 entries are 64 MiB.
_BLOCK_ENTRIES = {'cpu': 2**18}
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


class _BlockwiseAttention(torch.autograd.Function):
    """``P M (P^T v)`` with ``M`` a given matrix or the inverse of a given one.

    The backward recomputes ``P`` and holds, beside tensors of the size of its inputs, what belongs to one block. With
    ``G = P^T v``, ``W = M G`` and the incoming gradient ``dO``: ``dW = P^T dO``, ``dG = M^T dW``,
    ``dP = dO W^T + v dG^T``, and with ``dE = dP * P`` the gradients of the tokens follow from those of a squared
    distance.
    """

    @staticmethod
    def forward(ctx, q, landmarks, v, matrix, inverted, scale):
        dtype = landmarks.dtype
        blocks = _blocks(q, landmarks)
        gathered = landmarks.new_zeros(*landmarks.shape[:-1], v.shape[-1])
        for block in blocks:
            cross = gaussian_kernel(q[:, :, block].to(dtype) * scale, landmarks)
            gathered += torch.matmul(cross.transpose(-2, -1), v[:, :, block].to(dtype))
        if inverted:
            matrix, _ = torch.linalg.cholesky_ex(matrix)
            weights = torch.cholesky_solve(gathered, matrix)
        else:
            weights = torch.matmul(matrix, gathered)
        out = _empty_tokens(v, v.dtype)
        for block in blocks:
            if len(blocks) > 1:
                cross = gaussian_kernel(q[:, :, block].to(dtype) * scale, landmarks)
            out[:, :, block] = torch.matmul(cross, weights)
        ctx.save_for_backward(q, landmarks, v, matrix, gathered, weights)
        ctx.inverted, ctx.scale = inverted, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, landmarks, v, matrix, gathered, weights = ctx.saved_tensors
        dtype = landmarks.dtype
        blocks = _blocks(q, landmarks)
        with torch.autocast(q.device.type, enabled=False):
            grad_weights = torch.zeros_like(weights)
            for block in blocks:
                cross = gaussian_kernel(q[:, :, block].to(dtype) * ctx.scale, landmarks)
                grad_weights += torch.matmul(cross.transpose(-2, -1), grad[:, :, block].to(dtype))
            if ctx.inverted:
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
                tokens, values = q[:, :, block].to(dtype) * ctx.scale, v[:, :, block].to(dtype)
                if len(blocks) > 1:
                    cross = gaussian_kernel(tokens, landmarks)
                grad_v[:, :, block] = torch.matmul(cross, grad_gathered)
                outer = torch.matmul(torch.cat([grad[:, :, block].to(dtype), values], dim=-1), both).mul_(cross)
                pulls = torch.matmul(outer, landmarks_and_one)
                grad_q[:, :, block] = (pulls[..., :-1] - pulls[..., -1:] * tokens) * ctx.scale
                sums += torch.matmul(outer.transpose(-2, -1), _append_ones(tokens))
            grad_landmarks = sums[..., :-1] - sums[..., -1:] * landmarks
        return grad_q, grad_landmarks, grad_v, grad_matrix, None, None


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
