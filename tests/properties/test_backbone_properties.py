"""Properties of every backbone: outputs, batches, chunks, copies, changed weights, frozen parts."""

import copy
import io
import math
import pickle
from unittest import mock

import pytest
import torch
from hypothesis import strategies as st
from properties.strategies import (
    DTYPES,
    NUMBERS,
    assert_clear,
    assert_close,
    assert_equal,
    attentions,
    backbones,
    build,
    expected_shapes,
    image,
    images,
    searched,
)

from soft_mm import SOFT
from soft_mm.models import blocks
from soft_mm.ops import blockwise

# Rounding of the sums of squares is amplified by the inverse, at most by the reciprocal of the ridge or, without one,
# by 2 ** newton_iterations. The pseudo-inverse has no bound: its rank can change by rounding.
TOLERANCE = 1e-6
ARCH = dict(embed_dims=(2, 2, 2, 2), num_heads=(1, 1, 1, 1), depths=(1, 1, 1, 1), ratios=(3, 2, 1, 1))
CONTINUOUS = ('newton', 'cholesky')


@searched(fast=25, long=250, options=backbones(), drawn=images(), dtype=DTYPES, number=NUMBERS)
def test_outputs_have_their_shapes_and_are_finite_and_repeatable(options, drawn, dtype, number):
    model, x = build(options, number, dtype), image(drawn, options, number, dtype)
    before = x.clone()
    with torch.no_grad():
        outputs = model(x)
        assert [tuple(out.shape) for out in outputs] == expected_shapes(options, drawn)
        for out in outputs:
            assert out.dtype == dtype
            assert torch.isfinite(out).all()
            # Operators of detectors read a map as contiguous.
            assert out.ndim == 2 or out.is_contiguous()
        # Evaluation draws nothing from the global generator.
        torch.manual_seed(number + 1)
        assert_equal(model(x), outputs)
    assert torch.equal(x, before)


@searched(
    fast=20,
    long=200,
    options=backbones(attentions(CONTINUOUS)),
    drawn=images(batch=(2, 3)),
    others=st.floats(-3, 3) | st.sampled_from([math.nan, math.inf]),
    number=NUMBERS,
)
def test_an_image_does_not_depend_on_the_batch_it_came_in(options, drawn, others, number):
    model, x = build(options, number, torch.float64), image(drawn, options, number, torch.float64)
    x[1:] = others * x[1:] + others
    with torch.no_grad():
        together = model(x)
        for i in range(len(x) if math.isfinite(others) else 1):
            assert_close([out[i : i + 1] for out in together], model(x[i : i + 1]), TOLERANCE)


@pytest.mark.parametrize('normalized', [False, True])
@pytest.mark.parametrize('solver', ['newton', 'cholesky', 'svd'])
def test_an_image_with_nan_gives_nan_and_leaves_the_others(solver, normalized):
    options = dict(arch=ARCH, attention=dict(solver=solver, normalized=normalized))
    model, x = build(options, 0), image((2, 32, 40, 'noise'), options, 0)
    x[1, 0, 5, 5] = math.nan
    with torch.no_grad():
        for out in model(x):
            assert torch.isfinite(out[0]).all() and out[1].isnan().any()


@searched(
    fast=15,
    long=150,
    options=backbones(attentions(CONTINUOUS)),
    drawn=images(batch=(2, 2), side=(32, 70)),
    entries=st.integers(200, 4000),
    training=st.booleans(),
    number=NUMBERS,
)
def test_the_size_of_chunks_changes_nothing(options, drawn, entries, training, number):
    x = image(drawn, options, number, torch.float64)
    results = []
    for size in (10**9, entries):
        model = build(options, number, torch.float64).train(training)
        torch.manual_seed(number)
        with mock.patch.dict(blocks._CHUNK_ENTRIES, cpu=size), mock.patch.dict(blockwise._CHUNK_ENTRIES, cpu=size):
            outputs = model(x)
            weights = [torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape) for out in outputs]
            learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
            loss = sum((out * weight).sum() for out, weight in zip(outputs, weights))
            # With all stages frozen, the output has no gradient.
            gradients = torch.autograd.grad(loss, learned, allow_unused=True) if learned else ()
        results.append((outputs, [gradient for gradient in gradients if gradient is not None]))
    assert_same_step(*results)


