"""Base class of all attentions, and construction of an attention from its config."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from soft_mm import ops
from soft_mm.ops.checks import check_integer, is_integer
from soft_mm.ops.kernel import is_autocast_enabled, no_autocast
from soft_mm.ops.linear import linear
from soft_mm.ops.recording import has_variable
from soft_mm.registry import MODELS, find_registered

from ..fused_layers import call_linear

# Largest seed of torch.Generator.
MAX_SEED = 2**64 - 1
# Arguments that the backbone passes to every attention.
_SHAPE = ('embed_dims', 'num_heads', 'ratio', 'conv_size')
InitCfg = dict[str, Any] | list[dict[str, Any]] | None


def patch_sides(size: int, grid_dims: int) -> tuple[int, int]:
    """Return the sides of a patch or a filter.

    Args:
        size (int): Side in tokens.
        grid_dims (int): 2 for maps, 1 for sequences. A sequence is a map with one row.

    Returns:
        tuple[int, int]: Rows and columns.
    """
    return (size, size) if grid_dims == 2 else (1, size)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Split the channels of tokens into heads.

    Args:
        x (Tensor): ``(B, n, C)``.
        num_heads (int): Number of heads ``h``, a divisor of ``C``.

    Returns:
        Tensor: ``(B, h, n, d)``.
    """
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Join the heads of tokens, the inverse of :func:`split_heads`.

    Args:
        x (Tensor): ``(B, h, n, d)``.

    Returns:
        Tensor: ``(B, n, C)``.
    """
    return x.transpose(1, 2).flatten(2)


class LocalBranch(nn.Conv2d):
    """Depthwise convolution of the values with one filter per head, see :func:`soft_mm.ops.local_branch`.

    Args:
        num_heads (int): Number of heads.
        conv_size (int): Side of the filters, odd.
        grid_dims (int): 2 for maps, 1 for sequences.
    """

    def __init__(self, num_heads: int, conv_size: int, grid_dims: int) -> None:
        rows, columns = patch_sides(conv_size, grid_dims)
        padding = (rows // 2, columns // 2)
        super().__init__(num_heads, num_heads, (rows, columns), padding=padding, groups=num_heads, bias=False)

    def forward(self, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """Convolve values ``(B, n, C)`` on ``grid`` and return ``(B, n, C)``."""
        return ops.local_branch(v, grid, self.weight)


class TokenAttention(BaseModule):
    """Base class of all attentions, also of those between two sets of tokens: heads, grids and masks.

    Args:
        embed_dims (int): Channels ``C`` of the tokens.
        num_heads (int): Number of heads, a divisor of ``embed_dims``.
        grid_dims (int): 2 for maps with the grid ``(H, W)``, 1 for sequences with the grid ``(n,)``.
        init_cfg (dict | None): See mmengine's ``BaseModule``.

    Raises:
        ValueError: If an argument is out of its range.
    """

    exports_any_size = False

    def __init__(self, embed_dims: int, num_heads: int, grid_dims: int, init_cfg: InitCfg) -> None:
        super().__init__(init_cfg)
        for name, value in dict(embed_dims=embed_dims, num_heads=num_heads).items():
            check_integer(name, value)
        if embed_dims % num_heads:
            raise ValueError(f'embed_dims={embed_dims}: expected a multiple of num_heads={num_heads}')
        if not is_integer(grid_dims) or grid_dims > 2:
            raise ValueError(f'grid_dims={grid_dims!r}: expected 2 (maps) or 1 (sequences)')
        self.num_heads = num_heads
        self.head_dims = embed_dims // num_heads
        self.grid_dims = grid_dims

    def map_grid(self, grid: Sequence[int], num_tokens: int) -> tuple[int, int]:
        """Check a grid, and convert it to the grid of a map.

        Args:
            grid (tuple[int, ...]): ``(H, W)``, or ``(n,)`` with ``grid_dims=1``.
            num_tokens (int): Number of tokens.

        Returns:
            tuple[int, int]: ``(H, W)``, or ``(1, n)``.

        Raises:
            NotImplementedError: If the sides of the grid are variables of an export, which this attention cannot have.
            ValueError: If the grid does not have ``grid_dims`` sides or ``num_tokens`` cells.
        """
        if len(grid) != self.grid_dims:
            expected = '(H, W)' if self.grid_dims == 2 else '(n,)'
            raise ValueError(f'grid={tuple(grid)}: expected {expected}, because grid_dims={self.grid_dims}')
        if math.prod(grid) != num_tokens:
            raise ValueError(f'grid={tuple(grid)}: expected {num_tokens} cells, one per token')
        if has_variable(grid) and not self.exports_any_size:
            raise NotImplementedError(
                f'{type(self).__name__} with these options can be exported for one image size only: leave height and '
                'width fixed, or use another attention'
            )
        return (grid[0], grid[1]) if self.grid_dims == 2 else (1, grid[0])


def mask_tokens(x: Tensor, mask: Tensor) -> Tensor:
    """Check a mask, and set the tokens that do not take part to 0, whatever they hold.

    Args:
        x (Tensor): Tokens ``(B, n, C)``.
        mask (Tensor): ``(B, n)``, True where a token takes part.

    Returns:
        Tensor: ``(B, n, C)``.

    Raises:
        ValueError: If the mask has another dtype or shape.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != x.shape[:2]:
        given = f'{mask.dtype} {tuple(mask.shape)}' if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f'mask: {given}: expected a tensor torch.bool {tuple(x.shape[:2])} (B, n), True where a token takes part'
        )
    return x.masked_fill(~mask.unsqueeze(-1), 0)


