"""Properties of every attention alone: the formulas of the reference, images and sequences, chunks."""

from unittest import mock

import torch
from hypothesis import strategies as st
from properties.strategies import (
    DTYPES,
    NUMBERS,
    assert_close,
    assert_equal,
    baselines,
    randomize,
    searched,
    softmax_free,
)

from soft_mm import ops
from soft_mm.models.attention import build_attention
from soft_mm.models.attention.base import merge_heads, split_heads
from soft_mm.ops import blockwise, reference

CONTINUOUS = ('newton', 'cholesky')


@st.composite
def shapes(draw):
    """``embed_dims``, ``num_heads``, ``ratio`` and ``conv_size``."""
    heads = draw(st.integers(1, 3))
    dims = draw(st.sampled_from([1, 2, 5, 8, 16]))
    return dict(
        embed_dims=heads * dims,
        num_heads=heads,
        ratio=draw(st.integers(1, 9)),
        conv_size=draw(st.sampled_from([1, 3, 5, 9])),
    )


def make(options, shape, number, dtype=torch.float64, **more):
    torch.manual_seed(number)
    return randomize(build_attention(dict(options, **more), **shape), number).to(dtype).eval()


def tokens(shape, batch, count, scale, number, dtype=torch.float64):
    generator = torch.Generator().manual_seed(number)
    drawn = torch.randn(batch, count, shape['embed_dims'], generator=generator, dtype=torch.float64)
    return (scale * drawn).to(dtype)


SCALES = st.sampled_from([0, 0.1, 1, 10])
GRIDS = st.tuples(st.integers(1, 16), st.integers(1, 16))


def reference_inverse(options):
    """The inverse of the reference for the options of an attention."""
    ridge, iterations = options.get('ridge', 0.01), options.get('newton_iterations', 20)
    if options.get('solver') == 'cholesky':
        return lambda kernel: reference.ridge_inverse(kernel, ridge)
    if options.get('normalized'):
        return lambda kernel: reference.newton_inverse_per_image(kernel, iterations)
    return lambda kernel: reference.newton_inverse(kernel, iterations, ridge)


