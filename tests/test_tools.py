"""Command-line tools of training, testing and prediction: what they take, do and refuse."""

import json
import subprocess
import sys

import mmcv
import numpy as np
import pytest
import torch
from test_configs import CLASSIFIER, DENSE, OPTIONS, ROOT, classifier, workspace  # noqa: F401 (fixtures)

TEST_OPTIONS = ['test_dataloader.num_workers=0']


def tool(name, *arguments, cwd):
    command = [sys.executable, str(ROOT / 'tools' / name), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def config_of(workspace, task):  # noqa: F811
    return CLASSIFIER if task == 'classification' else next(path for path in DENSE if path.stem.startswith(task))


@pytest.fixture(scope='module')
def checkpoints(workspace, classifier):  # noqa: F811
    """A checkpoint of each task, of models as they are initialised."""
    code = """
import importlib, sys, torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, init_default_scope
cfg = Config.fromfile(sys.argv[1])
importlib.import_module(f'{cfg.default_scope}.models')
importlib.import_module(f'{cfg.default_scope}.datasets')
init_default_scope(cfg.default_scope)
cfg.model.backbone.init_cfg = None
model = MODELS.build(cfg.model)
meta = dict(dataset_meta=DATASETS.build(cfg.val_dataloader.dataset).metainfo)
torch.save(dict(meta=meta, state_dict=model.state_dict()), sys.argv[2])
"""
    files = dict(classification=classifier)
    for task in ('mask-rcnn', 'fpn'):
        files[task] = workspace / f'{task}.pth'
        command = [sys.executable, '-c', code, str(config_of(workspace, task)), str(files[task])]
        done = subprocess.run(command, cwd=workspace, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    return files


@pytest.mark.parametrize('task', ['classification', 'mask-rcnn', 'fpn'])
@pytest.mark.parametrize('folder', [False, True])
def test_predict_draws(workspace, checkpoints, tmp_path, task, folder):  # noqa: F811
    images = tmp_path / 'images'
    images.mkdir()
    for name, size in (('a.png', (90, 120, 3)), ('b.jpg', (128, 100, 3))):
        mmcv.imwrite(np.random.default_rng(0).integers(0, 255, size, dtype=np.uint8), str(images / name))
    (images / 'notes.txt').write_text('no image')
    source = images if folder else images / 'a.png'
    arguments = (source, config_of(workspace, task), checkpoints[task], '--out-dir', tmp_path / 'out')
    done = tool('predict.py', *arguments, '--score-thr', 0.0, '--device', 'cpu', cwd=workspace)
    assert done.returncode == 0, done.stderr[-3000:]
    pictures = sorted((tmp_path / 'out' / 'vis').iterdir())
    assert len(pictures) == (2 if folder else 1)
    assert f'{len(pictures)} pictures are in {tmp_path / "out" / "vis"}' in done.stdout
    original = mmcv.imread(images / 'a.png')
    drawn = mmcv.imread(pictures[0])
    assert drawn.shape != original.shape or (drawn != original).any()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(image='none.png'), 'there is no image or folder none.png'),
        (dict(image='broken.png'), 'broken.png cannot be read as an image'),
        (dict(image='empty'), 'empty holds no images'),
        (dict(config='none.py'), 'there is no file none.py'),
        (dict(checkpoint='none.pth'), 'there is no file none.pth'),
        (dict(device='cuda:7'), "device 'cuda:7'"),
        (dict(checkpoint='other.pth'), 'is not of the model of this config'),
    ],
)
def test_predict_refuses(workspace, checkpoints, tmp_path, change, message):  # noqa: F811
    (tmp_path / 'broken.png').write_bytes(b'\x89PNG\r\n\x1a\n')
    (tmp_path / 'empty').mkdir()
    mmcv.imwrite(np.zeros((64, 64, 3), np.uint8), str(tmp_path / 'a.png'))
    torch.save(dict(meta={}, state_dict={'backbone.weight': torch.zeros(1)}), tmp_path / 'other.pth')
    given = dict(image='a.png', config=CLASSIFIER, checkpoint=checkpoints['classification'], device='cpu') | change
    arguments = (given['image'], given['config'], given['checkpoint'], '--device', given['device'])
    done = tool('predict.py', *arguments, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and 'Traceback' not in done.stderr
    assert not (tmp_path / 'outputs').exists()


@pytest.mark.parametrize(
    ('name', 'arguments', 'message'),
    [
        ('train.py', ['none.py'], 'there is no config none.py'),
        ('train.py', [CLASSIFIER, '--resume', 'none.pth'], 'there is no checkpoint none.pth'),
        ('train.py', [CLASSIFIER, '--auto-scale-lr'], 'does not set auto_scale_lr'),
        ('train.py', [ROOT / 'configs/ade20k/upernet_soft-tiny-norm_8xb2-160k_ade20k-512x512.py'], 'data_root'),
        ('test.py', [CLASSIFIER, 'none.pth'], 'there is no checkpoint none.pth'),
        ('test.py', ['none.py', __file__], 'there is no config none.py'),
    ],
)
def test_missing_files_are_named(tmp_path, name, arguments, message):
    done = tool(name, *arguments, '--cfg-options', 'model.backbone.init_cfg=None', cwd=tmp_path)
    assert done.returncode in (1, 2) and message in done.stderr and 'Traceback' not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason='it is for machines without a GPU')
