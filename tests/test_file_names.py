"""Odd names of configs, checkpoints, images and outputs, and ``~`` for the home folder, in every tool.

``tests/test_security.py`` tries the converter, ``get_complexity.py`` and the launchers.
"""

import json
import sys

import cv2
import numpy as np
import pytest
import torch
from digits_workspace import DETECTOR, SEGMENTOR, small_classifier
from mmengine.config import Config
from programs import run_tool
from test_security import NAMES

from soft_mm.checkpoints import to_official
from soft_mm.utils import build_model

pytestmark = pytest.mark.skipif(sys.platform == 'win32', reason='Windows allows no quotes and newlines in file names')
ODD = [
    'two words, \'single\' "double"\nnew line ünï-图',
    '[bold] {0} %s {{ x }} = $(touch trace); `touch trace` & # *',
]
odd = pytest.mark.parametrize('name', ODD, ids=['quotes', 'marks'])


def config_of(task):
    """The config of a small model."""
    cfg = small_classifier()
    if task == 'classifier':
        return cfg
    backbone = dict(arch=cfg.model.backbone.arch, init_cfg=None)
    cfg = Config.fromfile(dict(detector=DETECTOR, segmentor=SEGMENTOR)[task])
    cfg.model.backbone.update(backbone)
    cfg.model.neck.in_channels = [*backbone['arch'].embed_dims]
    return cfg


@pytest.fixture(scope='module')
def models():
    """The config and the content of a checkpoint of each task."""
    found = {}
    for task in ('classifier', 'detector', 'segmentor'):
        cfg = config_of(task)
        torch.manual_seed(0)
        model = build_model(cfg)
        model.init_weights()
        classes = cfg.get('classes') or cfg.val_dataloader.dataset.classes
        meta = dict(dataset_meta=dict(classes=classes, palette=cfg.get('palette')))
        found[task] = (cfg, dict(meta=meta, state_dict=model.state_dict()))
    return found


def write_image(path):
    # cv2.imwrite takes the suffix from the name.
    pixels = np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8)
    assert cv2.imwrite(str(path), pixels)
    return path


@pytest.fixture
def files(models, tmp_path, monkeypatch):
    """Write a config, a checkpoint and an image with a given name to the current folder."""
    monkeypatch.chdir(tmp_path)

    def write(name, task='classifier'):
        cfg, content = models[task]
        folder = tmp_path / f'{name} folder'
        folder.mkdir()
        config, checkpoint = folder / f'{name}.py', folder / f'{name}.pth'
        cfg.dump(config)
        torch.save(content, checkpoint)
        return config, checkpoint, write_image(folder / f'{name}.png')

    yield write
    assert not list(tmp_path.rglob('trace'))


def run(tool, *arguments):
    done = run_tool(tool, *arguments)
    assert done.returncode == 0, done
    return done.stdout + done.stderr


@odd
def test_train(workspace, files, monkeypatch, name):
    """The config, its work directory, the checkpoints that it starts and resumes from, and its data."""
    config, checkpoint, _ = files(name)
    data = config.parent / name
    data.symlink_to(workspace / 'data/photo_digits_demo')
    cfg = Config.fromfile(config)
    cfg.load_from, cfg.train_cfg = str(checkpoint), dict(by_epoch=True, max_epochs=1, val_interval=1)
    cfg.train_dataloader.dataset.length = 4
    cfg.val_dataloader.dataset.data_root = str(data)
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(checkpoint), prefix='backbone.')
    cfg.dump(config)
    run('train.py', config)
    default = config.parents[1] / 'work_dirs' / name
    assert (default / 'epoch_1.pth').exists() and (default / config.name).exists()
    monkeypatch.setenv('HOME', str(default.parent))
    work_dir = config.parent / 'work' / name
    for epochs, resume in ((2, [f'~/{name}/epoch_1.pth']), (3, [])):
        options = ['--work-dir', work_dir, '--resume', *resume, '--cfg-options', f'train_cfg.max_epochs={epochs}']
        said = run('train.py', config, *options)
        assert f'resumed epoch: {epochs - 1}' in said
        assert [path.name for path in work_dir.glob('*.pth')] == [f'epoch_{epochs}.pth']


