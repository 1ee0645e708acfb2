"""Layer-wise learning rates of the models of all toolboxes, in their scopes."""

import pytest
from authors import REDUCED_ARCH
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from torch import nn

from soft_mm import SOFT
from soft_mm.utils import build_model, toolbox_scope

BACKBONE = dict(type='soft_mm.SOFT', arch=REDUCED_ARCH)
DIMS = list(REDUCED_ARCH['embed_dims'])
FPN_HEAD = dict(
    type='FPNHead',
    in_channels=[8] * 4,
    in_index=[0, 1, 2, 3],
    feature_strides=[4, 8, 16, 32],
    channels=8,
    num_classes=3,
)
NECK = dict(type='FPN', in_channels=DIMS, out_channels=8, num_outs=4)
MODELS = {
    'mmpretrain': dict(
        type='ImageClassifier',
        backbone=dict(BACKBONE, out_indices=(3,), out_type='cls_token'),
        head=dict(type='LinearClsHead', num_classes=5, in_channels=128),
    ),
    'mmdet': dict(
        type='RetinaNet',
        backbone=BACKBONE,
        neck=NECK,
        bbox_head=dict(
            type='RetinaHead',
            num_classes=3,
            in_channels=8,
            stacked_convs=1,
            feat_channels=8,
            anchor_generator=dict(type='AnchorGenerator', ratios=[1.0], scales=[4], strides=[4, 8, 16, 32]),
        ),
    ),
    'mmseg': dict(type='EncoderDecoder', backbone=BACKBONE, neck=NECK, decode_head=FPN_HEAD),
}
# Depths of the reduced backbone with 1, 1, 2 and 1 blocks: the exponent of the rate is 6 minus the depth.
DEPTHS = {
    'stages.0.patch_embed': 0,
    'stages.0.pos_embed': 0,
    'stages.0.blocks.0': 1,
    'stages.1.patch_embed': 2,
    'stages.1.pos_embed': 2,
    'stages.1.blocks.0': 2,
    'stages.2.patch_embed': 3,
    'stages.2.pos_embed': 3,
    'stages.2.blocks.0': 3,
    'stages.2.blocks.1': 4,
    'stages.3.patch_embed': 5,
    'stages.3.pos_embed': 5,
    'stages.3.cls_token': 5,
    'stages.3.cls_pos_embed': 5,
    'stages.3.blocks.0': 5,
    'stages.3.norm': 6,
}


def rates(scope, model, **paramwise):
    """Return the learning rate of each parameter by its name."""
    optimizer = dict(type='AdamW', lr=1e-2, weight_decay=0.05)
    cfg = dict(
        type='OptimWrapper',
        optimizer=optimizer,
        constructor='soft_mm.LayerDecayOptimWrapperConstructor',
        paramwise_cfg=paramwise,
    )
    with toolbox_scope(Config(dict(default_scope=scope))):
        groups = build_optim_wrapper(model, cfg).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    # mmengine adds a group with a tensor of its own, to log the base learning rate.
    return {names[p]: group['lr'] for group in groups for p in group['params'] if p in names}


@pytest.mark.parametrize('scope', MODELS)
def test_rate_of_every_parameter(scope):
    pytest.importorskip(scope)
    model = build_model(Config(dict(default_scope=scope, model=MODELS[scope])))
    found = rates(scope, model, layer_decay_rate=0.5, custom_keys={'fc': dict(lr_mult=10.0)})
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, rate in found.items():
        part = name.removeprefix('backbone.')
        if part == name:
            expected = 1e-2
        else:
            expected = 1e-2 * 0.5 ** (6 - next(depth for key, depth in DEPTHS.items() if part.startswith(key)))
        factor = 10 if 'fc' in name else 1
        assert rate == pytest.approx(factor * expected), name


def test_nested_backbone_and_frozen_stages():
    model = SOFT(REDUCED_ARCH, frozen_stages=1)
    found = rates('mmengine', model, layer_decay_rate=0.5)
    assert not any(name.startswith('stages.0') for name in found)
    assert found['stages.3.norm.weight'] == 1e-2
    assert found['stages.1.blocks.0.norm1.weight'] == pytest.approx(1e-2 * 0.5**4)


@pytest.mark.parametrize('rate', [None, 0, 1.5, 'half', True])
def test_wrong_rates_are_named(rate):
    with pytest.raises(ValueError, match='layer_decay_rate=.* in paramwise_cfg: expected a number above 0'):
        rates('mmengine', SOFT(REDUCED_ARCH), layer_decay_rate=rate)


def test_model_without_a_backbone_is_named():
    with pytest.raises(ValueError, match='Linear has no backbone with the method get_layer_depth'):
        rates('mmengine', nn.Linear(2, 2), layer_decay_rate=0.5)
