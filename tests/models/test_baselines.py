"""The baselines as modules of the backbone's interface."""

import math

import pytest
import torch
from mmengine.registry import MODELS as MMENGINE_MODELS
from torch.utils.checkpoint import checkpoint

from soft_mm import SOFT
from soft_mm.models import (
    GaussianKernelAttention,
    LinformerAttention,
    NystromAttention,
    PerformerAttention,
    SoftmaxAttention,
    SoftmaxFreeAttention,
    SpatialReductionAttention,
)

SHAPE = dict(embed_dims=16, num_heads=2, ratio=2, conv_size=3)
BASELINES = [
    SoftmaxAttention,
    LinformerAttention,
    PerformerAttention,
    NystromAttention,
    SpatialReductionAttention,
    GaussianKernelAttention,
]
REDUCED = dict(embed_dims=(32, 64, 96, 128), num_heads=(1, 2, 3, 4), depths=(1, 1, 2, 1))


SAMPLERS = [dict(sampler='conv'), dict(sampler='mean'), dict(sampler='random'), dict(sampler='mean', solver='svd')]


def modules(**shape):
    """Every type, and SOFT's own with each sampler."""
    yield from (kind(**(SHAPE | shape)) for kind in BASELINES)
    yield from (SoftmaxFreeAttention(**(SHAPE | shape), **options) for options in SAMPLERS)


@pytest.mark.parametrize('index', range(len(BASELINES) + len(SAMPLERS)))
@pytest.mark.parametrize('grid', [(5, 7), (14, 14), (1, 9), (35,), (1,)])
def test_tokens_in_tokens_out_with_gradients(index, grid):
    torch.manual_seed(0)
    module = list(modules(grid_dims=len(grid)))[index]
    n = math.prod(grid)
    tokens = torch.randn(2, n, 16, requires_grad=True)
    out = module(tokens, grid)
    assert out.shape == tokens.shape and torch.isfinite(out).all()
    out.square().mean().backward()
    assert tokens.grad.abs().sum() > 0
    if n > 1:
        silent = {name for name, parameter in module.named_parameters() if not parameter.grad.abs().sum() > 0}
        assert not silent
    with pytest.raises(ValueError, match='cells, one per token'):
        module(tokens, (*grid[:-1], n + 1))
    with pytest.raises(ValueError, match=r'expected \(.*\), because grid_dims=[12]'):
        module(tokens, (*grid, 1, 1))


