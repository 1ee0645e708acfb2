"""The attentions that the papers compare SOFT with, as modules of its interface: tokens and grid in, tokens out.

Each is built as ``Type(embed_dims, num_heads, ratio, conv_size, **own_options)``; what a type has no use for of the
first four is taken and left.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.model import BaseModule

from soft_mm import ops
from soft_mm.ops.attention import check_count
from soft_mm.registry import MODELS

from .attention import as_map, check_shape, local_conv, map_kernel, split_heads

# -1 outside of a backward pass. Not there before PyTorch 2.1.
_backward_pass = getattr(torch._C, '_current_graph_task_id', lambda: -1)
# A stage of 224x224 pixels has seven patches of its ratio along a side.
_PATCHES = 7


class _Attention(BaseModule):
    """Projections before and behind ``attend(q, k, v, grid)``, each of whose tensors is ``(B, h, n, d)``."""

    def __init__(self, embed_dims, num_heads, ratio, conv_size, grid_dims, init_cfg):
        super().__init__(init_cfg)
        check_shape(embed_dims, num_heads, ratio, conv_size, grid_dims)
        self.num_heads = num_heads
        self.grid_dims = grid_dims
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)

    def forward(self, x, grid):
        """Tokens ``(B, n, C)`` on ``grid`` in, tokens ``(B, n, C)`` out."""
        grid = as_map(grid, self.grid_dims, x.shape[1])
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        heads = (split_heads(part, self.num_heads) for part in (q, k, v))
        out = self.attend(*heads, grid).transpose(1, 2).reshape(x.shape)
        return self.proj(out + self.beside(v, grid))

    def beside(self, v, grid):
        """What is added to the attention's output before the projection, of values ``(B, n, C)``: nothing."""
        return 0


@MODELS.register_module()
class SoftmaxAttention(_Attention):
    """Softmax attention between all tokens through PyTorch's fused kernel (arXiv:1706.03762, section 3.2).

    Args:
        embed_dims (int): channels ``C``.
        num_heads (int): heads, a divisor of ``embed_dims``.
        ratio (int): not used.
        conv_size (int): not used.
        grid_dims (int): 2 for maps, 1 for sequences. Defaults to 2.
        init_cfg (dict | None): mmengine's. Defaults to None.
    """

    def __init__(self, embed_dims, num_heads, ratio, conv_size, grid_dims=2, init_cfg=None):
        super().__init__(embed_dims, num_heads, ratio, conv_size, grid_dims, init_cfg)

    def attend(self, q, k, v, grid):
        return F.scaled_dot_product_attention(q, k, v)


@MODELS.register_module()
class LinformerAttention(_Attention):
    """Softmax attention over learned combinations of keys and values (Linformer, arXiv:2006.04768).

    The projection of the tokens is learned on one grid and resized to any other, see
    :func:`~soft_mm.ops.resize_sequence_projection`.

    Args:
        embed_dims (int): channels ``C``.
        num_heads (int): heads, which share the projections of the tokens.
        ratio (int): side of a landmark's patch in SOFT; the learned grid has seven of them a side by default, as stages
            1 to 3 do at 224x224 pixels.
        conv_size (int): not used.
        proj_tokens (int): keys and values that are left, ``p``. Defaults to 49.
        grid (Sequence[int] | None): learned grid, ``(H, W)`` or ``(n,)``; backbone and encoder give that of their
            ``img_size`` or ``length``. Defaults to None.
        grid_dims (int): 2 for maps, 1 for sequences. Defaults to 2.
        init_cfg (dict | None): mmengine's. Defaults to None.

    Raises:
        ValueError: for an option out of its range.
    """

    def __init__(self, embed_dims, num_heads, ratio, conv_size, proj_tokens=49, grid=None, grid_dims=2, init_cfg=None):
        super().__init__(embed_dims, num_heads, ratio, conv_size, grid_dims, init_cfg)
        check_count('proj_tokens', proj_tokens)
        grid = (_PATCHES * ratio,) * grid_dims if grid is None else tuple(grid)
        if len(grid) != grid_dims or min(grid) < 1:
            raise ValueError(f'grid={grid!r} must have {grid_dims} positive sides, as grid_dims={grid_dims} says')
        rows, columns = grid if grid_dims == 2 else (1, *grid)
        for name in ('key_weight', 'value_weight'):
            weight = nn.Parameter(torch.empty(proj_tokens, rows, columns))
            nn.init.normal_(weight, std=(rows * columns) ** -0.5)
            self.register_parameter(name, weight)

    def attend(self, q, k, v, grid):
        weights = (ops.resize_sequence_projection(weight, grid) for weight in (self.key_weight, self.value_weight))
        return ops.linformer_attention(q, k, v, *weights)


