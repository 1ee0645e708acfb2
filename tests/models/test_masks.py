"""The mask of every attention: tokens that do not take part, such as padding, change nothing."""

import functools

import pytest
import torch

from soft_mm import SOFT, ops
from soft_mm.models import LinformerAttention, SoftmaxFreeAttention, SoftmaxFreeCrossAttention
from soft_mm.models.attention import build_attention
from soft_mm.models.attention.base import SharedQKAttention
from soft_mm.models.blocks import SoftmaxFreeBlock

SHAPE = dict(embed_dims=16, num_heads=2, ratio=2, conv_size=3)
SOFTMAX_FREE = {
    'newton': dict(),
    'newton exact': dict(newton_backward='exact'),
    'newton normalized': dict(normalized=True),
    'cholesky bounded': dict(solver='cholesky', max_landmarks=5),
    'cholesky normalized bounded': dict(solver='cholesky', normalized=True, max_landmarks=5),
    'newton normalized bounded': dict(normalized=True, max_landmarks=5),
    'svd': dict(solver='svd'),
    'svd normalized': dict(solver='svd', normalized=True),
    'mean': dict(sampler='mean', solver='cholesky'),
    'mean bounded': dict(sampler='mean', max_landmarks=5),
    'random': dict(sampler='random', solver='cholesky', normalized=True),
    'random bounded': dict(sampler='random', max_landmarks=5),
}
BASELINES = {
    name: dict(type=f'{name}Attention')
    for name in ('Softmax', 'Linformer', 'Performer', 'Nystrom', 'SpatialReduction', 'GaussianKernel')
}
ATTENTIONS = SOFTMAX_FREE | BASELINES | dict(nystrom_coarse=dict(type='NystromAttention', num_landmarks=6))
GRIDS = [(5, 7), (33,)]


def build(options, grid_dims=2, **shape):
    """An attention in float64, with weights far from their initial values, so that an omitted part is noticed."""
    torch.manual_seed(0)
    module = build_attention(dict(options, grid_dims=grid_dims), **dict(SHAPE, **shape)).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def tokens_and_mask(grid, batch=3, dims=16):
    """Tokens, and a mask that leaves whole patches and parts of patches out, other ones in every image."""
    generator = torch.Generator().manual_seed(1)
    n = torch.Size(grid).numel()
    mask = torch.rand(batch, n, generator=generator) < 0.4
    mask[0] = torch.arange(n) < n // 3
    return torch.randn(batch, n, dims, generator=generator, dtype=torch.float64), mask


@pytest.mark.parametrize('grid', GRIDS, ids=str)
@pytest.mark.parametrize('name', ATTENTIONS)
def test_masked_tokens_may_hold_anything(name, grid):
    """Bit for bit, also with NaN, and no gradient reaches them."""
    module = build(ATTENTIONS[name], len(grid))
    x, mask = tokens_and_mask(grid)
    weights = torch.linspace(-1, 1, x.numel()).sin().view_as(x) * mask.unsqueeze(-1)
    outcomes = []
    for value in (None, 0.0, 1e300, -torch.inf, torch.nan):
        changed = (x if value is None else x.masked_fill(~mask.unsqueeze(-1), value)).requires_grad_()
        out = module(changed, grid, mask)
        gradients = torch.autograd.grad((out * weights).sum(), [changed, *module.parameters()])
        assert torch.isfinite(out).all() and all(torch.isfinite(gradient).all() for gradient in gradients)
        assert not gradients[0][~mask].any() and gradients[0][mask].any()
        outcomes.append([out, *gradients])
    for outcome in outcomes[1:]:
        assert all(torch.equal(*pair) for pair in zip(outcome, outcomes[0]))
    assert not torch.allclose(outcomes[0][0][mask], module(x, grid)[mask], atol=1e-3)


