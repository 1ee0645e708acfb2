"""The photo-digits configs: they parse, build, train a step and predict, and start from a classifier's checkpoint."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mmcv
import pytest
import torch
from mmengine.config import Config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / 'configs' / 'photo_digits').glob('*.py'))
CLASSIFIER = ROOT / 'configs/photo_digits/soft-tiny_photo-digits-crops.py'
DENSE = [path for path in CONFIGS if path != CLASSIFIER]
SMALL_DATA = dict(num_crops=6, num_scenes=3)
OPTIONS = [
    'train_cfg.max_iters=2',
    'train_cfg.val_interval=2',
    'param_scheduler=[]',
    'train_dataloader.num_workers=0',
    'train_dataloader.persistent_workers=False',
    'val_dataloader.num_workers=0',
    'train_dataloader.batch_size=2',
    'default_hooks.checkpoint.interval=1',
]


@pytest.fixture(scope='module')
def workspace(tmp_path_factory):
    """A folder with a small validation split where the configs look for it."""
    from soft_mm.datasets.export import export_photo_digits

    folder = tmp_path_factory.mktemp('workspace')
    export_photo_digits(folder / 'data/photo_digits_demo', splits=('val',), **SMALL_DATA)
    return folder


def train(workspace, config, *options, resume=False):
    command = [sys.executable, str(ROOT / 'tools/train.py'), str(config), '--work-dir', f'work_dirs/{config.stem}']
    command += ['--resume'] if resume else []
    command += ['--cfg-options', *OPTIONS, *options]
    return subprocess.run(command, cwd=workspace, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope='module')
def classifier(workspace):
    """Checkpoint of a classifier that was trained for two iterations."""
    done = train(workspace, CLASSIFIER)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'accuracy/top1' in done.stdout + done.stderr
    # A training that goes on in the same folder removes its older checkpoints.
    return shutil.copy(workspace / 'work_dirs' / CLASSIFIER.stem / 'iter_2.pth', workspace / 'classifier.pth')


@pytest.mark.parametrize('config', CONFIGS, ids=lambda path: path.stem)
def test_config_parses_and_names_its_scope(config):
    cfg = Config.fromfile(config)
    assert cfg.default_scope in ('mmpretrain', 'mmdet', 'mmseg')
    assert cfg.model.backbone.type == 'soft_mm.SOFT'
    end = max(scheduler.end for scheduler in cfg.param_scheduler)
    assert end == cfg.train_cfg.max_iters == cfg.train_cfg.val_interval


@pytest.mark.parametrize('config', DENSE, ids=lambda path: path.stem)
def test_classes_and_colours_are_those_of_the_data_set(config):
    from soft_mm.datasets import CLASSES, PALETTE

    metainfo = Config.fromfile(config).val_dataloader.dataset.metainfo
    # A config cannot import the package's own, and mmsegmentation's begin with the background.
    assert tuple(metainfo.classes[-10:]) == CLASSES and tuple(metainfo.palette[-10:]) == PALETTE


@pytest.mark.parametrize('config', DENSE, ids=lambda path: path.stem)
def test_dense_config_trains_from_the_classifier_and_evaluates(config, workspace, classifier):
    # After two iterations a detector is sure of nothing, and without detections there are no metrics.
    options = [] if config.stem.startswith('fpn') else ['model.test_cfg.rcnn.score_thr=0.0']
    done = train(workspace, config, f'model.backbone.init_cfg.checkpoint={classifier}', *options)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-3000:]
    keys = sum(key.startswith('backbone.') for key in torch.load(classifier, weights_only=False)['state_dict'])
    assert f'SOFT: all {keys} backbone keys loaded from {classifier}' in log
    assert ('mIoU' if config.stem.startswith('fpn') else 'bbox_mAP') in log
    code = f"""
from soft_mm.analysis.pictures import draw_predictions
draw_predictions({str(config)!r}, 'work_dirs/{config.stem}/iter_2.pth', 'picture.png', count=3, columns=2)
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=workspace, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    picture = mmcv.imread(workspace / 'picture.png')
    # Two rows of two scenes of 256 pixels, the last place empty, each scene beside its prediction.
    assert picture.shape == (512, 1024, 3) and not picture[256:, 512:].any() and picture[:, :512].std() > 10
    assert not list(workspace.glob('picture.png?*'))


def test_training_resumes_and_test_tool_evaluates(workspace, classifier):
    done = train(workspace, CLASSIFIER, 'train_cfg.max_iters=3', 'train_cfg.val_interval=3', resume=True)
    assert done.returncode == 0, done.stderr[-3000:]
    log = done.stdout + done.stderr
    assert 'resumed epoch: 0, iter: 2' in log
    assert (workspace / 'work_dirs' / CLASSIFIER.stem / 'iter_3.pth').is_file()
    command = [
        sys.executable,
        str(ROOT / 'tools/test.py'),
        str(CLASSIFIER),
        str(workspace / 'work_dirs' / CLASSIFIER.stem / 'iter_3.pth'),
    ]
    done = subprocess.run(
        [*command, '--json', 'metrics.json', '--cfg-options', 'test_dataloader.num_workers=0'],
        cwd=workspace,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert 0 <= json.loads((workspace / 'metrics.json').read_text())['accuracy/top1'] <= 100


def test_checkpoint_of_another_arch_stops_the_training(workspace, classifier):
    done = train(workspace, DENSE[0], f'model.backbone.init_cfg.checkpoint={classifier}', 'model.backbone.arch=small')
    assert done.returncode != 0
    assert 'does not fit this SOFT backbone' in done.stderr.splitlines()[-1]


def test_user_config_inherits_from_another_folder(tmp_path):
    """Ten lines that put SOFT into mmdet's Mask R-CNN, as the README shows them."""
    readme = (ROOT / 'README.md').read_text()
    block = readme.split('```python\n# my_mask_rcnn.py\n')[1].split('```')[0]
    path = tmp_path / 'my_mask_rcnn.py'
    path.write_text(block)
    code = f"""
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmdet.registry import MODELS
init_default_scope('mmdet')
cfg = Config.fromfile({str(path)!r})
cfg.model.backbone.init_cfg = None
model = MODELS.build(cfg.model)
print(type(model.backbone).__name__, model.neck.in_channels)
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert 'SOFT [64, 128, 320, 512]' in done.stdout, done.stderr[-2000:]


def test_readme_python_example_runs():
    readme = (ROOT / 'README.md').read_text()
    block = readme.split('```python\nimport torch\n')[1].split('```')[0]
    done = subprocess.run([sys.executable, '-c', 'import torch\n' + block], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.strip().splitlines()[0]
        == '[(1, 64, 128, 160), (1, 128, 64, 80), (1, 320, 32, 40), (1, 512, 16, 20)]'
    )
