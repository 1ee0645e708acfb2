"""Configs of the backbone, changed at random: a model that runs, or a clear error of soft_mm."""

import numpy as np
import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from mmengine.config import ConfigDict
from properties.strategies import NUMBERS, assert_clear, backbones, baselines, searched, softmax_free

from soft_mm import SOFT, SoftmaxFreeAttention

# Options of which a large number needs no more memory or time.
UNBOUNDED = ('seed', 'max_landmarks', 'num_landmarks', 'max_tokens', 'redraw_interval', 'ridge')
STRINGS = (
    *('', '.', 'tiny', 'newton', 'cholesky', 'svd', 'conv', 'mean', 'random', 'exact', 'one_step', 'cls_token'),
    *('featmap', 'yes', '3', 'x' * 300, 'Normalized'),
)
TYPES = (
    *('SoftmaxAttention', 'soft_mm.NystromAttention', 'soft_mm.models.attention.PerformerAttention', 'SOFT', 'ResNet'),
    *('soft_mm.models.attention.BaseAttention', 'soft_mm.models.blocks.SoftmaxFreeBlock', 'torch.Tensor', 'dict'),
    *('builtins.dict', 'torch.nn.Linear', 'nothing.ResNet', 'soft_mm.', '.SOFT', 'soft_mm.SoftmaxFreeAttention.x'),
    *(SoftmaxFreeAttention, torch.nn.Linear, dict, int, len),
)
# Other types of init_cfg are a matter of mmengine.
INITIALIZERS = ('Pretrained', 'PretrainedInit', 'Constant', 'Normal', 'Uniformly', 'tiny', None, 3, ())
UNKNOWN = ('pretrained', 'norm_cfg', 'normalised', '_delete_', 'kwargs', 'unknown', '', 'embed_dims', 'type')
ARCH = dict(embed_dims=(2, 2, 2, 2), num_heads=(1, 1, 1, 1), depths=(1, 1, 1, 1), ratios=(3, 2, 1, 1))
# Options of the backbone, of an arch and of all attentions, with values that some config may have.
WHOLE = st.integers(0, 12)
OPTIONS = {
    (): dict(
        arch=st.sampled_from(['tiny', 'nano']),
        attention=st.lists(softmax_free() | baselines(), min_size=2, max_size=4),
        out_indices=st.lists(st.integers(-1, 4), max_size=4),
        out_type=st.sampled_from(['featmap', 'cls_token', 'avg']),
        in_channels=WHOLE,
        img_size=st.integers(30, 70) | st.lists(st.integers(30, 70), min_size=1, max_size=3),
        drop_rate=st.floats(-0.1, 1.1),
        drop_path_rate=st.floats(-0.1, 1.1),
        frozen_stages=st.integers(-2, 6),
        norm_eval=st.sampled_from(['yes', 0, 1]),
        with_cp=st.sampled_from(['yes', 0, 1]),
        init_cfg=st.sampled_from(
            [[], {}, [{}], dict(type='Pretrained'), dict(type='Constant', layer='Conv2d', val=0.1)]
        ),
    ),
    ('arch',): {
        name: st.lists(WHOLE, min_size=2, max_size=5)
        for name in ('embed_dims', 'num_heads', 'depths', 'ratios', 'conv_sizes')
    },
    ('attention',): dict(
        type=st.sampled_from(TYPES),
        normalized=st.booleans(),
        solver=st.sampled_from(['newton', 'cholesky', 'svd', 'lu']),
        newton_iterations=WHOLE,
        newton_backward=st.sampled_from(['one_step', 'exact', 'none']),
        max_landmarks=WHOLE,
        ridge=st.floats(0, 2),
        sampler=st.sampled_from(['conv', 'mean', 'random', 'max']),
        seed=WHOLE,
        grid_dims=st.sampled_from([0, 1, 2, 2.0, 3, True]),
        init_cfg=st.sampled_from([dict(type='Constant', layer='Linear', val=0.1), 3, [3], 'x']),
        proj_tokens=WHOLE,
        grid=st.lists(WHOLE, min_size=1, max_size=3),
        num_features=WHOLE,
        redraw_interval=WHOLE,
        num_landmarks=WHOLE,
        iterations=st.integers(0, 6),
        max_tokens=WHOLE,
    ),
}
PLACES = [(place, key) for place, options in OPTIONS.items() for key in options]
# Types of the options that only one attention has.
OWNERS = dict(
    proj_tokens='LinformerAttention',
    grid='LinformerAttention',
    num_features='PerformerAttention',
    redraw_interval='PerformerAttention',
    num_landmarks='NystromAttention',
    iterations='NystromAttention',
    max_tokens='GaussianKernelAttention',
    ridge='SoftmaxFreeAttention',
    seed='SoftmaxFreeAttention',
)


def odd_values():
    """Values that a config may have in a wrong place."""
    plain = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 12),
        st.floats(),
        st.sampled_from([0.1, 0.5, 1.0, -1e-9, 64]),
        st.sampled_from(STRINGS),
        st.binary(max_size=3),
        st.sampled_from([1j, np.float32(0.5), np.int64(2), np.bool_(True), np.ones(2), torch.ones(2), torch.tensor(1)]),
        st.sampled_from([dict, len, {1, 2}, range(3), slice(2)]),
    )
    some = st.lists(plain, max_size=4)
    return plain | some | some.map(tuple) | st.dictionaries(st.sampled_from(UNKNOWN) | st.integers(), plain, max_size=2)


