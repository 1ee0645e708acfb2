"""The floor of a backbone: which products and convolutions count, and how they are computed alone."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.floor import FORMS, Recorder, measure_floor
from benchmarks.targets import build_step, parse_target
from soft_mm.complexity import count_multiply_adds


def test_products_and_convolutions_are_counted():
    conv, linear = nn.Conv2d(4, 6, 3, 2, 1, groups=2), nn.Linear(6, 5)
    x = torch.randn(2, 4, 8, 10, requires_grad=True)
    tokens = torch.randn(2, 3, 7, 8)
    with Recorder() as recorder:
        out = linear(conv(x).flatten(2).mT)
        torch.bmm(tokens[0], tokens[1].mT)
        values = torch.randn(2, 3, 7, 8, requires_grad=True)
        attended = F.scaled_dot_product_attention(tokens, tokens, values)
        (out.sum() + attended.sum()).backward()
    convolution = ((2, 4, 8, 10), (6, 2, 3, 3), (2, 2), (1, 1), (1, 1), 2)
    assert recorder.calls == {
        ('convolution', *convolution): 1,
        ('gradient', *convolution, (True, True)): 1,
        # The linear layer, and its gradients of input and weights.
        ('product', 1, 40, 6, 5): 1,
        ('product', 1, 40, 5, 6): 1,
        ('product', 1, 5, 40, 6): 1,
        ('product', 3, 7, 8, 7): 1,
        # Scores and values of the attention. Its gradients need the scores again, and the products for q, k and v.
        ('product', 6, 7, 8, 7): 3,
        ('product', 6, 7, 7, 8): 4,
    }


@pytest.mark.parametrize('target', ['soft-tiny', 'resnet-50'])
def test_shapes_have_the_multiply_adds_of_the_backbone(target):
    if target == 'resnet-50':
        pytest.importorskip('mmdet', reason="the ResNet is mmdet's")
    step = build_step(parse_target(target), (64, 96), 1, False, 'cpu')
    with Recorder() as recorder:
        step()
    found = 0
    for (kind, *shapes), calls in recorder.calls.items():
        if kind == 'product':
            batch, rows, inner, columns = shapes
            found += calls * batch * rows * inner * columns
        else:
            with torch.device('meta'):
                out = F.conv2d(torch.empty(shapes[0]), torch.empty(shapes[1]), None, *shapes[2:])
            found += calls * out.numel() * torch.Size(shapes[1][1:]).numel()
    # The recorder leaves out the Cholesky factorisation and its solve, which the count includes.
    assert found == pytest.approx(count_multiply_adds(step), rel=0.01)


@pytest.mark.parametrize(
    ('kind', 'shapes', 'count'),
    [
        ('product', (1, 5, 6, 7), 3),
        ('product', (3, 5, 6, 7), 2),
        ('convolution', ((2, 4, 8, 10), (6, 2, 3, 3), (2, 2), (1, 1), (1, 1), 2), 4),
        ('gradient', ((2, 4, 8, 10), (6, 2, 3, 3), (2, 2), (1, 1), (1, 1), 2, (True, True)), 2),
    ],
)
def test_all_forms_compute_the_same(kind, shapes, count):
    results = [form() for form in FORMS[kind](*shapes)]
    assert len(results) == count
    if kind == 'gradient':
        assert all(tuple(grads[0].shape) == shapes[0] and tuple(grads[1].shape) == shapes[1] for grads in results)
        return
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_parts_of_a_step():
    found = measure_floor(build_step(parse_target('soft-tiny'), (64, 64), 1, True, 'cpu'), repeats=1)
    assert found['parts'].keys() == {'product', 'convolution', 'gradient'}
    assert found['seconds'] > 0 and all(part['seconds'] > 0 and part['calls'] > 0 for part in found['parts'].values())


def test_program(environment, root):
    command = [sys.executable, '-m', 'benchmarks.floor', 'soft-tiny', '--size', '64x96']
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    assert '1 x 64x96' in done.stdout and 'floor / step' in done.stdout
    done = subprocess.run([*command, '--batch-size', '0'], capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 2 and '--batch-size 0: expected an integer >= 1' in done.stderr
