"""Landmark (bottleneck) tokens: a few tokens per head that represent all tokens."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernel import compute_dtype, without_autocast
from .recording import has_variable, needs_standard_operators


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
    (B, heads, _, d), (H, W) = q.shape, grid
    rows, columns = (int(side) for side in weight.shape[-2:])
    dtype = compute_dtype(q)
    maps = q.to(dtype).reshape(B, heads, H, W, d)
    if has_variable(grid):
        # An export cannot decide whether a side is shorter than a patch. For the backbone's images none is.
        out_h, out_w = H // rows, W // columns
    else:
        out_h, out_w = max(H // rows, 1), max(W // columns, 1)
        for dim, side, r in ((2, H, rows), (3, W, columns)):
            if side < r:
                maps = maps.index_select(dim, torch.arange(r, device=q.device) * side // r)
    patches = maps[:, :, : out_h * rows, : out_w * columns].reshape(B, heads, out_h, rows, out_w, columns, d)
    patches = patches.transpose(3, 4).reshape(B, heads, out_h * out_w, rows * columns * d)
    return F.linear(patches, weight.to(dtype).permute(0, 2, 3, 1).reshape(d, -1)), (out_h, out_w)


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


def random_landmarks(q: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw tokens without replacement, the same for every head and image (SOFT, ablation of landmark sampling).

    Args:
        q (Tensor): ``(B, h, n, d)``.
        count (int): Number of landmarks, at most ``n``.
        generator (torch.Generator | None): A CPU generator. Defaults to None: PyTorch's generator of the device of
            ``q``.

    Returns:
        Tensor: ``(B, h, count, d)``.
    """
    n = q.shape[2]
    if generator is None:
        order = torch.randperm(n, device=q.device)
    else:
        order = torch.randperm(n, generator=generator).to(q.device)
    return q.index_select(2, order[:count])
