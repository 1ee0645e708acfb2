"""Fixtures: a workspace with small photo-digits data, and a classifier trained in it for two iterations."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / 'projects/photo_digits/configs').glob('*.py'))
CLASSIFIER = ROOT / 'projects/photo_digits/configs/soft-tiny_photo-digits-crops.py'
DENSE = [path for path in CONFIGS if path != CLASSIFIER]
SEGMENTOR, DETECTOR = (next(path for path in DENSE if path.stem.startswith(name)) for name in ('fpn', 'mask-rcnn'))
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


def small_classifier():
    """Config of a reduced classifier that trains for three epochs of six steps. Only the order of images is random."""
    cfg = Config.fromfile(CLASSIFIER)
    cfg.model.backbone.arch = dict(embed_dims=(16, 32, 48, 64), num_heads=(1, 2, 3, 4), depths=(1, 1, 2, 1))
    cfg.model.head.in_channels = 64
    cfg.train_dataloader.batch_size = 4
    cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=True)
    cfg.train_dataloader.dataset = dict(type='PhotoDigitsCrops', length=24, pipeline=cfg.train_pipeline)
    cfg.val_dataloader.num_workers = cfg.test_dataloader.num_workers = 0
    cfg.train_cfg = dict(by_epoch=True, max_epochs=3, val_interval=3)
    cfg.default_hooks = dict(
        logger=dict(type='LoggerHook', interval=1),
        checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1),
    )
    cfg.log_processor.by_epoch, cfg.param_scheduler = True, []
    return cfg


@pytest.fixture(scope='session')
def workspace(tmp_path_factory):
    """A folder with a small validation split where the configs look for it."""
    # Here, so that a test run without this fixture does not import scikit-learn.
    from projects.photo_digits.dataset_files import export_photo_digits

    folder = tmp_path_factory.mktemp('workspace')
    export_photo_digits(folder / 'data/photo_digits_demo', splits=('val',), num_crops=6, num_scenes=3)
    return folder


@pytest.fixture(scope='session')
def run(workspace, environment):
    """Run a Python program in the workspace. Return its exit code and its whole output."""

    def start(*arguments):
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(
            command, cwd=workspace, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        return done.returncode, done.stdout

    return start


@pytest.fixture(scope='session')
def train(run):
    def start(config, *options, resume=False):
        arguments = [config, '--work-dir', f'work_dirs/{config.stem}', *(['--resume'] if resume else [])]
        return run(ROOT / 'tools/train.py', *arguments, '--cfg-options', *OPTIONS, *options)

    return start


@pytest.fixture(scope='session')
def classifier(workspace, train):
    """Checkpoint of a classifier that was trained for two iterations."""
    code, log = train(CLASSIFIER)
    assert code == 0 and 'accuracy/top1' in log, log[-3000:]
    # A copy, because a resumed training in the same folder removes older checkpoints.
    return shutil.copy(workspace / 'work_dirs' / CLASSIFIER.stem / 'iter_2.pth', workspace / 'classifier.pth')
