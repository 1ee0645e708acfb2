"""What the engine was chosen against: the same computation in the ways that it does not take, for token sweeps."""

from contextlib import ExitStack
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from soft_mm import ops
from soft_mm.models.attention import SoftmaxFreeAttention
from soft_mm.models.blocks import MLP
from soft_mm.models.soft import PatchEmbed, SOFTStage, resize_pos_embed
from soft_mm.ops.blockwise import _blocks
from soft_mm.ops.kernel import compute_dtype, gaussian_kernel

_embed_patches = PatchEmbed.forward


def _mlp_at_once(self, x):
    return self._behind_fc1(self.fc1(x))


def _solve(matrix, right, inverted):
    return torch.cholesky_solve(right, torch.linalg.cholesky_ex(matrix)[0]) if inverted else matrix @ right


def _composed_attention(q, landmarks, v, matrix, inverted=False, scale=1.0):
    """Blocks of tokens through PyTorch's checkpointing in place of a hand-written backward."""
    landmarks = landmarks.to(compute_dtype(q))

    def gather(tokens, values, landmarks):
        return gaussian_kernel(tokens * scale, landmarks).transpose(-2, -1) @ values

    def spread(tokens, landmarks, weights):
        return gaussian_kernel(tokens * scale, landmarks) @ weights

    blocks = _blocks(q, landmarks)
    gathered = sum(checkpoint(gather, q[:, :, b], v[:, :, b], landmarks, use_reentrant=False) for b in blocks)
    weights = _solve(matrix, gathered, inverted)
    return torch.cat([checkpoint(spread, q[:, :, b], landmarks, weights, use_reentrant=False) for b in blocks], dim=2)


def _held_attention(q, landmarks, v, matrix, inverted=False, scale=1.0):
    """``P`` formed once and held for the backward pass."""
    cross = gaussian_kernel(q * scale, landmarks)
    return cross @ _solve(matrix, cross.transpose(-2, -1) @ v, inverted)


def _local_branch_over_heads(v, grid, weight):
    """One grouped convolution of as many channels as there are heads, the channels of a head in the batch."""
    heads = weight.shape[0]
    maps = v.unflatten(-1, (heads, -1)).permute(0, 3, 2, 1).flatten(0, 1).unflatten(-1, grid)
    out = F.conv2d(maps, weight, padding=weight.shape[-1] // 2, groups=heads)
    return out.unflatten(0, (v.shape[0], -1)).permute(0, 3, 4, 2, 1).flatten(3).flatten(1, 2)


def _two_projections(self, x, grid):
    weights, biases = self.qv.weight.chunk(2), self.qv.bias.chunk(2)
    q, v = (F.linear(x, weight, bias) for weight, bias in zip(weights, biases))
    heads = (*x.shape[:2], self.num_heads, self.head_dims)
    out = self.attend(q.reshape(heads).transpose(1, 2), v.reshape(heads).transpose(1, 2), grid)
    return self.proj(ops.local_branch(v, grid, self.local.weight) + out.transpose(1, 2).reshape(x.shape))


def _embed_and_normalise(self, x):
    for layer in self:
        x = layer(x)
    return x


def _positions_each_time(self, grid):
    return resize_pos_embed(self.pos_embed, grid).flatten(2).transpose(1, 2)


#: Patches by the name of the variant. Each computes what the engine computes, up to rounding.
VARIANTS = {
    'composed-autograd': lambda: patch('soft_mm.ops.attention.blockwise_attention', _composed_attention),
    'held-kernel': lambda: patch('soft_mm.ops.attention.blockwise_attention', _held_attention),
    'local-over-heads': lambda: patch('soft_mm.ops.local_branch', _local_branch_over_heads),
    'mlp-at-once': lambda: patch.object(MLP, 'forward', _mlp_at_once),
    'two-projections': lambda: patch.object(SoftmaxFreeAttention, 'forward', _two_projections),
    'batchnorm-apart': lambda: patch.object(PatchEmbed, 'forward', _embed_and_normalise),
    'positions-each-time': lambda: patch.object(SOFTStage, 'positions', _positions_each_time),
    'channels-first': lambda: patch.object(PatchEmbed, 'forward', lambda self, x: _embed_patches(self, x.contiguous())),
}


def apply_variant(name):
    """A context in which the engine takes another way.

    Args:
        name (str | None): a key of :data:`VARIANTS`, or None for the engine as it is.

    Returns:
        ContextManager: to be entered once.
    """
    return VARIANTS[name]() if name else ExitStack()