@MODELS.register_module()
class PerformerAttention(_Attention):
    """Softmax attention by positive orthogonal random features (FAVOR+; Performer, arXiv:2009.14794).

    Args:
        embed_dims (int): channels ``C``.
        num_heads (int): heads, which share the features.
        ratio (int): not used.
        conv_size (int): not used.
        num_features (int): random features. Defaults to 49.
        seed (int): of the features. Defaults to 0.
        redraw_interval (int | None): forwards in training after which the features are drawn anew. Defaults to None,
            never.
        grid_dims (int): 2 for maps, 1 for sequences. Defaults to 2.
        init_cfg (dict | None): mmengine's. Defaults to None.

    Raises:
        ValueError: for an option out of its range.
    """

    def __init__(
        self,
        embed_dims,
        num_heads,
        ratio,
        conv_size,
        num_features=49,
        seed=0,
        redraw_interval=None,
        grid_dims=2,
        init_cfg=None,
    ):
        super().__init__(embed_dims, num_heads, ratio, conv_size, grid_dims, init_cfg)
        check_count('num_features', num_features)
        if redraw_interval is not None:
            check_count('redraw_interval', redraw_interval)
        check_count('seed', seed, least=0)
        self.redraw_interval = redraw_interval
        self.forwards = 0
        generator = torch.Generator().manual_seed(seed)
        features = ops.orthogonal_features(num_features, embed_dims // num_heads, generator, 'cpu')
        self.register_buffer('features', features)

    def attend(self, q, k, v, grid):
        # A forward that checkpointing repeats in the backward pass needs the features that it had.
        if self.training and self.redraw_interval and _backward_pass() == -1:
            if self.forwards == self.redraw_interval:
                self.redraw()
            self.forwards += 1
        return ops.performer_attention(q, k, v, self.features)

    def redraw(self):
        """Draw the features anew from PyTorch's generator."""
        # In a tensor of its own: a backward pass may still need the old one.
        drawn = ops.orthogonal_features(*self.features.shape, device=self.features.device)
        self.features = drawn.to(self.features.dtype)
        self.forwards = 0


@MODELS.register_module()
class NystromAttention(_Attention):
    """Nystrom approximation of softmax attention, with a depthwise convolution of the values beside it (Nystromformer,
    arXiv:2102.03902).

    Args:
        embed_dims (int): channels ``C``.
        num_heads (int): heads.
        ratio (int): not used.
        conv_size (int): side of the filters of the convolution, one a head, odd.
        num_landmarks (int): means of cells of a grid, or of segments of a sequence. Defaults to 49.
        iterations (int): of the pseudo-inverse. Defaults to 6, the paper's.
        grid_dims (int): 2 for maps, 1 for sequences. Defaults to 2.
        init_cfg (dict | None): mmengine's. Defaults to None.

    Raises:
        ValueError: for an option out of its range.
    """

    def __init__(
        self, embed_dims, num_heads, ratio, conv_size, num_landmarks=49, iterations=6, grid_dims=2, init_cfg=None
    ):
        super().__init__(embed_dims, num_heads, ratio, conv_size, grid_dims, init_cfg)
        check_count('num_landmarks', num_landmarks)
        check_count('iterations', iterations)
        self.num_landmarks = num_landmarks
        self.iterations = iterations
        self.local = local_conv(num_heads, conv_size, grid_dims)

    def attend(self, q, k, v, grid):
        coarse = ops.pooled_grid(grid, self.num_landmarks)
        landmarks = (ops.mean_landmarks(tokens, grid, coarse) for tokens in (q, k))
        return ops.nystrom_attention(q, k, v, *landmarks, self.iterations)

    def beside(self, v, grid):
        return ops.local_branch(v, grid, self.local.weight)


@MODELS.register_module()
class SpatialReductionAttention(BaseModule):
    """Softmax attention over keys and values of a grid that a strided convolution has made coarser (PVT,
    arXiv:2102.12122, section 3.3). With a ratio of 1 there is neither a convolution nor its norm.

    Args:
        embed_dims (int): channels ``C``.
        num_heads (int): heads.
        ratio (int): stride and side of the convolution; a side of the grid shorter than it is stretched to it.
        conv_size (int): not used.
        grid_dims (int): 2 for maps, 1 for sequences. Defaults to 2.
        init_cfg (dict | None): mmengine's. Defaults to None.
    """

    def __init__(self, embed_dims, num_heads, ratio, conv_size, grid_dims=2, init_cfg=None):
        super().__init__(init_cfg)
        check_shape(embed_dims, num_heads, ratio, conv_size, grid_dims)
        self.num_heads = num_heads
        self.grid_dims = grid_dims
        self.kernel = map_kernel(ratio, grid_dims)
        self.q = nn.Linear(embed_dims, embed_dims)
        if ratio > 1:
            self.reduction = nn.Conv2d(embed_dims, embed_dims, self.kernel, self.kernel)
            self.norm = nn.LayerNorm(embed_dims)
        self.kv = nn.Linear(embed_dims, 2 * embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)

    def forward(self, x, grid):
        """Tokens ``(B, n, C)`` on ``grid`` in, tokens ``(B, n, C)`` out."""
        grid = as_map(grid, self.grid_dims, x.shape[1])
        return self.proj(self.attend(split_heads(self.q(x), self.num_heads), x, grid).transpose(1, 2).reshape(x.shape))

    def reduce(self, x, grid):
        """Keys and values ``(B, h, m, d)`` of the coarser grid, and that grid, of tokens ``(B, n, C)`` on a map."""
        if max(self.kernel) > 1:
            maps = x.transpose(1, 2).unflatten(2, grid)
            size = tuple(max(side, least) for side, least in zip(grid, self.kernel))
            if size != grid:
                maps = F.interpolate(maps, size=size, mode='nearest')
            maps = self.reduction(maps)
            grid = tuple(maps.shape[-2:])
            x = self.norm(maps.flatten(2).transpose(1, 2))
        return *(split_heads(part, self.num_heads) for part in self.kv(x).chunk(2, dim=-1)), grid

    def attend(self, q, x, grid):
        """Queries ``(B, h, n, d)`` and the tokens whose keys and values they attend to, on a map, in."""
        k, v, _ = self.reduce(x, grid)
        return F.scaled_dot_product_attention(q, k, v)


@MODELS.register_module()
class GaussianKernelAttention(BaseModule):
    """The Gaussian kernel between all tokens, without decomposition, which the paper says hardly trains (SOFT,
    section 3.1), with the projections and the local branch of :class:`SoftmaxFreeAttention`.

    Args:
        embed_dims (int): channels ``C``.
        num_heads (int): heads.
        ratio (int): not used.
        conv_size (int): side of the filters of the local branch, odd.
        max_tokens (int): more tokens are refused, for ``n x n`` numbers a head are held. Defaults to 4096.
        grid_dims (int): 2 for maps, 1 for sequences. Defaults to 2.
        init_cfg (dict | None): mmengine's. Defaults to None.

    Raises:
        ValueError: for an option out of its range.
    """

    def __init__(self, embed_dims, num_heads, ratio, conv_size, max_tokens=4096, grid_dims=2, init_cfg=None):
        super().__init__(init_cfg)
        check_shape(embed_dims, num_heads, ratio, conv_size, grid_dims)
        check_count('max_tokens', max_tokens)
        self.num_heads = num_heads
        self.grid_dims = grid_dims
        self.max_tokens = max_tokens
        self.qv = nn.Linear(embed_dims, 2 * embed_dims)
        self.local = local_conv(num_heads, conv_size, grid_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)

    def forward(self, x, grid):
        """Tokens ``(B, n, C)`` on ``grid`` in, tokens ``(B, n, C)`` out.

        Raises:
            ValueError: for more tokens than ``max_tokens``.
        """
        grid = as_map(grid, self.grid_dims, x.shape[1])
        q, v = self.qv(x).chunk(2, dim=-1)
        out = self.attend(split_heads(q, self.num_heads), split_heads(v, self.num_heads), grid)
        return self.proj(out.transpose(1, 2).reshape(x.shape) + ops.local_branch(v, grid, self.local.weight))

    def attend(self, q, v, grid):
        n = q.shape[2]
        if n > self.max_tokens:
            raise ValueError(
                f'GaussianKernelAttention: {n} tokens are more than max_tokens={self.max_tokens}; the kernel would '
                f'hold {n}x{n} numbers a head. Give smaller images, another attention, or a larger max_tokens'
            )
        return ops.gaussian_attention(q * q.shape[-1] ** -0.25, v)
