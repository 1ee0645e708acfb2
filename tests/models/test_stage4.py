"""Attention of stage 4 by choice: its structure, its class token and its checkpoints."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from authors import REDUCED_ARCH
from torch._subclasses.fake_tensor import FakeTensorMode

from soft_mm import SOFT
from soft_mm.complexity import count_multiply_adds
from soft_mm.models.attention import SoftmaxAttention, SoftmaxFreeAttention
from soft_mm.models.blocks import PreNormBlock
from soft_mm.registry import MODELS

SOFTMAX_FREE = dict(type='SoftmaxFreeAttention', max_landmarks=9)
ON_A_GRID = {
    'plain newton': SOFTMAX_FREE,
    'normalised newton': dict(SOFTMAX_FREE, normalized=True),
    'cholesky': dict(SOFTMAX_FREE, solver='cholesky'),
    'normalised cholesky': dict(SOFTMAX_FREE, normalized=True, solver='cholesky'),
    'svd': dict(SOFTMAX_FREE, solver='svd'),
    'mean': dict(SOFTMAX_FREE, sampler='mean'),
    'linformer': dict(type='LinformerAttention', proj_tokens=6),
    'nystrom': dict(type='NystromAttention', num_landmarks=5),
    'spatial reduction': dict(type='SpatialReductionAttention'),
    'gaussian': dict(type='GaussianKernelAttention'),
}
WITH_CLASS_TOKEN = {
    'softmax': dict(type='SoftmaxAttention'),
    'performer': dict(type='PerformerAttention', num_features=11),
}


def reduced(last=None, arch=REDUCED_ARCH, **kwargs):
    torch.manual_seed(0)
    attention = None if last is None else [{}, {}, {}, last]
    return SOFT(arch, attention=attention, **kwargs)


@pytest.mark.parametrize('attention', [{}, [{}, {}, {}], [{}, {}, {}, {}], [{}, {}, {}, dict(type='SoftmaxAttention')]])
def test_softmax_is_the_default(attention):
    torch.manual_seed(0)
    model, default = SOFT(REDUCED_ARCH, attention=attention).eval(), reduced().eval()
    assert isinstance(model.stages[3].blocks[0].attn, SoftmaxAttention)
    assert 'stages.3.cls_token' in model.state_dict()
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        for one, other in zip(model(x), default(x), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize('name', [*ON_A_GRID, *WITH_CLASS_TOKEN])
def test_every_type_computes_maps_and_gradients(name):
    last = {**ON_A_GRID, **WITH_CLASS_TOKEN}[name]
    model = reduced(last).train()
    assert model.stages[3].class_token == (name in WITH_CLASS_TOKEN)
    assert [key for key in model.state_dict() if 'cls_' in key] == [
        f'stages.3.{key}' for key in ('cls_token', 'cls_pos_embed') if name in WITH_CLASS_TOKEN
    ]
    maps = model(torch.randn(2, 3, 160, 100))
    assert maps[3].shape == (2, 128, 5, 4)
    generator = torch.Generator().manual_seed(0)
    sum((out * torch.randn(out.shape, generator=generator)).sum() for out in maps).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        # The bias of a convolution before a BatchNorm has no effect.
        assert parameter.grad.abs().max() > 0 or 'patch_embed' in key, key


@pytest.mark.parametrize('name', [*ON_A_GRID, *WITH_CLASS_TOKEN])
def test_block_is_the_pre_norm_formula(name):
    last = {**ON_A_GRID, **WITH_CLASS_TOKEN}[name]
    torch.manual_seed(0)
    block = PreNormBlock(16, 2, 1, 3, last, grid=(5, 7)).double().eval()
    x = torch.randn(2, 35, 16, dtype=torch.float64)
    weights = dict(block.named_parameters())

    def norm(tokens, layer):
        return F.layer_norm(tokens, (16,), weights[f'{layer}.weight'], weights[f'{layer}.bias'], 1e-6)

    with torch.no_grad():
        middle = x + block.attn(norm(x, 'norm1'), (5, 7))
        hidden = F.gelu(F.linear(norm(middle, 'norm2'), weights['mlp.fc1.weight'], weights['mlp.fc1.bias']))
        expected = middle + F.linear(hidden, weights['mlp.fc2.weight'], weights['mlp.fc2.bias'])
        torch.testing.assert_close(block(x, (5, 7)), expected, rtol=1e-12, atol=1e-12)


def test_dropout_follows_the_attention():
    torch.manual_seed(0)
    block = PreNormBlock(16, 2, 1, 3, SOFTMAX_FREE, drop_rate=1 - 1e-9).train()
    x = torch.randn(1, 35, 16)
    torch.testing.assert_close(block(x, (5, 7)), x)


@pytest.mark.parametrize('name', ON_A_GRID)
def test_class_token_is_refused_on_a_grid(name):
    with pytest.raises(ValueError, match=r"out_type='cls_token': \w+ in stage 4 needs a grid.*GlobalAveragePooling"):
        reduced(ON_A_GRID[name], out_type='cls_token')


def test_class_token_of_performer():
    outputs = reduced(WITH_CLASS_TOKEN['performer'], out_type='cls_token').eval()(torch.randn(2, 3, 64, 96))
    assert outputs[-1].shape == (2, 128)


def test_attention_of_other_code_gets_no_class_token():
    @MODELS.register_module(force=True)
    class MeanOfTheGrid(torch.nn.Module):
        def __init__(self, embed_dims, num_heads, ratio, conv_size):
            super().__init__()
            self.proj = torch.nn.Linear(embed_dims, embed_dims)

        def forward(self, x, grid):
            assert x.shape[1] == grid[0] * grid[1]
            return self.proj(x.mean(1, keepdim=True).expand_as(x))

    try:
        model = reduced(dict(type='MeanOfTheGrid')).eval()
        assert not model.stages[3].class_token
        assert model(torch.randn(1, 3, 64, 96))[3].shape == (1, 128, 2, 3)
    finally:
        MODELS.module_dict.pop('MeanOfTheGrid')


def test_ratio_and_filters_of_stage_4():
    arch = dict(REDUCED_ARCH, ratios=(8, 4, 2, 2), conv_sizes=(9, 5, 3, 7))
    attn = reduced(SOFTMAX_FREE, arch).stages[3].blocks[0].attn
    assert isinstance(attn, SoftmaxFreeAttention)
    assert attn.landmark.weight.shape == (32, 32, 2, 2) and attn.local.weight.shape == (4, 1, 7, 7)
    assert reduced(SOFTMAX_FREE).stages[3].blocks[0].attn.local.weight.shape == (4, 1, 3, 3)
    for last in (None, *WITH_CLASS_TOKEN.values()):
        with pytest.raises(ValueError, match=r'ratios=\(8, 4, 2, 2\): expected 1 as the last entry'):
            reduced(last, arch)
    with pytest.raises(ValueError, match=r'conv_sizes=\(9, 5\): expected 3 or 4 integers'):
        reduced(SOFTMAX_FREE, dict(REDUCED_ARCH, conv_sizes=(9, 5)))


@pytest.mark.parametrize('count', [2, 5])
def test_other_lengths_of_the_list_are_refused(count):
    with pytest.raises(ValueError, match='list of three dicts for stages 1 to 3, or a list of four dicts'):
        SOFT(REDUCED_ARCH, attention=[{}] * count)


def test_keys_of_softmax_free_attention_need_its_type():
    with pytest.raises(TypeError, match=r"\['max_landmarks'\] are unknown to SoftmaxAttention"):
        reduced(dict(max_landmarks=9))


def test_multiply_adds_are_linear_in_all_stages():
    bounded = dict(type='SoftmaxFreeAttention', normalized=True, solver='cholesky', max_landmarks=49)
    growth = {}
    for name, attention in (('softmax', bounded), ('linear', [bounded] * 4)):
        with FakeTensorMode():
            model = SOFT('tiny', attention=attention).eval().requires_grad_(False)
            images = [torch.empty(1, 3, side, side) for side in (512, 2048)]
            counts = [count_multiply_adds(functools.partial(model, x)) for x in images]
        growth[name] = math.log(counts[1] / counts[0]) / math.log(16)
    assert growth['linear'] < 1.005 < 1.05 < growth['softmax']


# Checkpoints.


@pytest.fixture
def classifier(classifier_checkpoint):
    """The checkpoint file of a classifier with softmax attention in stage 4, and the weights of its backbone."""
    path, backbone = classifier_checkpoint
    return path, backbone.state_dict()


def pretrained(path, **keys):
    return dict(type='Pretrained', checkpoint=path, prefix='backbone.', **keys)


@pytest.mark.parametrize('last', [SOFTMAX_FREE, dict(SOFTMAX_FREE, normalized=True)], ids=str)
def test_checkpoint_starts_what_fits(classifier, log, last):
    path, source = classifier
    model = reduced(last, init_cfg=pretrained(path, fresh_attention=[3]))
    initial = {key: value.clone() for key, value in model.state_dict().items()}
    model.init_weights()
    fresh = {key for key in initial if '.attn.' in key and key.startswith('stages.3.')}
    for key, value in model.state_dict().items():
        assert torch.equal(value, initial[key] if key in fresh else source[key]), key
    left_out = len([key for key in source if key.startswith('stages.3.') and ('.attn.' in key or 'cls_' in key)])
    assert (
        f'SOFT: {len(initial) - len(fresh)} of {len(initial)} backbone keys loaded from {path}; initial values kept: '
        f'stages.3.blocks.0.attn; left out: {left_out} keys of the attentions'
    ) in log().replace('\n', ' ')


def test_checkpoint_of_another_attention_is_refused_unless_wanted(classifier):
    model = reduced(SOFTMAX_FREE, init_cfg=pretrained(classifier[0]))
    initial = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r'Only attentions do not fit: stages.3.blocks.0.attn.*fresh_attention=\[3\]'):
        model.init_weights()
    assert all(torch.equal(value, initial[key]) for key, value in model.state_dict().items())


def test_fresh_attention_does_not_hide_other_differences(classifier):
    path, _ = classifier
    arch = dict(REDUCED_ARCH, embed_dims=(32, 64, 192, 128), num_heads=(1, 2, 6, 4))
    model = reduced(SOFTMAX_FREE, arch, init_cfg=pretrained(path, fresh_attention=[3]))
    with pytest.raises(ValueError, match='of another shape'):
        model.init_weights()
    # Attentions of stages that are not named.
    model = SOFT(
        dict(REDUCED_ARCH, ratios=(4, 4, 2, 1)),
        attention=[{}, {}, {}, SOFTMAX_FREE],
        init_cfg=pretrained(path, fresh_attention=[3]),
    )
    with pytest.raises(ValueError, match=r'Only attentions do not fit: stages.0.*set fresh_attention=\[0, 3\]'):
        model.init_weights()
    for value in (True, 3, ['3'], [4], [-1]):
        with pytest.raises(ValueError, match='in init_cfg: expected a list of indices of stages'):
            reduced(SOFTMAX_FREE, init_cfg=pretrained(path, fresh_attention=value)).init_weights()


def test_fresh_attention_changes_nothing_where_all_fits(classifier, log):
    path, source = classifier
    model = reduced(init_cfg=pretrained(path, fresh_attention=[3]))
    model.init_weights()
    assert all(torch.equal(value, source[key]) for key, value in model.state_dict().items())
    assert f'all {len(source)} backbone keys loaded' in log() and 'initial values' not in log()


def test_class_token_starts_fresh_with_the_attention(tmp_path, log):
    linear = reduced(SOFTMAX_FREE)
    path = tmp_path / 'linear.pth'
    torch.save({f'backbone.{key}': value for key, value in linear.state_dict().items()}, path)
    model = reduced(init_cfg=pretrained(str(path), fresh_attention=[3]))
    token = model.stages[3].cls_token.clone()
    model.init_weights()
    assert torch.equal(model.stages[3].cls_token, token)
    assert 'stages.3.blocks.0.attn, stages.3.cls_pos_embed, stages.3.cls_token' in log()


def test_performer_takes_the_class_token_of_softmax(classifier):
    path, source = classifier
    model = reduced(WITH_CLASS_TOKEN['performer'], init_cfg=pretrained(path, fresh_attention=[3]))
    model.init_weights()
    assert torch.equal(model.stages[3].cls_token, source['stages.3.cls_token'])


def test_global_average_pooling_classifies_the_mean_of_the_tokens():
    mmpretrain = pytest.importorskip('mmpretrain')
    from mmengine.registry import DefaultScope

    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = mmpretrain.registry.MODELS.build(
            dict(
                type='ImageClassifier',
                backbone=dict(
                    type='soft_mm.SOFT', arch=REDUCED_ARCH, attention=[{}, {}, {}, SOFTMAX_FREE], out_indices=(3,)
                ),
                neck=dict(type='GlobalAveragePooling'),
                head=dict(type='LinearClsHead', num_classes=5, in_channels=128),
            )
        ).eval()
    x = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        tokens, _ = model.backbone.stages[3](torch.randn(2, 96, 6, 4))
        assert tokens.shape == (2, 6, 128)
        expected = model.head.fc(model.backbone(x)[0].mean((2, 3)))
        torch.testing.assert_close(model(x), expected)
