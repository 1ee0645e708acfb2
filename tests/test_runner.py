"""Set-up of training and evaluation: where a training starts, test-time augmentation, pictures, metrics, warnings."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset, ConcatDataset, DefaultSampler
from mmengine.runner import Runner
from test_training_faults import toy_runner
from torch import nn
from torch.utils.data import DataLoader

from soft_mm.hooks import BatchNormCheckHook, MissingGradientHook, PictureNameHook
from soft_mm.runner import (
    build_runner,
    data_errors,
    find_start,
    load_config,
    plain_values,
    revert_sync_batchnorm,
    runner_parser,
    show_pictures,
    use_test_time_augmentation,
    writable_file,
)
from soft_mm.utils import DataError, dicts_in, without_pretrained


@pytest.mark.parametrize(
    ('resume', 'checkpoints', 'load_from', 'expected'),
    [
        (None, True, 'start.pth', (False, 'start.pth')),
        ('auto', False, 'start.pth', (False, 'start.pth')),
        ('auto', False, None, (False, None)),
        ('auto', True, 'start.pth', (True, 'iter_2.pth')),
        ('other.pth', True, 'start.pth', (True, 'other.pth')),
    ],
)
def test_where_a_training_starts(tmp_path, resume, checkpoints, load_from, expected):
    """A job that restarts itself always passes `--resume`: its first start must not forget `load_from`."""
    if checkpoints:
        (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_2.pth'))
    cfg = Config(dict(work_dir=str(tmp_path), load_from=load_from, resume=False))
    find_start(cfg, resume)
    found = cfg.load_from and cfg.load_from.removeprefix(f'{tmp_path}/')
    assert (cfg.resume, found) == expected


def test_first_start_with_resume_is_told(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr('soft_mm.runner.print_log', lambda text, *_: said.append(text))
    find_start(Config(dict(work_dir=str(tmp_path), load_from='start.pth')), 'auto')
    assert said == [
        f'--resume: {tmp_path} has no checkpoint yet, so training starts from the weights of start.pth',
    ]


def test_no_workers_need_no_persistent_workers(tmp_path):
    loader = dict(num_workers=4, persistent_workers=True, prefetch_factor=2)
    Config(dict(train_dataloader=loader, val_dataloader=loader, test_dataloader=None)).dump(tmp_path / 'config.py')
    args = argparse.Namespace(
        config=str(tmp_path / 'config.py'),
        local_rank=0,
        launcher='none',
        work_dir=None,
        cfg_options={'train_dataloader.num_workers': 0},
    )
    cfg = load_config(argparse.ArgumentParser(), args)
    assert cfg.train_dataloader == dict(num_workers=0, persistent_workers=False)
    assert cfg.val_dataloader == loader
    torch.utils.data.DataLoader(range(3), **cfg.train_dataloader)


def detector(**changes):
    return Config(
        dict(
            model=dict(type='RetinaNet'),
            test_dataloader=dict(dataset=dict(type='RepeatDataset', dataset=dict(type='CocoDataset', pipeline=[]))),
            test_evaluator=dict(type='CocoMetric', metric='bbox'),
            tta_model=dict(type='DetTTAModel', tta_cfg=dict(max_per_img=100)),
            tta_pipeline=[dict(type='LoadImageFromFile')],
            **changes,
        )
    )


def test_test_time_augmentation_wraps_the_model():
    cfg = detector()
    use_test_time_augmentation(cfg)
    assert cfg.model == dict(type='DetTTAModel', tta_cfg=dict(max_per_img=100), module=dict(type='RetinaNet'))
    assert cfg.test_dataloader.dataset.dataset.pipeline == cfg.tta_pipeline


def test_what_test_time_augmentation_cannot_do_is_said():
    cfg = detector()
    cfg.model.roi_head = dict(mask_head=dict(type='FCNMaskHead'))
    with pytest.raises(ValueError, match='merges the boxes of augmented images but no masks: evaluate this model'):
        use_test_time_augmentation(cfg)
    cfg.pop('tta_model')
    with pytest.raises(ValueError, match='--tta: the config has no tta_model: define'):
        use_test_time_augmentation(cfg)
    cfg.pop('tta_pipeline')
    with pytest.raises(ValueError, match='--tta: the config has no tta_model and no tta_pipeline'):
        use_test_time_augmentation(cfg)


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmdet', 'mmseg'])
def test_pictures_go_to_an_absolute_folder(scope, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = Config(dict(default_scope=scope, visualizer=dict(type='Visualizer')))
    show_pictures(cfg, 'pictures')
    hook = cfg.default_hooks.visualization
    folder = hook.get('out_dir') or hook.get('test_out_dir') or cfg.visualizer.save_dir
    assert folder == str(tmp_path / 'pictures') and (hook.get('draw') or hook.get('enable'))


def test_pictures_of_other_toolboxes_are_refused():
    cfg = Config(dict(default_scope='mmpose', visualizer=dict(type='Visualizer')))
    with pytest.raises(ValueError, match="--show-dir: default_scope='mmpose': expected 'mmpretrain', 'mmdet' or"):
        show_pictures(cfg, 'pictures')


def test_pictures_of_several_processes_are_refused():
    cfg = Config(dict(default_scope='mmdet', launcher='pytorch'))
    with pytest.raises(ValueError, match='--show-dir: only the first of several processes draws its pictures: leave'):
        show_pictures(cfg, 'pictures')


class Images(BaseDataset):
    def load_data_list(self):
        return [dict(img_path=path) for path in self.ann_file.split()]


@pytest.mark.parametrize('parts', [['a/1.png b/1.png'], ['a/1.png a/2.png', 'b/2.png b/1.png']], ids=str)
def test_two_pictures_with_one_name_are_refused(parts):
    dataset = ConcatDataset([Images(part) for part in parts])
    runner = SimpleNamespace(test_dataloader=SimpleNamespace(dataset=dataset))
    name = '1' if len(parts) == 1 else '2'
    with pytest.raises(DataError, match=rf'^--show-dir: a/{name}\.png and b/{name}\.png have the same name, so the'):
        PictureNameHook().before_test(runner)


@pytest.mark.parametrize('paths', ['a/1.png b/2.png', 'a/1.png a/1.png'])
def test_pictures_with_names_of_their_own_are_drawn(paths):
    for dataset in (Images(paths), [1, 2]):
        PictureNameHook().before_test(SimpleNamespace(test_dataloader=SimpleNamespace(dataset=dataset)))


def test_output_file_is_tried_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    new = tmp_path / 'new/folder/file.json'
    assert writable_file('~/new/folder/file.json') == new and new.parent.is_dir() and not new.exists()
    new.write_text('old')
    assert writable_file(new) == new and new.read_text() == 'old'
    assert writable_file('/dev/stdout') == Path('/dev/stdout')
    for wrong in (new.parent, new / 'file.json', Path('/proc/file.json')):
        with pytest.raises(ValueError, match=f'^{wrong} cannot be written: .*; give a file in a folder where you may'):
            writable_file(wrong)


def test_metrics_that_are_no_numbers_can_be_written():
    metrics = {
        'top1': np.float32(0.5),
        'per_class': np.array([[1, 2], [3, 4]]),
        'matrix': torch.eye(2),
        'names': ['a', 'b'],
        'nested': dict(count=3, none=None),
        'other': argparse.Namespace(a=1),
    }
    assert json.loads(json.dumps(plain_values(metrics))) == {
        'top1': 0.5,
        'per_class': [[1, 2], [3, 4]],
        'matrix': [[1.0, 0.0], [0.0, 1.0]],
        'names': ['a', 'b'],
        'nested': dict(count=3, none=None),
        'other': 'Namespace(a=1)',
    }


def test_batchnorm_between_gpus_becomes_ordinary():
    norm = dict(type='SyncBN', requires_grad=True)
    model = ConfigDict(
        decode_head=dict(norm_cfg=norm), auxiliary_head=[dict(norm_cfg=dict(norm))], other=dict(type='A')
    )
    revert_sync_batchnorm(model)
    assert model.decode_head.norm_cfg == model.auxiliary_head[0].norm_cfg == dict(type='BN', requires_grad=True)
    assert model.other.type == 'A'


def test_synchronisation_of_batchnorm_is_left_out_on_the_cpu(monkeypatch):
    """The option of both runners, once for each process."""
    said = []
    monkeypatch.setattr('soft_mm.runner.print_log', lambda text, *_: said.append(text))
    monkeypatch.setattr('soft_mm.runner.get_device', lambda: 'cpu')
    monkeypatch.setattr('torch.distributed.init_process_group', lambda backend: None)
    monkeypatch.setattr('soft_mm.runner.Runner.from_cfg', lambda cfg: cfg)
    for place in ({}, dict(strategy=dict(type='DDPStrategy'))):
        cfg = Config(dict(launcher='pytorch', model=dict(norm_cfg=dict(type='SyncBN')), **place))
        (cfg.strategy if place else cfg).sync_bn = 'torch'
        built = build_runner(cfg)
        assert (built.strategy if place else built).sync_bn is None and built.model.norm_cfg.type == 'BN'
    assert len(said) == 2
    assert all(text.startswith("sync_bn='torch' is left out, because PyTorch synchronises") for text in said)


def test_pretrained_weights_of_nested_backbones_are_removed():
    """As in mmdet's SoftTeacher, in a distiller with two models, and behind a wrapper."""
    init = dict(type='Pretrained', checkpoint='none.pth')
    one = dict(backbone=dict(type='soft_mm.SOFT', init_cfg=init), neck=dict(type='FPN'))
    model = ConfigDict(detector=one, teacher=[dict(module=one)])
    assert without_pretrained(model) == 2
    assert [part['init_cfg'] for part in dicts_in(model) if part.get('type') == 'soft_mm.SOFT'] == [None, None]
    assert without_pretrained(ConfigDict(head=dict(type='A'))) == 0