@pytest.mark.parametrize('grid', GRIDS, ids=str)
@pytest.mark.parametrize('name', ATTENTIONS)
def test_mask_of_all_tokens_is_no_mask(name, grid):
    module, (x, mask) = build(ATTENTIONS[name], len(grid)), tokens_and_mask(grid)
    x.requires_grad_()
    outcomes = []
    for given in ((), (torch.ones_like(mask),)):
        out = module(x, grid, *given)
        outcomes.append([out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])])
    for found, wanted in zip(*outcomes):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9 * wanted.abs().max().item())


@pytest.mark.parametrize('name', ATTENTIONS)
def test_an_image_does_not_depend_on_the_masks_of_its_batch(name):
    module, (x, mask) = build(ATTENTIONS[name]), tokens_and_mask((5, 7), batch=4)
    mask[2] = False
    mask[3] = True
    together = module(x, (5, 7), mask)
    for i in range(4):
        alone = module(x[i : i + 1], (5, 7), mask[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-10)
    torch.testing.assert_close(together[3:], module(x[3:], (5, 7)), rtol=0, atol=1e-9)
    # No token takes part in the third image.
    assert torch.equal(together[2], module.proj.bias.expand(35, 16))


@pytest.mark.parametrize('name', ATTENTIONS)
def test_image_without_a_token_has_gradients(name):
    module, (x, mask) = build(ATTENTIONS[name]), tokens_and_mask((5, 7))
    x.requires_grad_()
    out = module(x, (5, 7), torch.zeros_like(mask))
    gradients = torch.autograd.grad(out.square().sum(), [x, *module.parameters()])
    assert all(torch.isfinite(gradient).all() for gradient in gradients) and not gradients[0].any()


# Linformer weights every token by its place, and random landmarks are drawn by it.
ALIGNED = [name for name in ATTENTIONS if 'random' not in name and 'ounded' not in name and name != 'Linformer']


@pytest.mark.parametrize('name', [name for name in ALIGNED if name != 'nystrom_coarse'])
@pytest.mark.parametrize(
    ('grid', 'rows', 'columns'),
    [((8, 6), slice(0, 4), slice(0, 6)), ((8, 6), slice(2, 8), slice(2, 4)), ((1, 20), slice(0, 1), slice(6, 14))],
    ids=['rows', 'window', 'sequence'],
)
def test_attention_is_that_of_the_present_tokens_alone(name, grid, rows, columns):
    """If they are a window of whole patches: the local branch pads maps with zeros, and masked values are zeros."""
    dims = 1 if grid[0] == 1 else 2
    module = build(ATTENTIONS[name], dims)
    x = torch.randn(2, *grid, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.zeros(2, *grid, dtype=torch.bool)
    # The other image has its own window.
    mask[0] = True
    mask[1, rows, columns] = True
    window = x[1:, rows, columns]
    out = module(x.flatten(1, 2), grid[-dims:], mask.flatten(1)).unflatten(1, grid)
    alone = module(window.flatten(1, 2), window.shape[3 - dims : 3])
    found = out[1:, rows, columns].flatten(1, 2)
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-9 * alone.abs().max().item())


@pytest.mark.parametrize(
    'options',
    [
        dict(solver='cholesky', normalized=True),
        dict(solver='cholesky'),
        dict(normalized=True),
        dict(sampler='mean', normalized=True, solver='svd'),
        dict(type='NystromAttention'),
    ],
    ids=str,
)
@pytest.mark.parametrize('start', [0, 16])
def test_bounded_landmarks_are_those_of_the_present_tokens(options, start):
    """Half a sequence has half the cells, so the bound of the half is half of the bound."""
    ratio, bound = 4, 'num_landmarks' if 'type' in options else 'max_landmarks'
    whole, half = (build(options | {bound: count}, 1, ratio=ratio) for count in (4, 2))
    x, mask = torch.randn(2, 32, 16, dtype=torch.float64), torch.ones(2, 32, dtype=torch.bool)
    mask[1] = False
    mask[1, start : start + 16] = True
    found = whole(x, (32,), mask)[1, mask[1]]
    expected = half(x[1:, start : start + 16], (16,))[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_linformer_combines_the_present_tokens():
    module, (x, mask) = build(BASELINES['Linformer']), tokens_and_mask((5, 7), batch=1)
    q, k, v = module.project(x, (5, 7))
    weights = (ops.resize_sequence_projection(weight, (5, 7)) for weight in (module.key_weight, module.value_weight))
    keys = [weight[:, mask[0]] for weight in weights]
    expected = ops.linformer_attention(q, k[:, :, mask[0]], v[:, :, mask[0]], *keys)
    expected = module.proj(expected.transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x, (5, 7), mask)[mask], expected[mask], rtol=0, atol=1e-12)


@pytest.mark.parametrize('sampler', ['conv', 'mean', 'random'])
def test_landmarks_are_made_of_present_tokens(sampler):
    """The scale of a landmark of the convolution does not depend on how full its patch is."""
    module = SoftmaxFreeAttention(**SHAPE, sampler=sampler, solver='svd').double().eval()
    q = torch.randn(1, 2, 24, 8, dtype=torch.float64)
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    # One patch of 2 x 2 is full, one has a single token, and four are empty.
    mask[:, :2, :2] = mask[:, 2, 5] = True
    filled = mask.flatten(1)
    landmarks, factor, present = module.landmarks(q * filled[:, None, :, None], (4, 6), filled)
    assert factor.item() == 1 and present.sum() == 2
    kept = landmarks[:, :, present[0, 0] > 0]
    if sampler == 'conv':
        assert present.flatten().tolist() == [1, 0, 0, 0, 0, 1]
        assert (kept.norm(dim=-1).amax() / kept.norm(dim=-1).amin()).item() < 3
    elif sampler == 'mean':
        maps = q.unflatten(2, (4, 6))
        expected = torch.stack([maps[:, :, :2, :2].mean((2, 3)), maps[:, :, 2, 5]], 2)
        torch.testing.assert_close(kept, expected)
    else:
        distances = torch.cdist(kept[0, 0], q[0, 0, filled[0]])
        assert distances.amin(-1).max() == 0


def test_block_passes_the_mask():
    block = SoftmaxFreeBlock(16, 2, 2, 3, dict(solver='cholesky')).double().eval()
    x, mask = tokens_and_mask((5, 7))
    expected = block.norm1(x + block.attn(x, (5, 7), mask))
    torch.testing.assert_close(block(x, (5, 7), mask), block.norm2(expected + block.mlp(expected)))
    changed = x + 5 * (~mask).unsqueeze(-1)
    torch.testing.assert_close(block(changed, (5, 7), mask)[mask], block(x, (5, 7), mask)[mask], rtol=0, atol=1e-12)


class Maskless(SharedQKAttention):
    def __init__(self, embed_dims, num_heads, ratio, conv_size, grid_dims=2, init_cfg=None):
        super().__init__(embed_dims, num_heads, ratio, conv_size, grid_dims, init_cfg)
        self.proj = torch.nn.Linear(embed_dims, embed_dims)

    def attend(self, q, v, grid):
        return v.mean(2, keepdim=True).expand_as(v)


class Foreign(torch.nn.Module):
    def __init__(self, embed_dims, num_heads, ratio, conv_size):
        super().__init__()
        self.linear = torch.nn.Linear(embed_dims, embed_dims)

    def forward(self, x, grid):
        return self.linear(x)


def test_own_types_work_without_a_mask():
    arch = dict(embed_dims=(16, 16, 32, 32), num_heads=(2, 2, 2, 2), depths=(1, 1, 1, 1))
    for kind in (Maskless, Foreign):
        assert len(SOFT(arch, attention=dict(type=kind))(torch.rand(1, 3, 64, 64))) == 4
    x, mask = tokens_and_mask((5, 7))
    module = Maskless(**SHAPE).double()
    assert module(x, (5, 7)).shape == x.shape
    with pytest.raises(NotImplementedError, match='Maskless supports no mask: add the argument `mask` to its method'):
        module(x, (5, 7), mask)


@pytest.mark.parametrize(
    ('mask', 'given'),
    [
        (torch.ones(2, 35), r'torch.float32 \(2, 35\)'),
        (torch.ones(2, 35, dtype=torch.long), r'torch.int64 \(2, 35\)'),
        (torch.ones(2, 34, dtype=torch.bool), r'torch.bool \(2, 34\)'),
        (torch.ones(35, dtype=torch.bool), r'torch.bool \(35,\)'),
        (torch.ones(2, 5, 7, dtype=torch.bool), r'torch.bool \(2, 5, 7\)'),
        ([[True] * 35] * 2, 'list'),
    ],
)
@pytest.mark.parametrize('name', ['newton', *BASELINES])
def test_invalid_masks_are_named(name, mask, given):
    message = rf'mask: {given}: expected a tensor torch.bool \(2, 35\) \(B, n\), True where a token takes part'
    with pytest.raises(ValueError, match=message):
        build(ATTENTIONS[name])(torch.randn(2, 35, 16, dtype=torch.float64), (5, 7), mask)


class WithGrid(torch.nn.Module):
    """An attention as a function of tensors alone."""

    def __init__(self, attention, grid=None):
        super().__init__()
        self.attention, self.grid = attention, grid

    def forward(self, x, mask):
        if self.grid is None:
            # A map ``(B, H, W, C)``.
            return self.attention(x.flatten(1, 2), x.shape[1:3], mask.flatten(1)).unflatten(1, x.shape[1:3])
        return self.attention(x, self.grid, mask)


RECORDED = [name for name in ATTENTIONS if 'random' not in name]


@pytest.mark.parametrize('name', RECORDED)
def test_exported_traced_and_transformed_masks(name):
    module, (x, mask) = build(ATTENTIONS[name]), tokens_and_mask((5, 7))
    expected = module(x, (5, 7), mask).detach()
    with torch.no_grad():
        exported = torch.export.export(WithGrid(module, (5, 7)), (x, mask)).module()
        traced = torch.jit.trace(WithGrid(module, (5, 7)), (x, mask), check_trace=False)
    other = mask.flip(0)
    wanted = module(x, (5, 7), other).detach()
    for function in (exported, traced):
        # A trace computes the scale of the queries in float32.
        torch.testing.assert_close(function(x, mask), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(function(x, other), wanted, rtol=0, atol=1e-5)
    mapped = torch.func.vmap(lambda tokens, part: module(tokens[None], (5, 7), part[None])[0])(x, mask)
    torch.testing.assert_close(mapped, expected)

    def loss(tokens):
        return module(tokens, (5, 7), mask).square().sum()

    x.requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), torch.autograd.grad(loss(x), x)[0])


