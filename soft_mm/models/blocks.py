"""Transformer blocks of SOFT."""

from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from soft_mm.ops.mlp import FORWARD_ENTRIES, chunked_mlp
from soft_mm.ops.recording import is_compiling, needs_standard_operators

from .attention import build_attention
from .fused_layers import fused_dtype

# Entries of the hidden layer of an MLP per chunk. On a CPU, a chunk should fit in the cache.
_CHUNK_ENTRIES = {'cpu': FORWARD_ENTRIES}
_ACCELERATOR_ENTRIES = 2**26


def reset_parameters(module: nn.Module) -> None:
    """Initialise a model as the authors do.

    Weights of linear layers, position embeddings and the class token are drawn from a truncated normal distribution
    with standard deviation 0.02. Biases of linear layers are 0. All other layers keep PyTorch's initialisation.

    Args:
        module (nn.Module): Model, changed in place.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    for name, parameter in module.named_parameters():
        if name.rpartition('.')[2] in ('pos_embed', 'cls_pos_embed', 'cls_token'):
            nn.init.trunc_normal_(parameter, std=0.02)


class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): drop the residual branch of random images, and rescale the others.

    Args:
        drop_prob (float): Probability of dropping the branch of an image in training.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """Apply stochastic depth to a branch ``(B, ...)``."""
        if not self.training or self.drop_prob == 0:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f'drop_prob={self.drop_prob:.3f}'


class MLP(nn.Sequential):
    """Two linear layers with a GELU between them, and ``4 C`` hidden channels.

    Processes tokens in chunks, so the 4C-wide hidden layer is not held whole in inference. With gradients on an x86 CPU
    in float32, it is computed again in the backward pass, see :func:`soft_mm.ops.chunked_mlp`. On other devices, in
    other dtypes, with dropout, and with changed layers, only training computes again, and only the output of the GELU.

    Args:
        embed_dims (int): Channels ``C``.
        approximate (str): Form of the GELU: ``'tanh'`` in stages 1 to 3, ``'none'`` in stage 4.
        drop_rate (float): Dropout rate after each linear layer. Defaults to 0.
    """

    def __init__(self, embed_dims: int, approximate: str, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dims, 4 * embed_dims)
        self.act = nn.GELU(approximate)
        self.drop1 = nn.Dropout(drop_rate)
        self.fc2 = nn.Linear(4 * embed_dims, embed_dims)
        self.drop2 = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP to tokens ``(B, n, C)``."""
        # An export would unroll the loop, and torch.compile plans its memory itself.
        if is_compiling() or needs_standard_operators():
            return self.after_fc1(self.fc1(x))
        tokens, fused = x.flatten(0, -2), fused_dtype(x, self)
        if fused is not None:
            weight1, bias1 = self.fc1.weight.to(fused), self.fc1.bias.to(fused)
            weight2, bias2 = self.fc2.weight.to(fused), self.fc2.bias.to(fused)
            return chunked_mlp(tokens.to(fused), weight1, bias1, weight2, bias2, self.act.approximate).view(x.shape)
        recompute = self.training and torch.is_grad_enabled()
        entries = _CHUNK_ENTRIES.get(x.device.type, _ACCELERATOR_ENTRIES)
        outputs = []
        for chunk in tokens.split(max(entries // (4 * x.shape[-1]), 1)):
            hidden = self.fc1(chunk)
            if recompute:
                # The random state matters to dropout only, and saving it would prevent the capture of a CUDA graph.
                keep = self.drop1.p > 0
                outputs.append(checkpoint(self.after_fc1, hidden, use_reentrant=False, preserve_rng_state=keep))
            else:
                outputs.append(self.after_fc1(hidden))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).view(x.shape)

    def after_fc1(self, hidden: Tensor) -> Tensor:
        """Apply the layers after the first linear layer to ``(..., 4C)``."""
        return self.drop2(self.fc2(self.drop1(self.act(hidden))))


class SoftmaxFreeBlock(BaseModule):
    """Post-norm block of stages 1 to 3: ``x = LN(x + attn(x)); x = LN(x + MLP(x))``.

    Args:
        embed_dims (int): Channels ``C``.
        num_heads (int): Number of heads.
        ratio (int): Side of the patch of tokens that becomes one landmark.
        conv_size (int): Side of the filters of the local branch.
        attention (dict): Config of the attention, see :func:`~soft_mm.models.attention.build_attention`.
        drop_path (float): Rate of stochastic depth in both branches. Defaults to 0.
        grid (tuple[int, ...] | None): Default grid for attentions that learn a projection of the tokens, see
            :func:`~soft_mm.models.attention.build_attention`. Defaults to None.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        ratio: int,
        conv_size: int,
        attention: dict[str, Any],
        drop_path: float = 0.0,
        grid: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.attn = build_attention(attention, embed_dims, num_heads, ratio, conv_size, grid)
        self.norm1 = nn.LayerNorm(embed_dims)
        self.mlp = MLP(embed_dims, approximate='tanh')
        self.norm2 = nn.LayerNorm(embed_dims)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: tuple[int, ...], mask: Tensor | None = None) -> Tensor:
        """Apply the block to tokens ``(B, H * W, C)`` on ``grid = (H, W)``, or ``(B, n, C)`` on ``(n,)``.

        A ``mask`` ``(B, n)`` is True where a token takes part in the attention.
        """
        # An attention that takes no mask works without one.
        attended = self.attn(x, grid) if mask is None else self.attn(x, grid, mask)
        x = self.norm1(x + self.drop_path(attended))
        return self.norm2(x + self.drop_path(self.mlp(x)))


class PreNormBlock(BaseModule):
    """Pre-norm block of stage 4: ``x = x + attn(LN(x)); x = x + MLP(LN(x))``.

    Args:
        embed_dims (int): Channels ``C``.
        num_heads (int): Number of heads.
        ratio (int): Side of the patch of tokens that becomes one landmark.
        conv_size (int): Side of the filters of the local branch.
        attention (dict): Config of the attention, see :func:`~soft_mm.models.attention.build_attention`.
        drop_rate (float): Dropout rate of the attention's output and of the MLP. Defaults to 0.
        drop_path (float): Rate of stochastic depth in both branches. Defaults to 0.
        grid (tuple[int, ...] | None): See :class:`SoftmaxFreeBlock`. Defaults to None.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        ratio: int,
        conv_size: int,
        attention: dict[str, Any],
        drop_rate: float = 0.0,
        drop_path: float = 0.0,
        grid: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.attn = build_attention(attention, embed_dims, num_heads, ratio, conv_size, grid)
        self.attn_drop = nn.Dropout(drop_rate)
        self.norm2 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.mlp = MLP(embed_dims, approximate='none', drop_rate=drop_rate)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Apply the block to tokens ``(B, H * W, C)`` on ``grid = (H, W)``.

        With a class token, the tokens ``(B, 1 + H * W, C)`` form one row: ``grid = (1, 1 + H * W)``.
        """
        x = x + self.drop_path(self.attn_drop(self.attn(self.norm1(x), grid)))
        return x + self.drop_path(self.mlp(self.norm2(x)))