class Pooled(nn.Module):
    """As the image pooling of ASPP: the block after the pooling has the BatchNorm."""

    def __init__(self, size=1, norm=None):
        super().__init__()
        block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4) if norm is None else norm)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(size), block)
        self.other = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.pool(self.other(x))


def check_batchnorm(model, images, batch_size, world_size=1, **options):
    data = list(range(images))
    loader = DataLoader(data, batch_size=batch_size, sampler=DefaultSampler(data), **options)
    runner = SimpleNamespace(model=model, train_dataloader=loader, world_size=world_size)
    BatchNormCheckHook().before_train(runner)


@pytest.mark.parametrize('size', [1, (1, 1)])
def test_batchnorm_that_gets_one_value_is_refused_before_the_first_step(size):
    """As PyTorch does in the first step."""
    with pytest.raises(ValueError, match='Expected more than 1 value per channel when training'):
        Pooled(size)(torch.ones(1, 3, 4, 4))
    with pytest.raises(DataError, match=r'^BatchNorm of pool\.1\.1 cannot .* Set train_dataloader.batch_size to 2 or'):
        check_batchnorm(Pooled(size), images=4, batch_size=1)
    with pytest.raises(DataError, match=r'The last batch of 2 has one image: set train_dataloader.drop_last=True'):
        check_batchnorm(Pooled(size), images=5, batch_size=2)
    with pytest.raises(DataError, match=r'^BatchNorm of pool\.1\.1'):
        check_batchnorm(Pooled(size, nn.SyncBatchNorm(4)), images=4, batch_size=1)
    with pytest.raises(DataError, match=r'^BatchNorm of pool\.1\.1'):
        check_batchnorm(Pooled(size), images=4, batch_size=1, world_size=2)


