"""Baselines: the attentions that the papers compare with SOFT.

Every type takes ``embed_dims``, ``num_heads``, ``ratio`` and ``conv_size``. Unused arguments are ignored.
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soft_mm import ops
from soft_mm.ops.checks import check_integer, is_integer
from soft_mm.ops.kernel import compute_dtype
from soft_mm.registry import MODELS

from ..fused_layers import call_linear
from .base import (
    MAX_SEED,
    BaseAttention,
    InitCfg,
    LocalBranch,
    SharedQKAttention,
    WideProjection,
    patch_sides,
    split_heads,
    value_gradients,
)

# Returns -1 outside a backward pass. PyTorch before 2.1 does not have it.
_backward_pass: Callable[[], int] = getattr(torch._C, '_current_graph_task_id', lambda: -1)
# Number of patches along a side in stages 1 to 3 at 224x224 pixels.
_PATCHES = 7
# Number of queries whose rows of the Gaussian kernel are summed at a time.
_QUERIES = 32


class _QKVAttention(BaseAttention):
    """Base class of attentions with separate queries, keys and values."""

    def __init__(
        self, embed_dims: int, num_heads: int, ratio: int, conv_size: int, grid_dims: int = 2, init_cfg: InitCfg = None
    ) -> None:
        super().__init__(embed_dims, num_heads, ratio, conv_size, grid_dims, init_cfg)
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)

    def project(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, ...]:
        """Project tokens ``(B, n, C)`` to queries, keys and values, each ``(B, h, n, d)``."""
        return tuple(split_heads(part, self.num_heads) for part in call_linear(self.qkv, x).chunk(3, dim=-1))


@MODELS.register_module()
class SoftmaxAttention(_QKVAttention):
    """Softmax attention between all tokens with PyTorch's fused kernel (arXiv:1706.03762, section 3.2).

    Args:
        embed_dims (int): Channels ``C``.
        num_heads (int): Number of heads, a divisor of ``embed_dims``.
        ratio (int): Unused.
        conv_size (int): Unused.
        grid_dims (int): 2 for maps, 1 for sequences. Defaults to 2.
        init_cfg (dict | None): See mmengine's ``BaseModule``. Defaults to None.
    """

    exports_any_size = True
    needs_grid = False

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        return ops.softmax_attention(q, k, v, mask)


@MODELS.register_module()
class LinformerAttention(_QKVAttention):
    """Softmax attention over learned combinations of keys and values (Linformer, arXiv:2006.04768).

    The projection of the tokens is learned on one grid and resized to other grids, see
    :func:`soft_mm.ops.resize_sequence_projection`.

    Args:
        embed_dims (int): Channels ``C``.
        num_heads (int): Number of heads. They share the projection of the tokens.
        ratio (int): Side of the patch of a landmark in SOFT. It determines the default grid: seven patches per side, as
            in stages 1 to 3 at 224x224 pixels.
        conv_size (int): Unused.
        proj_tokens (int): Number ``p`` of projected keys and values. Defaults to 49.
        grid (Sequence[int] | None): Grid on which the projection is learned, ``(H, W)`` or ``(n,)``. The backbone
            passes the grid of its ``img_size``. Defaults to None: ``7 * ratio`` tokens per side.
        grid_dims (int): 2 for maps, 1 for sequences. Defaults to 2.
        init_cfg (dict | None): See mmengine's ``BaseModule``. Defaults to None.

    Raises:
        ValueError: If an option is out of its range.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        ratio: int,
        conv_size: int,
        proj_tokens: int = 49,
        grid: Sequence[int] | None = None,
        grid_dims: int = 2,
        init_cfg: InitCfg = None,
    ) -> None:
        super().__init__(embed_dims, num_heads, ratio, conv_size, grid_dims, init_cfg)
        check_integer('proj_tokens', proj_tokens)
        grid = (_PATCHES * ratio,) * grid_dims if grid is None else grid
        if not (isinstance(grid, (list, tuple)) and len(grid) == grid_dims and all(map(is_integer, grid))):
            raise ValueError(f'grid={grid!r}: expected {grid_dims} integers >= 1, because grid_dims={grid_dims}')
        rows, columns = grid if grid_dims == 2 else (1, *grid)
        for name in ('key_weight', 'value_weight'):
            weight = nn.Parameter(torch.empty(proj_tokens, rows, columns))
            nn.init.normal_(weight, std=(rows * columns) ** -0.5)
            self.register_parameter(name, weight)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        # Masked keys and values are 0 already, so they add nothing to the combinations.
        weights = (ops.resize_sequence_projection(weight, grid) for weight in (self.key_weight, self.value_weight))
        return ops.linformer_attention(q, k, v, *weights)