def mask_heads(x: Tensor, mask: Tensor) -> Tensor:
    """Set projected tokens ``(B, h, n, d)`` that do not take part to 0, by a mask ``(B, n)``."""
    return x.masked_fill(~mask[:, None, :, None], 0)


class BaseAttention(TokenAttention):
    """Base class of self-attentions: project the tokens, attend, add the local branch, project the output.

    A subclass defines :meth:`project`, :meth:`attend` and the output projection ``proj``, a linear layer. It may set
    ``local`` to a :class:`LocalBranch`. The benchmarks also call :meth:`project` and :meth:`attend` directly, and the
    attention maps call :meth:`rows`. It overrides ``exports_any_size`` if it can be exported with variable sides. It
    sets ``needs_grid`` to False if the tokens need not be the cells of a grid: it then can take the class
    token of stage 4. It supports masks if its :meth:`attend` has the argument ``mask``.

    Args:
        embed_dims (int): Channels ``C`` of the tokens.
        num_heads (int): Number of heads, a divisor of ``embed_dims``.
        ratio (int): Side of the patch of tokens that becomes one landmark, at least 1.
        conv_size (int): Side of the filters of the local branch, odd.
        grid_dims (int): 2 for maps with the grid ``(H, W)``, 1 for sequences with the grid ``(n,)``.
        init_cfg (dict | None): See mmengine's ``BaseModule``.

    Raises:
        ValueError: If an argument is out of its range.
    """

    needs_grid = True
    _takes_mask = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._takes_mask = 'mask' in inspect.signature(cls.attend).parameters

    def __init__(
        self, embed_dims: int, num_heads: int, ratio: int, conv_size: int, grid_dims: int, init_cfg: InitCfg
    ) -> None:
        super().__init__(embed_dims, num_heads, grid_dims, init_cfg)
        for name, value in dict(ratio=ratio, conv_size=conv_size).items():
            check_integer(name, value)
        if conv_size % 2 == 0:
            raise ValueError(f'conv_size={conv_size}: expected an odd integer')
        self.local: LocalBranch | None = None

    def project(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, ...]:
        """Project tokens to the inputs of :meth:`attend`.

        Args:
            x (Tensor): Tokens ``(B, n, C)``.
            grid (tuple[int, int]): ``(H, W)`` with ``n = H * W``. A sequence has the grid ``(1, n)``.

        Returns:
            tuple[Tensor, ...]: Inputs of :meth:`attend`, with the queries ``(B, h, n, d)`` first. With a local branch,
            the values ``(B, h, n, d)`` must be last.

        Raises:
            NotImplementedError: In the base class.
        """
        raise NotImplementedError

    def attend(self, *projected: Tensor, grid: tuple[int, int]) -> Tensor:
        """Compute the attention, without local branch and output projection.

        A subclass that supports masks has a third argument ``mask``, ``(B, n)`` or None. With a mask, the projected
        tokens that do not take part are 0, see :meth:`mask_projected`.

        Args:
            *projected (Tensor): Output of :meth:`project`.
            grid (tuple[int, int]): ``(H, W)`` with ``n = H * W``. A sequence has the grid ``(1, n)``.

        Returns:
            Tensor: ``(B, h, n, d)``.

        Raises:
            NotImplementedError: In the base class.
        """
        raise NotImplementedError

    def mask_projected(self, projected: tuple[Tensor, ...], mask: Tensor) -> tuple[Tensor, ...]:
        """Set the projected tokens that do not take part to 0.

        Args:
            projected (tuple[Tensor, ...]): Output of :meth:`project`, ``(B, h, n, d)`` each. A subclass whose output
                differs overrides this method.
            mask (Tensor): ``(B, n)``, True where a token takes part.

        Returns:
            tuple[Tensor, ...]: Inputs of :meth:`attend`.
        """
        return tuple(mask_heads(part, mask) for part in projected)

    def forward(self, x: Tensor, grid: Sequence[int], mask: Tensor | None = None) -> Tensor:
        """Compute the attention with local branch and output projection.

        Args:
            x (Tensor): Tokens ``(B, n, C)``.
            grid (tuple[int, ...]): ``(H, W)``, or ``(n,)`` with ``grid_dims=1``.
            mask (Tensor | None): ``(B, n)`` bool, True where a token takes part. The other tokens, such as padding, may
                hold anything, NaN included: they change no output of a token that takes part and get no gradient. Their
                own outputs have no meaning. In an image without a token that takes part, all outputs are the bias of
                the output projection. Defaults to None: all tokens take part.

        Returns:
            Tensor: Tokens ``(B, n, C)``.

        Raises:
            NotImplementedError: If the sides of the grid are variables of an export, which this attention cannot have,
                or if a mask is given to a subclass that does not support it.
            ValueError: If the grid does not fit the tokens or ``grid_dims``, or the mask does not fit the tokens.
        """
        grid = self.map_grid(grid, x.shape[1])
        options: dict[str, Any] = dict(grid=grid)
        if mask is None:
            projected = self.project(x, grid)
        else:
            if not self._takes_mask:
                raise NotImplementedError(
                    f'{type(self).__name__} supports no mask: add the argument `mask` to its method `attend`, or leave '
                    'the mask out'
                )
            projected = self.mask_projected(self.project(mask_tokens(x, mask), grid), mask)
            options['mask'] = mask
        out = merge_heads(self.attend(*projected, **options))
        if self.local is not None:
            out = out + self.local(merge_heads(projected[-1]), grid)
        return call_linear(self.proj, out)

    def rows(self, x: Tensor, grid: Sequence[int], points: list[int] | None) -> Tensor:
        """Compute rows of the attention matrix or their mean, without the local branch.

        The output is linear in the values, so a row is the gradient of the output with respect to the values. Nothing
        of size ``n x n`` is formed. The last output of :meth:`project` must be the values.

        Args:
            x (Tensor): Tokens ``(1, n, C)`` of one image.
            grid (tuple[int, ...]): ``(H, W)``, or ``(n,)`` with ``grid_dims=1``.
            points (list[int] | None): Indices of the query tokens. None: the mean row of all query tokens.

        Returns:
            Tensor: ``(len(points), h, H, W)``, or ``(1, h, H, W)`` for the mean row.
        """
        grid = self.map_grid(grid, x.shape[1])
        with torch.no_grad():
            *others, v = self.project(x, grid)
        return value_gradients(lambda values: self.attend(*others, values, grid=grid), v, points).unflatten(-1, grid)


