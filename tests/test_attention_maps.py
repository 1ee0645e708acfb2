"""Rows of the attention matrix against the matrix itself, and the tool that draws them."""

import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import cv2
import mmcv
import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from soft_mm import SOFT, attention_maps
from soft_mm.attention_maps import contrast, draw_attention, image_attention, local_window, overlay
from soft_mm.inference import load_model
from soft_mm.models.attention import build_attention

ROOT = Path(__file__).resolve().parents[1]
SHAPE = dict(embed_dims=16, num_heads=2, ratio=2, conv_size=3)
ATTENTIONS = [
    dict(),
    dict(normalized=True, solver='cholesky', max_landmarks=4),
    dict(sampler='mean', solver='svd'),
    dict(type='SoftmaxAttention'),
    dict(type='LinformerAttention', proj_tokens=7),
    dict(type='PerformerAttention', num_features=16),
    dict(type='NystromAttention', num_landmarks=6),
    dict(type='GaussianKernelAttention'),
]


@pytest.mark.parametrize('cfg', ATTENTIONS, ids=str)
def test_rows_are_those_of_the_matrix(cfg):
    torch.manual_seed(0)
    module, grid = build_attention(cfg, **SHAPE).double().eval(), (5, 6)
    x = torch.randn(1, 30, 16, dtype=torch.float64)
    with torch.no_grad():
        *others, v = module.project(x, grid)
        # One token's value at a time, in the first channel: columns of the matrix.
        columns = []
        for token in range(30):
            values = torch.zeros_like(v)
            values[:, :, token, 0] = 1
            columns.append(module.attend(*others, values, grid=grid)[0, ..., 0])
    matrix = torch.stack(columns, dim=-1)
    rows = module.rows(x, grid, [0, 13, 29])
    assert rows.shape == (3, 2, 5, 6)
    assert torch.allclose(rows.flatten(2), matrix[:, [0, 13, 29]].transpose(0, 1), atol=1e-12)
    if cfg.get('type') == 'SoftmaxAttention':
        assert torch.allclose(rows.sum((-2, -1)), torch.ones(3, 2, dtype=torch.float64))
    mean = module.rows(x, grid, None)
    assert mean.shape == (1, 2, 5, 6) and torch.allclose(mean[0].flatten(1), matrix.mean(1), atol=1e-12)


@pytest.mark.parametrize('cfg', [*ATTENTIONS, dict(type='SpatialReductionAttention')], ids=str)
def test_differences_from_the_mean_row_cancel_out(cfg):
    torch.manual_seed(0)
    module, grid = build_attention(cfg, **SHAPE).double().eval(), (5, 7)
    x = torch.randn(1, 35, 16, dtype=torch.float64)
    rows, mean = module.rows(x, grid, list(range(35))), module.rows(x, grid, None)
    assert (rows - mean).mean(0).abs().max() < 1e-12
    gains, rest = contrast(rows, mean)
    assert gains.shape == (35, 2) and rest.abs().amax((0, 2, 3)).min() > 1e-3
    assert rest.mean(0).abs().max() < 1e-12 and torch.allclose(gains.mean(0), torch.ones(2, dtype=torch.float64))
    # The rest has nothing in common with the mean row, and its unit is the mean weight of the head.
    assert (rest * mean).mean((-2, -1)).abs().max() < 1e-12
    whole = gains[3, 1] * mean[0, 1] + rest[3, 1] * mean[0, 1].abs().mean()
    assert torch.allclose(whole, rows[3, 1])


def test_rows_over_a_coarser_grid_are_shared_out():
    torch.manual_seed(0)
    module = build_attention(dict(type='SpatialReductionAttention'), **SHAPE).double()
    rows = module.rows(torch.randn(1, 48, 16, dtype=torch.float64), (6, 8), [5])
    assert rows.shape == (1, 2, 6, 8) and torch.allclose(rows.sum((-2, -1)), torch.ones(1, 2, dtype=torch.float64))
    assert torch.equal(rows[..., ::2, ::2], rows[..., 1::2, 1::2])
    # The convolution leaves out what its patches do not fill.
    rows = module.rows(torch.randn(1, 35, 16, dtype=torch.float64), (5, 7), [30])
    assert torch.allclose(rows.sum((-2, -1)), torch.ones(1, 2, dtype=torch.float64))
    assert not rows[..., 4, :].any() and not rows[..., 6].any() and torch.equal(rows[..., 0, ::2], rows[..., 1, ::2])
    # A side that is shorter than the patch is stretched to it.
    rows = module.rows(torch.randn(1, 6, 16, dtype=torch.float64), (1, 6), [0])
    assert torch.allclose(rows.sum((-2, -1)), torch.ones(1, 2, dtype=torch.float64)) and rows.shape == (1, 2, 1, 6)


