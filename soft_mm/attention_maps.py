"""Rows of the attention matrix of a trained model, drawn over the image."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soft_mm.models import SOFT
from soft_mm.utils import make_figure


def image_attention(
    model: nn.Module, image: np.ndarray, points: list[tuple[int, int]], stage: int, block: int = -1
) -> Tensor:
    """Compute rows of the attention matrix of one block, for query pixels of an image.

    Args:
        model (nn.Module): Model of :func:`soft_mm.inference.load_model` with a SOFT backbone.
        image (ndarray): ``(H, W, 3)``, RGB, 0 to 255.
        points (list[tuple[int, int]]): Query pixels ``(x, y)``.
        stage (int): Stage from 1 to 3. Stage 4 has another attention.
        block (int): Block of the stage, counted from 0, or from the end if negative. Defaults to -1.

    Returns:
        Tensor: ``(len(points), h, H', W')`` on the grid of the stage.

    Raises:
        ValueError: If the model has no SOFT backbone, its attention has no method ``rows``, or a point, the stage or
            the block is out of range.
    """
    backbone = getattr(model, 'backbone', None)
    if not isinstance(backbone, SOFT):
        raise ValueError(
            "model.backbone is not a SOFT backbone; give the config of a model with backbone type='soft_mm.SOFT'"
        )
    H, W = image.shape[:2]
    for x, y in points:
        if not (0 <= x < W and 0 <= y < H):
            raise ValueError(f'point {x},{y} is outside the image of {W}x{H} pixels; x and y are counted from 0')
    stages = backbone.stages[:3]
    if not 1 <= stage <= len(stages):
        raise ValueError(f'stage={stage}: expected an integer from 1 to {len(stages)}')
    blocks: Any = stages[stage - 1].blocks
    if not -len(blocks) <= block < len(blocks):
        raise ValueError(f'block {block} does not exist: stage {stage} has {len(blocks)} blocks, counted from 0')
    attention, inputs = blocks[block].attn, []
    if not hasattr(attention, 'rows'):
        raise ValueError(f'{type(attention).__name__} has no method `rows`; use an attention of soft_mm.models')
    hook = attention.register_forward_pre_hook(lambda module, args: inputs.append(args))
    pixels = torch.from_numpy(np.ascontiguousarray(image)).float()
    # A preprocessor without normalisation has no mean and no standard deviation.
    if hasattr(model.data_preprocessor, 'mean'):
        mean, std = (getattr(model.data_preprocessor, name).flatten().cpu() for name in ('mean', 'std'))
        pixels = (pixels - mean) / std
    try:
        with torch.no_grad():
            backbone(pixels.permute(2, 0, 1)[None].to(next(model.parameters()).device))
    finally:
        hook.remove()
    tokens, grid = inputs[0]
    queries = [y * grid[0] // H * grid[1] + x * grid[1] // W for x, y in points]
    return attention.rows(tokens, grid, queries)


def draw_attention(
    image: np.ndarray, rows: Tensor, points: list[tuple[int, int]], out_file: str | Path, heads: list[int] | None = None
) -> None:
    """Draw rows of the attention matrix over the image, with one row of pictures per query and one column per head.

    Args:
        image (ndarray): ``(H, W, 3)``, RGB.
        rows (Tensor): Output of :func:`image_attention`.
        points (list[tuple[int, int]]): Query pixels ``(x, y)``. They are marked in the picture.
        out_file (str | Path): Picture to write.
        heads (list[int] | None): Heads, counted from 0. Defaults to None: all.

    Raises:
        ValueError: If a head does not exist.
    """
    heads = list(range(rows.shape[1])) if heads is None else heads
    if missing := [head for head in heads if not 0 <= head < rows.shape[1]]:
        raise ValueError(f'heads {missing} do not exist: the stage has {rows.shape[1]} heads, counted from 0')
    height, width = image.shape[:2]
    figure, axes = make_figure(len(points), len(heads), (2.2 * len(heads), 2.2 * len(points) * height / width + 0.3))
    for line, (point, row) in enumerate(zip(points, rows)):
        for axis, head in zip(axes[line], heads):
            weights = F.interpolate(row[None, None, head], size=(height, width), mode='bilinear')[0, 0].cpu().numpy()
            bound = max(abs(weights).max(), 1e-12)
            axis.imshow(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cmap='gray', vmin=0, vmax=255)
            # Weights of SOFT can be negative, so the colour scale is symmetric.
            axis.imshow(weights, cmap='RdBu_r', vmin=-bound, vmax=bound, alpha=0.6)
            axis.plot(*point, marker='+', color='lime', markersize=9, markeredgewidth=2)
            axis.set_axis_off()
            if line == 0:
                axis.set_title(f'head {head}', fontsize=9)
    Path(out_file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_file, dpi=120)
