"""Half precision, in autocast and in the weights, against float32, and inputs that are hard for it."""

import copy

import pytest
import torch
from authors import VARIANTS, image, reduced_model
from torch.nn.functional import cosine_similarity

from soft_mm import SOFT, ops
from soft_mm.models.attention import SoftmaxFreeCrossAttention, build_attention
from soft_mm.models.blocks import SoftmaxFreeBlock
from soft_mm.ops import reference

# Largest relative error of the outputs, and smallest cosine between the gradients. docs/training.md states them.
BARS = {torch.bfloat16: (0.04, 0.99), torch.float16: (0.004, 0.999)}
SOLVERS = [
    ('newton', False),
    ('newton', True),
    ('cholesky', False),
    ('cholesky', True),
]


def relative_error(found, expected):
    return ((found.float() - expected).norm() / expected.norm()).item()


def gradient(out, model):
    return torch.cat(
        [g.flatten().double() for g in torch.autograd.grad(out.float().square().sum(), model.parameters())]
    )


@pytest.mark.parametrize('dtype', BARS, ids=str)
@pytest.mark.parametrize('solver', ['newton', 'cholesky'])
@pytest.mark.parametrize(('kind', 'regime'), VARIANTS)
def test_autocast_is_close_to_float32(kind, regime, solver, dtype):
    model, x = reduced_model(kind, regime, attention=dict(solver=solver)), image(96, 136)
    expected = model(x)
    with torch.autocast('cpu', dtype):
        found = model(x)
    error, cosine = BARS[dtype]
    assert relative_error(found, expected) <= error
    # Without gradients, layers are fused and BatchNorm is folded.
    with torch.no_grad(), torch.autocast('cpu', dtype):
        assert relative_error(model(x), expected) <= error
    assert cosine_similarity(gradient(found, model), gradient(expected, model), dim=0) >= cosine


@pytest.mark.parametrize('dtype', BARS, ids=str)
@pytest.mark.parametrize(('kind', 'regime'), VARIANTS)
def test_weights_in_half_precision_are_close_to_float32(kind, regime, dtype):
    model, x = reduced_model(kind, regime), image(96, 136)
    with torch.no_grad():
        found = copy.deepcopy(model).to(dtype)(x.to(dtype))
        assert found.dtype == dtype
        assert relative_error(found, model(x)) <= BARS[dtype][0]


@pytest.mark.parametrize(('dtype', 'bar'), [(torch.bfloat16, 0.02), (torch.float16, 0.003)], ids=str)
@pytest.mark.parametrize('attention', [{}, dict(normalized=True), dict(solver='cholesky', max_landmarks=49)], ids=str)
def test_soft_tiny_in_half_precision(attention, dtype, bar):
    """Weights as initialised, at the size of ImageNet."""
    torch.manual_seed(0)
    model, x = SOFT('tiny', attention=attention).eval(), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = model(x)
        found = model.to(dtype)(x.to(dtype))
    assert max(relative_error(*pair) for pair in zip(found, expected)) <= bar


@pytest.mark.parametrize(
    ('spread', 'offset', 'solver', 'normalized'),
    # With tokens that are far apart, A is I up to rounding, and normalised Newton amplifies the rounding of a degree
    # without bound: of an exact I, its inverse is 0.
    [(0.5, 8.0, *case) for case in SOLVERS] + [(60.0, 0.0, *case) for case in SOLVERS if case != ('newton', True)],
)
@pytest.mark.parametrize('dtype', BARS, ids=str)
def test_distances_neither_cancel_nor_overflow_in_half_precision(dtype, spread, offset, solver, normalized):
    generator = torch.Generator().manual_seed(0)
    q = (spread * torch.randn(1, 2, 30, 32, generator=generator) + offset).to(dtype)
    v = torch.randn(1, 2, 30, 32, generator=generator).to(dtype)
    landmarks = q[:, :, ::3].contiguous()
    squares = q.float().square().sum(-1)
    # A step between two numbers of half precision is larger than the exponents, or the squares are beyond its range.
    assert squares.min() * torch.finfo(dtype).eps > 1 if offset else squares.min() > torch.finfo(torch.float16).max / 2
    attend = ops.normalized_softmax_free_attention if normalized else ops.softmax_free_attention
    with torch.autocast('cpu', dtype):
        found = attend(q, landmarks, v, solver=solver)
    if solver == 'cholesky':
        invert = reference.ridge_inverse
    else:
        invert = reference.newton_inverse_per_image if normalized else reference.newton_inverse
    wide = (tensor.double() for tensor in (q, landmarks, v))
    expected = reference.softmax_free_attention(*wide, invert, normalized).float()
    # The output is rounded to half precision, and the exponents are differences of squares in float32.
    tolerance = 2 * torch.finfo(dtype).eps + 4 * squares.max() * torch.finfo(torch.float32).eps
    assert (found.float() - expected).norm() <= tolerance * v.float().norm()


