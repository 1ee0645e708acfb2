"""Exports, traces and transforms of the backbone compute what the eager model computes, or raise an error."""

import subprocess
import sys

import pytest
import torch
from authors import REDUCED_ARCH
from exports import ATTENTIONS, EVERY_SIZE, build, image, largest_error, slow
from mmengine.config import Config

from soft_mm import ops
from soft_mm.models.attention import SoftmaxFreeAttention
from soft_mm.utils import build_model

pytestmark = pytest.mark.skipif(
    not hasattr(torch.compiler, 'is_exporting'), reason='PyTorch before 2.7 does not tell an export from a compilation'
)


@pytest.mark.parametrize('name', ATTENTIONS)
def test_export_of_one_size(name):
    model = build(ATTENTIONS[name])
    with torch.no_grad():
        program = torch.export.export(model, (image(),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert largest_error(program.module(), model, image()) < 1e-8
    assert largest_error(program.module(), model, image(1)) < 1e-8
    with pytest.raises(RuntimeError):
        program.module()(image(size=(128, 96)))


@pytest.mark.parametrize('name', ['newton', slow('newton normalized'), slow('cholesky'), 'cholesky normalized'])
def test_strict_export(name):
    model = build(ATTENTIONS[name])
    with torch.no_grad():
        program = torch.export.export(model, (image(),), strict=True)
    assert largest_error(program.module(), model, image()) < 1e-8


@pytest.mark.parametrize('options', [dict(out_indices=(1,)), dict(out_indices=(0, 2)), dict(out_type='cls_token')])
def test_export_of_other_outputs(options):
    model = build({}, **options)
    program = torch.export.export(model, (image(),))
    assert largest_error(program.module(), model, image()) < 1e-8


@pytest.mark.parametrize(
    'name',
    [
        'newton',
        *map(slow, ('newton bounded', 'newton normalized', 'newton normalized bounded', 'cholesky')),
        'cholesky normalized',
    ],
)
@pytest.mark.parametrize('kind', ['DYNAMIC', slow('AUTO')])
def test_export_of_every_size(name, kind):
    """The landmarks are bounded at some sizes and not at others; the images are wide and high, their sides odd."""
    model, dim = build(ATTENTIONS[name]), getattr(torch.export.Dim, kind)
    with torch.no_grad():
        program = torch.export.export(model, (image(size=(96, 160)),), dynamic_shapes=({0: dim, 2: dim, 3: dim},))
    # PyTorch does not let a variable side of a map, or of the grid of the landmarks that are pooled, become 1.
    least = 61 if model.stages[0].blocks[0].attn.max_landmarks else 33
    for batch, size in ((1, (least, least)), (2, (224, 224)), (1, (65, 401)), (3, (160, 64)), (1, (401, least))):
        assert largest_error(program.module(), model, image(batch, size)) < 1e-8


def test_smallest_variable_size_is_33_pixels():
    """At 32 pixels, the map of stage 4 has a side of 1."""
    model, dim = build({}), torch.export.Dim.DYNAMIC
    with torch.no_grad():
        program = torch.export.export(model, (image(size=(96, 160)),), dynamic_shapes=({0: dim, 2: dim, 3: dim},))
    with pytest.raises(RuntimeError, match='33'):
        program.module()(image(1, (32, 64)))


@pytest.mark.parametrize('name', [name for name in ATTENTIONS if name not in EVERY_SIZE])
def test_other_attentions_with_variable_sizes_are_refused(name):
    dim = torch.export.Dim.DYNAMIC
    with torch.no_grad(), pytest.raises(NotImplementedError, match='can be exported for one image size only'):
        torch.export.export(build(ATTENTIONS[name]), (image(),), dynamic_shapes=({0: dim, 2: dim, 3: dim},))


@pytest.mark.parametrize('name', ['newton', 'newton exact', 'newton normalized', 'cholesky', 'cholesky normalized'])
def test_gradients_of_the_standard_operators(name):
    """The exported program differentiates as the eager model does, the authors' one-step gradient included."""
    model, x = build(ATTENTIONS[name]), image()
    # An export without gradients must not lose the one-step gradient.
    with torch.no_grad():
        program = torch.export.export(model, (x,)).module()
    gradients = []
    for function in (model, program):
        parameters = dict(function.named_parameters())
        outputs = function(x)
        loss = sum((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum() for output in outputs)
        gradients.append(dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True))))
    expected, got = gradients
    assert expected.keys() == got.keys()
    for key, gradient in expected.items():
        if gradient is not None:
            torch.testing.assert_close(got[key], gradient, rtol=1e-6, atol=1e-9 * gradient.abs().max().item())