@MODELS.register_module()
class PerformerAttention(_QKVAttention):
    """Softmax attention by positive orthogonal random features (FAVOR+; Performer, arXiv:2009.14794).

    Args:
        embed_dims (int): Channels ``C``.
        num_heads (int): Number of heads. They share the features.
        ratio (int): Unused.
        conv_size (int): Unused.
        num_features (int): Number of random features. Defaults to 49.
        seed (int): Seed of the features. Defaults to 0.
        redraw_interval (int | None): Number of forward passes in training after which the features are redrawn.
            Defaults to None: never.
        grid_dims (int): 2 for maps, 1 for sequences. Defaults to 2.
        init_cfg (dict | None): See mmengine's ``BaseModule``. Defaults to None.

    Raises:
        ValueError: If an option is out of its range.
    """

    needs_grid = False
    features: Tensor

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        ratio: int,
        conv_size: int,
        num_features: int = 49,
        seed: int = 0,
        redraw_interval: int | None = None,
        grid_dims: int = 2,
        init_cfg: InitCfg = None,
    ) -> None:
        super().__init__(embed_dims, num_heads, ratio, conv_size, grid_dims, init_cfg)
        check_integer('num_features', num_features)
        if redraw_interval is not None:
            check_integer('redraw_interval', redraw_interval)
        check_integer('seed', seed, minimum=0, maximum=MAX_SEED)
        self.redraw_interval = redraw_interval
        self.forwards = 0
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer('features', ops.orthogonal_features(num_features, self.head_dims, generator, 'cpu'))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        # Gradient checkpointing repeats the forward pass in the backward pass, with the same features.
        if self.training and self.redraw_interval and _backward_pass() == -1:
            if self.forwards == self.redraw_interval:
                self.redraw()
            self.forwards += 1
        return ops.performer_attention(q, k, v, self.features, mask=mask)

    def redraw(self) -> None:
        """Redraw the features from PyTorch's global generator."""
        # A new tensor instead of an in-place change, because a backward pass may still need the old one.
        drawn = ops.orthogonal_features(self.features.shape[0], self.features.shape[1], device=self.features.device)
        self.features = drawn.to(self.features.dtype)
        self.forwards = 0