def test_loss_scaling_recovers_from_an_overflow():
    """Steps whose gradients overflow in float16 are skipped, and training goes on with a smaller scale."""
    model, x = reduced_model('norm', 'flat').train(), image(64, 96).repeat(2, 1, 1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0**40)
    before, scales, changed = copy.deepcopy(model.state_dict()), [scaler.get_scale()], []
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast('cpu', torch.float16):
            loss = torch.nn.functional.cross_entropy(model(x).float(), torch.tensor([1, 2]))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        changed.append(any(not torch.equal(p, before[name]) for name, p in model.named_parameters()))
        if changed[-1]:
            break
    assert len(changed) > 1 and changed == [False] * (len(changed) - 1) + [True]
    assert scales[-1] < scales[0]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize('size', [(32, 4000), (4000, 32)], ids='{0[0]}x{0[1]}'.format)
@pytest.mark.parametrize(('solver', 'normalized'), SOLVERS)
def test_long_and_narrow_images(solver, normalized, size):
    model = reduced_model('norm' if normalized else 'plain', 'flat', attention=dict(solver=solver, max_landmarks=49))
    out = model(image(*size))
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), model.parameters()))


@pytest.mark.parametrize('value', [0.0, 1.0, 1e4, 1e-8, -3e5])
@pytest.mark.parametrize(('solver', 'normalized'), [*SOLVERS, ('svd', False), ('svd', True)])
def test_constant_images_train(solver, normalized, value):
    """All tokens of the inside of the image are equal, and so are their landmarks."""
    kind = 'norm' if normalized else 'plain'
    model = reduced_model(kind, 'sharp', attention=dict(solver=solver)).train()
    out = model(torch.full((2, 3, 64, 96), value))
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.square().sum(), model.parameters()))


PLAIN_OR_NOT = [{}, dict(solver='cholesky'), dict(normalized=True), dict(type='GaussianKernelAttention')]


@pytest.mark.parametrize('attention', PLAIN_OR_NOT, ids=str)
def test_sums_beyond_the_range_of_float16(attention):
    """Plain attention sums the values of all similar tokens, here 1024 values in the thousands. LayerNorm follows."""
    torch.manual_seed(0)
    block = SoftmaxFreeBlock(32, 2, ratio=8, conv_size=3, attention=attention).eval()
    sums = []
    block.attn.proj.register_forward_pre_hook(lambda module, args: sums.append(args[0].abs().max()))
    with torch.no_grad():
        block.attn.qv.weight[:32] *= 0.01
        block.attn.qv.weight[32:] *= 4000
        x = torch.randn(2, 1024, 32) + torch.linspace(-2, 2, 32)
        expected = block(x, (32, 32))
        with torch.autocast('cpu', torch.float16):
            found = block(x, (32, 32))
    assert all((largest > 65504) == (not attention.get('normalized', False)) for largest in sums)
    assert relative_error(found, expected) < 0.01


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('attention', PLAIN_OR_NOT, ids=str)
def test_attention_returns_the_dtype_of_its_weights(attention, dtype):
    attend = build_attention(attention, 32, 2, 4, 3).to(dtype)
    assert attend(torch.randn(1, 64, 32, dtype=dtype), (8, 8)).dtype == dtype
    if 'type' not in attention:
        cross = SoftmaxFreeCrossAttention(32, 2, **attention).to(dtype)
        query, keys = torch.randn(1, 5, 32, dtype=dtype), torch.randn(1, 64, 32, dtype=dtype)
        assert cross(query, keys, (8, 8)).dtype == dtype
