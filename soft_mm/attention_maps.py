"""Rows of the attention matrix of a trained model, drawn over the image against the mean row of their head."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soft_mm.models import SOFT
from soft_mm.utils import make_figure

# Differences below this part of a mean weight are rounding, so the colour scale never magnifies them.
_LEAST_DIFFERENCE = 1e-4


def image_attention(
    model: nn.Module, image: np.ndarray, points: list[tuple[int, int]] | None, stage: int, block: int = -1
) -> Tensor:
    """Compute rows of the attention matrix of one block for query pixels of an image, or the mean row of all queries.

    The rows are without the local branch, see :func:`local_window`.

    Args:
        model (nn.Module): Model of :func:`soft_mm.inference.load_model` with a SOFT backbone.
        image (ndarray): ``(H, W, 3)``, RGB, 0 to 255.
        points (list[tuple[int, int]] | None): Query pixels ``(x, y)``. None: the mean row of all queries.
        stage (int): Stage from 1 to 3, or 4 if stage 4 has no class token.
        block (int): Block of the stage, counted from 0, or from the end if negative. Defaults to -1.

    Returns:
        Tensor: ``(len(points), h, H', W')`` on the grid of the stage, or ``(1, h, H', W')`` for the mean row.

    Raises:
        ValueError: If the model has no SOFT backbone, its attention has no method ``rows``, or a point, the stage or
            the block is out of range.
    """
    attention = _find_attention(model, stage, block)
    H, W = image.shape[:2]
    for x, y in points or ():
        if not (0 <= x < W and 0 <= y < H):
            raise ValueError(f'point {x},{y} is outside the image of {W}x{H} pixels; x and y are counted from 0')
    if not hasattr(attention, 'rows'):
        raise ValueError(f'{type(attention).__name__} has no method `rows`; use an attention of soft_mm.models')
    inputs: list[Any] = []
    hook = attention.register_forward_pre_hook(lambda module, args: inputs.append(args))
    pixels = torch.from_numpy(np.ascontiguousarray(image)).float()
    # A preprocessor without normalisation has no mean and no standard deviation.
    preprocessor: Any = model.data_preprocessor
    if hasattr(preprocessor, 'mean'):
        mean, std = (getattr(preprocessor, name).flatten().cpu() for name in ('mean', 'std'))
        pixels = (pixels - mean) / std
    backbone: Any = model.backbone
    try:
        with torch.no_grad():
            backbone(pixels.permute(2, 0, 1)[None].to(next(model.parameters()).device))
    finally:
        hook.remove()
    tokens, grid = inputs[0]
    queries = None if points is None else [y * grid[0] // H * grid[1] + x * grid[1] // W for x, y in points]
    return attention.rows(tokens, grid, queries)


def local_window(model: nn.Module, stage: int, block: int = -1) -> int | None:
    """Return the side of the window that a block's local branch adds to what a query attends to.

    Args:
        model (nn.Module): Model with a SOFT backbone.
        stage (int): See :func:`image_attention`.
        block (int): Block of the stage, counted from 0, or from the end if negative. Defaults to -1.

    Returns:
        int | None: Side in tokens. None if the attention has no local branch.

    Raises:
        ValueError: See :func:`image_attention`.
    """
    local = getattr(_find_attention(model, stage, block), 'local', None)
    return None if local is None else local.kernel_size[1]


def contrast(rows: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Compare rows with the mean row of their head: split each into its multiple of the mean row and the rest.

    The rows of SOFT do not sum to 1, so a query may also attend more to everything. This is the gain, the least-squares
    factor between row and mean row. Over all queries, the mean of the gains is 1, and the mean of the rests is 0.

    Args:
        rows (Tensor): ``(p, h, H, W)``.
        mean (Tensor): Mean row of all queries, ``(1, h, H, W)``.

    Returns:
        tuple[Tensor, Tensor]: Gains ``(p, h)``, and ``rows - gains * mean``, ``(p, h, H, W)``, in units of the mean
        absolute weight of the head's mean row. For a mean row of zeros, the gain is 0 and the unit is 1.
    """
    power, unit = mean.square().sum((-2, -1)), mean.abs().mean((-2, -1), keepdim=True)
    gains = (rows * mean).sum((-2, -1)) / torch.where(power > 0, power, 1)
    return gains, (rows - gains[..., None, None] * mean) / torch.where(unit > 0, unit, 1)


def overlay(image: np.ndarray, values: Tensor, bound: float) -> np.ndarray:
    """Draw values over an image: red for positive, blue for negative, the pale grey image where they are zero.

    Args:
        image (ndarray): ``(H, W, 3)`` uint8, RGB.
        values (Tensor): ``(H', W')``. They are interpolated to the size of the image.
        bound (float): Absolute value with the full colour, positive.

    Returns:
        ndarray: ``(H, W, 3)`` uint8, RGB.
    """
    size = (image.shape[0], image.shape[1])
    scaled = F.interpolate(values[None, None].float() / bound, size=size, mode='bilinear')[0, 0].cpu().numpy()
    # A pale picture leaves the colours to the values.
    pale = 255 - (255 - cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None].astype(float)) / 2
    colours = _colours()(0.5 + 0.5 * scaled)
    alpha = colours[..., 3:]
    return np.rint((1 - alpha) * pale + alpha * 255 * colours[..., :3]).astype(np.uint8)


