"""Attention modules: softmax-free attention of stages 1 to 3, and the multi-head attention of stage 4.

An attention of stages 1 to 3 is built as ``Type(embed_dims, num_heads, ratio, conv_size, **own_options)`` and called as
``module(tokens, grid)``, tokens ``(B, n, C)`` in and out. The grid is ``(H, W)``, or with ``grid_dims=1`` that of a
sequence, ``(n,)``.
"""

import inspect
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.model import BaseModule

from soft_mm import ops
from soft_mm.ops.attention import check_count, check_solver
from soft_mm.registry import MODELS

# What the backbone gives to every attention.
_SHAPE = ('embed_dims', 'num_heads', 'ratio', 'conv_size')
SAMPLERS = ('conv', 'mean', 'random')


def check_shape(embed_dims, num_heads, ratio, conv_size, grid_dims):
    """Raise a ``ValueError`` that names what is allowed if what every attention is given does not fit."""
    if embed_dims % num_heads or ratio < 1 or conv_size % 2 == 0:
        raise ValueError(
            f'embed_dims={embed_dims}, num_heads={num_heads}, ratio={ratio}, conv_size={conv_size}: the heads must '
            'divide the width, the ratio be 1 or more, and the filters odd'
        )
    if grid_dims not in (1, 2):
        raise ValueError(f'grid_dims={grid_dims!r} must be 2 (maps) or 1 (sequences)')


def map_kernel(size, grid_dims):
    """Sides of a filter of a map: a sequence is a map of one row."""
    return (size, size) if grid_dims == 2 else (1, size)