@pytest.mark.parametrize('name', [name for name in RECORDED if name.startswith(('newton', 'cholesky'))])
def test_exported_masks_with_variable_sides(name):
    """The landmarks are bounded at some sizes and not at others."""
    module, dim = WithGrid(build(ATTENTIONS[name])), torch.export.Dim.DYNAMIC
    sides = {0: dim, 1: dim, 2: dim}
    x, mask = torch.randn(2, 9, 12, 16, dtype=torch.float64), torch.rand(2, 9, 12) < 0.4
    with torch.no_grad():
        program = torch.export.export(module, (x, mask), dynamic_shapes=(sides, sides)).module()
        for size in ((1, 5, 6), (3, 20, 7), (2, 9, 12)):
            x, mask = torch.randn(*size, 16, dtype=torch.float64), torch.rand(*size) < 0.4
            mask[0, 4:] = False
            torch.testing.assert_close(program(x, mask), module(x, mask), rtol=0, atol=1e-8)


@pytest.mark.parametrize('name', ['random', 'random bounded'])
def test_recorded_random_landmarks_are_refused(name):
    module, (x, mask) = build(ATTENTIONS[name]), tokens_and_mask((5, 7))
    with pytest.raises(NotImplementedError, match="sampler='random' cannot be exported"):
        torch.export.export(WithGrid(module, (5, 7)), (x, mask))


