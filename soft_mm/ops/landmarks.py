"""Landmark (bottleneck) tokens: a few tokens per head that represent all tokens."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernel import compute_dtype, without_autocast
from .recording import has_dynamic_side, has_variable, needs_standard_operators


@without_autocast
def project_patches(q: Tensor, grid: tuple[int, int], weight: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Apply a convolution whose kernel equals its stride to the queries of each head.

    The patches do not overlap, so the convolution is one matrix product over flattened patches. Rows and columns that
    do not fill a patch are ignored. A side shorter than one patch is stretched to one patch by nearest neighbours, so
    there is at least one landmark.

    Args:
        q (Tensor): Scaled queries ``(B, h, n, d)`` with ``n = H * W``.
        grid (tuple[int, int]): ``(H, W)``.
        weight (Tensor): ``(d, d, r, r)``, shared by the heads. ``(d, d, 1, r)`` for a sequence, whose grid is
            ``(1, n)``.

    Returns:
        tuple[Tensor, tuple[int, int]]: Tokens ``(B, h, m, d)`` in float32 or wider, and their grid
        ``(max(H // r, 1), max(W // r, 1))`` (for a sequence ``(1, max(n // r, 1))``).
    """
    dtype, d = compute_dtype(q), q.shape[-1]
    patches, out_grid = _cut_patches(q.to(dtype), grid, (int(weight.shape[-2]), int(weight.shape[-1])))
    return F.linear(patches, weight.to(dtype).permute(0, 2, 3, 1).reshape(d, -1)), out_grid