# The grid that Linformer learns has other sides.
@pytest.mark.parametrize(
    'index', [i for i in range(len(BASELINES) + len(SAMPLERS)) if i != BASELINES.index(LinformerAttention)]
)
def test_a_sequence_is_a_map_of_one_row(index):
    """The filters of a sequence are one row of those of a map, in which the others are empty."""
    torch.manual_seed(0)
    flat, wide = (list(modules(grid_dims=dims, ratio=1))[index].double().eval() for dims in (1, 2))
    for narrow, parameter in zip(flat.parameters(), wide.parameters()):
        with torch.no_grad():
            if parameter.ndim == 4 and parameter.shape != narrow.shape:
                parameter.zero_()[:, :, parameter.shape[2] // 2] = narrow[:, :, 0]
            else:
                parameter.copy_(narrow)
    tokens = torch.randn(1, 24, 16, dtype=torch.float64)
    assert torch.allclose(flat(tokens, (24,)), wide(tokens, (1, 24)), atol=1e-10)


@pytest.mark.parametrize('index', range(len(BASELINES) + len(SAMPLERS)))
def test_an_image_does_not_depend_on_its_batch(index):
    torch.manual_seed(0)
    module = list(modules())[index].double().eval()
    tokens = torch.randn(3, 35, 16, dtype=torch.float64)
    together = module(tokens, (5, 7))
    assert torch.allclose(together[1:2], module(tokens[1:2], (5, 7)), atol=1e-10)


@pytest.mark.parametrize('kind', BASELINES)
def test_in_the_backbone_and_in_the_registry(kind):
    torch.manual_seed(0)
    backbone = SOFT(REDUCED, attention=dict(type=kind.__name__))
    maps = backbone(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(1, 32, 16, 24), (1, 64, 8, 12), (1, 96, 4, 6), (1, 128, 2, 3)]
    alone = MMENGINE_MODELS.build(dict(type=f'soft_mm.{kind.__name__}', **SHAPE))
    assert type(alone) is kind


def test_choices_are_attentions_alone():
    with pytest.raises(ValueError, match="'NistromAttention' is unknown; choose one of .*'NystromAttention'") as caught:
        SOFT(REDUCED, attention=dict(type='NistromAttention'))
    assert 'SequenceEncoder' not in str(caught.value)
    inherited = dict(type='NystromAttention', solver='newton')
    with pytest.raises(TypeError, match=r"keys \['solver'\] are unknown to NystromAttention.*_delete_=True"):
        SOFT(REDUCED, attention=inherited)


def test_one_attention_per_stage():
    kinds = ['NystromAttention', 'SpatialReductionAttention', 'SoftmaxFreeAttention']
    backbone = SOFT(REDUCED, attention=[dict(type=kind) for kind in kinds])
    assert [type(stage.blocks[0].attn).__name__ for stage in backbone.stages[:3]] == kinds


def test_softmax_attention_is_that_of_pytorch():
    torch.manual_seed(0)
    module = SoftmaxAttention(**SHAPE).double()
    oracle = torch.nn.MultiheadAttention(16, 2, batch_first=True).double()
    oracle.in_proj_weight.data, oracle.in_proj_bias.data = module.qkv.weight.data, module.qkv.bias.data
    oracle.out_proj.load_state_dict(module.proj.state_dict())
    tokens = torch.randn(2, 35, 16, dtype=torch.float64)
    assert torch.allclose(module(tokens, (5, 7)), oracle(tokens, tokens, tokens)[0], atol=1e-12)


@pytest.mark.parametrize('ratio', [1, 2])
def test_spatial_reduction_is_that_of_mmdet(ratio):
    pvt = pytest.importorskip('mmdet.models.backbones.pvt')
    torch.manual_seed(0)
    module = SpatialReductionAttention(**dict(SHAPE, ratio=ratio)).eval()
    oracle = pvt.SpatialReductionAttention(
        16, 2, qkv_bias=True, norm_cfg=dict(type='LN'), sr_ratio=ratio, batch_first=True
    ).eval()
    if ratio > 1:
        oracle.sr.load_state_dict(module.reduction.state_dict())
        oracle.norm.load_state_dict(module.norm.state_dict())
    oracle.attn.in_proj_weight.data = torch.cat([module.q.weight, module.kv.weight]).data
    oracle.attn.in_proj_bias.data = torch.cat([module.q.bias, module.kv.bias]).data
    oracle.attn.out_proj.load_state_dict(module.proj.state_dict())
    tokens = torch.randn(2, 35, 16)
    expected = oracle(tokens, (5, 7), identity=torch.zeros_like(tokens))
    assert torch.allclose(module(tokens, (5, 7)), expected, atol=1e-5)


def smooth_map(side):
    """16 channels whose neighbours are alike, as in images."""
    coarse = torch.randn(1, 16, 4, 4, dtype=torch.float64)
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode='bicubic')


