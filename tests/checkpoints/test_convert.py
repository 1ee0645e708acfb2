"""tools/convert_checkpoint.py: what it reads, writes, says and refuses."""

import argparse
import importlib
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from authors import VARIANTS, Classifier, Harmful, image, official_models, record, reduced_model, weight
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from programs import run_tool

from soft_mm import SOFT
from soft_mm.checkpoints import from_official, read_checkpoint, to_official
from soft_mm.checkpoints.convert import convert_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def weights(arch='tiny', seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = official_models()[arch]['keys']
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


convert = partial(run_tool, 'convert_checkpoint.py')


@pytest.fixture(scope='module')
def official(tmp_path_factory):
    path = tmp_path_factory.mktemp('official') / 'tiny.pth.tar'
    state_dict = {f'module.{key}': value for key, value in weights().items()}
    averaged = weights(seed=1)
    torch.save(
        dict(state_dict=state_dict, state_dict_ema=averaged, args=argparse.Namespace(model='soft_norm_tiny')), path
    )
    return path


@pytest.mark.parametrize(('option', 'seed'), [((), 1), (('--weights', 'ema'), 1), (('--weights', 'raw'), 0)])
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_converts_what_was_asked_for(official, tmp_path, option, seed, suffix):
    target = tmp_path / 'new' / f'tiny{suffix}'
    done = convert(official, target, *option)
    assert done.returncode == 0, done.stderr
    assert 'normalised (from the file)' in done.stdout and '56x56, 28x28, 14x14, 7x7' in done.stdout
    assert f'{len(weights())} read, 0 dropped' in done.stdout
    other = 'state_dict_ema' if option == ('--weights', 'raw') else 'state_dict'
    assert f'; unused: {other}, args\n' in done.stdout
    assert 'configs/imagenet/soft-tiny-norm_8xb128_in1k.py' in done.stdout.split('config:\n')[1]
    loaded = read_checkpoint(target)
    loaded = loaded if suffix == '.safetensors' else loaded['state_dict']
    expected = from_official(weights(seed=seed))
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.items())
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_converted_weights_start_a_backbone(official, tmp_path):
    target = tmp_path / 'tiny.pth'
    assert convert(official, target, '--backbone-only').returncode == 0
    assert not [key for key in read_checkpoint(target)['state_dict'] if key.startswith('head')]
    init = dict(type='Pretrained', checkpoint=str(target), prefix='backbone.')
    backbone = SOFT('tiny', attention=dict(normalized=True), out_indices=(0, 2), init_cfg=init)
    backbone.init_weights()
    expected = from_official(weights(seed=1))
    for key, value in backbone.state_dict().items():
        assert torch.equal(value.float(), expected[f'backbone.{key}'].to(value.dtype).float()), key


def test_small_of_the_code_becomes_an_architecture(tmp_path):
    source, target = tmp_path / 'small.pth', tmp_path / 'ours.pth'
    torch.save(weights('small_code'), source)
    done = convert(source, target, '--normalized')
    assert done.returncode == 0, done.stderr
    assert 'normalised (as requested)' in done.stdout and 'depths=(1, 3, 20, 4)' in done.stdout
    arch = printed_config(done, tmp_path).model.backbone.arch
    with torch.device('meta'):
        backbone = SOFT(arch.to_dict(), out_type='cls_token')
    shapes = {f'backbone.{key}': value.shape for key, value in backbone.state_dict().items()}
    state_dict = read_checkpoint(target)['state_dict']
    assert shapes == {key: value.shape for key, value in state_dict.items() if key.startswith('backbone.')}


def printed_config(done, folder):
    """The config that the tool printed, as a file. Its base is mmpretrain's."""
    pytest.importorskip('mmpretrain')
    path = folder / 'printed.py'
    path.write_text(done.stdout.split('config:\n')[1].replace("'configs/", f"'{ROOT.as_posix()}/configs/"))
    return Config.fromfile(path)


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize(
    ('change', 'options'),
    [
        ({}, []),
        ({'head.weight': (10, 512), 'head.bias': (10,)}, []),
        ({'head.weight': (10, 512), 'head.bias': (10,)}, ['--backbone-only']),
        (dict(pos_embed1=(1, 576, 64), pos_embed2=(1, 144, 128), pos_embed3=(1, 36, 320), pos_embed4=(1, 10, 512)), []),
    ],
    ids=['as usual', 'ten classes', 'backbone alone', '96 pixels'],
)
def test_printed_config_loads_the_file(tmp_path, change, options, suffix):
    theirs = weights() | {key: torch.randn(shape) for key, shape in change.items()}
    torch.save(theirs, tmp_path / 'source.pth')
    done = convert(tmp_path / 'source.pth', tmp_path / f'ours{suffix}', *options)
    assert done.returncode == 0, done.stderr
    # The base config has 1000 classes.
    assert ('num_classes' in done.stdout.split('config:')[1]) == (len(theirs['head.bias']) == 10 and not options)
    cfg = printed_config(done, tmp_path)
    init_default_scope('mmpretrain')
    importlib.import_module('mmpretrain.models')
    model = MODELS.build(cfg.model)
    model.init_weights()
    if cfg.load_from:
        model.load_state_dict(read_checkpoint(cfg.load_from)['state_dict'])
    expected = from_official(theirs)
    found = model.state_dict()
    if not cfg.load_from:
        expected = {key: value for key, value in expected.items() if key.startswith('backbone.')}
    assert found.keys() >= expected.keys()
    assert all(torch.equal(found[key], value.to(found[key].dtype)) for key, value in expected.items())
    assert model.head.num_classes == len(theirs['head.bias']) or '--backbone-only' in options