def test_other_attentions_and_models_are_named(tmp_path):
    image, model = np.zeros((64, 64, 3), np.uint8), Whole().eval()
    with pytest.raises(ValueError, match='model.backbone is not a SOFT backbone'):
        image_attention(torch.nn.Module(), image, [(0, 0)], stage=1)
    model.backbone.stages[0].blocks[0].attn = torch.nn.Linear(16, 16)
    with pytest.raises(ValueError, match='Linear has no method `rows`; use an attention of soft_mm.models'):
        image_attention(model, image, [(0, 0)], stage=1)
    with pytest.raises(ValueError, match='default_runtime_mmseg.py has no `model` with a backbone'):
        load_model(ROOT / 'configs/_base_/default_runtime_mmseg.py', tmp_path / 'none.pth')


@pytest.mark.parametrize(
    'cfg',
    [
        dict(solver='cholesky', max_landmarks=16),
        dict(normalized=True, max_landmarks=16),
        dict(type='SoftmaxAttention'),
        dict(type='LinformerAttention', proj_tokens=16),
        dict(type='PerformerAttention', num_features=16),
        dict(type='NystromAttention', num_landmarks=16),
        dict(type='SpatialReductionAttention'),
        dict(type='GaussianKernelAttention', max_tokens=4),
    ],
    ids=str,
)
def test_nothing_of_tokens_times_tokens_is_formed(cfg):
    """Such a matrix would have fifty times the entries of the largest tensor that there may be."""
    shape = dict(SHAPE, ratio=8)
    module, sizes = build_attention(cfg, **shape), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(part.numel() for part in tree_leaves(out) if isinstance(part, torch.Tensor))
            return out

    with Watch():
        rows = module.rows(torch.randn(1, 64 * 50, 16), (64, 50), [7, 1600])
        mean = module.rows(torch.randn(1, 64 * 50, 16), (64, 50), None)
    assert rows.shape == (2, 2, 64, 50) and mean.shape == (1, 2, 64, 50) and 0 < max(sizes) <= 3200 * 16 * 4


class Whole(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = SOFT(dict(embed_dims=(32, 64, 96, 128), num_heads=(1, 2, 3, 4), depths=(1, 1, 2, 1)))
        self.data_preprocessor = torch.nn.Module()
        self.data_preprocessor.register_buffer('mean', torch.full((3, 1, 1), 120.0))
        self.data_preprocessor.register_buffer('std', torch.full((3, 1, 1), 60.0))


def test_points_are_pixels_of_the_image():
    torch.manual_seed(0)
    model = Whole().eval()
    image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    rows = image_attention(model, image, [(0, 0), (95, 63), (3, 3)], stage=1)
    assert rows.shape == (3, 1, 16, 24) and torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])
    assert image_attention(model, image, [(1, 1)], stage=3, block=0).shape == (1, 3, 4, 6)
    for arguments, message in (
        (([(96, 0)], 1), 'point 96,0 is outside the image of 96x64'),
        (([(0, 0)], 4), 'stage=4: expected an integer from 1 to'),
        (([(0, 0)], 2, 1), 'block 1 does not exist: stage 2 has 1'),
    ):
        with pytest.raises(ValueError, match=message):
            image_attention(model, image, *arguments)


def test_mean_row_and_window_of_a_model():
    torch.manual_seed(0)
    model = Whole().eval()
    image = np.random.default_rng(0).integers(0, 255, (32, 64, 3), dtype=np.uint8)
    # One pixel of each token of stage 2.
    points = [(x, y) for y in range(4, 32, 8) for x in range(4, 64, 8)]
    rows, mean = (image_attention(model, image, queries, stage=2) for queries in (points, None))
    assert rows.shape == (32, 2, 4, 8) and torch.allclose(rows.mean(0, keepdim=True), mean, atol=1e-6)
    assert [local_window(model, stage) for stage in (1, 2, 3)] == [9, 5, 3]
    model.backbone.stages[1].blocks[0].attn = build_attention(dict(type='SoftmaxAttention'), 64, 2, 4, 5)
    assert local_window(model, 2) is None
    with pytest.raises(ValueError, match='stage=4: expected an integer from 1 to'):
        local_window(model, 4)