def test_spatial_reduction_comes_nearer_with_its_budget():
    """With means in place of what its convolution learns, of neighbours that are alike."""
    torch.manual_seed(0)
    exact = SoftmaxAttention(**SHAPE).double()
    tokens = torch.nn.functional.layer_norm(smooth_map(16).flatten(2).transpose(1, 2), (16,))
    errors = []
    for ratio in (8, 4, 2, 1):
        module = SpatialReductionAttention(**dict(SHAPE, ratio=ratio)).double()
        weights, biases = exact.qkv.weight.data, exact.qkv.bias.data
        module.q.weight.data, module.kv.weight.data = weights[:16], weights[16:]
        module.q.bias.data, module.kv.bias.data = biases[:16], biases[16:]
        module.proj.load_state_dict(exact.proj.state_dict())
        if ratio > 1:
            mean = torch.eye(16).double()[:, :, None, None].repeat(1, 1, ratio, ratio) / ratio**2
            module.reduction.weight.data = mean
            module.reduction.bias.data.zero_()
        errors.append((module(tokens, (16, 16)) - exact(tokens, (16, 16))).norm().item())
    assert errors == sorted(errors, reverse=True) and errors[0] > 10 * errors[2] and errors[-1] < 1e-10 * errors[0]


def test_attention_learns_on_the_grid_of_its_stage():
    backbone = SOFT(REDUCED, attention=dict(type='LinformerAttention'), img_size=(64, 96))
    grids = [tuple(stage.blocks[0].attn.key_weight.shape[1:]) for stage in backbone.stages[:3]]
    assert grids == [(16, 24), (8, 12), (4, 6)]
    given = SOFT(REDUCED, attention=dict(type='LinformerAttention', grid=(5, 6)))
    assert tuple(given.stages[0].blocks[0].attn.key_weight.shape[1:]) == (5, 6)


def test_linformer_takes_its_learned_grid_and_others():
    module = LinformerAttention(**SHAPE)
    assert module.key_weight.shape == (49, 14, 14)
    sequence = LinformerAttention(**SHAPE, proj_tokens=5, grid=(40,), grid_dims=1)
    assert sequence(torch.randn(1, 33, 16), (33,)).shape == (1, 33, 16)


def test_performer_draws_anew_when_asked():
    torch.manual_seed(0)
    module, still = PerformerAttention(**SHAPE, redraw_interval=2), PerformerAttention(**SHAPE)
    before = module.features.clone()
    assert torch.equal(before, still.features) and not torch.equal(before, PerformerAttention(**SHAPE, seed=1).features)
    tokens = torch.randn(1, 12, 16)
    for count in range(4):
        module(tokens, (3, 4))
        still(tokens, (3, 4))
        assert torch.equal(module.features, before) == (count < 2)
    module.eval()
    drawn = module.features.clone()
    for _ in range(5):
        module(tokens, (3, 4))
    assert torch.equal(module.features, drawn) and torch.equal(still.features, before)


@pytest.mark.parametrize('reentrant', [False, True])
def test_checkpointing_neither_counts_nor_changes_the_features(reentrant):
    torch.manual_seed(0)
    module = PerformerAttention(**SHAPE, redraw_interval=2)
    tokens = torch.randn(1, 12, 16, requires_grad=True)
    results = []
    for run in (module, lambda *inputs: checkpoint(module, *inputs, use_reentrant=reentrant)):
        # The next forward draws anew, if it is one.
        module.forwards = 1
        run(tokens, (3, 4)).square().sum().backward()
        results.append((tokens.grad.clone(), module.features.clone()))
        tokens.grad = None
        assert module.forwards == 2
    torch.testing.assert_close(*results)


def test_full_kernel_has_a_guard():
    module = GaussianKernelAttention(**SHAPE, max_tokens=30)
    with pytest.raises(ValueError, match='35 tokens exceed max_tokens=30'):
        module(torch.randn(1, 35, 16), (5, 7))