@pytest.mark.parametrize('arch', ['tiny', 'small', 'medium', 'large', 'huge'])
def test_every_arch_is_recognised(arch):
    keys = official_models()[arch]['keys']
    conversion = convert_checkpoint({key: torch.empty(shape, device='meta') for key, shape in keys.items()})
    assert conversion.arch == arch and conversion.num_classes == 1000 and conversion.normalized is None


def test_code_is_refused_and_does_not_run(tmp_path):
    source, trace, target = tmp_path / 'harmful.pth', tmp_path / 'trace', tmp_path / 'out.pth'
    torch.save(dict(state_dict=weights(), extra=Harmful(trace)), source)
    done = convert(source, target)
    assert done.returncode == 2 and 'is refused: it holds an object that may run code' in done.stderr
    assert not trace.exists() and not target.exists()
    with source.open('wb') as file:
        pickle.dump(Harmful(trace), file)
    assert convert(source, target).returncode == 2
    assert not trace.exists() and not target.exists()


def cut(path):
    torch.save(weights(), path)
    path.write_bytes(path.read_bytes()[:100000])


def cut_of_old(length):
    def make(path):
        torch.save(weights(), path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:length])

    return make


def holding(content):
    return lambda path: path.write_bytes(content)


def page(path):
    path.write_text('<!DOCTYPE html><html>Sign in</html>')


def save(change):
    def make(path):
        state_dict = weights()
        change(state_dict)
        torch.save(state_dict, path)

    return make


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (cut, 'not a checkpoint of PyTorch, or is cut off'),
        (page, 'is a web page, not a checkpoint'),
        (holding(b'\xef\xbb\xbf<!-- login --><html>'), 'is a web page, not a checkpoint'),
        (holding(b'Not Found'), 'not a checkpoint of PyTorch, or is cut off'),
        (holding(b'{"error": "denied"}'), 'not a checkpoint of PyTorch, or is cut off'),
        (holding(b'GIF89a' + bytes(64)), 'not a checkpoint of PyTorch, or is cut off'),
        (holding(b'\x80\x02.'), 'not a checkpoint of PyTorch, or is cut off'),
        *((cut_of_old(length), 'not a checkpoint of PyTorch, or is cut off') for length in (1, 200, 1000, 4000)),
        (
            lambda path: torch.save({1: torch.zeros(2)}, path),
            'it has other entries, [1]',
        ),
        (save(lambda d: d.update({'block1.0.att.mha.W_q.weight': torch.zeros(64, 9)})), 'do not fit together'),
        (save(lambda d: d.update({'block4.0.attn.kv.weight': torch.zeros(4)})), 'do not fit together'),
        (save(lambda d: d.update(pos_embed1=torch.zeros(56))), "'pos_embed1' has the shape (56,)"),
        (save(lambda d: d.update({'block1.0.att.mha.attn.conv.weight': torch.zeros(2, 9)})), 'expected four dim'),
        (lambda path: None, 'does not exist'),
        (lambda path: torch.save([1, 2], path), 'holds a list'),
        (lambda path: torch.save({'layer1.0.weight': torch.zeros(2)}, path), 'not a SOFT model of the authors'),
        (save(lambda d: d.update({'head.bias': torch.zeros(10)})), 'classifier: weight (1000, 512), bias (10,)'),
        (save(lambda d: d.pop('head.weight')), 'classifier: weight None, bias (1000,)'),
        (save(lambda d: d.pop('head.bias')), 'classifier: weight (1000, 512), bias None'),
        (
            save(lambda d: [d.pop(key) for key in [*d] if key.startswith('block2.0.att.mha.attn.')]),
            'stage 2 has no softmax-free attention: expected att.mha.attn.conv and Qlandmark_op in block2.0',
        ),
        (save(lambda d: d.update({'block2.0.att.ff1.weight': torch.zeros(4, 4)})), '1 of another shape'),
        (save(lambda d: d.pop('norm.weight')), "1 missing ['backbone.stages.3.norm.weight']"),
        (save(lambda d: d.update({'neck.weight': torch.zeros(1)})), "'neck.weight' is not a key"),
    ],
)
def test_bad_files_are_named_and_leave_nothing(tmp_path, make, message):
    source, target = tmp_path / 'source.pth', tmp_path / 'target.pth'
    make(source)
    done = convert(source, target)
    assert done.returncode == 2 and message in done.stderr and 'Traceback' not in done.stderr
    assert not target.exists() and not list(tmp_path.glob('*.part')) and not list(tmp_path.glob('.*'))


