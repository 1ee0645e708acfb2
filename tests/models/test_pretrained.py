"""Loading of the backbone from a classifier's checkpoint."""

import pytest
import torch
from authors import REDUCED_ARCH
from mmengine.model import PretrainedInit

from soft_mm import SOFT


def reduced(**kwargs):
    torch.manual_seed(0)
    return SOFT(REDUCED_ARCH, **kwargs)


def test_pretrained_backbone_is_loaded_and_the_log_says_so(classifier_checkpoint, log):
    path, source = classifier_checkpoint
    model = reduced(init_cfg=dict(type='Pretrained', checkpoint=path, prefix='backbone.'))
    model.init_weights()
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert f'all {len(source.state_dict())} backbone keys loaded from {path}' in log()


def test_pretrained_backbone_for_fewer_stages_and_another_size(classifier_checkpoint, log):
    path, source = classifier_checkpoint
    cfg = dict(type='Pretrained', checkpoint=path, prefix='backbone')
    model = reduced(out_indices=(0, 1), img_size=96, init_cfg=cfg)
    model.init_weights()
    assert torch.equal(model.stages[1].blocks[0].attn.qv.weight, source.stages[1].blocks[0].attn.qv.weight)
    assert (
        'resized: stages.0.pos_embed from (56, 56) to (24, 24), stages.1.pos_embed from (28, 28) to (12, 12)' in log()
    )
    left_out = [key for key in source.state_dict() if key.startswith(('stages.2.', 'stages.3.'))]
    assert f'unused: {len(left_out)} keys of stages that out_indices does not need' in log()
    assert "not of the backbone: keys under ['head']" in log()


@pytest.mark.parametrize(
    ('options', 'prefix', 'message'),
    [
        (
            dict(arch=dict(REDUCED_ARCH, depths=(1, 1, 3, 1))),
            'backbone.',
            r'1\d missing .*stages.2.blocks.2.*0 unexpected',
        ),
        (
            dict(arch=dict(REDUCED_ARCH, depths=(1, 1, 1, 1))),
            'backbone.',
            r'0 missing .*unexpected .*stages.2.blocks.1',
        ),
        (
            dict(arch=dict(REDUCED_ARCH, embed_dims=(32, 64, 192, 128), num_heads=(1, 2, 6, 4))),
            'backbone.',
            'of another shape',
        ),
        (
            dict(arch=REDUCED_ARCH, in_channels=1),
            'backbone.',
            r'1 of another shape .*\(32, 3, 3, 3\) for \(32, 1, 3, 3\)',
        ),
        (dict(arch=REDUCED_ARCH), None, r"keys under \['backbone', 'head'\]: set `prefix` in init_cfg"),
        (dict(arch=REDUCED_ARCH), 'encoder.', r"keys under \['backbone', 'head'\]"),
    ],
)
def test_checkpoint_of_another_model_is_an_error(classifier_checkpoint, options, prefix, message):
    cfg = dict(type='Pretrained', checkpoint=classifier_checkpoint[0], prefix=prefix)
    model = SOFT(init_cfg=cfg, **options)
    with pytest.raises(ValueError, match=message):
        model.init_weights()


@pytest.mark.parametrize('form', ['list', 'class'])
def test_checkpoint_of_another_model_is_an_error_in_every_form_of_init_cfg(classifier_checkpoint, form):
    cfg = dict(type='Pretrained', checkpoint=classifier_checkpoint[0], prefix='backbone.')
    init_cfg = [cfg] if form == 'list' else dict(cfg, type=PretrainedInit)
    with pytest.raises(ValueError, match='does not fit'):
        SOFT('tiny', init_cfg=init_cfg).init_weights()


def test_missing_checkpoint_is_named():
    model = reduced(init_cfg=dict(type='Pretrained', checkpoint='no/such.pth', prefix='backbone.'))
    with pytest.raises(FileNotFoundError, match='no/such.pth'):
        model.init_weights()


def test_mmengine_initialisers_still_work():
    model = reduced(init_cfg=dict(type='Constant', layer='Linear', val=0.5, bias=0.25))
    model.init_weights()
    assert (model.stages[0].blocks[0].attn.qv.weight == 0.5).all()


def first_convolution(path, channels, rule):
    cfg = dict(type='Pretrained', checkpoint=str(path), prefix='backbone.', new_channels=rule)
    model = SOFT(REDUCED_ARCH, in_channels=channels, init_cfg=cfg)
    model.init_weights()
    return model


@pytest.fixture
def three_channels(tmp_path):
    torch.manual_seed(0)
    model = SOFT(REDUCED_ARCH).eval()
    torch.save(dict(state_dict={f'backbone.{k}': v for k, v in model.state_dict().items()}), tmp_path / 'rgb.pth')
    return model, tmp_path / 'rgb.pth'


@pytest.mark.parametrize('channels', [1, 2, 4])
def test_mean_of_the_channels_keeps_the_output_of_equal_channels(three_channels, channels):
    model, path = three_channels
    grey = torch.rand(2, 1, 64, 80)
    with torch.no_grad():
        expected = model(grey.expand(-1, 3, -1, -1))
        found = first_convolution(path, channels, 'mean').eval()(grey.expand(-1, channels, -1, -1))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_new_channels_of_zeros_change_nothing_at_first(three_channels):
    model, path = three_channels
    image = torch.rand(2, 5, 64, 80)
    with torch.no_grad():
        expected, found = model(image[:, :3]), first_convolution(path, 5, 'zero').eval()(image)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ('channels', 'rule', 'message'),
    [
        (4, None, "For images with another number of channels, set new_channels='mean' or 'zero' in init_cfg"),
        (1, 'zero', "new_channels='zero' cannot make 3 channels 1: set new_channels='mean'"),
        (4, 'copy', "new_channels='copy' in init_cfg: expected 'mean', 'zero' or None"),
    ],
)
def test_other_channels_are_taken_on_demand_only(three_channels, channels, rule, message):
    with pytest.raises(ValueError) as error:
        first_convolution(three_channels[1], channels, rule)
    assert message in str(error.value)


def test_changed_channels_are_reported(three_channels, monkeypatch):
    said = []
    monkeypatch.setattr('soft_mm.models.soft.print_log', lambda text, *_: said.append(text))
    first_convolution(three_channels[1], 4, 'zero')
    assert 'stages.0.patch_embed.0.weight changed from 3 to 4 channels by the rule' in said[-1]