def assert_same_step(found, expected):
    """Compare outputs and gradients. A gradient of 0, as behind a LayerNorm of one channel, is rounding only."""
    assert_close(found[0], expected[0], TOLERANCE)
    largest = max((gradient.abs().max().item() for gradient in expected[1]), default=0)
    assert_close(found[1], expected[1], TOLERANCE, scale=max(largest, 1))


def through_file(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@searched(fast=20, long=200, options=backbones(), drawn=images(), dtype=DTYPES, number=NUMBERS)
def test_copies_give_the_same_outputs(options, drawn, dtype, number):
    model, x = build(options, number, dtype), image(drawn, options, number, dtype)
    fresh = SOFT(**options).to(dtype).eval()
    fresh.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        outputs = model(x)
        for other in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), through_file(model)):
            assert_equal(other(x), outputs)
            assert other.state_dict().keys() == model.state_dict().keys()


def swap_storage(tensor, new):
    with torch.no_grad():
        tensor.set_(new.clone().untyped_storage(), 0, new.shape, new.stride())


CHANGES = {
    'data': lambda tensor, new: tensor.data.copy_(new),
    'in place': lambda tensor, new: tensor.copy_(new),
    'new data': lambda tensor, new: setattr(tensor, 'data', new.clone()),
    'set_': swap_storage,
    'NumPy': lambda tensor, new: tensor.detach().numpy().__setitem__(..., new.numpy()),
}


@searched(
    fast=30,
    long=300,
    options=backbones(),
    drawn=images(batch=(1, 2), side=(32, 64)),
    dtype=DTYPES,
    change=st.sampled_from([*CHANGES, 'load', 'assign', 'replace', 'step']),
    which=st.integers(0, 10**4),
    inference=st.booleans(),
    number=NUMBERS,
)
def test_changed_weights_are_seen(options, drawn, dtype, change, which, inference, number):
    """By whatever means one parameter or statistic is changed, the next forward pass uses its new value."""
    model, x = build(options, number, dtype), image(drawn, options, number, dtype)
    with torch.inference_mode() if inference else torch.no_grad():
        model(x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    names = [name for name, value in state.items() if value.is_floating_point()]
    name = names[which % len(names)]
    # Variances stay positive.
    new = state[name] + torch.linspace(0.3, 0.7, state[name].numel(), dtype=dtype).view(state[name].shape)
    owner, _, attribute = name.rpartition('.')
    owner = model.get_submodule(owner)
    tensor = getattr(owner, attribute)
    if change in ('load', 'assign'):
        model.load_state_dict({**state, name: new}, assign=change == 'assign')
    elif change == 'replace':
        setattr(owner, attribute, torch.nn.Parameter(new) if isinstance(tensor, torch.nn.Parameter) else new)
    elif change == 'step' and isinstance(tensor, torch.nn.Parameter):
        tensor.grad = state[name] - new
        torch.optim.SGD([tensor], 1.0).step()
        new = tensor.detach().clone()
    else:
        with torch.no_grad():
            CHANGES.get(change, CHANGES['data'])(tensor, new)
    fresh = build(options, number, dtype)
    fresh.load_state_dict({**state, name: new})
    with torch.no_grad():
        assert_equal(model(x), fresh(x))


@searched(
    fast=20,
    long=200,
    options=backbones(training=True),
    drawn=images(batch=(2, 3), side=(32, 64)),
    dtype=DTYPES,
    optimizer=st.sampled_from(['SGD', 'AdamW']),
    number=NUMBERS,
)
def test_a_step_changes_only_what_is_not_frozen(options, drawn, dtype, optimizer, number):
    model, x = build(options, number, dtype).train(), image(drawn, options, number, dtype)
    frozen = options.get('frozen_stages', -1)
    embeddings = ['stages.0.patch_embed.', 'stages.0.pos_embed'] if frozen == 0 else []
    prefixes = [f'stages.{i}.' for i in range(frozen)] + embeddings
    before = {key: value.clone() for key, value in model.state_dict().items()}
    settings = dict(SGD=dict(lr=1e-3, momentum=0.9, weight_decay=0.1), AdamW=dict(lr=1e-3, weight_decay=0.1))[optimizer]
    stepper = getattr(torch.optim, optimizer)(model.parameters(), **settings)
    for _ in range(2):
        outputs = model(x)
        loss = sum((out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)).sum() for out in outputs)
        if loss.requires_grad:
            stepper.zero_grad()
            loss.backward()
            for name, parameter in model.named_parameters():
                assert (parameter.grad is not None) == parameter.requires_grad, name
                assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
            # The gradient of a pseudo-inverse can be of any size.
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            stepper.step()
    for key, value in model.state_dict().items():
        if any(key.startswith(prefix) for prefix in prefixes):
            assert torch.equal(value, before[key]), key
        elif model.norm_eval and ('running' in key or 'num_batches' in key):
            assert torch.equal(value, before[key]), key
        elif not key.endswith('features'):
            # Weight decay alone changes every weight that is not frozen.
            assert not torch.equal(value, before[key]), key