def draw_attention(
    image: np.ndarray,
    rows: Tensor,
    points: list[tuple[int, int]],
    out_file: str | Path,
    heads: list[int] | None = None,
    mean: Tensor | None = None,
    window: int | None = None,
) -> None:
    """Draw rows of the attention matrix over the image, with one row of pictures per query.

    The first picture of a row is the image with the query. One picture per head follows. Its colours are red for
    positive and blue for negative numbers, and transparent at zero. The scale of a head is the same for all queries.

    Args:
        image (ndarray): ``(H, W, 3)``, RGB.
        rows (Tensor): Output of :func:`image_attention`.
        points (list[tuple[int, int]]): Query pixels ``(x, y)``. A ring marks them.
        out_file (str | Path): Picture to write. Its suffix is the format.
        heads (list[int] | None): Heads, counted from 0. Defaults to None: all.
        mean (Tensor | None): Mean row of all queries, from :func:`image_attention` with ``points=None``. The maps then
            show the :func:`contrast`, and their titles the gains. Defaults to None: the weights themselves, which look
            alike for most queries, because they have the mean row in common.
        window (int | None): Side in tokens of a square around the query, drawn dashed: the :func:`local_window`, which
            the rows are without. Defaults to None: no square.

    Raises:
        ValueError: If a head does not exist.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    heads = list(range(rows.shape[1])) if heads is None else heads
    if missing := [head for head in heads if not 0 <= head < rows.shape[1]]:
        raise ValueError(f'heads {missing} do not exist: the stage has {rows.shape[1]} heads, counted from 0')
    height, width = image.shape[:2]
    gains, values = (None, rows) if mean is None else contrast(rows, mean)
    # Weights and differences can be negative, so the scale is symmetric.
    least = 1e-12 if mean is None else _LEAST_DIFFERENCE
    bounds = values.abs().amax((0, 2, 3)).clamp(min=least).tolist()
    lines, columns, aspect = len(points), 1 + len(heads), height / width
    # The last line holds the colour bars.
    figure, axes = make_figure(lines + 1, columns, (2.2 * columns, (2.2 * aspect + 0.25) * lines + 0.7))
    axes[0, 0].get_gridspec().set_height_ratios([aspect] * lines + [0.06])
    for line, point in enumerate(points):
        axes[line, 0].imshow(image)
        axes[line, 0].set_title(f'query {point[0]},{point[1]}', fontsize=9)
        for axis, head in zip(axes[line, 1:], heads):
            axis.imshow(overlay(image, values[line, head], bounds[head]))
            title = f'head {head}' if gains is None else f'head {head}: {gains[line, head]:.2f} × mean row'
            axis.set_title(title, fontsize=9)
        for axis in axes[line]:
            _mark_query(axis, point, (width, height), (values.shape[3], values.shape[2]), window)
            axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
            axis.set_axis_off()
    axes[-1, 0].set_axis_off()
    for axis, head in zip(axes[-1, 1:], heads):
        scale = ScalarMappable(Normalize(-bounds[head], bounds[head]), _colours())
        figure.colorbar(scale, axis, orientation='horizontal', ticks=MaxNLocator(3))
        axis.tick_params(labelsize=8)
    label = 'weights' if mean is None else "row minus its multiple of the head's mean row, in mean weights"
    figure.supxlabel(label, fontsize=9)
    Path(out_file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_file, dpi=120)


def _find_attention(model: nn.Module, stage: int, block: int) -> Any:
    backbone = getattr(model, 'backbone', None)
    if not isinstance(backbone, SOFT):
        raise ValueError(
            "model.backbone is not a SOFT backbone; give the config of a model with backbone type='soft_mm.SOFT'"
        )
    stages: list[Any] = [part for part in backbone.stages if not part.class_token]
    if not 1 <= stage <= len(stages):
        raise ValueError(f'stage={stage}: expected an integer from 1 to {len(stages)}')
    blocks: Any = stages[stage - 1].blocks
    if not -len(blocks) <= block < len(blocks):
        raise ValueError(f'block {block} does not exist: stage {stage} has {len(blocks)} blocks, counted from 0')
    return blocks[block].attn


def _mark_query(
    axis: Any, point: tuple[int, int], size: tuple[int, int], grid: tuple[int, int], window: int | None
) -> None:
    """Draw a ring around a query pixel, and the square of a window of tokens around its token. Widths come first."""
    outline = None
    if window is not None:
        tokens = [place * count // side for place, count, side in zip(point, grid, size)]
        # From the left or upper edge of the window to the other, in pixels, whose centres are integers.
        (left, right), (top, bottom) = (
            [(token + step) * side / count - 0.5 for step in (-(window // 2), window // 2 + 1)]
            for token, count, side in zip(tokens, grid, size)
        )
        outline = [left, right, right, left, left], [top, top, bottom, bottom, top]
    # On black, so that the colour is visible on any picture.
    for colour, width, dashes in (('black', 2.4, 'solid'), ('lime', 1.2, (0, (3, 2)))):
        ring = dict(marker='o', fillstyle='none', markersize=9, markeredgecolor=colour, markeredgewidth=width)
        axis.plot(*point, **ring)
        if outline:
            axis.plot(*outline, color=colour, linewidth=width, linestyle=dashes)


def _colours() -> Any:
    """Return a colour map from blue to red that is transparent in the middle."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    steps = np.linspace(-1, 1, 257)
    # The palest third of the map is left out: transparency takes its place.
    colours = colormaps['RdBu_r'](0.5 + 0.5 * np.sign(steps) * (1 + 2 * abs(steps)) / 3)
    colours[:, 3] = 0.9 * abs(steps) ** 0.7
    return ListedColormap(colours)
