"""Transformer blocks of SOFT."""

import torch
import torch.nn as nn
from mmengine.model import BaseModule
from torch.utils.checkpoint import checkpoint

from soft_mm.ops.kernel import is_compiling

from .attention import MultiheadAttention, build_attention

# Entries of the hidden layer of an MLP at a time: on a CPU they should stay in the cache.
_PART_ENTRIES = {'cpu': 2**20}
_ACCELERATOR_ENTRIES = 2**26


class DropPath(nn.Module):
    """Stochastic depth: drop the whole residual branch of an image and rescale the others (arXiv:1603.09382).

    Args:
        drop_prob (float): probability that an image's branch is dropped in training.
    """

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training or self.drop_prob == 0:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep).div_(keep)

    def extra_repr(self):
        return f'drop_prob={self.drop_prob:.3f}'


class MLP(nn.Sequential):
    """Two linear layers with a GELU between, hidden width ``4 C``.

    Tokens are taken a part at a time, so that what is four times as wide as they are stays small. In training the
    output of the GELU is not held for the backward pass but computed again.

    Args:
        embed_dims (int): channels ``C``.
        approximate (str): of the GELU: ``'tanh'`` in stages 1 to 3, ``'none'`` in stage 4.
        drop_rate (float): dropout after each linear layer. Defaults to 0.
    """

    def __init__(self, embed_dims, approximate, drop_rate=0.0):
        super().__init__()
        self.add_module('fc1', nn.Linear(embed_dims, 4 * embed_dims))
        self.add_module('act', nn.GELU(approximate))
        self.add_module('drop1', nn.Dropout(drop_rate))
        self.add_module('fc2', nn.Linear(4 * embed_dims, embed_dims))
        self.add_module('drop2', nn.Dropout(drop_rate))

    def forward(self, x):
        """Tokens ``(B, n, C)`` in and out."""
        # A compiler decides by itself what to compute when, and what again.
        if is_compiling():
            return self._behind_fc1(self.fc1(x))
        recompute = self.training and torch.is_grad_enabled()
        entries = _PART_ENTRIES.get(x.device.type, _ACCELERATOR_ENTRIES)
        outputs = []
        for part in x.flatten(0, -2).split(max(entries // (4 * x.shape[-1]), 1)):
            hidden = self.fc1(part)
            if recompute:
                # Without dropout there is no random state to keep, which a CUDA graph could not capture.
                keep = self.drop1.p > 0
                outputs.append(checkpoint(self._behind_fc1, hidden, use_reentrant=False, preserve_rng_state=keep))
            else:
                outputs.append(self._behind_fc1(hidden))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).view(x.shape)

    def _behind_fc1(self, hidden):
        return self.drop2(self.fc2(self.drop1(self.act(hidden))))


class SoftmaxFreeBlock(BaseModule):
    """Post-norm block of stages 1 to 3: ``x = LN(x + attn(x)); x = LN(x + MLP(x))``.

    Args:
        embed_dims (int): channels ``C``.
        num_heads (int): heads.
        ratio (int): side of a landmark's patch.
        conv_size (int): side of the filters of the local branch.
        attention (dict): config of the attention, see :func:`~soft_mm.models.attention.build_attention`.
        drop_path (float): stochastic depth of both branches. Defaults to 0.
        grid (tuple[int, ...] | None): that on which the attention learns, see there. Defaults to None.
    """

    def __init__(self, embed_dims, num_heads, ratio, conv_size, attention, drop_path=0.0, grid=None):
        super().__init__()
        self.attn = build_attention(attention, embed_dims, num_heads, ratio, conv_size, grid)
        self.norm1 = nn.LayerNorm(embed_dims)
        self.mlp = MLP(embed_dims, approximate='tanh')
        self.norm2 = nn.LayerNorm(embed_dims)
        self.drop_path = DropPath(drop_path)

    def forward(self, x, grid):
        """Tokens ``(B, H * W, C)`` on ``grid = (H, W)`` in, tokens out."""
        x = self.norm1(x + self.drop_path(self.attn(x, grid)))
        return self.norm2(x + self.drop_path(self.mlp(x)))


class SoftmaxBlock(BaseModule):
    """Pre-norm block of stage 4 with softmax attention: ``x = x + attn(LN(x)); x = x + MLP(LN(x))``.

    Args:
        embed_dims (int): channels ``C``.
        num_heads (int): heads.
        drop_rate (float): dropout of projection and MLP. Defaults to 0.
        drop_path (float): stochastic depth of both branches. Defaults to 0.
    """

    def __init__(self, embed_dims, num_heads, drop_rate=0.0, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.attn = MultiheadAttention(embed_dims, num_heads, drop_rate)
        self.norm2 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.mlp = MLP(embed_dims, approximate='none', drop_rate=drop_rate)
        self.drop_path = DropPath(drop_path)

    def forward(self, x, grid):
        """Tokens ``(B, 1 + H * W, C)``, the class token first, in and out; ``grid`` is not used."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))