@pytest.mark.parametrize(
    ('kind', 'options', 'message'),
    [
        (LinformerAttention, dict(proj_tokens=0), 'proj_tokens=0'),
        (LinformerAttention, dict(grid=(3, 4, 5)), r'grid=\(3, 4, 5\): expected 2 integers >= 1'),
        (LinformerAttention, dict(grid=(2.5, 3)), r'grid=\(2.5, 3\): expected 2 integers >= 1'),
        (LinformerAttention, dict(grid=3), 'grid=3: expected 2 integers >= 1'),
        (SoftmaxAttention, dict(grid_dims=3), 'grid_dims=3: expected 2'),
        (SoftmaxFreeAttention, dict(sampler='median'), "sampler='median' is unknown"),
        (PerformerAttention, dict(num_features=1.5), 'num_features=1.5'),
        (PerformerAttention, dict(redraw_interval=0), 'redraw_interval=0'),
        (PerformerAttention, dict(seed=-1), 'seed=-1: expected an integer >= 0'),
        (SoftmaxFreeAttention, dict(sampler='random', seed='one'), "seed='one': expected an integer >= 0"),
        (NystromAttention, dict(num_landmarks=True), 'num_landmarks=True'),
        (GaussianKernelAttention, dict(max_tokens=-1), 'max_tokens=-1'),
    ],
)
def test_bad_options_are_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**SHAPE, **options)


def test_random_landmarks_are_drawn_in_training_and_fixed_in_evaluation():
    torch.manual_seed(0)
    module = SoftmaxFreeAttention(**SHAPE, sampler='random', max_landmarks=4)
    q = torch.randn(1, 2, 35, 8) * 8**-0.25
    drawn = [module.landmarks(q, (5, 7)) for _ in range(3)]
    assert all(landmarks.shape == (1, 2, 4, 8) and pool_factor == 6 / 4 for landmarks, pool_factor, _ in drawn)
    assert not torch.equal(drawn[0][0], drawn[1][0])
    module.eval()
    first, again = (module.landmarks(q, (5, 7))[0] for _ in range(2))
    assert torch.equal(first, again)
    # They are queries.
    distances = torch.cdist(first[0, 0], q[0, 0])
    assert distances.amin(-1).max() < 1e-5
    other = SoftmaxFreeAttention(**SHAPE, sampler='random', max_landmarks=4, seed=1).eval()
    assert not torch.equal(other.landmarks(q, (5, 7))[0], first)


@pytest.mark.parametrize('normalized', [False, True])
def test_mean_landmarks_of_patches_of_one_give_the_full_kernel(normalized):
    """With every token a landmark and the exact inverse, the decomposition is the kernel itself (SOFT, section 3.2)."""
    torch.manual_seed(0)
    module = SoftmaxFreeAttention(16, 2, 1, 3, sampler='mean', solver='svd', normalized=normalized).double()
    q, v = torch.randn(2, 1, 2, 20, 8, dtype=torch.float64)
    kernel = torch.exp(-torch.cdist(q, q).square() / 2 / 8**0.5)
    expected = kernel @ v
    if normalized:
        root = kernel.sum(-1, keepdim=True).sqrt()
        expected = kernel @ (torch.linalg.inv(kernel) / root / root.mT) @ kernel @ v
    assert torch.allclose(module.attend(q * 8**-0.25, v, grid=(4, 5)), expected, atol=1e-6)


@pytest.mark.parametrize('sampler', ['mean', 'random'])
def test_approximation_falls_with_the_budget_of_a_sampler(sampler):
    """To nothing, where every token is a landmark (SOFT, section 3.2); neighbours are alike, as in images."""
    torch.manual_seed(0)
    q = smooth_map(12).reshape(1, 2, 8, 144).transpose(-2, -1)
    kernel = torch.exp(-torch.cdist(q, q).square() / 2 / 8**0.5)
    eye = torch.eye(144, dtype=torch.float64).expand(1, 2, -1, -1)
    errors = []
    for budget in (1, 4, 16, 36, 144):
        error = 0
        for seed in range(5):
            options = dict(sampler=sampler, solver='svd', max_landmarks=budget)
            options |= dict(seed=seed) if sampler == 'random' else {}
            module = SoftmaxFreeAttention(16, 2, 1, 3, **options).eval()
            found = module.attend(q * 8**-0.25, eye, grid=(12, 12))
            error += (found - kernel).norm().item()
        errors.append(error)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-5 * errors[0], errors