def _cut_patches(tokens: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Return the patches of tokens ``(B, h, n, d)`` as ``(B, h, m, patch size * d)``, and their grid."""
    (B, heads, _, d), (H, W), (rows, columns) = tokens.shape, grid, patch
    maps = tokens.reshape(B, heads, H, W, d)
    if has_variable(grid):
        # An export cannot decide whether a side is shorter than a patch. With the default ratios none is.
        out_h, out_w = H // rows, W // columns
    else:
        out_h, out_w = max(H // rows, 1), max(W // columns, 1)
        for dim, side, r in ((2, H, rows), (3, W, columns)):
            if side < r:
                maps = maps.index_select(dim, torch.arange(r, device=tokens.device) * side // r)
    patches = maps[:, :, : out_h * rows, : out_w * columns].reshape(B, heads, out_h, rows, out_w, columns, d)
    return patches.transpose(3, 4).reshape(B, heads, out_h * out_w, rows * columns * d), (out_h, out_w)


def present_patches(mask: Tensor, grid: tuple[int, int], patch: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return which patches of :func:`project_patches` hold a token that takes part.

    Args:
        mask (Tensor): ``(B, n)``, True where a token takes part.
        grid (tuple[int, int]): Grid of the tokens.
        patch (tuple[int, int]): Rows and columns of a patch.
        dtype (torch.dtype): Dtype of the output.

    Returns:
        Tensor: ``(B, 1, m)`` with ones and zeros.
    """
    return _cut_patches(mask[:, None, :, None].to(dtype), grid, patch)[0].amax(-1)


@without_autocast
def activate_landmarks(tokens: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Apply LayerNorm and GELU to landmark tokens, in float32 or wider.

    Args:
        tokens (Tensor): ``(B, h, m, d)``.
        weight (Tensor): Weight of the LayerNorm, ``(d,)``.
        bias (Tensor): Bias of the LayerNorm, ``(d,)``.
        eps (float): Epsilon of the LayerNorm. Defaults to 1e-5.

    Returns:
        Tensor: ``(B, h, m, d)``.
    """
    tokens = tokens.to(compute_dtype(tokens))
    weight, bias = weight.to(tokens.dtype), bias.to(tokens.dtype)
    return F.gelu(F.layer_norm(tokens, tokens.shape[-1:], weight, bias, eps))


def conv_landmarks(
    q: Tensor, grid: tuple[int, int], weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, tuple[int, int]]:
    """Sample landmarks by a strided convolution: ``GELU(LayerNorm(conv(q)))`` (SOFT, section 3.2).

    Args:
        q (Tensor): Scaled queries ``(B, h, n, d)``.
        grid (tuple[int, int]): ``(H, W)`` with ``n = H * W``.
        weight (Tensor): See :func:`project_patches`.
        norm_weight (Tensor): Weight of the LayerNorm, ``(d,)``.
        norm_bias (Tensor): Bias of the LayerNorm, ``(d,)``.
        eps (float): Epsilon of the LayerNorm. Defaults to 1e-5.

    Returns:
        tuple[Tensor, tuple[int, int]]: Landmarks ``(B, h, m, d)`` in float32 or wider, and their grid, see
        :func:`project_patches`.
    """
    tokens, grid = project_patches(q, grid, weight)
    return activate_landmarks(tokens, norm_weight, norm_bias, eps), grid


def pooled_grid(grid: tuple[int, int], max_landmarks: int) -> tuple[int, int]:
    """Return a grid with at most ``max_landmarks`` cells, close to that number and to the aspect ratio of ``grid``.

    The ideal short side is rounded down or up, whichever keeps the aspect ratio better.

    Args:
        grid (tuple[int, int]): ``(H, W)`` of the landmarks.
        max_landmarks (int): Largest number of cells, at least 1.

    Returns:
        tuple[int, int]: Rows and columns. ``grid`` itself if it has at most ``max_landmarks`` cells.
    """
    H, W = grid
    if H * W <= max_landmarks:
        return grid
    short, long = min(H, W), max(H, W)
    below = max(math.isqrt(short * max_landmarks // long), 1)
    above = min(below + 1, short, max_landmarks)

    def aspect_error(side: int) -> tuple[int, int]:
        """Return the ratio of the aspect ratios, at least 1, as numerator and denominator."""
        terms = min(long, max_landmarks // side) * short, side * long
        return max(terms), min(terms)

    above_error, below_error = aspect_error(above), aspect_error(below)
    better = above_error[0] * below_error[1] < below_error[0] * above_error[1]
    short_out = above if better else below
    long_out = min(long, max_landmarks // short_out)
    return (short_out, long_out) if H <= W else (long_out, short_out)


def pool_landmarks(landmarks: Tensor, grid: tuple[int, int], max_landmarks: int | None) -> tuple[Tensor, float]:
    """Average landmarks over the cells of a coarser grid, so that at most ``max_landmarks`` remain.

    Args:
        landmarks (Tensor): ``(B, h, M, d)``.
        grid (tuple[int, int]): Grid of the landmarks, with ``M`` cells.
        max_landmarks (int | None): Largest number of landmarks. None keeps all.

    Returns:
        tuple[Tensor, float]: Landmarks ``(B, h, m, d)`` and the pool factor ``M / m``. If ``M <= max_landmarks``, these
        are the given tensor itself and 1.
    """
    count = landmarks.shape[2]
    if max_landmarks is None or count <= max_landmarks:
        return landmarks, 1.0
    pooled = mean_landmarks(landmarks, grid, pooled_grid(grid, max_landmarks))
    return pooled, count / pooled.shape[2]


def mean_landmarks(tokens: Tensor, grid: tuple[int, int], out_grid: tuple[int, int]) -> Tensor:
    """Average tokens over the cells of a coarser grid. The cells of a sequence, whose grid is ``(1, n)``, are segments.

    Args:
        tokens (Tensor): ``(B, h, n, d)``.
        grid (tuple[int, int]): Grid of the tokens.
        out_grid (tuple[int, int]): Grid of the landmarks.

    Returns:
        Tensor: ``(B, h, m, d)``. If the grids are equal, the given tensor itself.
    """
    if tuple(grid) == tuple(out_grid):
        return tokens
    B, heads, _, d = tokens.shape
    if needs_standard_operators() or torch.are_deterministic_algorithms_enabled():
        # ONNX has no adaptive pooling, and CUDA has no deterministic gradient of it.
        rows, columns = (
            _cell_weights(torch.arange(cells, device=tokens.device), cells, side, tokens.dtype)
            for cells, side in zip(out_grid, grid)
        )
        maps = torch.matmul(rows, tokens.reshape(B, heads, grid[0], grid[1] * d))
        return torch.matmul(columns, maps.unflatten(-1, (grid[1], d))).flatten(2, 3)
    maps = tokens.reshape(B * heads, *grid, d).permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(maps, out_grid).flatten(2).transpose(1, 2).unflatten(0, (B, heads))


def mean_present_landmarks(
    tokens: Tensor, present: Tensor, grid: tuple[int, int], out_grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Average the tokens that take part over the cells of a coarser grid, see :func:`mean_landmarks`.

    Args:
        tokens (Tensor): ``(B, h, n, d)``, finite.
        present (Tensor): Ones and zeros ``(B, 1, n)``, in float32 or wider: which tokens take part.
        grid (tuple[int, int]): Grid of the tokens.
        out_grid (tuple[int, int]): Grid of the landmarks.

    Returns:
        tuple[Tensor, Tensor]: Landmarks ``(B, h, m, d)`` in float32 or wider, zero in cells without a token that takes
        part; and the mask of the other cells, ``(B, 1, m)`` with ones and zeros.
    """
    return _mean_of_present(lambda x: mean_landmarks(x, grid, out_grid), tokens, present)


def pool_present_landmarks(
    landmarks: Tensor, present: Tensor, grid: tuple[int, int], max_landmarks: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Average the present landmarks as :func:`pool_landmarks` does, or :func:`pool_to_slots` with variable sides.

    The cells are those of the whole grid. Each averages its present landmarks alone.

    Args:
        landmarks (Tensor): ``(B, h, M, d)``, finite.
        present (Tensor): Ones and zeros ``(B, 1, M)``: which landmarks are present.
        grid (tuple[int, int]): Grid of the landmarks, with ``M`` cells.
        max_landmarks (int | None): Largest number of landmarks. None keeps all.

    Returns:
        tuple[Tensor, Tensor, Tensor]: Landmarks ``(B, h, m, d)``, zero where absent; the pool factor ``(B, 1, 1, 1)``,
        the number of present landmarks divided by that of present cells, or 1 if there is none; the mask of the present
        cells, ``(B, 1, m)`` with ones and zeros.
    """
    if max_landmarks is not None and has_dynamic_side(grid):
        bound = max_landmarks
        pooled, cells = _mean_of_present(lambda x: pool_to_slots(x, grid, bound)[0], landmarks, present)
    else:
        pooled, cells = _mean_of_present(lambda x: pool_landmarks(x, grid, max_landmarks)[0], landmarks, present)
    before, after = (mask.sum(-1)[..., None, None].clamp(min=1) for mask in (present, cells))
    return pooled, before / after, cells


def _mean_of_present(average: Callable[[Tensor], Tensor], tokens: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means of the present tokens by a linear ``average`` of all, and which means have such a token."""
    weights = present.unsqueeze(-1)
    share = average(weights)
    filled = share > 0
    return average(tokens * weights) / torch.where(filled, share, 1), filled.to(share.dtype).squeeze(-1)


def _cell_weights(index: Tensor, cells: int | Tensor, side: int, dtype: torch.dtype) -> Tensor:
    """Return the weights ``(len(index), side)`` with which the cells of a side average it, as adaptive pooling does."""
    start = (index * side // cells)[:, None]
    end = ((index + 1) * side + cells - 1).div(cells, rounding_mode='floor')[:, None]
    position = torch.arange(side, device=index.device)
    return ((position >= start) & (position < end)).to(dtype) / (end - start)


def pool_to_slots(landmarks: Tensor, grid: tuple[int, int], max_landmarks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Average landmarks as :func:`pool_landmarks` does, on a grid whose sides are variables of an export.

    The number of landmarks then depends on the input. The output therefore has ``max_landmarks`` slots, and a mask says
    which slots hold a landmark.

    Args:
        landmarks (Tensor): ``(B, h, M, d)``.
        grid (tuple[int, int]): Grid of the landmarks, with ``M`` cells.
        max_landmarks (int): Largest number of landmarks.

    Returns:
        tuple[Tensor, Tensor, Tensor]: Slots ``(B, h, max_landmarks, d)``, zero where there is no landmark; the pool
        factor, a scalar; the mask ``(max_landmarks,)`` with ones and zeros.
    """
    device, dtype = landmarks.device, landmarks.dtype
    H, W = (torch.full((), side, dtype=torch.int64, device=device) for side in grid)
    # A tensor, because ONNX does not divide a number by a tensor.
    bound = torch.full_like(H, max_landmarks)
    short, long = torch.minimum(H, W), torch.maximum(H, W)
    below = (short * max_landmarks // long).double().sqrt().floor().long().clamp(min=1)
    above = torch.minimum(below + 1, short).clamp(max=max_landmarks)

    def aspect_error(side: Tensor) -> tuple[Tensor, Tensor]:
        terms = torch.minimum(long, bound // side) * short, side * long
        return torch.maximum(*terms), torch.minimum(*terms)

    above_error, below_error = aspect_error(above), aspect_error(below)
    better = above_error[0] * below_error[1] < below_error[0] * above_error[1]
    short_out = torch.where(better, above, below)
    long_out = torch.minimum(long, bound // short_out)
    wide, all_fit = H <= W, H * W <= max_landmarks
    rows = torch.where(all_fit, H, torch.where(wide, short_out, long_out))
    columns = torch.where(all_fit, W, torch.where(wide, long_out, short_out))
    slot = torch.arange(max_landmarks, device=device)
    row_weights = _cell_weights(slot // columns, rows, grid[0], dtype)
    column_weights = _cell_weights(slot % columns, columns, grid[1], dtype)
    present = (slot < rows * columns).to(dtype)
    weights = (row_weights[:, :, None] * column_weights[:, None, :]).flatten(1) * present[:, None]
    return torch.matmul(weights, landmarks), (H * W).to(dtype) / (rows * columns), present


def random_landmarks(
    q: Tensor, count: int, generator: torch.Generator | None = None, mask: Tensor | None = None
) -> Tensor:
    """Draw tokens without replacement, the same for every head and image (SOFT, ablation of landmark sampling).

    With a mask, an image draws the tokens that take part first, in the order that all images share.

    Args:
        q (Tensor): ``(B, h, n, d)``.
        count (int): Number of landmarks, at most ``n``.
        generator (torch.Generator | None): A CPU generator. Defaults to None: PyTorch's generator of the device of
            ``q``.
        mask (Tensor | None): ``(B, n)``, True where a token takes part. Defaults to None: all.

    Returns:
        Tensor: ``(B, h, count, d)``.
    """
    n = q.shape[2]
    if generator is None:
        order = torch.randperm(n, device=q.device)
    else:
        order = torch.randperm(n, generator=generator).to(q.device)
    if mask is None:
        return q.index_select(2, order[:count])
    absent_last = (~mask[:, order]).byte().argsort(dim=1, stable=True)
    chosen = order[absent_last[:, :count]]
    return q.gather(2, chosen[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