class WideProjection(nn.Linear):
    """Linear layer that computes in float32 if its input is float32, also inside autocast and with narrower weights.

    Inside autocast the output is float32, otherwise it has the dtype of the weights.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Project ``(..., C)``."""
        autocast = is_autocast_enabled(x.device.type)
        if x.dtype != torch.float32 or not (autocast or self.weight.dtype != x.dtype):
            return linear(x, self.weight, self.bias)
        with no_autocast(x):
            out = nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
        return out if autocast else out.to(self.weight.dtype)


class QueryProjection(nn.Linear):
    """Linear layer to scaled queries. The scale ``d^(-1/4)`` is applied to the weights.

    Args:
        embed_dims (int): Channels ``C``.
        head_dims (int): Channels ``d`` of a head.
    """

    def __init__(self, embed_dims: int, head_dims: int) -> None:
        super().__init__(embed_dims, embed_dims)
        self.query_scale = head_dims**-0.25

    def forward(self, x: Tensor, scaled: bool = False) -> Tensor:
        """Project tokens ``(B, n, C)`` to queries ``(B, n, C)``.

        Args:
            x (Tensor): Tokens.
            scaled (bool): Whether to apply the scale. Defaults to False: the output of ``nn.Linear``, to which the
                adapter of a library may add a term.

        Returns:
            Tensor: Queries.
        """
        if not scaled:
            return super().forward(x)
        return linear(x, self.weight * self.query_scale, self.bias * self.query_scale)


