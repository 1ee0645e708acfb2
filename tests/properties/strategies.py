"""The search of the property tests, and random small backbones, attentions and images for it."""

import secrets
import traceback
from pathlib import Path

import mmengine.registry
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from mmengine.model import weight_init

import soft_mm
from soft_mm import SOFT

STRIDES = (4, 8, 16, 32)
NUMBERS = st.integers(0, 2**16)
DTYPES = st.sampled_from([torch.float32, torch.float64])

# Nothing is stored between runs: the fast search is the same in each run, and the long one prints its seed.
_COMMON = settings(
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    phases=[Phase.generate, Phase.shrink],
)
settings.register_profile('fast', _COMMON, derandomize=True)
settings.register_profile('long', _COMMON)


def searched(fast, long, **arguments):
    """Make a test of a property: call it with random arguments, ``fast`` times, or ``long`` times with ``-m long``.

    A failure prints the smallest arguments, the seed of a long search, and a `reproduce_failure` line, which is to be
    added below the decorator. The option ``--hypothesis-seed`` repeats a long search. The function itself stays
    available as ``check``, for single cases that failed once.
    """
    counts = dict(fast=fast, long=long)

    def decorate(check):
        @pytest.mark.parametrize('profile', ['fast', pytest.param('long', marks=pytest.mark.long)])
        def test(profile, pytestconfig):
            cases = []

            def count(**values):
                check(**values)
                cases.append(None)

            # The search depends on the name and the source of the function.
            count.__name__, count.__wrapped__ = check.__name__, check
            vars(count).update({key: value for key, value in vars(check).items() if key.startswith('_hypothesis')})
            search = given(**arguments)(count)
            if profile == 'long':
                given_seed = pytestconfig.getoption('--hypothesis-seed', None)
                number = secrets.randbits(32) if given_seed in (None, 'random') else int(given_seed)
                print(f'repeat this search with --hypothesis-seed={number}')
                search = seed(number)(search)
            settings(settings.get_profile(profile), max_examples=counts[profile])(search)()
            assert len(cases) >= counts[profile]

        test.__name__, test.__qualname__, test.__doc__ = check.__name__, check.__qualname__, check.__doc__
        test.__module__ = check.__module__
        test.check = check
        return test

    return decorate