def local_conv(num_heads, conv_size, grid_dims):
    """The filters of the local branch, one a head."""
    rows, columns = map_kernel(conv_size, grid_dims)
    padding = (rows // 2, columns // 2)
    return nn.Conv2d(num_heads, num_heads, (rows, columns), padding=padding, groups=num_heads, bias=False)


def split_heads(x, num_heads):
    """Tokens ``(B, n, C)`` as those of heads, ``(B, h, n, d)``."""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


def as_map(grid, grid_dims, tokens):
    """A grid as that of a map, ``(1, n)`` for a sequence.

    Raises:
        ValueError: for a grid with another number of sides than the attention was built for, or of cells than tokens.
    """
    if len(grid) != grid_dims:
        raise ValueError(f'the grid {tuple(grid)} has {len(grid)} sides; this attention has grid_dims={grid_dims}')
    if math.prod(grid) != tokens:
        raise ValueError(f'{tokens} tokens are not the cells of the grid {tuple(grid)}')
    return tuple(grid) if grid_dims == 2 else (1, *grid)


@MODELS.register_module()
class SoftmaxFreeAttention(BaseModule):
    """Attention with a Gaussian kernel in place of softmax, linear in the tokens while the landmarks are held.

    Queries and keys are one projection, so that the kernel is symmetric. See
    :func:`soft_mm.ops.softmax_free_attention` and :func:`soft_mm.ops.normalized_softmax_free_attention`. A depthwise
    convolution of the values is added per head.

    Sources: SOFT (arXiv:2110.11945, section 3), SOFT++ (arXiv:2207.03341, section 3).

    Args:
        embed_dims (int): channels ``C`` of the tokens.
        num_heads (int): heads, a divisor of ``embed_dims``.
        ratio (int): side of the patch of tokens that becomes one landmark.
        conv_size (int): side of the filters of the local branch, odd.
        normalized (bool): the symmetrically normalised attention of SOFT++. Defaults to False.
        solver (str): ``'newton'``, the authors' truncated Newton inverse; ``'cholesky'``, the ridge inverse solved
            directly; or ``'svd'``, the exact pseudo-inverse, slow. Defaults to ``'newton'``.
        newton_iterations (int): iterations of ``'newton'``. Defaults to 20.
        newton_backward (str): gradient of the plain ``'newton'`` form: ``'one_step'``, the authors', or ``'exact'``.
            Every other form differentiates what it computed. Defaults to ``'one_step'``.
        max_landmarks (int | None): bound on the number of landmarks, by average pooling of their grid. None is the
            authors' behaviour: the landmarks grow with the tokens. Defaults to None.
        ridge (float): added to the diagonal of the landmarks' kernel, the normalised ``'newton'`` form excepted,
            which has none. Defaults to 0.01, the authors'.
        sampler (str): of the landmarks, one a patch: ``'conv'``, the strided convolution with LayerNorm and GELU;
            ``'mean'``, the mean query of the patch; ``'random'``, as many queries drawn anew at each forward in
            training, and always the same in evaluation. Defaults to ``'conv'``.
        seed (int): of ``'random'`` in evaluation. Defaults to 0.
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
        normalized=False,
        solver='newton',
        newton_iterations=20,
        newton_backward='one_step',
        max_landmarks=None,
        ridge=0.01,
        sampler='conv',
        seed=0,
        grid_dims=2,
        init_cfg=None,
    ):
        super().__init__(init_cfg)
        check_solver(solver, newton_iterations, newton_backward)
        check_shape(embed_dims, num_heads, ratio, conv_size, grid_dims)
        if sampler not in SAMPLERS:
            raise ValueError(f'sampler={sampler!r} is unknown; choose one of {SAMPLERS}')
        if not isinstance(normalized, bool):
            raise ValueError(f'normalized={normalized!r} must be True or False')
        if max_landmarks is not None and (
            not isinstance(max_landmarks, int) or isinstance(max_landmarks, bool) or max_landmarks < 1
        ):
            raise ValueError(f'max_landmarks={max_landmarks!r} must be None (no bound) or a whole number from 1 up')
        check_count('seed', seed, least=0)
        self.num_heads = num_heads
        self.head_dims = embed_dims // num_heads
        self.normalized = normalized
        self.solver = solver
        self.newton_iterations = newton_iterations
        self.newton_backward = newton_backward
        if isinstance(ridge, bool) or not isinstance(ridge, (int, float)) or not 0 < ridge < math.inf:
            raise ValueError(f'ridge={ridge!r} must be a positive number')
        self.max_landmarks = max_landmarks
        self.ridge = ridge
        self.sampler = sampler
        self.seed = seed
        self.ratio = ratio
        self.grid_dims = grid_dims
        self.qv = nn.Linear(embed_dims, 2 * embed_dims)
        if sampler == 'conv':
            kernel = map_kernel(ratio, grid_dims)
            self.landmark = nn.Conv2d(self.head_dims, self.head_dims, kernel, stride=kernel, bias=False)
            self.landmark_norm = nn.LayerNorm(self.head_dims)
        self.local = local_conv(num_heads, conv_size, grid_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)

    def landmarks(self, q, grid):
        """Landmarks of queries as projected.

        Args:
            q (Tensor): ``(B, h, n, d)``.
            grid (tuple[int, int]): ``(H, W)``, or ``(1, n)``.

        Returns:
            tuple[Tensor, float]: landmarks ``(B, h, m, d)``, and how many each stands for of those that there would
            be without a bound.
        """
        # Queries are divided by d^(1/4). What is made of them is scaled in their place, which saves a pass over them.
        scale = self.head_dims**-0.25
        if self.sampler == 'conv':
            norm = self.landmark_norm
            sampled, sampled_grid = ops.conv_landmarks(
                q, grid, self.landmark.weight * scale, norm.weight, norm.bias, norm.eps
            )
            return ops.pool_landmarks(sampled, sampled_grid, self.max_landmarks)
        sampled_grid = tuple(max(side // r, 1) for side, r in zip(grid, map_kernel(self.ratio, self.grid_dims)))
        wide = q.to(torch.promote_types(q.dtype, torch.float32))
        if self.sampler == 'mean':
            sampled = ops.mean_landmarks(wide, grid, sampled_grid) * scale
            return ops.pool_landmarks(sampled, sampled_grid, self.max_landmarks)
        unbounded = sampled_grid[0] * sampled_grid[1]
        count = unbounded if self.max_landmarks is None else min(unbounded, self.max_landmarks)
        generator = None if self.training else torch.Generator().manual_seed(self.seed)
        return ops.random_landmarks(wide, count, generator) * scale, unbounded / count

    def attend(self, q, v, grid):
        """The attention core, without projections and local branch.

        Args:
            q (Tensor): queries as projected, ``(B, h, n, d)``.
            v (Tensor): values ``(B, h, n, d)``.
            grid (tuple[int, int]): ``(H, W)`` with ``n = H * W``, or ``(1, n)``.

        Returns:
            Tensor: ``(B, h, n, d)``.
        """
        landmarks, merged = self.landmarks(q, grid)
        scale = self.head_dims**-0.25
        options = dict(solver=self.solver, newton_iterations=self.newton_iterations, ridge=self.ridge, scale=scale)
        if self.normalized:
            # Each pooled landmark stands for `merged` of them, whose rows the degree would have summed.
            return ops.normalized_softmax_free_attention(q, landmarks, v, degree_scale=merged, **options)
        return ops.softmax_free_attention(q, landmarks, v, newton_backward=self.newton_backward, **options)

    def forward(self, x, grid):
        """Tokens ``(B, n, C)`` on ``grid`` in, tokens ``(B, n, C)`` out."""
        grid = as_map(grid, self.grid_dims, x.shape[1])
        q, v = self.qv(x).chunk(2, dim=-1)
        out = self.attend(split_heads(q, self.num_heads), split_heads(v, self.num_heads), grid)
        out = ops.local_branch(v, grid, self.local.weight) + out.transpose(1, 2).reshape(x.shape)
        return self.proj(out)

    def extra_repr(self):
        options = (
            'num_heads',
            'normalized',
            'solver',
            'newton_iterations',
            'newton_backward',
            'max_landmarks',
            'ridge',
            'sampler',
            'seed',
            'grid_dims',
        )
        return ', '.join(f'{option}={getattr(self, option)!r}' for option in options)


class MultiheadAttention(BaseModule):
    """Ordinary softmax attention of stage 4, through PyTorch's scaled dot-product attention.

    Args:
        embed_dims (int): channels ``C``.
        num_heads (int): heads, a divisor of ``embed_dims``.
        drop_rate (float): dropout of the output. Defaults to 0.
    """

    def __init__(self, embed_dims, num_heads, drop_rate=0.0):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x):
        """Tokens ``(B, n, C)`` in and out."""
        B, n, C = x.shape
        q, k, v = self.qkv(x).reshape(B, n, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.drop(self.proj(out.transpose(1, 2).reshape(B, n, C)))


def _takes_shape(kind):
    return inspect.isclass(kind) and set(_SHAPE) <= set(inspect.signature(kind).parameters)


def _needs_no_more(kind):
    try:
        inspect.signature(kind).bind(**dict.fromkeys(_SHAPE))
    except TypeError:
        return False
    return True


def _registered_attentions():
    registered = {**(MODELS.parent.module_dict if MODELS.parent else {}), **MODELS.module_dict}
    return sorted(name for name, kind in registered.items() if _takes_shape(kind) and _needs_no_more(kind))


def build_attention(cfg, embed_dims, num_heads, ratio, conv_size, grid=None):
    """Build the attention of one stage from its config.

    Args:
        cfg (dict): ``type``, a registered name or a class, and its own options. Keys left out take the type's
            defaults, and the type itself ``'SoftmaxFreeAttention'``.
        embed_dims (int): channels.
        num_heads (int): heads.
        ratio (int): side of a landmark's patch.
        conv_size (int): side of the local filters.
        grid (tuple[int, ...] | None): that on which a type with the option ``grid`` learns, unless its config says
            another. Defaults to None, the type's own.

    Raises:
        ValueError: for an unknown type or a value out of range.
        TypeError: for a key that the type does not have.
    """
    options = dict(cfg)
    kind = options.pop('type', 'SoftmaxFreeAttention')
    # What is no registered name may still be the path of a class, or of something else.
    cls = MODELS.get(kind) if isinstance(kind, str) and kind else kind
    if not _takes_shape(cls):
        what = 'is unknown' if cls is None else f'does not take {list(_SHAPE)}'
        raise ValueError(f'attention type {kind!r} {what}; choose one of {_registered_attentions()}')
    own = [name for name in inspect.signature(cls).parameters if name not in _SHAPE]
    unknown = sorted(set(options) - set(own))
    if unknown:
        raise TypeError(
            f'attention keys {unknown} are unknown to {cls.__name__}; allowed are {["type", *own]} (a config that '
            'inherits those of another type leaves them out by `_delete_=True`)'
        )
    if 'grid' in own and grid is not None:
        options.setdefault('grid', grid)
    return cls(embed_dims=embed_dims, num_heads=num_heads, ratio=ratio, conv_size=conv_size, **options)