@pytest.mark.parametrize('name', ['newton', 'cholesky normalized bounded', 'Nystrom', 'SpatialReduction', 'Performer'])
def test_compiled_masks(name):
    module, (x, mask) = build(ATTENTIONS[name]), tokens_and_mask((5, 7))
    torch._dynamo.reset()
    compiled = torch.compile(WithGrid(module, (5, 7)), fullgraph=True, backend='aot_eager')
    outcomes = []
    for function in (WithGrid(module, (5, 7)), compiled):
        out = function(x.requires_grad_(), mask)
        outcomes.append([out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])])
    for found, wanted in zip(*outcomes):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8 * wanted.abs().max().item())
    torch._dynamo.reset()


@pytest.mark.parametrize('name', ['newton', 'cholesky normalized bounded', 'Softmax', 'Nystrom', 'Performer'])
def test_masks_inside_autocast(name):
    module, (x, mask) = build(ATTENTIONS[name]).float(), tokens_and_mask((5, 7))
    x = x.float()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = module(x, (5, 7), mask)
        assert torch.equal(out, module(x.masked_fill(~mask.unsqueeze(-1), torch.nan), (5, 7), mask))
    wide = module(x, (5, 7), mask)
    assert (out.float() - wide)[mask].abs().max() < 0.1 * wide[mask].abs().max()


