"""Whether a checkpoint fits a backbone: the form of its attention, its channels and its shapes."""

import pytest
import torch
from mmengine.config import Config

from soft_mm.checkpoints.matching import adapt_channels, check_normalized, compare_state_dicts, describe_backbone


def recorded(attention, **keys):
    """Metadata of mmengine's runner for a classifier with this attention."""
    backbone = dict(type='soft_mm.SOFT', arch='tiny', **({} if attention is None else dict(attention=attention)))
    cfg = Config(dict(model=dict(type='ImageClassifier', backbone=backbone, head=dict(type='LinearClsHead')), lr=0.1))
    return dict(meta=dict(cfg=cfg.pretty_text, epoch=3, **keys))


NORMALIZED = dict(normalized=True, solver='cholesky', max_landmarks=49)


@pytest.mark.parametrize(
    ('attention', 'forms'),
    [
        (None, {False}),
        (dict(solver='cholesky'), {False}),
        (NORMALIZED, {True}),
        ([NORMALIZED] * 3, {True}),
        ([NORMALIZED] * 3 + [{}], {True}),
        ([dict(NORMALIZED, type='SoftmaxFreeAttention')] * 4, {True}),
        ([NORMALIZED] * 3 + [dict(type='soft_mm.SoftmaxFreeAttention')], {True, False}),
        ([dict(type='NystromAttention'), NORMALIZED, NORMALIZED], {True}),
    ],
    ids=str,
)
def test_config_of_the_training_says_the_form(attention, forms):
    checkpoint = recorded(attention)
    for form in (True, False):
        if form in forms:
            check_normalized(checkpoint, [form, form], 'a.pth')
        else:
            with pytest.raises(ValueError, match=rf'a.pth was trained with normalized={not form}, .*normalized={form}'):
                check_normalized(checkpoint, [form, form], 'a.pth')
    check_normalized(checkpoint, [], 'a.pth')


@pytest.mark.parametrize(
    'text',
    [
        None,
        3,
        '',
        'model = dict(backbone=dict(type="ResNet"))',
        'model = (',
        'raise SystemExit("the text must not run")',
        '(' * 10000,
        'a' + '.b' * 100000,
        'model = dict(backbone=dict(**base, type=SOFT))',
        'model = dict(backbone=dict(type="MySOFT"))',
        'model = dict(backbone=dict(type="SOFT", attention=dict(type="MySoftmaxFreeAttention")))',
        'model = dict(backbone=dict(type="SOFT", attention=[dict(type="Mine", normalized=True), dict(), dict()]))',
    ],
    ids=range(12),
)
def test_texts_that_say_nothing_are_not_checked(text):
    for form in (True, False):
        check_normalized(dict(meta=dict(cfg=text)), [form], 'a.pth')


def test_other_metadata_is_not_checked():
    for checkpoint in ({}, dict(meta=None), dict(meta=[1]), dict(meta=dict(epoch=1))):
        check_normalized(checkpoint, [True], 'a.pth')


def test_converter_comes_first():
    checkpoint = recorded(NORMALIZED, normalized=False)
    with pytest.raises(ValueError, match='is plain, as recorded by tools/convert_checkpoint.py'):
        check_normalized(checkpoint, [True], 'a.pth')


FIRST = 'backbone.stages.0.patch_embed.0.weight'


@pytest.mark.parametrize('given', [1, 2, 3, 5])
@pytest.mark.parametrize('wanted', [1, 3, 4])
@pytest.mark.parametrize('rule', ['mean', 'zero'])
def test_channels_of_the_first_convolution(given, wanted, rule):
    weight = torch.randn(6, given, 3, 3)
    state_dict = {FIRST: weight, 'backbone.other': torch.ones(2)}
    if rule == 'zero' and wanted < given:
        with pytest.raises(ValueError, match=f"'zero' cannot make {given} channels {wanted}: set new_channels='mean'"):
            adapt_channels(state_dict, 'backbone.', wanted, rule)
        return
    adapted, said = adapt_channels(state_dict, 'backbone.', wanted, rule)
    assert adapted.keys() == state_dict.keys() and adapted['backbone.other'] is state_dict['backbone.other']
    new = adapted[FIRST]
    if given == wanted:
        assert new is weight and said == ''
        return
    assert f'{FIRST} changed from {given} to {wanted} channels' in said
    if rule == 'mean':
        # An image whose channels are equal gives the same output.
        torch.testing.assert_close(new.sum(1), weight.sum(1))
        torch.testing.assert_close(new, new[:, :1].expand(6, wanted, 3, 3))
    else:
        assert torch.equal(new[:, :given], weight) and not new[:, given:].any()


@pytest.mark.parametrize('prefix', ['', 'backbone', 'backbone.'])
def test_prefix_of_the_first_convolution(prefix):
    key = FIRST if prefix else FIRST.removeprefix('backbone.')
    adapted, _ = adapt_channels({key: torch.ones(2, 3, 3, 3)}, prefix, 1, 'mean')
    assert adapted[key].shape == (2, 1, 3, 3)


@pytest.mark.parametrize(
    'state_dict',
    [
        {},
        {FIRST: torch.ones(2, 3)},
        {FIRST: torch.ones(0, 3, 3, 3)},
        {FIRST.removeprefix('backbone.'): torch.ones(2, 3, 3, 3)},
    ],
    ids=['missing', 'two dimensions', 'empty', 'other prefix'],
)
def test_without_a_first_convolution_nothing_changes(state_dict):
    assert adapt_channels(state_dict, 'backbone.', 4, 'mean') == (state_dict, '')


@pytest.mark.parametrize(
    ('found', 'resized'),
    [
        ((1, 8, 5, 6), True),
        ((1, 7, 4, 4), False),
        ((1, 9, 4, 4), False),
        ((2, 8, 5, 6), False),
        ((0, 8, 5, 6), False),
        ((1, 8, 0, 6), False),
        ((1, 8, 16), False),
    ],
)
def test_only_other_grids_are_resized(found, resized):
    key = 'stages.0.pos_embed'
    expected = {key: torch.zeros(1, 8, 4, 4), 'a': torch.zeros(2), 'b': torch.zeros(2)}
    diff = compare_state_dicts({key: torch.zeros(found), 'a': torch.zeros(2), 'c': torch.zeros(1)}, expected)
    assert (diff.missing, diff.unexpected) == (['b'], ['c'])
    assert diff.resized == [key] * resized
    assert diff.misshapen == ([] if resized else [f'{key} {found} for (1, 8, 4, 4)'])


def test_description_of_a_backbone():
    assert describe_backbone({}) == describe_backbone({'layer1.0.weight': torch.ones(2)}) == 'no SOFT backbone'
    state_dict = {f'stages.1.blocks.{block}.norm1.weight': torch.ones(2) for block in (2, 0, 1)}
    state_dict |= {'stages.0.blocks.0.norm1.weight': torch.ones(2), 'stages.1.pos_embed': torch.zeros(1, 16, 2, 2)}
    assert describe_backbone(state_dict) == 'depths 1, 3, widths ?, 16'
    assert describe_backbone({**state_dict, 'stages.1.pos_embed': torch.zeros(4)}) == 'depths 1, 3, widths ?, ?'
