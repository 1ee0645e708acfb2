"""Landmark (bottleneck) tokens: a few tokens per head that stand for all."""

import math

import torch
import torch.nn.functional as F

from .kernel import compute_dtype, without_autocast


@without_autocast
def conv_landmarks(q, grid, weight, norm_weight, norm_bias, eps=1e-5):
    """Sample landmarks by a strided convolution: ``GELU(LayerNorm(conv(q)))`` (SOFT, section 3.2).

    The patches do not overlap, so the convolution is one matrix product over flattened patches. A remainder of the
    grid beyond a whole number of patches is left out; a side shorter than one patch is stretched to one by nearest
    neighbours, so that there is always a landmark.

    Args:
        q (Tensor): scaled queries ``(B, h, n, d)`` with ``n = H * W``.
        grid (tuple[int, int]): ``(H, W)``.
        weight (Tensor): ``(d, d, r, r)``, kernel and stride ``r``, shared by the heads; ``(d, d, 1, r)`` for a
            sequence, whose grid is ``(1, n)``.
        norm_weight (Tensor): ``(d,)``.
        norm_bias (Tensor): ``(d,)``.
        eps (float): of the LayerNorm.

    Returns:
        tuple[Tensor, tuple[int, int]]: landmarks ``(B, h, m, d)`` in float32 or wider, and their grid
        ``(max(H // r, 1), max(W // r, 1))``, for a sequence ``(1, max(n // r, 1))``.
    """
    (B, heads, _, d), (H, W), (rows, columns) = q.shape, grid, weight.shape[-2:]
    out_h, out_w = max(H // rows, 1), max(W // columns, 1)
    dtype = compute_dtype(q)
    maps = q.to(dtype).reshape(B, heads, H, W, d)
    for dim, side, r in ((2, H, rows), (3, W, columns)):
        if side < r:
            maps = maps.index_select(dim, torch.arange(r, device=q.device) * side // r)
    patches = maps[:, :, : out_h * rows, : out_w * columns].reshape(B, heads, out_h, rows, out_w, columns, d)
    patches = patches.transpose(3, 4).reshape(B, heads, out_h * out_w, rows * columns * d)
    tokens = F.linear(patches, weight.to(dtype).permute(0, 2, 3, 1).reshape(d, -1))
    tokens = F.layer_norm(tokens, (d,), norm_weight.to(dtype), norm_bias.to(dtype), eps)
    return F.gelu(tokens), (out_h, out_w)


def pooled_grid(grid, max_landmarks):
    """A grid of at most ``max_landmarks`` cells, close to that number and to the aspect of ``grid``.

    Of the two whole numbers around the ideal short side, that whose grid has the nearer aspect.

    Args:
        grid (tuple[int, int]): ``(H, W)`` of the landmarks.
        max_landmarks (int): at least 1.

    Returns:
        tuple[int, int]: ``grid`` itself where it has no more cells than that.
    """
    H, W = grid
    if H * W <= max_landmarks:
        return grid
    short, long = min(H, W), max(H, W)
    below = max(int(math.sqrt(short * max_landmarks // long)), 1)
    above = min(below + 1, short, max_landmarks)

    def aspect_error(side):
        return abs(math.log(min(long, max_landmarks // side) * short / (side * long)))

    short_out = above if aspect_error(above) < aspect_error(below) else below
    long_out = min(long, max_landmarks // short_out)
    return (short_out, long_out) if H <= W else (long_out, short_out)


def pool_landmarks(landmarks, grid, max_landmarks):
    """Average landmarks over the cells of a coarser grid, so that at most ``max_landmarks`` remain.

    Args:
        landmarks (Tensor): ``(B, h, M, d)``.
        grid (tuple[int, int]): their grid, ``M`` cells.
        max_landmarks (int | None): ``None`` keeps all.

    Returns:
        tuple[Tensor, float]: ``(B, h, m, d)``, and ``M / m``, the number of landmarks that one of them now stands
        for. With ``M <= max_landmarks`` the very tensor that was given, and 1.
    """
    count = landmarks.shape[2]
    if max_landmarks is None or count <= max_landmarks:
        return landmarks, 1.0
    pooled = mean_landmarks(landmarks, grid, pooled_grid(grid, max_landmarks))
    return pooled, count / pooled.shape[2]


def mean_landmarks(tokens, grid, out_grid):
    """Means of tokens over the cells of a coarser grid: segments of a sequence, whose grid is ``(1, n)``.

    Args:
        tokens (Tensor): ``(B, h, n, d)``.
        grid (tuple[int, int]): their grid.
        out_grid (tuple[int, int]): grid of the landmarks.

    Returns:
        Tensor: ``(B, h, m, d)``; the very tensor that was given where the grids are the same.
    """
    if tuple(grid) == tuple(out_grid):
        return tokens
    B, heads, _, d = tokens.shape
    maps = tokens.reshape(B * heads, *grid, d).permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(maps, out_grid).flatten(2).transpose(1, 2).reshape(B, heads, -1, d)


def random_landmarks(q, count, generator=None):
    """Tokens drawn without replacement, the same of every head and image (SOFT, ablation of the sampling).

    Args:
        q (Tensor): ``(B, h, n, d)``.
        count (int): how many, at most ``n``.
        generator (torch.Generator | None): of the CPU. Defaults to None, PyTorch's own on the device of ``q``.

    Returns:
        Tensor: ``(B, h, count, d)``.
    """
    n = q.shape[2]
    if generator is None:
        order = torch.randperm(n, device=q.device)
    else:
        order = torch.randperm(n, generator=generator).to(q.device)
    return q.index_select(2, order[:count])