@MODELS.register_module()
class NystromAttention(_QKVAttention):
    """Nystrom approximation of softmax attention, with a local branch (Nystromformer, arXiv:2102.03902).

    Args:
        embed_dims (int): Channels ``C``.
        num_heads (int): Number of heads.
        ratio (int): Unused.
        conv_size (int): Side of the filters of the local branch, one per head, odd.
        num_landmarks (int): Largest number of landmarks, which are means over the cells of a grid or the segments of a
            sequence. Defaults to 49.
        iterations (int): Number of iterations of the pseudo-inverse, at most 30: more only add rounding errors, which
            grow without bound. Defaults to 6, as in the paper.
        grid_dims (int): 2 for maps, 1 for sequences. Defaults to 2.
        init_cfg (dict | None): See mmengine's ``BaseModule``. Defaults to None.

    Raises:
        ValueError: If an option is out of its range.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        ratio: int,
        conv_size: int,
        num_landmarks: int = 49,
        iterations: int = 6,
        grid_dims: int = 2,
        init_cfg: InitCfg = None,
    ) -> None:
        super().__init__(embed_dims, num_heads, ratio, conv_size, grid_dims, init_cfg)
        check_integer('num_landmarks', num_landmarks)
        check_integer('iterations', iterations, maximum=30)
        self.num_landmarks = num_landmarks
        self.iterations = iterations
        self.local = LocalBranch(num_heads, conv_size, grid_dims)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        coarse = ops.pooled_grid(grid, self.num_landmarks)
        if mask is None:
            query_landmarks, key_landmarks = (ops.mean_landmarks(tokens, grid, coarse) for tokens in (q, k))
            return ops.nystrom_attention(q, k, v, query_landmarks, key_landmarks, self.iterations)
        takes_part = mask.unsqueeze(1).to(compute_dtype(q))
        query_landmarks, _ = ops.mean_present_landmarks(q, takes_part, grid, coarse)
        key_landmarks, present = ops.mean_present_landmarks(k, takes_part, grid, coarse)
        landmarks = query_landmarks.to(q.dtype), key_landmarks.to(k.dtype)
        return ops.nystrom_attention(q, k, v, *landmarks, self.iterations, mask, present.squeeze(1) > 0)


@MODELS.register_module()
class SpatialReductionAttention(BaseAttention):
    """Softmax attention whose keys and values come from a coarser grid (PVT, arXiv:2102.12122, section 3.3).

    A strided convolution and a LayerNorm produce the tokens of the coarser grid. With a ratio of 1 there are neither.

    Args:
        embed_dims (int): Channels ``C``.
        num_heads (int): Number of heads.
        ratio (int): Kernel and stride of the convolution. A side of the grid that is shorter is stretched to this
            length.
        conv_size (int): Unused.
        grid_dims (int): 2 for maps, 1 for sequences. Defaults to 2.
        init_cfg (dict | None): See mmengine's ``BaseModule``. Defaults to None.
    """

    def __init__(
        self, embed_dims: int, num_heads: int, ratio: int, conv_size: int, grid_dims: int = 2, init_cfg: InitCfg = None
    ) -> None:
        super().__init__(embed_dims, num_heads, ratio, conv_size, grid_dims, init_cfg)
        self.kernel = patch_sides(ratio, grid_dims)
        self.q = nn.Linear(embed_dims, embed_dims)
        if ratio > 1:
            self.reduction = nn.Conv2d(embed_dims, embed_dims, self.kernel, self.kernel)
            self.norm = nn.LayerNorm(embed_dims)
        self.kv = nn.Linear(embed_dims, 2 * embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)

    def project(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, ...]:
        """Project tokens ``(B, n, C)`` to queries ``(B, h, n, d)``. Returns the queries and the tokens themselves."""
        return split_heads(call_linear(self.q, x), self.num_heads), x

    def mask_projected(self, projected: tuple[Tensor, ...], mask: Tensor) -> tuple[Tensor, ...]:
        """Return the projected tensors: the second has the tokens themselves, which are 0 already."""
        return projected

    def attend(self, q: Tensor, x: Tensor, grid: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        k, v, _ = self.reduce(x, grid)
        if mask is not None and max(self.kernel) > 1:
            mask = ops.present_patches(mask, grid, self.kernel, torch.float32).squeeze(1) > 0
        return ops.softmax_attention(q, k, v, mask)

    def reduce(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Compute keys and values on the coarser grid.

        Args:
            x (Tensor): Tokens ``(B, n, C)``.
            grid (tuple[int, int]): Grid of the tokens.

        Returns:
            tuple[Tensor, Tensor, tuple[int, int]]: Keys and values, each ``(B, h, m, d)``, and the coarser grid.
        """
        if max(self.kernel) > 1:
            maps = x.transpose(1, 2).unflatten(2, grid)
            size = tuple(max(side, least) for side, least in zip(grid, self.kernel))
            if size != grid:
                maps = F.interpolate(maps, size=size, mode='nearest')
            maps = self.reduction(maps)
            grid = (maps.shape[-2], maps.shape[-1])
            x = self.norm(maps.flatten(2).transpose(1, 2))
        k, v = (split_heads(part, self.num_heads) for part in call_linear(self.kv, x).chunk(2, dim=-1))
        return k, v, grid

    def rows(self, x: Tensor, grid: Sequence[int], points: list[int] | None) -> Tensor:
        """Compute rows of the attention matrix or their mean, see :meth:`BaseAttention.rows`.

        The weight of a coarse token is shared equally by the tokens of its patch. Tokens outside all patches have the
        weight 0.
        """
        grid = self.map_grid(grid, x.shape[1])
        with torch.no_grad():
            q, _ = self.project(x, grid)
            k, v, coarse = self.reduce(x, grid)
        rows = value_gradients(lambda values: F.scaled_dot_product_attention(q, k, values), v, points)
        maps = rows.unflatten(-1, coarse)
        for dim, side, patch in zip((-2, -1), grid, self.kernel):
            # A side that is shorter than the patch was stretched, so its single patch has fewer tokens.
            cells = min(side, patch)
            maps = maps.repeat_interleave(cells, dim) / cells
        return F.pad(maps, (0, grid[1] - maps.shape[-1], 0, grid[0] - maps.shape[-2]))


