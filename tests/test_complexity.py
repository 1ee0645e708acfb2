"""Parameters and multiply-adds, against counts by hand."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmengine.analysis import FlopAnalyzer

from soft_mm import SOFT, ops
from soft_mm.complexity import config_complexity, count_multiply_adds, model_complexity

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / 'projects/photo_digits/configs'


def test_attention_products_are_counted():
    n, m, d = 600, 7, 8
    q, v = torch.randn(2, 1, 2, n, d)
    landmarks = torch.randn(1, 2, m, d)
    newton = count_multiply_adds(lambda: ops.softmax_free_attention(q, landmarks, v, newton_iterations=3))
    # The kernel, P^T v, and P times the result; the landmarks' kernel, three steps of two products, and M (P^T v).
    common = 2 * (3 * n * m * d + m * m * d)
    assert newton == common + 2 * (3 * 2 * m**3 + m * m * d)
    direct = count_multiply_adds(lambda: ops.softmax_free_attention(q, landmarks, v, solver='cholesky'))
    assert direct == common + 2 * (m**3 // 3) // 2 + 2 * m * m * d


def test_fused_softmax_attention_is_counted():
    q, k, v = torch.randn(3, 1, 2, 50, 8)
    assert count_multiply_adds(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * 2 * 50 * 50 * 8


@pytest.mark.parametrize(
    ('attention', 'share', 'uncounted'),
    [
        # A trace holds two products more per block, which give plain Newton its gradient.
        (dict(), (1, 1.01), ()),
        (dict(normalized=True), (1, 1), ()),
        (dict(solver='cholesky', max_landmarks=49), (0.998, 1), ('linalg_cholesky_ex', 'cholesky_solve')),
        (dict(type='SoftmaxAttention'), (0.5, 1), ('scaled_dot_product_attention',)),
    ],
    ids=str,
)
def test_counter_of_mmengine_sees_the_attention(attention, share, uncounted):
    """``get_flops.py`` of the toolboxes calls it. It names the operators that it does not count."""
    model, x = SOFT('tiny', attention=attention, out_indices=(2,)).eval(), torch.rand(1, 3, 160, 224)
    own = count_multiply_adds(lambda: model(x))
    analyzer = FlopAnalyzer(model, (x,))
    products = ('conv', 'linear', 'matmul', 'bmm', 'addmm')
    found = sum(analyzer.by_operator().get(name, 0) for name in products)
    assert share[0] * own <= found <= share[1] * own
    operators = ('linalg_cholesky_ex', 'cholesky_solve', 'scaled_dot_product_attention', 'baddbmm')
    assert tuple(name for name in operators if f'aten::{name}' in analyzer.unsupported_ops()) == uncounted


def test_parts_sum_to_the_whole():
    model = SOFT().eval()
    *parts, whole = model_complexity(model, lambda: model(torch.rand(1, 3, 64, 96)))
    assert [part.name for part in parts] == [f'stages.{i}' for i in range(4)]
    assert whole.parameters == sum(part.parameters for part in parts) == sum(p.numel() for p in model.parameters())
    assert whole.multiply_adds == sum(part.multiply_adds for part in parts)


@pytest.mark.parametrize('config', sorted(CONFIGS.glob('*.py')), ids=lambda path: path.stem)
def test_configs_of_every_toolbox(config):
    parts = {part.name: part for part in config_complexity(config, (96, 128))}
    alone = {part.name: part for part in config_complexity(config, (96, 128), backbone_only=True)}
    for i in range(4):
        assert parts[f'backbone.stages.{i}'].parameters == alone[f'stages.{i}'].parameters
        assert parts[f'backbone.stages.{i}'].multiply_adds == alone[f'stages.{i}'].multiply_adds > 0
    for name in ('neck', 'rpn_head', 'roi_head', 'decode_head'):
        assert name not in parts or parts[name].multiply_adds > 0, name
    assert parts[''].multiply_adds == sum(part.multiply_adds for name, part in parts.items() if name)


def test_sequences_are_counted():
    config = ROOT / 'projects/listops/configs/soft_listops.py'
    counts = [config_complexity(config, (1, n))[-1].multiply_adds for n in (64, 128)]
    assert 0 < counts[0] < counts[1] == config_complexity(config, (128,))[-1].multiply_adds
    with pytest.raises(ValueError, match=r'shape=\(224, 224\): expected 1 and the number of tokens'):
        config_complexity(config, (224, 224))


@pytest.mark.parametrize('scope', ['mmpose', 'mmaction'])
def test_whole_models_without_a_single_image_are_refused(tmp_path, scope):
    """The toolbox need not be installed."""
    (tmp_path / 'config.py').write_text(
        f"default_scope = '{scope}'\nmodel = dict(backbone=dict(type='soft_mm.SOFT'))\n"
    )
    with pytest.raises(ValueError, match=f'models of {scope} take no single image: count the backbone alone'):
        config_complexity(tmp_path / 'config.py', (64, 64))


def test_tool(tmp_path, environment):
    tool = [sys.executable, str(ROOT / 'tools/get_complexity.py')]
    config = CONFIGS / 'soft-tiny_photo-digits-crops.py'
    done = subprocess.run([*tool, str(config), '--shape', '64', '96'], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert 'backbone.stages.3' in done.stdout and 'whole' in done.stdout
    (tmp_path / 'empty.py').write_text('data = 1\n')
    done = subprocess.run([*tool, str(tmp_path / 'empty.py')], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and 'has no `model`' in done.stderr