def assert_clear(error):
    """Check that an error is raised on purpose: by soft_mm, by mmengine's registry or its initialisers of weights."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    said = f'{type(error).__name__}: {error}\nraised by {frame.filename}:{frame.lineno}: {frame.line}'
    assert isinstance(error, (ValueError, TypeError, KeyError, FileNotFoundError)), said
    assert len(str(error)) > 20, said
    file = Path(frame.filename).resolve()
    if Path(soft_mm.__file__).resolve().parent in file.parents:
        # An operation that fails, such as a comparison, is no message for a user.
        assert frame.line.startswith('raise'), said
    else:
        registry, initializers = (Path(module.__file__).resolve() for module in (mmengine.registry, weight_init))
        assert registry.parent in file.parents or file == initializers, said


@st.composite
def archs(draw, depth=2):
    """Small archs. One landmark per token is left to the later stages, because of its cost."""
    heads = draw(st.lists(st.integers(1, 3), min_size=4, max_size=4))
    widths = draw(st.lists(st.sampled_from([1, 2, 4, 7, 8]), min_size=4, max_size=4))
    arch = dict(
        embed_dims=tuple(h * d for h, d in zip(heads, widths)),
        num_heads=tuple(heads),
        depths=tuple(draw(st.lists(st.integers(1, depth), min_size=4, max_size=4))),
        ratios=(draw(st.integers(3, 9)), draw(st.integers(2, 5)), draw(st.integers(1, 3)), 1),
    )
    if draw(st.booleans()):
        arch['conv_sizes'] = tuple(draw(st.lists(st.sampled_from([1, 3, 5, 9]), min_size=3, max_size=3)))
    return arch


@st.composite
def softmax_free(draw, solvers=('newton', 'cholesky', 'svd'), samplers=('conv', 'mean', 'random')):
    """Options of ``SoftmaxFreeAttention``. Each may be left out."""
    options = {}

    def give(key, values):
        if draw(st.booleans()):
            options[key] = draw(values)

    give('type', st.just('SoftmaxFreeAttention'))
    give('normalized', st.booleans())
    give('solver', st.sampled_from(solvers))
    solver, normalized = options.get('solver', 'newton'), options.get('normalized', False)
    if solver == 'newton':
        give('newton_iterations', st.integers(1, 24))
    if solver == 'newton' and not normalized:
        give('newton_backward', st.sampled_from(['one_step', 'exact']))
    if solver == 'cholesky' or (solver == 'newton' and not normalized):
        give('ridge', st.sampled_from([0.001, 0.01, 0.3, 1]))
    give('max_landmarks', st.none() | st.integers(1, 40))
    give('sampler', st.sampled_from(samplers))
    if options.get('sampler') == 'random':
        give('seed', st.integers(0, 2**64 - 1))
    return options


@st.composite
def baselines(draw):
    """Types and options of the baselines."""
    options = dict(
        Softmax={},
        SpatialReduction={},
        GaussianKernel=dict(max_tokens=st.just(10**4)),
        Linformer=dict(proj_tokens=st.integers(1, 20), grid=st.tuples(st.integers(1, 9), st.integers(1, 9))),
        Performer=dict(
            num_features=st.integers(1, 30), seed=st.integers(0, 2**32), redraw_interval=st.none() | st.integers(1, 2)
        ),
        Nystrom=dict(num_landmarks=st.integers(1, 30), iterations=st.integers(1, 6)),
    )
    name = draw(st.sampled_from(sorted(options)))
    return dict(draw(st.fixed_dictionaries({}, optional=options[name])), type=f'{name}Attention')


def attentions(solvers=('newton', 'cholesky', 'svd')):
    """The option ``attention`` of the backbone."""
    one = softmax_free(solvers) | baselines()
    return st.none() | softmax_free(solvers) | baselines() | st.lists(one, min_size=3, max_size=3)


@st.composite
def backbones(draw, attention=None, training=False):
    """Keyword arguments of a small backbone. Each but ``arch`` may be left out."""
    options = dict(arch=draw(archs()))

    def give(key, values):
        if draw(st.booleans()):
            options[key] = draw(values)

    give('attention', attentions() if attention is None else attention)
    give('out_indices', st.sets(st.integers(0, 3), min_size=1).map(sorted).map(tuple) | st.integers(0, 3))
    last = options.get('out_indices', 3)
    last = last[-1] if isinstance(last, tuple) else last
    if last == 3:
        give('out_type', st.sampled_from(['featmap', 'cls_token']))
    give('in_channels', st.integers(1, 5))
    give('img_size', st.integers(32, 128) | st.tuples(st.integers(32, 128), st.integers(32, 128)))
    give('norm_eval', st.booleans())
    give('with_cp', st.booleans())
    give('frozen_stages', st.integers(-1, last + 1))
    if training:
        give('drop_rate', st.sampled_from([0.0, 0.3]))
        give('drop_path_rate', st.sampled_from([0, 0.4]))
    return options


@st.composite
def images(draw, batch=(0, 3), side=(32, 100)):
    """Arguments of :func:`image`: batch size, height, width and content."""
    kinds = ['noise', 'constant', 'zero', 'large', 'small', 'repeated']
    return draw(st.integers(*batch)), draw(st.integers(*side)), draw(st.integers(*side)), draw(st.sampled_from(kinds))


def image(drawn, options, number, dtype=torch.float32):
    """Images ``(B, in_channels, H, W)``."""
    batch, height, width, kind = drawn
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(batch, options.get('in_channels', 3), height, width, generator=generator, dtype=torch.float64)
    if kind == 'constant':
        x = x[..., :1, :1].expand_as(x)
    elif kind == 'repeated':
        x = x[..., :8, :8].repeat(1, 1, -(-height // 8), -(-width // 8))[..., :height, :width]
    return (x * dict(zero=0, large=1e3, small=1e-6).get(kind, 1)).to(dtype)


def randomize(model, number):
    """Move weights and statistics away from their initial values, so that an omitted part is noticed."""
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith('running_mean'):
                buffer += 0.1 * torch.randn(buffer.shape, generator=generator)
            elif name.endswith('running_var'):
                buffer += 0.2 * torch.rand(buffer.shape, generator=generator)
    return model


def build(options, number, dtype=torch.float32):
    """A backbone with random weights, in evaluation mode."""
    torch.manual_seed(number)
    return randomize(SOFT(**options), number).to(dtype).eval()


def expected_shapes(options, drawn):
    """The shapes of the backbone's outputs, from its options alone."""
    batch, height, width, _ = drawn
    indices = options.get('out_indices', (0, 1, 2, 3))
    dims, shapes = options['arch']['embed_dims'], []
    for i in indices if isinstance(indices, tuple) else (indices,):
        if i == 3 and options.get('out_type') == 'cls_token':
            shapes.append((batch, dims[3]))
        else:
            shapes.append((batch, dims[i], -(-height // STRIDES[i]), -(-width // STRIDES[i])))
    return shapes


def assert_equal(found, expected):
    """Check that tuples of outputs are equal, bit for bit."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert one.dtype == other.dtype and torch.equal(one, other)


def assert_close(found, expected, tolerance, scale=None):
    """Check that tuples of tensors are equal up to rounding, relative to the largest entry of each, or to ``scale``."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert torch.isfinite(one).all() and torch.isfinite(other).all()
        largest = max(other.abs().max().item(), 1e-30) if other.numel() else 1
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * (scale or largest))
