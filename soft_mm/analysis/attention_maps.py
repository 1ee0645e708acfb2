"""Where a query pixel looks: rows of the attention matrix, drawn over the image."""

from pathlib import Path

import matplotlib
import mmcv
import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import MODELS

from soft_mm.inference import check_weights, load_whole_model, toolbox_scope
from soft_mm.models import SOFT, GaussianKernelAttention, SoftmaxFreeAttention, SpatialReductionAttention
from soft_mm.models.attention import as_map, split_heads
from soft_mm.ops import gaussian_kernel


def attention_rows(module, x, grid, points):
    """Rows of the matrix with which an attention multiplies its values, without its local branch.

    The output of a query is linear in the values, so a row is its gradient with respect to them: nothing of the size of
    tokens times tokens is formed.

    Args:
        module (nn.Module): an attention of :mod:`soft_mm.models`.
        x (Tensor): its tokens ``(1, n, C)``.
        grid (tuple[int, ...]): their grid.
        points (list[int]): queries, by their place among the tokens.

    Returns:
        Tensor: ``(len(points), h, H, W)``. Of an attention over a coarser grid each entry is shared by the tokens that
            it was made of; a token that none was made of has zero.

    Raises:
        ValueError: for another attention.
    """
    if not (hasattr(module, 'attend') and hasattr(module, 'grid_dims')):
        raise ValueError(f'{type(module).__name__} has no rows to draw: give an attention of soft_mm.models')
    grid, columns = as_map(grid, module.grid_dims, x.shape[1]), None
    with torch.no_grad():
        if isinstance(module, GaussianKernelAttention):
            # Its own way would be by the whole kernel.
            q = _heads(module, module.qv(x), 2)[0]
            q = q * q.shape[-1] ** -0.25
            return gaussian_kernel(q[:, :, points], q)[0].transpose(0, 1).unflatten(-1, grid)
        if isinstance(module, SoftmaxFreeAttention):
            q, v = _heads(module, module.qv(x), 2)
            others = (q,)
        elif isinstance(module, SpatialReductionAttention):
            (q,) = _heads(module, module.q(x), 1)
            k, v, columns = module.reduce(x, grid)
            others = (q, k)
        else:
            *others, v = _heads(module, module.qkv(x), 3)
    # One channel is enough, for all are weighted alike.
    values = v[..., :1].clone().requires_grad_()
    with torch.enable_grad():
        if columns is None:
            out = module.attend(*others, values.expand_as(v).contiguous(), grid)
        else:
            out = F.scaled_dot_product_attention(*others, values.expand_as(v).contiguous())
        rows = [torch.autograd.grad(out[0, :, point, 0].sum(), values, retain_graph=True)[0] for point in points]
    maps = torch.stack(rows)[:, 0, ..., 0].detach()
    if columns is None:
        return maps.unflatten(-1, grid)
    maps = maps.unflatten(-1, columns)
    for dim, side, patch in zip((-2, -1), grid, module.kernel):
        # A side shorter than the patch was stretched to one.
        cells = min(side, patch)
        maps = maps.repeat_interleave(cells, dim) / cells
    return F.pad(maps, (0, grid[1] - maps.shape[-1], 0, grid[0] - maps.shape[-2]))


def _heads(module, projected, parts):
    return [split_heads(part, module.num_heads) for part in projected.chunk(parts, dim=-1)]


def load_model(config, checkpoint):
    """The model of a config with the weights of its checkpoint, in evaluation mode.

    Args:
        config (str | Path): config file of mmpretrain, mmdet or mmsegmentation with a SOFT backbone.
        checkpoint (str | Path): its checkpoint.

    Returns:
        nn.Module: the model.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if the config has no SOFT backbone, or if the checkpoint is of another model or cannot be read.
    """
    cfg = Config.fromfile(config)
    model = None
    if 'model' in cfg and 'backbone' in cfg.model:
        cfg.model.backbone.init_cfg = None
        if 'data_preprocessor' in cfg:
            # As mmengine's runner does.
            cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
        with toolbox_scope(cfg):
            model = MODELS.build(cfg.model)
    if not isinstance(getattr(model, 'backbone', None), SOFT):
        raise ValueError(f'{config} has no SOFT as `model.backbone`; give the config of a model with one')
    weights = check_weights(model, load_whole_model(checkpoint), checkpoint)
    model.load_state_dict(weights, strict=False)
    return model.eval()