# Attention between two sets of tokens.

CROSS = {name: options for name, options in SOFTMAX_FREE.items() if name != 'newton exact'}


def cross(options, grid_dims=2, **shape):
    torch.manual_seed(0)
    options = dict(dict(embed_dims=16, num_heads=2, kv_dims=12, ratio=2, grid_dims=grid_dims), **options, **shape)
    module = SoftmaxFreeCrossAttention(**options).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize('grid', GRIDS, ids=str)
@pytest.mark.parametrize('name', CROSS)
def test_cross_attention_has_the_mask_of_its_keys(name, grid):
    module, (x, mask) = cross(CROSS[name], len(grid)), tokens_and_mask(grid, dims=12)
    mask[2] = False
    query = torch.randn(3, 11, 16, dtype=torch.float64, requires_grad=True)
    outcomes = []
    for value in (0.0, 1e300, torch.nan):
        changed = x.masked_fill(~mask.unsqueeze(-1), value).requires_grad_()
        out = module(query, changed, grid, mask)
        assert out.shape == query.shape
        outcomes.append([out, *torch.autograd.grad(out.square().sum(), [changed, query, *module.parameters()])])
        assert not outcomes[-1][1][~mask].any() and outcomes[-1][1][mask].any()
    for outcome in outcomes[1:]:
        assert all(torch.equal(*pair) and torch.isfinite(pair[0]).all() for pair in zip(outcome, outcomes[0]))
    assert torch.equal(out[2], module.proj.bias.expand(11, 16))
    everything = module(query, x, grid, torch.ones_like(mask))
    torch.testing.assert_close(everything, module(query, x, grid), rtol=0, atol=1e-9)
    for i in range(3):
        one = slice(i, i + 1)
        torch.testing.assert_close(out[one], module(query[one], changed[one], grid, mask[one]), rtol=0, atol=1e-10)


@pytest.mark.parametrize('call', [functools.partial(torch.rand, 2, 34), functools.partial(torch.rand, 2, 11)])
def test_cross_attention_names_invalid_masks(call):
    with pytest.raises(ValueError, match=r'mask: torch.bool .*: expected a tensor torch.bool \(2, 35\)'):
        cross({})(torch.zeros(2, 11, 16).double(), torch.zeros(2, 35, 12).double(), (5, 7), call() < 1)


def test_linformer_mask_on_its_own_grid():
    """The learned projection is used as it is there."""
    module = LinformerAttention(**SHAPE, grid=(5, 7)).double()
    x, mask = tokens_and_mask((5, 7))
    changed = x.masked_fill(~mask.unsqueeze(-1), 7.0)
    assert torch.equal(module(x, (5, 7), mask), module(changed, (5, 7), mask))
