"""Targets of a token sweep: their names, and the steps that are built for them."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks.ablations import ABLATIONS
from benchmarks.targets import BACKBONES, OPERATORS, Target, build_operator, build_step, parse_target
from soft_mm.complexity import count_multiply_adds

ROOT = Path(__file__).resolve().parents[2]


def test_targets_are_parsed():
    target = parse_target('soft-tiny:arch=small,attention.max_landmarks=196')
    assert target.kind == 'backbone'
    assert target.config['arch'] == 'small'
    assert target.config['attention'] == dict(solver='cholesky', max_landmarks=196)
    assert BACKBONES['soft-tiny']['arch'] == 'tiny'
    operator = parse_target('attn-soft:max_landmarks=16')
    assert operator.kind == 'operator' and operator.config == dict(solver='cholesky', max_landmarks=16)
    registered = parse_target('mmdet.ResNet:depth=18,out_indices=(2, 3)')
    assert registered.config == dict(type='mmdet.ResNet', depth=18, out_indices=(2, 3))
    config = parse_target(str(ROOT / 'configs/coco/mask-rcnn_soft-tiny-norm_fpn_1x_coco.py'))
    assert config.config['type'] == 'soft_mm.SOFT'


def test_imports_of_a_config_are_kept(tmp_path, monkeypatch):
    (tmp_path / 'my_backbones.py').write_text('')
    monkeypatch.syspath_prepend(tmp_path)
    config = tmp_path / 'config.py'
    for imports in ("'my_backbones'", "['my_backbones']"):
        config.write_text(f"custom_imports = dict(imports={imports})\nmodel = dict(backbone=dict(type='Mine'))\n")
        target = parse_target(str(config))
        assert target.config == dict(type='Mine') and target.imports == ('my_backbones',)


def test_ablations_are_parsed():
    target = parse_target('soft-tiny:arch=small@channels-first')
    assert target.replacement == 'channels-first' and target.config['arch'] == 'small'
    attention = dict(solver='cholesky', max_landmarks=49, type='HeldKernelAttention')
    assert parse_target('soft-tiny@held-kernel').config['attention'] == attention
    assert parse_target('attn-soft@held-kernel').config == attention
    assert BACKBONES['soft-tiny']['attention'] == OPERATORS['attn-soft'] == dict(solver='cholesky', max_landmarks=49)
    authors = dict(type='HeldKernelAttention')
    assert parse_target('soft-tiny-authors@held-kernel').config['attention'] == authors
    stages = parse_target("soft-tiny:attention=[None, {'normalized': True}, {}]@held-kernel")
    assert stages.config['attention'] == [authors, dict(authors, normalized=True), authors]


@pytest.mark.parametrize('ablation', ABLATIONS)
def test_target_is_plain_data(ablation):
    target = parse_target(f'soft-tiny@{ablation}')
    assert target != parse_target('soft-tiny')
    assert Target(**json.loads(json.dumps(asdict(target)))).config == target.config


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('swin', "'swin': unknown target; expected an operator .*attn-soft.* a backbone .*swin-tiny"),
        ('nowhere.py', "'nowhere.py': unknown target"),
        ('soft-tiny:arch', "option 'arch' must have the form key=value"),
        ('attn-softmax-fused:heads=3', r"keys \['heads'\] are unknown to SoftmaxAttention"),
        ('attn-soft-reference:ridge=1', r"keys \['ridge'\] are unknown to ReferenceAttention"),
        ('attn-soft:landmarks=3', r"'attn-soft:landmarks=3': attention keys \['landmarks'\] are unknown"),
        ('attn-nystrom:num_features=3', r"keys \['num_features'\] are unknown to NystromAttention"),
        ('attn-nystrom@held-kernel', "NystromAttention has no ablation 'held-kernel'"),
        ('attn-soft:solver=qr', "'attn-soft:solver=qr': solver='qr'"),
        ('attn-softmax-fused@held-kernel', "SoftmaxAttention has no ablation 'held-kernel'"),
        ('attn-soft@mlp-at-once', "ablation 'mlp-at-once' does not apply to an operator"),
        ('swin-tiny@held-kernel', 'mmdet.SwinTransformer has no ablations'),
        ('soft-tiny:attention.type=GaussianKernelAttention@held-kernel', 'GaussianKernelAttention has no ablation'),
        ('attn-soft@faster', "unknown ablation 'faster'; expected one of .*held-kernel"),
        ('soft-tiny@', "unknown ablation ''"),
    ],
)
def test_unknown_targets_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_target(text)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('mmdet.ResNext', 'mmdet.ResNext is not in the registry of mmdet'),
        ('nowhere.ResNet', 'needs nowhere, which is not installed'),
    ],
)
def test_targets_that_cannot_be_built_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        build_step(parse_target(text), (64, 64), 1, False, 'cpu')


def test_tokens_are_counted():
    assert parse_target('attn-soft').tokens((52, 78)) == 13 * 20
    assert parse_target('soft-tiny').tokens((800, 1344)) == 67200


# The second form is given by a config file with mmpretrain's default_scope.
@pytest.mark.parametrize('kind', ['SequenceEncoder', 'mmpretrain.SequenceEncoder'])
@pytest.mark.parametrize('train', [False, True])
def test_encoder_of_sequences_takes_a_step(train, kind):
    config = dict(type=kind, vocab_size=16, length=80, embed_dims=16)
    target = Target('encoder', 'backbone', config, imports=('projects.listops',))
    assert target.tokens((1, 80)) == 80
    shorter, longer = (count_multiply_adds(build_step(target, (1, n), 1, train, 'cpu')) for n in (40, 80))
    assert 0 < shorter < longer
    with pytest.raises(ValueError, match="'encoder' encodes sequences: size 40x40: expected 1xN"):
        build_step(target, (40, 40), 1, train, 'cpu')


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('name', OPERATORS)
def test_every_operator_takes_a_step(name, train):
    step = build_step(parse_target(name), (52, 80), 1, train, 'cpu', head_dims=8)
    assert count_multiply_adds(step) > 0


@pytest.mark.parametrize(
    'names', [('attn-soft-authors', 'attn-soft-reference'), ('attn-softmax-fused', 'attn-softmax-plain')]
)
def test_plain_formulas_compute_what_the_operator_computes(names):
    outputs = []
    for name in names:
        torch.manual_seed(0)
        function, inputs, _ = build_operator(parse_target(name), (96, 80), 1, False, 'cpu', 2, 8)
        with torch.no_grad():
            outputs.append(function(*inputs))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-3 * outputs[0].abs().max().item())


@pytest.mark.parametrize('train', [False, True])
def test_every_backbone_takes_a_step(train):
    for name in BACKBONES:
        build_step(parse_target(name), (64, 96), 1, train, 'cpu')()