def draw_value(draw, place, key, old):
    """Draw a value for an option, often close to what it takes."""
    # Alternatives of `one_of` are flattened, so odd values would be the most frequent by far.
    choices = [odd_values(), OPTIONS[place][key], OPTIONS[place][key]]
    if isinstance(old, (list, tuple)) and old:
        index, value = draw(st.integers(0, len(old) - 1)), draw(odd_values())
        choices.append(st.just([*old[:index], value, *old[index + 1 :]]))
    if key in UNBOUNDED:
        choices.append(st.sampled_from([2**63, 2**64, 2**200, 10**400, 1e-300, 1e30, 1e300]))
    if key == 'attention':
        choices.append(st.lists(softmax_free() | baselines() | odd_values(), min_size=3, max_size=3))
    if key == 'init_cfg':
        keys = dict.fromkeys(['checkpoint', 'prefix', 'layer', 'val', 'override'], odd_values())
        one = st.fixed_dictionaries({}, optional=dict(keys, type=st.sampled_from(INITIALIZERS)))
        choices += [one, st.lists(one, max_size=2)]
    return draw(draw(st.sampled_from(choices)))


@st.composite
def mutated(draw):
    """A valid config with one or two changes."""
    places = draw(st.lists(st.sampled_from(PLACES), min_size=1, max_size=2))
    kinds = [draw(st.sampled_from(['set'] * 6 + ['drop', 'rename', 'add', 'wrap'])) for _ in places]
    config = draw(backbones(softmax_free() | baselines()))
    for (place, key), kind in zip(places, kinds):
        entries = config.setdefault(place[0], {}) if place else config
        if not isinstance(entries, dict):
            continue
        if key in OWNERS and draw(st.sampled_from([True, True, False])):
            entries = config['attention'] = dict(type=OWNERS[key])
        # The keywords of a call are strings.
        unknown = st.sampled_from(UNKNOWN) | (st.integers() if place else st.nothing())
        if kind == 'set' or key not in entries:
            entries[key] = draw_value(draw, place, key, entries.get(key))
        elif kind == 'add':
            entries[draw(unknown)] = draw(odd_values())
        elif kind == 'wrap':
            entries[key] = [entries[key]]
        else:
            value = entries.pop(key)
            if kind == 'rename':
                entries[draw(unknown)] = value
    return config


def is_small(config):
    """Return whether the model is cheap: the search is for errors, not for memory."""
    arch = config.get('arch', 'tiny')
    if not isinstance(arch, dict):
        return not isinstance(arch, str) or arch not in ('small', 'medium', 'large', 'huge')
    return all(
        number <= 24
        for value in arch.values()
        if isinstance(value, (list, tuple))
        for number in value
        if isinstance(number, int)
    )


def attempt(config, number=0):
    """Build the backbone and run it, or check that the error is clear."""
    torch.manual_seed(number)
    try:
        model = SOFT(**config)
        model.init_weights()
        outputs = model.eval()(torch.randn(1, model.in_channels, 32, 48))
    except Exception as error:
        assert_clear(error)
        return
    assert len(outputs) == len(model.out_indices)
    for out in outputs:
        assert len(out) == 1 and torch.isfinite(out).all()


@searched(fast=100, long=2500, config=mutated(), lazy=st.booleans(), number=NUMBERS)
def test_a_config_is_refused_clearly_or_works(config, lazy, number):
    assume(is_small(config))
    attempt(ConfigDict(config) if lazy else config, number)


@pytest.mark.parametrize(
    'config',
    [
        # Arrays, whose comparison is an array.
        dict(out_type=np.ones(2)),
        dict(attention=dict(solver=np.ones(2))),
        dict(attention=dict(newton_backward=np.ones(2))),
        dict(attention=dict(sampler=np.ones(2))),
        dict(attention=dict(grid_dims=np.ones(2))),
        dict(attention=dict(grid_dims=torch.ones(2))),
        dict(init_cfg=torch.ones(2)),
        dict(init_cfg=np.ones(2)),
        # Names of what is no attention.
        dict(attention=dict(type='builtins.dict')),
        dict(attention=dict(type='torch.Tensor')),
        dict(attention=dict(type=int)),
        dict(attention=dict(type='.')),
        dict(attention=dict(type='.SoftmaxFreeAttention')),
        dict(attention=dict(type='soft_mm.models.attention.BaseAttention')),
        dict(attention=dict(type='soft_mm.models.blocks.SoftmaxFreeBlock')),
        # Keys of several types, which have no order.
        dict(attention={'normalised': True, 3: 4}),
        # Numbers that PyTorch cannot hold.
        dict(attention=dict(sampler='random', seed=2**64)),
        dict(attention=dict(type='PerformerAttention', seed=2**64)),
        dict(attention=dict(ridge=10**400)),
        dict(attention=dict(ridge=1e300)),
        dict(attention=dict(ridge=1e30)),
        dict(attention=dict(solver='cholesky', ridge=1e300)),
        # Iterations after which rounding has grown beyond every bound.
        dict(attention=dict(type='NystromAttention', iterations=64)),
        dict(init_cfg=[{}]),
        dict(init_cfg=[dict(layer='Conv2d')]),
    ],
    ids=lambda config: repr(config)[:80],
)
def test_wrong_configs_are_refused_clearly(config):
    with pytest.raises((TypeError, ValueError)) as caught:
        SOFT(**dict(arch=ARCH, **config)).init_weights()
    assert_clear(caught.value)


def test_initialisation_of_an_attention_is_refused():
    """An option without effect is an error."""
    with pytest.raises(ValueError, match='init_cfg has no effect here'):
        SOFT(ARCH, attention=dict(init_cfg=dict(type='Constant', layer='Linear', val=0.25)))