@searched(
    fast=10,
    long=100,
    options=backbones(attentions(CONTINUOUS), training=True),
    drawn=images(batch=(2, 3), side=(32, 64)),
    number=NUMBERS,
)
def test_recomputation_changes_nothing(options, drawn, number):
    """``with_cp`` gives the same outputs and gradients, with dropout too."""
    x = image(drawn, options, number, torch.float64)
    results = []
    for with_cp in (False, True):
        model = build(dict(options, with_cp=with_cp), number, torch.float64).train()
        torch.manual_seed(number)
        outputs = model(x)
        loss = sum((out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum() for out in outputs)
        if loss.requires_grad:
            loss.backward()
        results.append((outputs, [p.grad for p in model.parameters() if p.grad is not None]))
    assert_same_step(*results)


@pytest.mark.parametrize(
    ('attention', 'batch'),
    [
        # A ridge that is large next to the row sums of the landmark kernel.
        (dict(ridge=0.3), 1),
        (dict(ridge=0.06, sampler='mean', max_landmarks=1), 1),
        # Means over a coarser grid, of no image.
        (dict(sampler='mean'), 0),
        (dict(max_landmarks=2), 0),
        (dict(type='NystromAttention', num_landmarks=1), 0),
    ],
    ids=str,
)
def test_outputs_that_were_wrong_once(attention, batch):
    options = dict(arch=ARCH, attention=attention)
    check = test_outputs_have_their_shapes_and_are_finite_and_repeatable.check
    check(options, (batch, 32, 32, 'noise'), torch.float32, 0)


OTHER_INPUTS = {
    'array': lambda x: x.numpy(),
    'list': lambda x: x.tolist(),
    'sparse': lambda x: x.to_sparse(),
    'meta': lambda x: x.to('meta'),
    'tuple': lambda x: (x,),
    'None': lambda x: None,
}
INPUT_DTYPES = [torch.float16, torch.float32, torch.float64, torch.uint8, torch.int64, torch.bool, torch.complex64]


@searched(
    fast=20,
    long=200,
    shape=st.lists(st.sampled_from([0, 1, 3, 31, 32, 40]), max_size=5) | st.just([1, 3, 32, 40]),
    dtype=st.sampled_from(INPUT_DTYPES),
    kind=st.sampled_from(['tensor'] * 4 + list(OTHER_INPUTS)),
    training=st.booleans(),
)
def test_an_input_is_refused_clearly_or_computed(shape, dtype, kind, training):
    x = torch.ones(shape, dtype=dtype)
    x = OTHER_INPUTS.get(kind, lambda x: x)(x)
    model = SOFT(ARCH).train(training)
    try:
        outputs = model(x)
    except Exception as error:
        assert_clear(error)
    else:
        assert all(torch.isfinite(out).all() for out in outputs)


@pytest.mark.parametrize(
    ('dtype', 'kind'), [(torch.float64, 'tensor'), (torch.float32, 'array'), (torch.float32, 'sparse')]
)
def test_an_input_that_was_not_named(dtype, kind):
    test_an_input_is_refused_clearly_or_computed.check([1, 3, 32, 40], dtype, kind, False)
