"""Attention between two sets of tokens as a module: its formula, its options, and the decoder of the documents."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS as MMENGINE_MODELS

import soft_mm
from soft_mm import SOFT, SoftmaxFreeAttention, SoftmaxFreeCrossAttention, ops
from soft_mm.models.attention.base import merge_heads, split_heads
from soft_mm.ops import reference

GUIDE = Path(__file__).resolve().parents[2] / 'docs/attention.md'
OPTIONS = [
    dict(),
    dict(normalized=True, ratio=2),
    dict(solver='cholesky', ratio=3, max_landmarks=4),
    dict(solver='cholesky', normalized=True, ratio=2, max_landmarks=4),
    dict(newton_backward='exact', ratio=2, max_landmarks=None),
    dict(sampler='mean', normalized=True, ratio=2, max_landmarks=4),
]


def build(**options):
    torch.manual_seed(0)
    module = SoftmaxFreeCrossAttention(**dict(dict(embed_dims=12, num_heads=3, kv_dims=10), **options)).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def inputs(grid, n=11):
    count = torch.Size(grid).numel()
    generator = torch.Generator().manual_seed(1)
    shapes = (2, n, 12), (2, count, 10)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def by_reference(module, query, key_value, grid):
    """The formulas of the reference with the weights of the module."""
    linear = torch.nn.functional.linear
    k_weight, v_weight = module.kv.weight.chunk(2)
    k_bias, v_bias = module.kv.bias.chunk(2)
    q = split_heads(linear(query, module.q.weight, module.q.bias), 3) * 4**-0.25
    k = split_heads(linear(key_value, k_weight, k_bias), 3) * 4**-0.25
    v = split_heads(linear(key_value, v_weight, v_bias), 3)
    sampled = tuple(max(side // module.ratio, 1) for side in grid)
    if module.sampler == 'mean':
        landmarks = reference.pool_landmarks(k, grid, sampled)
    else:
        norm = module.landmark_norm
        landmarks = reference.conv_landmarks(k, grid, module.landmark.weight, norm.weight, norm.bias)
    count = landmarks.shape[2]
    landmarks = reference.pool_landmarks(landmarks, sampled, ops.pooled_grid(sampled, module.max_landmarks or count))
    if module.solver == 'cholesky':
        inverse = reference.ridge_inverse
    else:
        inverse = reference.newton_inverse_per_image if module.normalized else reference.newton_inverse
    factor = count / landmarks.shape[2]
    out = reference.softmax_free_attention(q, landmarks, v, inverse, module.normalized, factor, k)
    return module.proj(merge_heads(out))


@pytest.mark.parametrize('grid', [(5, 7), (8, 6)], ids=str)
@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_module_is_its_formula(options, grid):
    module, (query, key_value) = build(**options), inputs(grid)
    outcomes = []
    for out in (module(query, key_value, grid), by_reference(module, query, key_value, grid)):
        assert out.shape == query.shape
        # The one-step gradient of plain Newton iterations differs from that of the formula.
        exact = module.solver == 'cholesky' or module.normalized or module.newton_backward == 'exact'
        wanted = [query, key_value, *module.parameters()] if exact else [*module.proj.parameters()]
        outcomes.append([out, *torch.autograd.grad(out.square().sum(), wanted)])
    for found, expected in zip(*outcomes):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-8 * expected.abs().max().item())


@pytest.mark.parametrize('options', OPTIONS[1:], ids=str)
def test_sequences_and_single_queries(options):
    """A sequence is a map of one row, if the patches have one row."""
    query, key_value = inputs((24,), n=1)
    flat = build(**options, grid_dims=1)
    out = flat(query, key_value, (24,))
    assert out.shape == (2, 1, 12)
    out.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in flat.parameters())
    assert query.grad.any() and key_value.grad.any()
    for i in range(2):
        alone = flat(query[i : i + 1], key_value[i : i + 1], (24,))
        torch.testing.assert_close(alone, out[i : i + 1], rtol=0, atol=1e-10)


def test_equal_sets_and_projections_give_self_attention():
    """Without its local branch, self-attention is the case in which queries and keys share tokens and weights."""
    torch.manual_seed(0)
    own = SoftmaxFreeAttention(12, 3, 2, 3, solver='cholesky', max_landmarks=4).double()
    torch.nn.init.zeros_(own.local.weight)
    module = SoftmaxFreeCrossAttention(12, 3, ratio=2, solver='cholesky', max_landmarks=4).double()
    state = own.state_dict()
    state['q.weight'], state['q.bias'] = own.qv.weight[:12], own.qv.bias[:12]
    state['kv.weight'], state['kv.bias'] = state.pop('qv.weight'), state.pop('qv.bias')
    del state['local.weight']
    module.load_state_dict(state)
    x = torch.randn(2, 35, 12, dtype=torch.float64)
    torch.testing.assert_close(module(x, x, (5, 7)), own(x, (5, 7)), rtol=0, atol=1e-12)


def test_module_is_registered_and_exported():
    assert soft_mm.SoftmaxFreeCrossAttention is SoftmaxFreeCrossAttention
    module = MMENGINE_MODELS.build(dict(type='soft_mm.SoftmaxFreeCrossAttention', embed_dims=8, num_heads=2))
    assert type(module) is SoftmaxFreeCrossAttention and module.kv.in_features == 8
    assert 'max_landmarks=49' in repr(module)


def test_backbone_refuses_the_type():
    message = (
        r"attention type 'SoftmaxFreeCrossAttention' does not take .*; choose one of \[.*'GaussianKernelAttention'"
    )
    with pytest.raises(ValueError, match=message) as caught:
        SOFT('tiny', attention=dict(type='SoftmaxFreeCrossAttention'))
    assert 'Cross' not in str(caught.value).partition('choose')[2]


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(kv_dims=0), 'kv_dims=0: expected an integer >= 1'),
        (dict(ratio=1.5), 'ratio=1.5'),
        (dict(embed_dims=13), 'embed_dims=13: expected a multiple of num_heads=3'),
        (dict(grid_dims=3), 'grid_dims=3'),
        (dict(solver='lu'), "solver='lu' is unknown"),
        (dict(solver='cholesky', newton_iterations=5), 'newton_iterations=5 has no effect'),
        (dict(max_landmarks=0), 'max_landmarks=0'),
    ],
)
def test_invalid_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize(
    ('query', 'key_value', 'grid', 'message'),
    [
        ((2, 11, 10), (2, 35, 10), (5, 7), r'query of shape \(2, 11, 10\): expected \(B, n, 12\)'),
        ((2, 11, 12), (2, 35, 12), (5, 7), r'key_value of shape \(2, 35, 12\): expected \(B, n, 10\)'),
        ((2, 11, 12), (2, 10, 5, 7), (5, 7), r'key_value of shape \(2, 10, 5, 7\)'),
        ((2, 11, 12), (1, 35, 10), (5, 7), 'query of 2 images and key_value of 1: expected the same number'),
        ((2, 11, 12), (2, 34, 10), (5, 7), 'expected 34 cells'),
        ((2, 11, 12), (2, 35, 10), (35,), r'expected \(H, W\)'),
    ],
)
def test_invalid_inputs_are_named(query, key_value, grid, message):
    with pytest.raises(ValueError, match=message):
        build()(torch.zeros(query).double(), torch.zeros(key_value).double(), grid)


@pytest.mark.parametrize('options', [OPTIONS[1], OPTIONS[3]], ids=str)
def test_exported_and_compiled_module_equals_eager(options):
    module, (query, key_value) = build(**options).eval(), [x.detach() for x in inputs((5, 7))]
    mask = torch.rand(2, 35, generator=torch.Generator().manual_seed(0)) < 0.5
    torch._dynamo.reset()
    with torch.no_grad():
        expected = module(query, key_value, (5, 7), mask)
        dim = torch.export.Dim.DYNAMIC
        shapes = dict(query={0: dim, 1: dim}, key_value={0: dim}, grid=(None, None), mask={0: dim})
        program = torch.export.export(module, (query, key_value, (5, 7), mask), dynamic_shapes=shapes).module()
        torch.testing.assert_close(program(query, key_value, (5, 7), mask), expected)
        one = query[:1, :4], key_value[:1], (5, 7), mask[:1]
        torch.testing.assert_close(program(*one), module(*one))
        compiled = torch.compile(module, backend='aot_eager', fullgraph=True)
        torch.testing.assert_close(compiled(query, key_value, (5, 7), mask), expected)
    torch._dynamo.reset()


def decoder_of_the_guide():
    """Run the example of the guide, and return its class."""
    (block,) = re.findall(
        r'^```python\n([^`]*class QueryDecoder.*?)^```', GUIDE.read_text(encoding='utf-8'), re.DOTALL | re.MULTILINE
    )
    namespace = {}
    exec(block, namespace)
    return namespace['QueryDecoder']


def marked_maps(count, generator):
    """Maps whose channels 1 and 2 are the coordinates; channel 0 marks one cell of the left part. And what it marks."""
    height, width = 6, 10
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing='ij')
    maps = 0.1 * torch.randn(count, 4, height, width, generator=generator)
    maps[:, 1], maps[:, 2] = rows, columns
    row = torch.randint(height, (count,), generator=generator)
    column = torch.randint(width - 2, (count,), generator=generator)
    maps[torch.arange(count), 0, row, column] = 3
    # Padding with marks that mislead, if it is seen.
    maps[:, 0, :, -2:] = 3 * torch.rand(count, height, 2, generator=generator)
    mask = torch.ones(count, height, width, dtype=torch.bool)
    mask[:, :, -2:] = False
    return maps, mask, torch.stack([rows[row, column], columns[row, column]], -1)


def test_decoder_of_the_guide_learns():
    """To find the marked cell of a map. The loss of an answer that ignores the map is the variance of the targets."""
    torch.manual_seed(0)
    decoder = decoder_of_the_guide()(num_queries=2, embed_dims=16, map_dims=4, outputs=2)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(120):
        maps, mask, targets = marked_maps(32, generator)
        loss = (decoder(maps, mask) - targets[:, None]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    maps, mask, targets = marked_maps(500, generator)
    with torch.no_grad():
        found = (decoder(maps, mask) - targets[:, None]).square().mean().item()
    assert losses[0] > found and found < 0.25 * targets.var(0).mean().item(), (losses[::20], found)