@pytest.mark.parametrize('grid', [(1, 1), (3, 5), (7, 7), (8, 9), (20, 4), (33, 2), (5, 15)])
@pytest.mark.parametrize('max_landmarks', [1, 7, 49, 64])
def test_slots_are_the_pooled_landmarks(grid, max_landmarks):
    landmarks = torch.randn(2, 3, grid[0] * grid[1], 8, dtype=torch.float64)
    slots, factor, present = ops.pool_to_slots(landmarks, grid, max_landmarks)
    pooled, expected_factor = ops.pool_landmarks(landmarks, grid, max_landmarks)
    count = pooled.shape[2]
    assert present.tolist() == [1.0] * count + [0.0] * (max_landmarks - count)
    assert factor.item() == pytest.approx(expected_factor)
    torch.testing.assert_close(slots[:, :, :count], pooled)
    assert slots[:, :, count:].abs().sum() == 0


@pytest.mark.parametrize('normalized', [False, True])
@pytest.mark.parametrize('solver', ['newton', 'cholesky'])
def test_empty_slots_change_nothing(normalized, solver):
    torch.manual_seed(0)
    landmarks = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    q, v = torch.randn(2, 2, 3, 50, 8, dtype=torch.float64)
    expected = ops.blockwise_attention(q, landmarks, v, *ops.middle_matrix(landmarks, normalized, solver))
    padded = torch.cat([landmarks, torch.zeros(2, 3, 4, 8, dtype=torch.float64)], 2)
    present = torch.tensor([1.0] * 9 + [0.0] * 4, dtype=torch.float64)
    matrix, inverted = ops.middle_matrix(padded, normalized, solver, present=present)
    torch.testing.assert_close(ops.whole_attention(q, padded, v, matrix, inverted, present), expected)


def test_saved_program_needs_torch_alone(tmp_path):
    model = build(ATTENTIONS['cholesky'])
    torch.export.save(torch.export.export(model, (image(),)), tmp_path / 'model.pt2')
    torch.save((image(), model(image())), tmp_path / 'example.pt')
    code = """
import sys, torch
sys.modules['soft_mm'] = sys.modules['mmengine'] = None
program = torch.export.load('model.pt2').module()
x, outputs = torch.load('example.pt')
for got, expected in zip(program(x), outputs, strict=True):
    torch.testing.assert_close(got, expected)
print('equal')
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == 'equal\n', done.stderr[-2000:]


@pytest.mark.parametrize('name', ATTENTIONS)
def test_trace_is_right_or_an_error(name, tmp_path):
    model = build(ATTENTIONS[name])
    torch.jit.save(torch.jit.trace(model, image(), check_trace=False), str(tmp_path / 'model.pt'))
    traced = torch.jit.load(str(tmp_path / 'model.pt'))
    # A trace computes with shapes in float32, such as the scale of the queries.
    assert largest_error(traced, model, image()) < 1e-4
    assert largest_error(traced, model, image(3)) < 1e-4
    # The second has as many tokens as the first, and the last as few landmarks.
    for size in ((64, 96), (128, 96), (96, 160), (32, 32)):
        with pytest.raises(RuntimeError):
            traced(image(size=size))


@pytest.mark.parametrize('name', ['newton', 'newton normalized', 'cholesky', 'cholesky normalized'])
def test_functional_transforms(name):
    attention = SoftmaxFreeAttention(32, 2, ratio=2, conv_size=3, **ATTENTIONS[name]).double()
    x = torch.randn(3, 35, 32, dtype=torch.float64, requires_grad=True)

    def loss(tokens):
        return attention(tokens, (5, 7)).square().sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)
    mapped = torch.func.vmap(lambda tokens: attention(tokens[None], (5, 7))[0])(x.detach())
    torch.testing.assert_close(mapped, attention(x, (5, 7)).detach())


@pytest.mark.parametrize('attention', [{}, dict(solver='cholesky', max_landmarks=7), dict(solver='svd')])
def test_functional_gradient_of_the_backbone(attention):
    model, x = build(attention, out_indices=(0, 2)), image(1, (64, 64)).requires_grad_()

    def loss(pixels):
        return sum(output.square().sum() for output in model(pixels))

    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)


def test_random_landmarks_are_refused():
    model = build(dict(sampler='random'))
    with pytest.raises(NotImplementedError, match="sampler='random' cannot be exported"):
        torch.export.export(model, (image(),))
    with pytest.raises(NotImplementedError, match="sampler='random' cannot be exported"):
        torch.jit.trace(model, image())


@pytest.mark.parametrize('strict', [False, True])
def test_classifier(strict):
    """From images to scores, with any number of images."""
    pytest.importorskip('mmpretrain')
    backbone = dict(type='soft_mm.SOFT', arch=REDUCED_ARCH, attention=ATTENTIONS['cholesky'], out_indices=(3,))
    head = dict(type='LinearClsHead', num_classes=5, in_channels=128)
    cfg = dict(type='ImageClassifier', backbone=dict(backbone, out_type='cls_token'), head=head)
    model = build_model(Config(dict(default_scope='mmpretrain', model=cfg))).eval().double()
    with torch.no_grad():
        shapes = dict(inputs={0: torch.export.Dim.DYNAMIC})
        program = torch.export.export(model, (image(),), dynamic_shapes=shapes, strict=strict).module()
        for batch in (1, 2, 5):
            torch.testing.assert_close(program(image(batch)), model(image(batch)), rtol=1e-8, atol=1e-8)
