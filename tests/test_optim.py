"""Layer-wise learning rates of the models of all toolboxes, in their scopes, and mixed precision on the CPU."""

import copy

import pytest
import torch
from authors import REDUCED_ARCH
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn

from soft_mm import SOFT
from soft_mm.optim import CPUAmpOptimWrapper, has_bfloat16
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


class Chain(nn.Module):
    """Two layers. It keeps the outputs of the last forward pass."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x):
        self.outputs = [self.one(x), self.two(torch.tanh(self.one(x)))]
        return self.outputs[1].float().square().mean()


def wrapper_of(model, kind='soft_mm.CPUAmpOptimWrapper', **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return OPTIM_WRAPPERS.build(dict(type=kind, optimizer=optimizer, **options))


def in_bfloat16(layer, x):
    return nn.functional.linear(*(value.bfloat16() for value in (x, layer.weight, layer.bias)))


def test_only_the_forward_pass_of_a_step_computes_in_bfloat16():
    model, x = Chain(), torch.randn(4, 5)
    wrapper = wrapper_of(model)
    assert type(wrapper) is CPUAmpOptimWrapper
    with wrapper.optim_context(model):
        model(x)
    assert torch.equal(model.outputs[0], in_bfloat16(model.one, x)) and model.outputs[1].dtype == torch.bfloat16
    model(x)
    assert {out.dtype for out in model.outputs} == {torch.float32}
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())


def test_only_the_given_modules_compute_in_bfloat16():
    model, x = Chain(), torch.randn(4, 5)
    with wrapper_of(model, modules=['one']).optim_context(model):
        model(x)
    one = in_bfloat16(model.one, x).float()
    assert torch.equal(model.outputs[0], one) and torch.equal(model.outputs[1], model.two(torch.tanh(one)))
    assert not any('forward' in vars(part) for part in model.modules())
    with pytest.raises(ValueError, match=r"modules=\['three'\]: Chain has no three"):
        with wrapper_of(model, modules=['three']).optim_context(model):
            pass


def test_bodies_of_nested_detectors_compute_in_bfloat16():
    """As in mmdet's SoftTeacher, whose heads stay in float32."""

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.roi_head = nn.Linear(5, 4), nn.Linear(4, 2)

        def forward(self, x):
            self.inside = nn.functional.linear(x, self.roi_head.weight.new_ones(2, 5)).dtype
            return self.roi_head(self.backbone(x))

    model, x = nn.ModuleDict(dict(student=Detector(), teacher=Detector())), torch.randn(3, 5)
    with wrapper_of(model).optim_context(model):
        found = [model[name](x) for name in model]
    for detector, out in zip(model.values(), found):
        assert detector.inside == torch.float32
        assert torch.equal(out, detector.roi_head(in_bfloat16(detector.backbone, x).float()))


def test_modules_are_whole_again_after_an_error():
    model = Chain()
    with pytest.raises(RuntimeError, match='shapes'), wrapper_of(model, modules=['one']).optim_context(model):
        model(torch.ones(1, 4))
    assert not any('forward' in vars(part) for part in model.modules())


def test_accumulation_and_clipping_are_those_of_mmengine():
    """The same gradients give the same weights as under mmengine's wrapper for float32."""
    first = Chain()
    batches = torch.randn(4, 2, 5)
    results = {}
    for kind in ('soft_mm.CPUAmpOptimWrapper', 'OptimWrapper'):
        model = copy.deepcopy(first)
        wrapper = wrapper_of(model, kind, accumulative_counts=2, clip_grad=dict(max_norm=0.01))
        wrapper.initialize_count_status(model, 0, len(batches))
        for x in batches:
            with wrapper.optim_context(model), torch.autocast('cpu', torch.bfloat16):
                loss = model(x)
            wrapper.update_params(loss)
        results[kind] = model.state_dict(), wrapper.state_dict()
    (found, state), (expected, expected_state) = results.values()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not torch.equal(found['one.weight'], first.one.weight)
    assert state.keys() == expected_state.keys()
    again = wrapper_of(copy.deepcopy(first), 'OptimWrapper')
    again.load_state_dict(state)
    assert again.optimizer.state_dict()['state'].keys() == expected_state['state'].keys()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(dtype='float16'), "dtype='float16': expected bfloat16"),
        (dict(dtype=torch.float32), 'dtype=torch.float32: expected bfloat16'),
        (dict(modules='backbone'), r"modules='backbone': expected a list of names, such as \['backbone'\]"),
    ],
)
def test_mixed_precision_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        wrapper_of(Chain(), **options)


def test_mixed_precision_for_the_cpu_refuses_other_devices():
    with pytest.raises(ValueError, match='trains on the CPU, but the model is on meta: use AmpOptimWrapper'):
        wrapper_of(Chain().to('meta'))


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('processor : 0\nflags\t\t: fpu avx2 avx512f\n', False),
        ('processor : 0\nflags\t\t: fpu avx512f avx512_bf16\n', True),
        ('flags : amx_bf16 amx_tile\n', True),
        ('Features\t: fp asimd bf16\n', True),
        ('Features\t: fp asimd\n', False),
        ('processor : 0\n', None),
        (None, None),
    ],
)
def test_processors_with_bfloat16_are_known(text, expected, tmp_path, monkeypatch):
    """A slow processor is told once, when the wrapper is built."""
    file, said = tmp_path / 'cpuinfo', []
    if text is not None:
        file.write_text(text)
    assert has_bfloat16(file) is expected
    monkeypatch.setattr('soft_mm.optim.has_bfloat16', lambda: expected)
    monkeypatch.setattr('soft_mm.optim.print_log', lambda text, *_: said.append(text))
    wrapper_of(Chain())
    assert len(said) == (expected is False)
