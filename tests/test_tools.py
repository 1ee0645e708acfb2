"""Command-line tools of training, testing and prediction: what they take, do and refuse."""

import functools
import importlib.util
import json
import shutil
import subprocess
import sys

import mmcv
import numpy as np
import pytest
import torch
from authors import Harmful
from digits_workspace import CLASSIFIER, DENSE, OPTIONS, ROOT
from mmengine.config import Config
from programs import run_in_processes, run_tool, tool

ADE20K = ROOT / 'configs/ade20k/upernet_soft-tiny-norm_8xb2-160k_ade20k-512x512.py'
TEST_OPTIONS = ['test_dataloader.num_workers=0']


def tool_here(name, *arguments):
    """Run a tool that refuses its arguments in this process. Return its exit code or message, and its error output."""
    done = run_tool(name, *arguments)
    assert done.returncode != 0
    return done.returncode, done.stderr


def config_of(workspace, task):
    return CLASSIFIER if task == 'classification' else next(path for path in DENSE if path.stem.startswith(task))


@pytest.fixture(scope='module')
def checkpoints(workspace, classifier, environment):
    """A checkpoint of each task, of models as they are initialised."""
    code = """
import importlib, sys, torch
from mmengine.registry import DATASETS, MODELS, init_default_scope
from soft_mm.utils import read_config
cfg = read_config(sys.argv[1])
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
        done = subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    return files


@pytest.mark.parametrize(
    ('task', 'folder'), [('classification', False), ('classification', True), ('mask-rcnn', True), ('fpn', True)]
)
def test_predict_draws(workspace, checkpoints, tmp_path, task, folder):
    images = tmp_path / 'images'
    images.mkdir()
    for name, size in (('a.png', (90, 120, 3)), ('b.jpg', (128, 100, 3))):
        mmcv.imwrite(np.random.default_rng(0).integers(0, 255, size, dtype=np.uint8), str(images / name))
    (images / 'notes.txt').write_text('no image')
    source = images if folder else images / 'a.png'
    arguments = (source, config_of(workspace, task), checkpoints[task], '--out-dir', tmp_path / 'out')
    threshold = ('--score-thr', 0.0) if task == 'mask-rcnn' else ()
    done = tool('predict.py', *arguments, *threshold, '--device', 'cpu', cwd=workspace)
    assert done.returncode == 0, done.stderr[-3000:]
    pictures = sorted((tmp_path / 'out' / 'vis').iterdir())
    assert len(pictures) == (2 if folder else 1)
    assert f'pictures written to {tmp_path / "out" / "vis"}: {len(pictures)}' in done.stdout
    original = mmcv.imread(images / 'a.png')
    drawn = mmcv.imread(pictures[0])
    assert drawn.shape != original.shape or (drawn != original).any()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(image='none.png'), 'none.png does not exist: expected an image file or a folder'),
        (dict(image='broken.png'), 'broken.png cannot be read as an image'),
        (dict(image='empty'), 'empty contains no images'),
        (dict(config='none.py'), 'none.py'),
        (dict(checkpoint='none.pth'), 'none.pth does not exist'),
        (dict(config='broken.png'), 'broken.png is not a config file'),
        (dict(device='cuda:7'), "device 'cuda:7'"),
        (dict(score='2'), 'score_thr=2.0: expected a number from 0 to 1'),
        (dict(score='0.5'), 'score_thr=0.5 has no effect'),
        (dict(checkpoint='other.pth'), 'does not fit the model of this config'),
        (dict(checkpoint='code.pth'), 'code.pth is refused'),
        (dict(checkpoint='some.safetensors'), 'the toolboxes cannot read safetensors files'),
        (dict(image='twins'), "several images have the same name apart from the suffix, ['a']"),
    ],
)
def test_predict_refuses(workspace, checkpoints, tmp_path, monkeypatch, change, message):
    (tmp_path / 'broken.png').write_bytes(b'\x89PNG\r\n\x1a\n')
    (tmp_path / 'empty').mkdir()
    mmcv.imwrite(np.zeros((64, 64, 3), np.uint8), str(tmp_path / 'a.png'))
    torch.save(dict(meta={}, state_dict={'backbone.weight': torch.zeros(1)}), tmp_path / 'other.pth')
    torch.save(dict(state_dict={}, extra=Harmful(tmp_path / 'trace')), tmp_path / 'code.pth')
    (tmp_path / 'some.safetensors').touch()
    (tmp_path / 'twins').mkdir()
    for name in ('a.png', 'a.jpg'):
        mmcv.imwrite(np.zeros((64, 64, 3), np.uint8), str(tmp_path / 'twins' / name))
    given = dict(image='a.png', config=CLASSIFIER, checkpoint=checkpoints['classification'], device='cpu') | change
    arguments = [given['image'], given['config'], given['checkpoint'], '--device', given['device']]
    arguments += ['--score-thr', given['score']] if 'score' in given else []
    monkeypatch.chdir(tmp_path)
    code, said = tool_here('predict.py', *arguments)
    assert code == 2 and message in said
    assert not (tmp_path / 'outputs').exists() and not (tmp_path / 'trace').exists()


@pytest.mark.parametrize(
    ('name', 'arguments', 'message'),
    [
        ('train.py', ['none.py'], 'none.py does not exist: expected a config file'),
        ('train.py', [ROOT / 'LICENSE'], 'LICENSE is not a config file'),
        ('get_complexity.py', [ROOT / 'LICENSE'], 'LICENSE is not a config file'),
        ('train.py', [CLASSIFIER, '--resume', 'none.pth'], 'none.pth does not exist'),
        ('train.py', [CLASSIFIER, '--auto-scale-lr'], 'set auto_scale_lr = dict'),
        ('test.py', [CLASSIFIER, 'none.pth'], 'none.pth does not exist'),
        ('test.py', ['none.py', __file__], 'none.py does not exist: expected a config file'),
    ],
)
def test_missing_files_are_named(tmp_path, monkeypatch, name, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, said = tool_here(name, *arguments)
    assert code == 2 and message in said


def test_missing_data_is_named(tmp_path):
    done = tool('train.py', ADE20K, '--cfg-options', 'model.backbone.init_cfg=None', cwd=tmp_path)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    said = done.stderr.splitlines()[-1]
    assert 'ADEChallengeData2016/images/training' in said and 'set data_root of train_dataloader.dataset' in said


def test_missing_weights_are_named_with_the_command_that_makes_them(workspace):
    config = config_of(workspace, 'mask-rcnn')
    arguments = ('model.backbone.init_cfg.checkpoint=none.pth', *OPTIONS)
    done = tool('train.py', config, '--work-dir', 'missing', '--cfg-options', *arguments, cwd=workspace)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    message = f"{config}: model.backbone.init_cfg: init_cfg names the checkpoint 'none.pth', which does not exist"
    assert done.stderr.splitlines()[-1].startswith(message)
    command = f'`python {ROOT / "tools/convert_checkpoint.py"} SRC none.pth`'
    assert command in done.stderr and 'data_root' not in done.stderr


def load_tool(name):
    spec = importlib.util.spec_from_file_location(f'tool_{name}', ROOT / 'tools' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Built(BaseException):
    """Carries the config out of a tool, past its handling of errors."""


@pytest.mark.parametrize('device', ['cuda', 'cpu'])
def test_mixed_precision_reaches_the_runner(monkeypatch, tmp_path, device):
    def build_runner(cfg):
        raise Built(cfg)

    (tmp_path / 'some.pth').touch()
    monkeypatch.setattr('soft_mm.runner.get_device', lambda: device)
    wrapper = ('AmpOptimWrapper', 'dynamic') if device == 'cuda' else ('soft_mm.CPUAmpOptimWrapper', None)
    for name, more in (('train', []), ('test', [str(tmp_path / 'some.pth')])):
        module = load_tool(name)
        monkeypatch.setattr(module, 'build_runner', build_runner)
        monkeypatch.setattr(module, 'read_whole_model', lambda path: (path, {}))
        for amp in ([], ['--amp']):
            monkeypatch.setattr(sys, 'argv', [name, str(CLASSIFIER), *more, *amp])
            with pytest.raises(Built) as caught:
                module.main()
            (cfg,) = caught.value.args
            if name == 'train':
                expected = wrapper if amp else ('OptimWrapper', None)
                assert (cfg.optim_wrapper.type, cfg.optim_wrapper.get('loss_scale')) == expected
            else:
                assert cfg.test_cfg.get('fp16', False) == bool(amp)


@pytest.mark.parametrize('option', ['--resume', 'load_from'])
def test_training_does_not_run_code_of_a_checkpoint(tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(state_dict={}, extra=Harmful(tmp_path / 'trace')), 'code.pth')
    options = ['--resume', 'code.pth'] if option == '--resume' else ['--cfg-options', 'load_from=code.pth']
    code, said = tool_here('train.py', CLASSIFIER, *options)
    assert code == 2 and 'code.pth is refused' in said and not (tmp_path / 'trace').exists()


@pytest.mark.parametrize('runner', ['Runner', 'FlexibleRunner'])
def test_training_does_not_start_from_the_other_form_of_attention(tmp_path, monkeypatch, runner):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(meta=dict(normalized=True), state_dict={}), 'norm.pth')
    options = ('load_from=norm.pth', f'runner_type={runner}')
    code, said = tool_here('train.py', CLASSIFIER, '--cfg-options', *options)
    assert code == 2 and 'the attention in norm.pth is normalised' in said and 'Set normalized=True' in said


@pytest.mark.skipif(torch.cuda.is_available(), reason='it is for machines without a GPU')
@pytest.mark.parametrize('task', ['classification', 'mask-rcnn'])
def test_trains_in_mixed_precision_on_the_cpu(workspace, monkeypatch, task):
    """The checkpoint, with its optimiser, is one of an ordinary training, which resumes from it."""
    monkeypatch.chdir(workspace)
    config, folder = config_of(workspace, task), f'work_dirs/amp-{task}'
    options = [*OPTIONS, 'model.backbone.init_cfg=None']
    done = run_tool('train.py', config, '--work-dir', folder, '--amp', '--cfg-options', *options)
    assert done.returncode == 0, done
    for step in (2, 3):
        content = torch.load(workspace / folder / f'iter_{step}.pth', weights_only=False)
        dtypes = {value.dtype for value in content['state_dict'].values()}
        assert torch.float32 in dtypes and torch.bfloat16 not in dtypes
        assert {'state', 'param_groups'} <= content['optimizer'].keys()
        longer = [*options, 'train_cfg.max_iters=3', 'train_cfg.val_interval=3']
        assert run_tool('train.py', config, '--work-dir', folder, '--resume', '--cfg-options', *longer).returncode == 0


def test_mixed_precision_on_the_cpu_takes_bfloat16_only(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    monkeypatch.setattr('soft_mm.runner.get_device', lambda: 'cpu')
    options = [*OPTIONS, 'optim_wrapper.dtype=float16']
    said = run_tool('train.py', CLASSIFIER, '--work-dir', 'work_dirs/half', '--amp', '--cfg-options', *options)
    assert said.returncode.split(': ', 1)[1].startswith("optim_wrapper: dtype='float16': expected bfloat16")


@pytest.mark.parametrize('runner', ['Runner', 'FlexibleRunner'])
def test_checkpoint_of_another_model_is_not_evaluated(workspace, checkpoints, monkeypatch, runner):
    monkeypatch.chdir(workspace)
    options = (*TEST_OPTIONS, f'runner_type={runner}')
    code, said = tool_here('test.py', CLASSIFIER, checkpoints['fpn'], '--cfg-options', *options)
    assert code == 2 and 'does not fit the model of this config' in said


def test_metrics_that_are_no_numbers_reach_the_file(workspace, checkpoints, tmp_path, monkeypatch):
    """A confusion matrix, in a folder that is new. ``~`` in both paths is the home folder."""
    monkeypatch.chdir(workspace)
    monkeypatch.setenv('HOME', str(tmp_path))
    shutil.copy(checkpoints['classification'], tmp_path / 'classifier.pth')
    metrics = "[dict(type='Accuracy', topk=(1,)), dict(type='ConfusionMatrix')]"
    (tmp_path / 'mine.py').write_text(f"_base_ = '{CLASSIFIER}'\ntest_evaluator = {metrics}\n")
    arguments = ('~/classifier.pth', '--json=~/new/folder/metrics.json', '--work-dir=~/work')
    done = run_tool('test.py', tmp_path / 'mine.py', *arguments, '--cfg-options', *TEST_OPTIONS)
    assert done.returncode == 0, done
    found = json.loads((tmp_path / 'new/folder/metrics.json').read_text())
    matrix = np.array(found['confusion_matrix/result'])
    assert matrix.shape == (10, 10) and matrix.sum() == 6
    assert found['accuracy/top1'] == pytest.approx(100 * matrix.trace() / 6)
    assert (tmp_path / 'work').is_dir()


@pytest.mark.parametrize('name', ['file/metrics.json', 'folder'])
def test_metrics_that_cannot_be_written_are_refused_before_the_evaluation(checkpoints, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').touch()
    (tmp_path / 'folder').mkdir()
    code, said = tool_here('test.py', CLASSIFIER, checkpoints['classification'], '--json', name)
    assert code == 2 and f'{name} cannot be written: ' in said and not (tmp_path / 'work_dirs').exists()


def test_pictures_with_one_name_are_refused_before_the_evaluation(workspace, checkpoints, tmp_path, monkeypatch):
    """In mmdet, the picture of the second image would replace the picture of the first."""
    monkeypatch.chdir(workspace)
    source = workspace / 'data/photo_digits_demo'
    annotations = json.loads((source / 'annotations/instances_val.json').read_text())
    for image, name in zip(annotations['images'], ('a/1.png', 'b/1.png', 'b/2.png')):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(source / 'val/scenes/images' / image['file_name'], tmp_path / name)
        image['file_name'] = name
    (tmp_path / 'annotations.json').write_text(json.dumps(annotations))
    options = [f'test_dataloader.dataset.data_root={tmp_path}/', 'test_dataloader.dataset.ann_file=annotations.json']
    options += ['test_dataloader.dataset.data_prefix.img=', f'test_evaluator.ann_file={tmp_path}/annotations.json']
    arguments = (config_of(workspace, 'mask-rcnn'), checkpoints['mask-rcnn'], '--show-dir', tmp_path / 'pictures')
    done = run_tool('test.py', *arguments, '--work-dir', tmp_path / 'work', '--cfg-options', *TEST_OPTIONS, *options)
    first, second = tmp_path / 'a/1.png', tmp_path / 'b/1.png'
    assert done.returncode.startswith(f'--show-dir: {first} and {second} have the same name, so the picture of one')
    assert not (tmp_path / 'pictures').exists()


def test_evaluates_in_mixed_precision(workspace, checkpoints):
    arguments = (CLASSIFIER, checkpoints['classification'], '--amp', '--json', 'amp.json')
    done = tool('test.py', *arguments, '--cfg-options', *TEST_OPTIONS, cwd=workspace)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 0 <= json.loads((workspace / 'amp.json').read_text())['accuracy/top1'] <= 100


def test_learning_rate_scaling_reaches_the_runner(monkeypatch, tmp_path):
    def build_runner(cfg):
        raise Built(cfg)

    mine = tmp_path / 'mine.py'
    mine.write_text(f"_base_ = '{CLASSIFIER}'\nauto_scale_lr = dict(base_batch_size=8)\n")
    module = load_tool('train')
    monkeypatch.setattr(module, 'build_runner', build_runner)
    for options in ([], ['--auto-scale-lr']):
        monkeypatch.setattr(sys, 'argv', ['train.py', str(mine), *options])
        with pytest.raises(Built) as caught:
            module.main()
        assert caught.value.args[0].auto_scale_lr.get('enable', False) == bool(options)


def test_scaled_learning_rate_is_told(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    options = [*OPTIONS, 'auto_scale_lr.base_batch_size=64']
    options[options.index('train_cfg.max_iters=2')] = 'train_cfg.max_iters=1'
    arguments = ('--work-dir', 'work_dirs/scaled', '--auto-scale-lr', '--cfg-options', *options)
    done = run_tool('train.py', CLASSIFIER, *arguments)
    assert done.returncode == 0, done
    logs = ''.join(path.read_text() for path in (workspace / 'work_dirs/scaled').rglob('*.log'))
    said = [line for line in logs.splitlines() if '--auto-scale-lr: ' in line]
    assert len(said) == 1 and said[0].endswith(
        '--auto-scale-lr: the config has the learning rate 0.0004 for 64 images a step; with 2 images (1 process, '
        '2 images each), it is 1.25e-05'
    )


def test_two_processes_train_and_evaluate(workspace, tmp_path):
    """The launchers for several GPUs, on two CPU processes. Their metrics equal those of one process."""
    launch = functools.partial(run_in_processes, cwd=workspace)
    run = tmp_path / 'run'
    done = launch('dist_train.sh', CLASSIFIER, 2, '--work-dir', run, '--cfg-options', *OPTIONS)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert 'Distributed training: True' in done.stdout + done.stderr
    assert 'GPU number: 2' in done.stdout + done.stderr
    arguments = (CLASSIFIER, run / 'iter_2.pth', 2, '--json', 'two.json', '--cfg-options', *TEST_OPTIONS)
    done = launch('dist_test.sh', *arguments)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    together = json.loads((workspace / 'two.json').read_text())
    arguments = (CLASSIFIER, run / 'iter_2.pth', '--json', 'one.json', '--cfg-options', *TEST_OPTIONS)
    assert tool('test.py', *arguments, cwd=workspace).returncode == 0
    assert together == json.loads((workspace / 'one.json').read_text())
    done = launch('dist_train.sh', CLASSIFIER)
    assert done.returncode == 2 and 'usage: ' in done.stderr


@pytest.mark.parametrize('task', ['classification', 'mask-rcnn', 'fpn'])
def test_evaluation_with_augmentation_and_pictures(workspace, checkpoints, tmp_path, task):
    """With the test-time augmentation of the zoo's configs, at smaller sizes."""
    part = dict(classification='tta/classification', fpn='datasets/ade20k_512x512').get(task, 'tta/detection')
    cfg, zoo = Config.fromfile(config_of(workspace, task)), Config.fromfile(ROOT / f'configs/_base_/{part}.py')
    if task == 'mask-rcnn':
        cfg.model.type, cfg.model.roi_head.mask_head = 'FasterRCNN', None
        cfg.test_evaluator.metric = 'bbox'
    cfg.tta_model = zoo.get('tta_model', dict(type='SegTTAModel'))
    cfg.tta_pipeline = zoo.tta_pipeline
    if task == 'classification':
        cfg.tta_pipeline[1].scale, cfg.tta_pipeline[2].crop_size = 72, 64
    else:
        transforms = cfg.tta_pipeline[1].transforms
        transforms[0] = [dict(type='Resize', scale=scale, keep_ratio=True) for scale in ((160, 120), (200, 150))]
    if task == 'fpn':
        transforms[2] = [dict(type='LoadAnnotations')]
    cfg.dump(tmp_path / 'config.py')
    options = ['--tta', '--json', tmp_path / 'metrics.json']
    if task != 'classification':
        options += ['--show-dir', tmp_path / 'pictures']
    options += ['--work-dir', tmp_path / 'work', '--cfg-options', *TEST_OPTIONS]
    done = tool('test.py', tmp_path / 'config.py', checkpoints[task], *options, cwd=workspace)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / 'metrics.json').read_text())
    if task != 'classification':
        assert len([file for file in (tmp_path / 'pictures').rglob('*.*') if file.suffix in ('.png', '.jpg')]) == 3
        return
    done = tool(
        'test.py', CLASSIFIER, checkpoints[task], *options[1:], '--show-dir', tmp_path / 'pictures', cwd=workspace
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / 'pictures').rglob('*.*'))) == 6
    done = tool('test.py', tmp_path / 'config.py', checkpoints[task], *options, '--show-dir', 'pictures', cwd=workspace)
    assert done.returncode == 2 and 'mmpretrain draws no pictures of augmented images' in done.stderr


def test_augmentation_without_a_definition_is_refused(workspace, checkpoints):
    options = ['--tta', '--cfg-options', *TEST_OPTIONS]
    done = tool('test.py', CLASSIFIER, checkpoints['classification'], *options, cwd=workspace)
    assert done.returncode == 2 and '--tta: the config has no tta_model and no tta_pipeline' in done.stderr