def test_file_to_convert_is_not_written_over(tmp_path):
    source = tmp_path / 'source.pth'
    torch.save(weights(), source)
    before = source.read_bytes()
    done = convert(source, tmp_path / '.' / 'source.pth', '--backbone-only')
    assert done.returncode == 2 and 'is the file to convert' in done.stderr and source.read_bytes() == before
    (tmp_path / 'folder.pth').mkdir()
    done = convert(source, tmp_path / 'folder.pth')
    assert done.returncode == 2 and 'folder.pth' in done.stderr and 'Traceback' not in done.stderr
    assert not list(tmp_path.glob('.*'))


@pytest.mark.parametrize(('name', 'normalized'), [('soft_tiny', False), ('SOFT_norm_small', True), ('resnet101', None)])
def test_only_names_of_the_authors_tell_the_attention(name, normalized):
    source = dict(model=weights(), args=argparse.Namespace(model=name, config='SOFT_Norm_Tiny.yaml'))
    assert convert_checkpoint(source).normalized is normalized


@pytest.mark.parametrize('wrap', [lambda d: d, lambda d: dict(state_dict=d, args=argparse.Namespace())])
@pytest.mark.parametrize('normalized', [False, True])
def test_backbone_names_the_command_for_a_file_of_the_authors(tmp_path, wrap, normalized):
    path = tmp_path / 'theirs.pth'
    torch.save(wrap({f'module.{key}': value for key, value in weights().items()}), path)
    init_cfg = dict(type='Pretrained', checkpoint=str(path), prefix='backbone.')
    with pytest.raises(ValueError, match="authors' names: convert it by") as raised:
        SOFT('tiny', attention=dict(normalized=normalized), init_cfg=init_cfg).init_weights()
    command = str(raised.value).split('`')[1].split()
    tool, source, target, *options = command[1:]
    assert Path(tool) == ROOT / 'tools/convert_checkpoint.py' and Path(source) == path
    assert options == ['--normalized'] * normalized
    assert convert(source, tmp_path / target, *options).returncode == 0
    init_cfg['checkpoint'] = str(tmp_path / target)
    SOFT('tiny', attention=dict(normalized=normalized), init_cfg=init_cfg).init_weights()


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('normalized', [False, True])
def test_converted_checkpoint_of_the_other_form_is_refused(tmp_path, suffix, normalized):
    source, target = tmp_path / 'theirs.pth', tmp_path / f'ours{suffix}'
    torch.save(weights(), source)
    assert convert(source, target, *['--normalized'] * normalized).returncode == 0
    init_cfg = dict(type='Pretrained', checkpoint=str(target), prefix='backbone.')
    other = dict(normalized=not normalized)
    for attention in (other, [dict(normalized=normalized), other, dict(normalized=normalized)]):
        with pytest.raises(ValueError, match=f'Set normalized={normalized} in the attention'):
            SOFT('tiny', attention=attention, init_cfg=init_cfg).init_weights()
    SOFT('tiny', attention=dict(normalized=normalized), init_cfg=init_cfg).init_weights()


def test_whole_model_of_the_other_form_is_refused(official, tmp_path):
    from soft_mm.inference import check_weights

    target = tmp_path / 'ours.pth'
    assert convert(official, target).returncode == 0
    content = read_checkpoint(target)
    models = [
        Classifier(SOFT('tiny', attention=dict(normalized=normalized), out_type='cls_token'), 1000)
        for normalized in (False, True)
    ]
    with pytest.raises(ValueError, match='ours.pth is normalised, as recorded by .* config has normalized=False'):
        check_weights(models[0], content, str(target))
    check_weights(models[1], content, str(target))


def test_whole_models_may_resize_position_embeddings():
    from soft_mm.inference import check_weights

    small, large = (Classifier(SOFT('tiny', img_size=size, out_type='cls_token'), 3) for size in (64, 96))
    check_weights(large, dict(state_dict=small.state_dict()), 'small.pth')
    large.load_state_dict(small.state_dict())
    with pytest.raises(ValueError, match=r'1 of another shape .*head.fc.bias'):
        check_weights(large, small.state_dict() | {'head.fc.bias': torch.zeros(4)}, 'small.pth')