@odd
def test_test(workspace, files, name):
    config, checkpoint, _ = files(name)
    (config.parents[1] / 'data').symlink_to(workspace / 'data')
    folder = config.parent / 'results'
    folder.mkdir()
    outputs = (
        '--work-dir',
        folder / f'{name} work',
        '--json',
        folder / name,
        '--show-dir',
        folder / f'{name} pictures',
    )
    run('test.py', config, checkpoint, *outputs)
    assert 'accuracy/top1' in json.loads((folder / name).read_text())
    assert len(list((folder / f'{name} pictures').iterdir())) == 6


@pytest.mark.parametrize('task', ['classifier', 'detector', 'segmentor'])
def test_predict(files, task):
    config, checkpoint, image = files(ODD[0], task)
    images = config.parent / f'{ODD[1]} images'
    images.mkdir()
    for name in NAMES:
        write_image(images / f'{name}.png')
    for source, names in ((image, ODD[:1]), (images, NAMES)):
        out = config.parent / f'{ODD[1]} {len(names)}'
        run('predict.py', source, config, checkpoint, '--out-dir', out, '--device', 'cpu')
        assert sorted(path.stem for path in (out / 'vis').iterdir()) == sorted(names)


@odd
def test_visualize_attention(files, name):
    config, checkpoint, image = files(name)
    out = config.parent / f'{name} attention.png'
    run('visualize_attention.py', image, config, checkpoint, '--points', '10,20', '--out', out)
    assert cv2.imread(str(out)) is not None


@odd
def test_export_onnx(workspace, files, name):
    """The written file is evaluated, and draws predictions."""
    pytest.importorskip('onnxruntime', reason='requirements/openmmlab.txt has no onnxruntime')
    config, checkpoint, image = files(name)
    exported = config.parent / f'{name}.onnx'
    run('export_onnx.py', config, checkpoint, exported, '--shape', 64, 64, '--images', image)
    run('predict.py', image, exported, '--out-dir', config.parent / 'out')
    assert [path.stem for path in (config.parent / 'out/vis').iterdir()] == [name]
    (config.parents[1] / 'data').symlink_to(workspace / 'data')
    run('test.py', config, exported, '--json', config.parent / name, '--cfg-options', 'test_dataloader.batch_size=1')
    assert 'accuracy/top1' in json.loads((config.parent / name).read_text())


@pytest.fixture
def home(workspace, files, models, monkeypatch):
    """The config and image of a classifier. Its checkpoint, and the authors' form of it, are in the home folder."""
    config, checkpoint, image = files('home')
    torch.save(to_official(models['classifier'][1]['state_dict']), checkpoint.with_name('theirs.pth'))
    (config.parents[1] / 'data').symlink_to(workspace / 'data')
    monkeypatch.setenv('HOME', str(checkpoint.parent))
    return config, image


OURS = '~/home.pth'
SHORT = ['--work-dir', 'work', '--cfg-options', 'train_dataloader.dataset.length=4', 'train_cfg.max_epochs=1']
INIT = 'model.backbone.init_cfg'
START = [f'{INIT}.type=Pretrained', f'{INIT}.checkpoint={OURS}', f'{INIT}.prefix=backbone.']


@pytest.mark.parametrize(
    ('tool', 'arguments'),
    [
        ('train.py', ['CONFIG', *SHORT, f'load_from={OURS}']),
        ('train.py', ['CONFIG', *SHORT, *START]),
        ('test.py', ['CONFIG', OURS, '--work-dir', 'work']),
        ('predict.py', ['IMAGE', 'CONFIG', OURS]),
        ('visualize_attention.py', ['IMAGE', 'CONFIG', OURS, '--points', '10,20']),
        ('convert_checkpoint.py', ['~/theirs.pth', 'converted.pth']),
        ('export_onnx.py', ['CONFIG', OURS, 'exported.onnx', '--shape', 64, 64, '--no-check']),
    ],
)
def test_home_folder(home, tool, arguments):
    if tool == 'export_onnx.py':
        pytest.importorskip('onnxruntime', reason='requirements/openmmlab.txt has no onnxruntime')
    config, image = home
    run(tool, *({'CONFIG': config, 'IMAGE': image}.get(argument, argument) for argument in arguments))