@MODELS.register_module()
class GaussianKernelAttention(SharedQKAttention):
    """The Gaussian kernel between all tokens, without decomposition (SOFT, section 3.1).

    The paper reports that it hardly trains. Projections and local branch are as in :class:`SoftmaxFreeAttention`.

    Args:
        embed_dims (int): Channels ``C``.
        num_heads (int): Number of heads.
        ratio (int): Unused.
        conv_size (int): Side of the filters of the local branch, odd.
        max_tokens (int): Largest number of tokens. It bounds the memory, which is ``n x n`` numbers per head. Defaults
            to 4096.
        grid_dims (int): 2 for maps, 1 for sequences. Defaults to 2.
        init_cfg (dict | None): See mmengine's ``BaseModule``. Defaults to None.

    Raises:
        ValueError: If an option is out of its range. In the forward pass: if there are more than ``max_tokens`` tokens.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        ratio: int,
        conv_size: int,
        max_tokens: int = 4096,
        grid_dims: int = 2,
        init_cfg: InitCfg = None,
    ) -> None:
        super().__init__(embed_dims, num_heads, ratio, conv_size, grid_dims, init_cfg)
        check_integer('max_tokens', max_tokens)
        self.max_tokens = max_tokens
        self.local = LocalBranch(num_heads, conv_size, grid_dims)
        self.proj = WideProjection(embed_dims, embed_dims)

    def attend(self, q: Tensor, v: Tensor, grid: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        n = q.shape[2]
        if n > self.max_tokens:
            raise ValueError(
                f'GaussianKernelAttention: {n} tokens exceed max_tokens={self.max_tokens}; the kernel would hold '
                f'{n}x{n} numbers per head. Use smaller images or another attention, or increase max_tokens'
            )
        # Masked values are 0 already, so they add nothing to the sum. It can exceed the range of float16.
        return ops.gaussian_attention(q, v.float() if v.dtype == torch.float16 else v)

    def rows(self, x: Tensor, grid: Sequence[int], points: list[int] | None) -> Tensor:
        """Compute rows of the kernel or their mean directly from the queries, see :meth:`BaseAttention.rows`."""
        grid = self.map_grid(grid, x.shape[1])
        with torch.no_grad():
            q, _ = self.project(x, grid)
            if points is None:
                # In parts, so that nothing of size n x n is formed.
                parts = (ops.gaussian_kernel(part, q).sum(2, keepdim=True) for part in q.split(_QUERIES, dim=2))
                rows = functools.reduce(torch.add, parts) / q.shape[2]
            else:
                rows = ops.gaussian_kernel(q[:, :, points], q)
            return rows[0].transpose(0, 1).unflatten(-1, grid)