def test_raw_weights_that_are_not_there():
    with pytest.raises(ValueError, match='only averaged weights'):
        convert_checkpoint(dict(state_dict_ema=weights()), 'raw')
    with pytest.raises(ValueError, match='no averaged weights'):
        convert_checkpoint(dict(state_dict=weights()), 'ema')


@pytest.mark.parametrize(
    ('arch', 'norm'),
    [
        *((arch, '') for arch in ('tiny', 'small', 'medium', 'large', 'huge')),
        ('small_code', 'norm_'),
        ('tiny', 'norm_'),
    ],
)
def test_every_arch_there_and_back(arch, norm):
    theirs = weights(arch)
    source = dict(state_dict=theirs, args=argparse.Namespace(model=f'soft_{norm}{arch.removesuffix("_code")}'))
    conversion = convert_checkpoint(source)
    assert conversion.normalized == bool(norm) and not conversion.dropped
    back = to_official(conversion.state_dict)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in back.items())


@pytest.mark.parametrize(('kind', 'regime'), VARIANTS)
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_converted_model_computes_what_the_authors_do(tmp_path, kind, regime, suffix):
    source, target = tmp_path / 'reduced.pth', tmp_path / f'ours{suffix}'
    shapes = {key: value.shape for key, value in to_official(reduced_model(kind, regime).state_dict()).items()}
    theirs = {key: weight(key, tuple(shape), regime) for key, shape in shapes.items()}
    theirs = {key: value.float() if value.is_floating_point() else value for key, value in theirs.items()}
    torch.save(
        dict(model=theirs, args=argparse.Namespace(model='soft_norm_tiny' if kind == 'norm' else 'soft_tiny')), source
    )
    done = convert(source, target)
    assert done.returncode == 0, done.stderr
    loaded = read_checkpoint(target)
    loaded = loaded if suffix == '.safetensors' else loaded['state_dict']
    conversion = convert_checkpoint(read_checkpoint(source))
    backbone = SOFT(conversion.arch, attention=dict(normalized=conversion.normalized), out_type='cls_token')
    model = Classifier(backbone, conversion.num_classes)
    model.load_state_dict(loaded)
    with torch.no_grad():
        logits = model.eval()(image(160, 256))
    assert (logits - record(f'reduced_{kind}_{regime}')['logits_160x256']).abs().max() < 1e-4


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize(
    ('config', 'changes', 'said'),
    [
        ('imagenet/soft-tiny-norm_8xb128_in1k.py', dict(head=dict(num_classes=10)), ''),
        ('coco/retinanet_soft-tiny-norm_fpn_1x_coco.py', dict(backbone=dict(img_size=(800, 1344))), '(200, 336)'),
        (
            'coco/deformable-detr_soft-tiny-norm_16xb2-50e_coco.py',
            dict(backbone=dict(out_indices=(1, 2)), neck=dict(in_channels=[128, 320])),
            'keys of stages that out_indices does not need',
        ),
        ('ade20k/fpn_soft-tiny-norm_8xb4-80k_ade20k-512x512.py', dict(decode_head=dict(num_classes=7)), ''),
    ],
)
def test_converted_weights_start_every_task(official, tmp_path, suffix, config, changes, said):
    target = tmp_path / f'tiny{suffix}'
    assert convert(official, target).returncode == 0
    pytest.importorskip({'imagenet': 'mmpretrain', 'coco': 'mmdet', 'ade20k': 'mmseg'}[config.split('/')[0]])
    cfg = Config.fromfile(ROOT / 'configs' / config)
    init_cfg = dict(type='Pretrained', checkpoint=str(target), prefix='backbone.')
    cfg.merge_from_dict(dict(model=dict(changes, backbone=dict(changes.get('backbone', {}), init_cfg=init_cfg))))
    importlib.import_module(f'{cfg.default_scope}.models')
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    MMLogger.get_instance(f'start-{tmp_path.name}', log_file=str(tmp_path / 'log.txt'))
    model.init_weights()
    expected = from_official(weights(seed=1))
    for key, value in model.backbone.state_dict().items():
        if said != '(200, 336)' or not key.endswith('.pos_embed'):
            assert torch.equal(value, expected[f'backbone.{key}'].to(value.dtype)), key
    report = (tmp_path / 'log.txt').read_text()
    assert report.count('SOFT: all ') == 1 and f'loaded from {target}' in report and said in report
    assert "not of the backbone: keys under ['head']" in report


def test_converted_weights_of_another_arch_are_refused(official, tmp_path):
    target = tmp_path / 'tiny.pth'
    assert convert(official, target).returncode == 0
    init = dict(type='Pretrained', checkpoint=str(target), prefix='backbone.')
    with pytest.raises(ValueError, match='does not fit this SOFT backbone'):
        SOFT('small', init_cfg=init).init_weights()