def scaled_queries(layer: nn.Module, x: Tensor, head_dims: int) -> Tensor:
    """Return scaled queries ``(B, n, C)`` of a :class:`QueryProjection`, or of a layer that wraps or replaces it."""
    return layer(x, scaled=True) if isinstance(layer, QueryProjection) else layer(x) * head_dims**-0.25


class QueryValueProjection(nn.Linear):
    """Linear layer to scaled queries (or keys) and values (SOFT, section 3.1).

    The scale ``d^(-1/4)`` of the queries is applied to the weights, which saves a pass over all tokens.

    Args:
        embed_dims (int): Channels ``C`` of queries and values.
        head_dims (int): Channels ``d`` of a head.
        in_dims (int | None): Channels of the tokens. Defaults to None: ``embed_dims``.
    """

    def __init__(self, embed_dims: int, head_dims: int, in_dims: int | None = None) -> None:
        super().__init__(embed_dims if in_dims is None else in_dims, 2 * embed_dims)
        self.query_scale = head_dims**-0.25

    def forward(self, x: Tensor, scaled: bool = False) -> Tensor | tuple[Tensor, ...]:
        """Project tokens ``(B, n, in_dims)`` to queries and values.

        Args:
            x (Tensor): Tokens.
            scaled (bool): Whether to return scaled queries and values, ``(B, n, C)`` each. Defaults to False: the
                output of ``nn.Linear``, to which the adapter of a library may add a term.

        Returns:
            Tensor | tuple[Tensor, ...]: ``(B, n, 2C)``, or with ``scaled`` queries and values.
        """
        if not scaled:
            return super().forward(x)
        (q_weight, v_weight), (q_bias, v_bias) = self.weight.chunk(2), self.bias.chunk(2)
        q = linear(x, q_weight * self.query_scale, q_bias * self.query_scale)
        # A second product, because the local branch would copy values that lie between queries.
        return q, linear(x, v_weight, v_bias)


def scaled_queries_and_values(layer: nn.Module, x: Tensor, head_dims: int) -> tuple[Tensor, ...]:
    """Return scaled queries and values of a :class:`QueryValueProjection`, or of a layer that wraps or replaces it.

    Args:
        layer (nn.Module): The layer.
        x (Tensor): Tokens ``(B, n, in_dims)``.
        head_dims (int): Channels ``d`` of a head.

    Returns:
        tuple[Tensor, ...]: Queries and values, ``(B, n, C)`` each.
    """
    if isinstance(layer, QueryValueProjection):
        return layer(x, scaled=True)
    q, v = layer(x).chunk(2, dim=-1)
    return q * head_dims**-0.25, v


class SharedQKAttention(BaseAttention):
    """Base class of attentions whose queries are also their keys, so their kernel is symmetric (SOFT, section 3.1).

    The arguments are those of :class:`BaseAttention`.
    """

    def __init__(
        self, embed_dims: int, num_heads: int, ratio: int, conv_size: int, grid_dims: int, init_cfg: InitCfg
    ) -> None:
        super().__init__(embed_dims, num_heads, ratio, conv_size, grid_dims, init_cfg)
        self.qv = QueryValueProjection(embed_dims, self.head_dims)

    def project(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, ...]:
        """Project tokens ``(B, n, C)`` to scaled queries and values, each ``(B, h, n, d)``."""
        projected = scaled_queries_and_values(self.qv, x, self.head_dims)
        return tuple(split_heads(part, self.num_heads) for part in projected)