@pytest.mark.parametrize(
    ('model', 'options'),
    [
        (Pooled(), dict(images=4, batch_size=2)),
        (Pooled(), dict(images=5, batch_size=2, drop_last=True)),
        (Pooled(size=2), dict(images=4, batch_size=1)),
        (Pooled(norm=nn.GroupNorm(2, 4)), dict(images=4, batch_size=1)),
        (Pooled(norm=nn.SyncBatchNorm(4)), dict(images=4, batch_size=1, world_size=2)),
    ],
)
def test_other_batchnorms_are_left_alone(model, options):
    check_batchnorm(model, **options)


def test_batchnorm_that_stays_in_evaluation_mode_is_left_alone():
    class Frozen(Pooled):
        def train(self, mode=True):
            super().train(mode)
            self.pool.eval()
            return self

    check_batchnorm(Frozen(), images=4, batch_size=1)


def test_batchnorm_that_is_found_in_the_first_step_only():
    with pytest.raises(
        SystemExit, match='^BatchNorm cannot be trained on one image.*Accumulated gradients do not help'
    ):
        with data_errors():
            nn.BatchNorm1d(3)(torch.ones(1, 3))


class TwoParts(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


@pytest.mark.parametrize('used', [('used',), ('used', 'unused')])
def test_parameters_without_a_gradient_are_named_once(used, monkeypatch):
    model, hook, said = TwoParts(), MissingGradientHook(), []
    monkeypatch.setattr('soft_mm.hooks.print_log', lambda text, *_: said.append(text))
    runner = SimpleNamespace(model=model)
    hook.before_train(runner)
    for step in range(2):
        model.zero_grad()
        sum(getattr(model, name)(torch.ones(1, 2)).sum() for name in used).backward()
        hook.after_train_iter(runner, step)
    if len(used) == 2:
        assert said == []
    else:
        (message,) = said
        assert message.startswith('2 parameters got no gradient in the first step, such as unused.bias, unused.weight.')


@pytest.mark.filterwarnings('ignore:torch.utils.checkpoint', 'ignore:None of the inputs')
@pytest.mark.parametrize('stages', [[], [0], [1]], ids=str)
def test_activation_checkpointing_of_mmengine_is_named(tmp_path, monkeypatch, stages):
    """It is reentrant: the input of the first stage, the image, needs no gradient, so the stage gets none itself."""
    said = []
    monkeypatch.setattr('soft_mm.hooks.print_log', lambda text, *_: said.append(text))
    names = [f'backbone.stages.{stage}' for stage in stages]
    watch = [dict(type='soft_mm.MissingGradientHook')]
    runner = toy_runner(tmp_path, 1, custom_hooks=watch, activation_checkpointing=names)
    runner.train()
    if stages == [0]:
        (message,) = said
        count = sum(1 for _ in runner.model.backbone.stages[0].parameters())
        assert message.startswith(f'{count} parameters got no gradient in the first step, such as backbone.stages.0.')
        assert message.endswith("use with_cp=True of the backbone instead of mmengine's activation_checkpointing")
    else:
        assert said == []


def test_missing_gradients_are_watched_in_every_training(tmp_path):
    cfg = dict(type='soft_mm.MissingGradientHook')
    runner = Runner(model=nn.Linear(2, 2), work_dir=str(tmp_path), custom_hooks=[cfg], experiment_name='hooks')
    assert any(isinstance(hook, MissingGradientHook) for hook in runner.hooks)


def test_unfinished_checkpoints_of_other_processes_that_run_are_kept(tmp_path):
    """An earlier instance of the training may still write while the next one starts."""
    running = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)
    ended = subprocess.Popen([sys.executable, '-c', ''])
    ended.wait()
    writers = (running.pid, ended.pid, os.getpid(), 2**70)
    kept, *removed = files = [tmp_path / f'.epoch_9.pth.{writer}.part' for writer in (*writers, 'other')]
    for file in files:
        file.touch()
    try:
        toy_runner(tmp_path, 1).train()
        assert kept.exists() and not any(file.exists() for file in removed)
    finally:
        running.communicate(b'\n')
    toy_runner(tmp_path, 2).train()
    assert not kept.exists()