def image_attention(model, image, points, stage, block=-1):
    """Rows of the attention of one block for query pixels of an image.

    Args:
        model (nn.Module): with a SOFT ``backbone`` and a ``data_preprocessor`` that normalises, as of
            :func:`load_model`.
        image (ndarray): ``(H, W, 3)``, RGB, 0 to 255.
        points (list[tuple[int, int]]): query pixels ``(x, y)``.
        stage (int): 1 to 3.
        block (int): of the stage, from the first, or with a minus from the last. Defaults to -1.

    Returns:
        Tensor: ``(len(points), h, H', W')`` on the grid of the stage.

    Raises:
        ValueError: for a point outside of the image, or a stage or a block that is not there.
    """
    height, width = image.shape[:2]
    for x, y in points:
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(f'the point {x},{y} is outside of the image of {width}x{height} pixels (x,y from 0)')
    stages = model.backbone.stages[:3]
    if not 1 <= stage <= len(stages):
        raise ValueError(f'stage {stage} is not there: the stages with such an attention are 1 to {len(stages)}')
    blocks = stages[stage - 1].blocks
    if not -len(blocks) <= block < len(blocks):
        raise ValueError(f'block {block} is not there: stage {stage} has {len(blocks)}, counted from 0')
    attention, seen = blocks[block].attn, []
    hook = attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    pixels = torch.from_numpy(np.ascontiguousarray(image)).float()
    # A preprocessor that does not normalise has neither mean nor deviation.
    if hasattr(model.data_preprocessor, 'mean'):
        mean, std = (getattr(model.data_preprocessor, name).flatten().cpu() for name in ('mean', 'std'))
        pixels = (pixels - mean) / std
    try:
        with torch.no_grad():
            model.backbone(pixels.permute(2, 0, 1)[None].to(next(model.parameters()).device))
    finally:
        hook.remove()
    tokens, grid = seen[0]
    places = [y * grid[0] // height * grid[1] + x * grid[1] // width for x, y in points]
    return attention_rows(attention, tokens, grid, places)


def draw_attention(image, rows, points, out_file, heads=None):
    """Draw rows of the attention over the image: one line of pictures a query, one picture a head.

    Args:
        image (ndarray): ``(H, W, 3)``, RGB.
        rows (Tensor): of :func:`image_attention`.
        points (list[tuple[int, int]]): query pixels ``(x, y)``, marked in the picture.
        out_file (str | Path): picture to write.
        heads (list[int] | None): which, from 0. Defaults to None, all.

    Raises:
        ValueError: for a head that is not there.
    """
    heads = list(range(rows.shape[1])) if heads is None else heads
    if missing := [head for head in heads if not 0 <= head < rows.shape[1]]:
        raise ValueError(f'heads {missing} are not there: the stage has {rows.shape[1]}, counted from 0')
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    height, width = image.shape[:2]
    figure, axes = plt.subplots(
        len(points),
        len(heads),
        figsize=(2.2 * len(heads), 2.2 * len(points) * height / width + 0.3),
        squeeze=False,
        layout='constrained',
    )
    for line, (point, row) in enumerate(zip(points, rows)):
        for axis, head in zip(axes[line], heads):
            weights = F.interpolate(row[None, None, head], size=(height, width), mode='bilinear')[0, 0].cpu().numpy()
            bound = max(abs(weights).max(), 1e-12)
            axis.imshow(mmcv.imconvert(mmcv.imconvert(image, 'rgb', 'gray'), 'gray', 'rgb'))
            # Weights of SOFT may be negative.
            axis.imshow(weights, cmap='RdBu_r', vmin=-bound, vmax=bound, alpha=0.6)
            axis.plot(*point, marker='+', color='lime', markersize=9, markeredgewidth=2)
            axis.set_axis_off()
            if line == 0:
                axis.set_title(f'head {head}', fontsize=9)
    Path(out_file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_file, dpi=120)
    plt.close(figure)