def by_reference(module, options, shape, x, grid):
    """The output of softmax-free attention by the formulas of the reference and the weights of the module."""
    heads, ratio, bound = shape['num_heads'], shape['ratio'], options.get('max_landmarks')
    q, v = (
        split_heads(part, heads)
        for part in torch.nn.functional.linear(x, module.qv.weight, module.qv.bias).chunk(2, -1)
    )
    q = q * q.shape[-1] ** -0.25
    sampled_grid = tuple(max(side // ratio, 1) for side in grid)
    count = sampled_grid[0] * sampled_grid[1]
    out_grid, sampler = ops.pooled_grid(sampled_grid, bound or count), options.get('sampler', 'conv')
    if sampler == 'random':
        kept = min(count, bound or count)
        order = torch.randperm(q.shape[2], generator=torch.Generator().manual_seed(options.get('seed', 0)))
        landmarks = q[:, :, order[:kept]]
    else:
        if sampler == 'mean':
            landmarks = reference.pool_landmarks(q, grid, sampled_grid)
        else:
            norm = module.landmark_norm
            landmarks = reference.conv_landmarks(q, grid, module.landmark.weight, norm.weight, norm.bias, norm.eps)
        landmarks = reference.pool_landmarks(landmarks, sampled_grid, out_grid)
        kept = landmarks.shape[2]
    assert kept <= (bound or count)
    normalized = options.get('normalized', False)
    out = reference.softmax_free_attention(q, landmarks, v, reference_inverse(options), normalized, count / kept)
    return module.proj(merge_heads(out + reference.local_branch(v, grid, module.local.weight)))


@searched(
    fast=40,
    long=400,
    options=softmax_free(CONTINUOUS),
    shape=shapes(),
    grid=GRIDS,
    scale=SCALES,
    batch=st.integers(1, 2),
    entries=st.integers(1, 3000),
    number=NUMBERS,
)
def test_softmax_free_attention_is_that_of_the_reference(options, shape, grid, scale, batch, entries, number):
    """Whole, and in chunks of tokens of any size."""
    module, x = make(options, shape, number), tokens(shape, batch, grid[0] * grid[1], scale, number)
    with torch.no_grad():
        expected = by_reference(module, options, shape, x, grid)
        for size in (10**9, entries):
            with mock.patch.dict(blockwise._CHUNK_ENTRIES, cpu=size):
                assert_close([module(x, grid)], [expected], 1e-6)


@searched(
    fast=30,
    long=300,
    options=softmax_free() | baselines(),
    shape=shapes(),
    grid=GRIDS,
    scale=SCALES,
    batch=st.integers(0, 3),
    dtype=DTYPES,
    number=NUMBERS,
)
def test_any_attention_keeps_the_shape_of_its_tokens(options, shape, grid, scale, batch, dtype, number):
    """On maps and on sequences, with a gradient for the tokens."""
    for grid_dims, sides in ((2, grid), (1, (grid[0] * grid[1],))):
        more = dict(grid_dims=grid_dims)
        if 'grid' in options:
            more['grid'] = options['grid'][:grid_dims]
        module = make(options, shape, number, dtype, **more)
        x = tokens(shape, batch, grid[0] * grid[1], scale, number, dtype).requires_grad_()
        out = module(x, sides)
        assert out.shape == x.shape and out.dtype == dtype
        assert torch.isfinite(out).all()
        assert_equal([module(x, sides)], [out])
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
        assert torch.isfinite(gradient).all()


@searched(
    fast=20,
    long=200,
    options=softmax_free(CONTINUOUS) | baselines(),
    shape=shapes(),
    count=st.integers(1, 150),
    scale=SCALES,
    number=NUMBERS,
)
def test_a_sequence_does_not_depend_on_its_batch(options, shape, count, scale, number):
    if 'grid' in options:
        options = dict(options, grid=options['grid'][:1])
    module, x = make(options, shape, number, grid_dims=1), tokens(shape, 2, count, scale, number)
    x[1] = 3 * x[1] + 1
    with torch.no_grad():
        assert_close([module(x, (count,))[:1]], [module(x[:1], (count,))], 1e-6)


def masks(batch, count, share, number):
    """Which tokens take part: about a ``share`` of them, other ones in every image."""
    return torch.rand(batch, count, generator=torch.Generator().manual_seed(number)) < share


SHARES = st.sampled_from([0, 0.1, 0.5, 0.9, 1])


@searched(
    fast=40,
    long=400,
    options=softmax_free() | baselines(),
    shape=shapes(),
    grid=GRIDS,
    scale=SCALES,
    share=SHARES,
    value=st.sampled_from([1e-3, -50.0, 1e300, float('inf'), float('nan')]),
    number=NUMBERS,
)
def test_masked_tokens_change_nothing(options, shape, grid, scale, share, value, number):
    """Bit for bit on maps and on sequences, whatever they hold, without a gradient for them."""
    count = grid[0] * grid[1]
    for grid_dims, sides in ((2, grid), (1, (count,))):
        more = dict(grid_dims=grid_dims)
        if 'grid' in options:
            more['grid'] = options['grid'][:grid_dims]
        module, mask = make(options, shape, number, **more), masks(3, count, share, number)
        x = tokens(shape, 3, count, scale, number)
        changed = x.masked_fill(~mask.unsqueeze(-1), value).requires_grad_()
        out = module(changed, sides, mask)
        assert torch.isfinite(out).all()
        assert_equal([module(x, sides, mask)], [out])
        (gradient,) = torch.autograd.grad(out.square().sum(), changed)
        assert torch.isfinite(gradient).all() and not gradient[~mask].any()
        empty = ~mask.any(1)
        assert torch.equal(out[empty], module.proj.bias.expand_as(out[empty]))


def by_reference_with_mask(module, options, shape, x, grid, mask):
    """The output for one image by the formulas of the reference, with the landmarks of the present tokens alone."""
    heads, ratio = shape['num_heads'], shape['ratio']
    q, v = (
        split_heads(part, heads) * mask[:, None, :, None]
        for part in torch.nn.functional.linear(x, module.qv.weight, module.qv.bias).chunk(2, -1)
    )
    q = q * q.shape[-1] ** -0.25
    sampled_grid = tuple(max(side // ratio, 1) for side in grid)
    count = sampled_grid[0] * sampled_grid[1]
    weights = mask[:, None, :, None].double()

    def means(landmarks, weights, *grids):
        shares = reference.pool_landmarks(weights, *grids)
        return reference.pool_landmarks(landmarks * weights, *grids) / shares.clamp(min=1e-12), (shares > 0).double()

    if options.get('sampler') == 'mean':
        landmarks, weights = means(q, weights, grid, sampled_grid)
    else:
        norm = module.landmark_norm
        landmarks = reference.conv_landmarks(q, grid, module.landmark.weight, norm.weight, norm.bias, norm.eps)
        maps = mask.view(1, 1, *grid).double()
        maps = torch.nn.functional.interpolate(maps, [max(side, ratio) for side in grid], mode='nearest')
        weights = torch.nn.functional.max_pool2d(maps, ratio).flatten(2).unsqueeze(-1)
    unbounded = weights.sum()
    landmarks, weights = means(
        landmarks, weights, sampled_grid, ops.pooled_grid(sampled_grid, module.max_landmarks or count)
    )
    landmarks, out = landmarks[:, :, weights.flatten() > 0], torch.zeros_like(v)
    if landmarks.shape[2]:
        normalized, factor = options.get('normalized', False), unbounded / weights.sum()
        out = reference.softmax_free_attention(q, landmarks, v, reference_inverse(options), normalized, factor)
    return module.proj(merge_heads(out + reference.local_branch(v, grid, module.local.weight)))


@searched(
    fast=40,
    long=400,
    options=softmax_free(CONTINUOUS, ('conv', 'mean')),
    shape=shapes(),
    grid=GRIDS,
    scale=SCALES,
    share=SHARES,
    entries=st.integers(1, 3000),
    number=NUMBERS,
)
def test_masked_attention_is_that_of_the_reference(options, shape, grid, scale, share, entries, number):
    """Image by image, with the landmarks that have a token."""
    count = grid[0] * grid[1]
    module, mask = make(options, shape, number), masks(3, count, share, number)
    x = tokens(shape, 3, count, scale, number)
    with torch.no_grad(), mock.patch.dict(blockwise._CHUNK_ENTRIES, cpu=entries):
        found = module(x, grid, mask)
        for i in range(3):
            one = slice(i, i + 1)
            expected = by_reference_with_mask(module, options, shape, x[one], grid, mask[one])
            assert_close([found[one][mask[one]]], [expected[mask[one]]], 1e-6)