def test_far_pixels_give_clearly_different_pictures():
    """Two rows that differ by a tenth of a weight: the weights alone look alike, the contrast does not."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (96, 128, 3), dtype=np.uint8)
    mean = torch.from_numpy(rng.uniform(0.5, 1.5, (1, 1, 12, 16)))
    rows = mean.repeat(2, 1, 1, 1)
    rows[0, 0, :6, :8] += 0.1
    rows[1, 0, 6:, 8:] += 0.1

    def distance(values):
        first, second = (overlay(image, row[0], float(values.abs().max())).astype(float) for row in values)
        return abs(first - second).mean()

    assert distance(contrast(rows, mean)[1]) > 20 > 3 * distance(rows)


def test_signs_have_their_colours_and_zero_shows_the_picture():
    image = np.random.default_rng(0).integers(0, 255, (48, 60, 3), dtype=np.uint8)
    values = torch.zeros(16, 20)
    values[:5], values[-5:] = 2.0, -2.0
    red, _, blue = np.moveaxis(overlay(image, values, 2.0).astype(int), 2, 0)
    assert (red - blue)[:12].min() > 60 and (blue - red)[-12:].min() > 60
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[18:30]
    assert np.array_equal(red[18:30], blue[18:30]) and np.corrcoef(red[18:30].flat, grey.flat)[0, 1] > 0.999
    # The picture is also visible below the strongest colours.
    assert np.corrcoef(red[-12:].flat, cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[-12:].flat)[0, 1] > 0.9


def test_picture_without_texture_has_no_colours(tmp_path):
    """Rounding is not magnified, and nothing is divided by a weight or a difference of zero."""
    image, points = np.full((64, 64, 3), 128, np.uint8), [(5, 5), (60, 60)]
    noise = 1 + 1e-7 * torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for rows, mean in ((noise, torch.ones(1, 1, 8, 8)), (torch.zeros(2, 1, 8, 8), torch.zeros(1, 1, 8, 8))):
        assert all(part.isfinite().all() for part in contrast(rows, mean))
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            draw_attention(image, rows, points, tmp_path / 'map.png', mean=mean)
        picture = mmcv.imread(tmp_path / 'map.png').astype(int)
        # Without the colour bar.
        maps = picture[: len(picture) * 3 // 4, picture.shape[1] // 2 :]
        ring = (maps[..., 1] - maps[..., 0] > 20) & (maps[..., 1] - maps[..., 2] > 20)
        assert ring.any() and abs(maps[..., 2] - maps[..., 0])[~ring].max() < 20


def test_scale_is_common_to_the_queries_of_a_head(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(attention_maps, 'overlay', lambda image, values, bound: calls.append(bound) or image)
    rows = torch.zeros(2, 3, 4, 4)
    rows[0, 0, 0, 0], rows[1, 0, 0, 0], rows[1, 2, 3, 3] = 1.0, -5.0, 2.0
    image = np.zeros((32, 32, 3), np.uint8)
    draw_attention(image, rows, [(0, 0), (9, 9)], tmp_path / 'a.png', heads=[2, 0])
    assert calls == [2.0, 5.0, 2.0, 5.0]
    calls.clear()
    draw_attention(image, rows, [(0, 0), (9, 9)], tmp_path / 'a.png', heads=[0], mean=torch.full((1, 3, 4, 4), 0.5))
    # The gain of the second row is -5 / (16 * 0.5): (-5 + 0.625 * 0.5) / 0.5.
    assert calls == [9.375, 9.375]


def test_query_and_window_are_where_they_belong():
    """Tokens of 4x8 pixels, and a window of 3x3 of them around the token (5, 2)."""
    drawn = []
    axis = SimpleNamespace(plot=lambda *places, **style: drawn.append(places))
    attention_maps._mark_query(axis, (23, 16), (40, 48), (10, 6), window=3)
    ring, (x, y) = drawn[:2]
    assert ring == (23, 16) and drawn[2:] == drawn[:2]
    assert (min(x), max(x)) == (15.5, 27.5) and (min(y), max(y)) == (7.5, 31.5)
    drawn.clear()
    attention_maps._mark_query(axis, (23, 16), (40, 48), (10, 6), window=None)
    assert drawn == [(23, 16)] * 2


def test_uniform_image_of_a_model_is_drawn(tmp_path):
    torch.manual_seed(0)
    model, image, points = Whole().eval(), np.full((64, 96, 3), 90, np.uint8), [(3, 3), (90, 60)]
    rows, mean = (image_attention(model, image, queries, stage=3) for queries in (points, None))
    assert all(part.isfinite().all() for part in contrast(rows, mean))
    draw_attention(image, rows, points, tmp_path / 'map.png', mean=mean, window=local_window(model, 3))
    assert mmcv.imread(tmp_path / 'map.png').shape[1] == round(2.2 * 4 * 120)


def test_tool_draws_and_refuses(tmp_path, environment):
    mmcv.imwrite(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8), str(tmp_path / 'a.png'))
    config = ROOT / 'projects/photo_digits/configs/soft-tiny_photo-digits-crops.py'
    state_dict = {f'backbone.{k}': v for k, v in SOFT('tiny', img_size=64, out_indices=(3,)).state_dict().items()}
    state_dict |= {'head.fc.weight': torch.zeros(10, 512), 'head.fc.bias': torch.zeros(10)}
    torch.save(dict(state_dict=state_dict), tmp_path / 'tiny.pth')

    def draw(*options, image='a.png'):
        command = [sys.executable, str(ROOT / 'tools/visualize_attention.py'), image, str(config), 'tiny.pth', *options]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    done = draw('--points', '10,12', '40,50', '--stage', '2', '--head', '0', '3', '--out', 'maps/two.png')
    assert done.returncode == 0, done.stderr
    assert mmcv.imread(tmp_path / 'maps/two.png').std() > 5
    mmcv.imwrite(mmcv.imread(tmp_path / 'a.png'), str(tmp_path / 'maps/three.png'))
    done = draw('--points', '10,12', '--head', '4', '--stage', '2')
    assert done.returncode == 2 and 'heads [4] do not exist: the stage has 4' in done.stderr
    done = draw('--points', '10')
    assert done.returncode == 2 and "'10': expected x,y in pixels" in done.stderr
    done = draw('--points', '1,1', image='maps')
    assert done.returncode == 2 and 'maps holds 2 images; give one' in done.stderr
