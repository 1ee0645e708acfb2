"""Whether a checkpoint's attention is normalised, from its metadata."""

import pytest
from mmengine.config import Config

from soft_mm.checkpoints.matching import check_normalized


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