def options_of(*pairs):
    return runner_parser('A tool.').parse_args(['config.py', '--cfg-options', *pairs]).cfg_options


def test_options_of_the_command_line():
    found = options_of(
        'a=1',
        'b=1,2',
        'c=(512,512)',
        "d=['x','y']",
        'e=None',
        'load_from=/tmp/my data/a file.pth',
        'f="/tmp/one, two.pth"',
        'g={"type": "x", "sizes": (1, 2)}',
        "h=dict(mode='slide', crop_size=(512, 512), inner=dict(a=None))",
        'i="a","b"',
        'j=',
    )
    assert found == dict(
        a=1,
        b=[1, 2],
        c=(512, 512),
        d=['x', 'y'],
        e=None,
        load_from='/tmp/my data/a file.pth',
        f='/tmp/one, two.pth',
        g=dict(type='x', sizes=(1, 2)),
        h=dict(mode='slide', crop_size=(512, 512), inner=dict(a=None)),
        i=['a', 'b'],
        j='',
    )


def test_the_last_option_of_a_name_wins():
    assert options_of("a='x y'", 'a=z') == dict(a='z')
    assert list(options_of('m=dict(_delete_=True)', 'm.type=B')) == ['m', 'm.type']


@pytest.mark.parametrize(
    ('pair', 'message'),
    [
        ("model=dict(a=1, **{'b': 2})", 'is not a dict of numbers, strings'),
        ('model={1, 2}', 'is not a dict of numbers, strings'),
        ('model', 'expected KEY=VALUE'),
        ('model={1: x}', 'is not a dict of numbers, strings'),
        ('model=dict(type=name)', 'is not a dict of numbers, strings'),
        ('model=dict(__import__("os").getcwd())', 'is not a dict of numbers, strings'),
    ],
)
def test_options_that_cannot_be_read(pair, message, capsys):
    with pytest.raises(SystemExit):
        options_of(pair)
    assert message in capsys.readouterr().err