def test_mixed_precision_needs_a_gpu(tmp_path):
    done = tool('train.py', CLASSIFIER, '--amp', cwd=tmp_path)
    assert done.returncode == 2 and 'mixed precision needs a GPU' in done.stderr


def test_checkpoint_of_another_model_is_not_evaluated(workspace, checkpoints):  # noqa: F811
    done = tool('test.py', CLASSIFIER, checkpoints['fpn'], '--cfg-options', *TEST_OPTIONS, cwd=workspace)
    assert done.returncode == 2 and 'is not of the model of this config' in done.stderr


def test_evaluates_in_mixed_precision(workspace, checkpoints):  # noqa: F811
    arguments = (CLASSIFIER, checkpoints['classification'], '--amp', '--json', 'amp.json')
    done = tool('test.py', *arguments, '--cfg-options', *TEST_OPTIONS, cwd=workspace)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 0 <= json.loads((workspace / 'amp.json').read_text())['accuracy/top1'] <= 100


def test_learning_rate_scales_with_the_batch(workspace, tmp_path):  # noqa: F811
    mine = tmp_path / 'mine.py'
    mine.write_text(f"_base_ = '{CLASSIFIER}'\nauto_scale_lr = dict(base_batch_size=8)\n")
    arguments = (mine, '--auto-scale-lr', '--work-dir', tmp_path / 'run', '--cfg-options', *OPTIONS)
    done = tool('train.py', *arguments, cwd=workspace)
    assert done.returncode == 0, done.stderr[-3000:]
    # A quarter of the batch, a quarter of 4e-4.
    state = torch.load(tmp_path / 'run/iter_2.pth', weights_only=False)
    assert state['optimizer']['param_groups'][0]['lr'] == pytest.approx(1e-4)


def test_two_processes_train_and_evaluate(workspace, tmp_path):  # noqa: F811
    """The launchers of several GPUs, on CPUs: the weights stay alike, each process sees its share."""

    def launch(name, *arguments):
        environment = dict(PORT='29555', PATH=f'{sys.exec_prefix}/bin:/usr/bin:/bin', OMP_NUM_THREADS='1')
        command = [str(ROOT / 'tools' / name), *map(str, arguments)]
        return subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True, timeout=300)

    run = tmp_path / 'run'
    done = launch('dist_train.sh', CLASSIFIER, 2, '--work-dir', run, '--cfg-options', *OPTIONS)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert 'GPU number: 2' in done.stdout + done.stderr or 'Distributed training: True' in done.stdout + done.stderr
    arguments = (CLASSIFIER, run / 'iter_2.pth', 2, '--json', 'two.json', '--cfg-options', *TEST_OPTIONS)
    done = launch('dist_test.sh', *arguments)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    together = json.loads((workspace / 'two.json').read_text())
    arguments = (CLASSIFIER, run / 'iter_2.pth', '--json', 'one.json', '--cfg-options', *TEST_OPTIONS)
    assert tool('test.py', *arguments, cwd=workspace).returncode == 0
    assert together == json.loads((workspace / 'one.json').read_text())
    done = launch('dist_train.sh', CLASSIFIER)
    assert done.returncode == 2 and 'usage: ' in done.stderr