def value_gradients(attend: Callable[[Tensor], Tensor], v: Tensor, points: Sequence[int] | None) -> Tensor:
    """Compute rows of an attention matrix, or their mean, by differentiating the output with respect to the values.

    Args:
        attend (Callable[[Tensor], Tensor]): Attention as a function of its values ``(1, h, n, d)``.
        v (Tensor): Values ``(1, h, n, d)``. Only shape, dtype and device matter.
        points (list[int] | None): Indices of the rows. None: the mean of all rows.

    Returns:
        Tensor: ``(len(points), h, n)``, or ``(1, h, n)`` for the mean.
    """
    # The matrix is the same for all channels, so one channel is enough.
    values = v[..., :1].detach().clone().requires_grad_()
    with torch.enable_grad():
        out = attend(values.expand_as(v).contiguous())[0, ..., 0]
        outputs = [out.mean(1)] if points is None else [out[:, point] for point in points]
        rows = [torch.autograd.grad(output.sum(), values, retain_graph=True)[0] for output in outputs]
    return torch.stack(rows)[:, 0, ..., 0].detach()


def _takes_shape(kind: Any) -> bool:
    if not inspect.isclass(kind):
        return False
    try:
        return set(_SHAPE) <= set(inspect.signature(kind).parameters)
    except ValueError:
        # Classes written in C, such as dict and torch.Tensor, have no signature.
        return False


def _needs_only_shape(kind: Any) -> bool:
    try:
        inspect.signature(kind).bind(**dict.fromkeys(_SHAPE))
    except TypeError:
        return False
    return True


def _registered_attentions() -> list[str]:
    registered = {**(MODELS.parent.module_dict if MODELS.parent else {}), **MODELS.module_dict}
    return sorted(name for name, kind in registered.items() if _takes_shape(kind) and _needs_only_shape(kind))


def build_attention(
    cfg: dict[str, Any], embed_dims: int, num_heads: int, ratio: int, conv_size: int, grid: Sequence[int] | None = None
) -> nn.Module:
    """Build the attention of one stage from its config.

    Args:
        cfg (dict): ``type``, a registered name or a class, and the options of the type. The default type is
            ``'SoftmaxFreeAttention'``. Missing options take the defaults of the type.
        embed_dims (int): Channels ``C``.
        num_heads (int): Number of heads.
        ratio (int): Side of the patch of tokens that becomes one landmark.
        conv_size (int): Side of the filters of the local branch.
        grid (tuple[int, ...] | None): Value of the option ``grid``, for types that have it, unless ``cfg`` sets it.
            Defaults to None: the default of the type.

    Returns:
        nn.Module: The attention, called as ``attention(tokens, grid)`` or ``attention(tokens, grid, mask)``.

    Raises:
        ValueError: If the type is unknown or the value of an option is out of its range.
        TypeError: If the type does not have one of the options, or needs another one.
    """
    options = dict(cfg)
    kind = options.pop('type', 'SoftmaxFreeAttention')
    cls = find_registered(MODELS, kind)
    if not _takes_shape(cls):
        problem = 'is unknown' if cls is None else f'does not take {list(_SHAPE)}'
        raise ValueError(f'attention type {kind!r} {problem}; choose one of {_registered_attentions()}')
    allowed = [name for name in inspect.signature(cls).parameters if name not in _SHAPE]
    unknown = sorted(set(options) - set(allowed), key=str)
    if unknown:
        raise TypeError(
            f'attention keys {unknown} are unknown to {cls.__name__}; allowed are {["type", *allowed]}. If a base '
            'config sets keys of another type, add `_delete_=True` to the attention'
        )
    if 'grid' in allowed and grid is not None:
        options.setdefault('grid', grid)
    options = dict(options, embed_dims=embed_dims, num_heads=num_heads, ratio=ratio, conv_size=conv_size)
    try:
        inspect.signature(cls).bind(**options)
    except TypeError as error:
        raise TypeError(
            f'attention type {kind!r}: {error}; give it, or choose one of {_registered_attentions()}'
        ) from None
    return cls(**options)
