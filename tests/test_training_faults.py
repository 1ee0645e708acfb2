"""Faults and settings of long trainings, with mmengine's runner and a small backbone."""

import copy
import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from digits_workspace import ROOT, small_classifier
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, METRICS
from mmengine.registry import MODELS as MMENGINE_MODELS
from programs import run_tool
from torch.utils.data import Dataset

from soft_mm import SOFT, hooks
from soft_mm.runner import build_runner, find_newest_checkpoint, find_start, full_disk, protect_checkpoints
from soft_mm.utils import build_model

ARCH = dict(embed_dims=(4, 4, 6, 8), num_heads=(1, 1, 2, 2), depths=(1, 1, 1, 1))


@DATASETS.register_module()
class NoiseImages(Dataset):
    """Images of noise with a label each."""

    def __init__(self, length=8):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randn(3, 32, 48, generator=generator), index % 3


@MMENGINE_MODELS.register_module()
class NoiseClassifier(BaseModel):
    """A linear head over the mean of every output of the backbone."""

    def __init__(self, **options):
        super().__init__()
        self.backbone = SOFT(**dict(dict(arch=ARCH), **options))
        self.head = torch.nn.Linear(sum(ARCH['embed_dims'][i] for i in self.backbone.out_indices), 3)

    def forward(self, inputs, labels, mode='tensor'):
        scores = self.head(torch.cat([out.mean((2, 3)) for out in self.backbone(inputs)], 1))
        if mode == 'loss':
            return dict(loss=torch.nn.functional.cross_entropy(scores, labels))
        return scores


@METRICS.register_module()
class LargestScore(BaseMetric):
    """Mean of the largest scores, which depends on every weight."""

    def process(self, data_batch, data_samples):
        self.results += [scores.max().item() for scores in data_samples]

    def compute_metrics(self, results):
        return dict(score=sum(results) / len(results), images=len(results))


@METRICS.register_module()
class RisingScore(BaseMetric):
    """A metric that rises with each evaluation."""

    count = 0

    def process(self, data_batch, data_samples):
        self.results += [0] * len(data_samples)

    def compute_metrics(self, results):
        RisingScore.count += 1
        return dict(rising=RisingScore.count)


@HOOKS.register_module()
class KillHook(Hook):
    """Kill the process after a step."""

    def __init__(self, step):
        self.step = step

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def toy_runner(work_dir, epochs, **changes):
    """A runner of mmengine, built as ``tools/train.py`` builds it."""
    loader = dict(
        dataset=dict(type='NoiseImages'),
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type='default_collate'),
    )
    cfg = Config(
        dict(
            work_dir=str(work_dir),
            launcher='none',
            model=dict(type='NoiseClassifier'),
            train_dataloader=dict(loader, batch_size=2),
            train_cfg=changes.pop('train_cfg', dict(by_epoch=True, max_epochs=epochs, val_interval=1)),
            val_dataloader=dict(loader, batch_size=3),
            val_cfg=dict(),
            val_evaluator=dict(type='LargestScore'),
            optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1)),
            randomness=dict(seed=0),
            experiment_name=f'{Path(work_dir).name}-{epochs}-{os.urandom(4).hex()}',
        )
    )
    cfg.merge_from_dict(changes)
    protect_checkpoints(cfg)
    find_start(cfg, 'auto')
    return build_runner(cfg)


def names(folder):
    return sorted(path.name for path in folder.glob('*.pth'))


def weights(path):
    """The weights of a checkpoint, and those of its moving average."""
    content = torch.load(path, weights_only=False)
    return {**content['state_dict'], **{f'ema.{k}': v for k, v in content.get('ema_state_dict', {}).items()}}


def assert_same_weights(found, expected):
    found, expected = weights(found), weights(expected)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


EMA = [dict(type='EMAHook', momentum=0.1)]


@pytest.mark.parametrize('custom_hooks', [None, EMA], ids=['plain', 'moving average'])
def test_resumed_training_equals_an_uninterrupted_one(tmp_path, custom_hooks):
    for folder, parts in (('whole', [4]), ('again', [4]), ('parts', [1, 3, 4])):
        for epochs in parts:
            toy_runner(tmp_path / folder, epochs, custom_hooks=custom_hooks).train()
        assert names(tmp_path / folder) == ['epoch_4.pth']
    for folder in ('again', 'parts'):
        assert_same_weights(tmp_path / folder / 'epoch_4.pth', tmp_path / 'whole/epoch_4.pth')


def disk_of(allowed):
    """A replacement of ``os.fsync`` for a disk that is full after some files."""
    left = [allowed]

    def sync(number):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return sync


def test_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    """Also if only one checkpoint is kept."""
    run = tmp_path / 'run'
    toy_runner(tmp_path / 'whole', 3).train()
    toy_runner(run, 1).train()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught, full_disk(run):
        patch.setattr(hooks.os, 'fsync', disk_of(0))
        toy_runner(run, 3).train()
    assert 'No space left' in str(caught.value) and f'the newest checkpoint is {run}/epoch_1.pth' in str(caught.value)
    assert names(run) == ['epoch_1.pth'] and not list(run.glob('.*.part'))
    toy_runner(run, 3).train()
    assert_same_weights(run / 'epoch_3.pth', tmp_path / 'whole/epoch_3.pth')


BEST = dict(type='CheckpointHook', interval=1, max_keep_ckpts=1, save_best='rising', rule='greater')


@pytest.mark.parametrize(
    ('allowed', 'expected'),
    [
        (0, ['best_rising_epoch_1.pth', 'epoch_1.pth']),
        (1, ['best_rising_epoch_1.pth', 'epoch_2.pth']),
        # The newest checkpoint is written again, because it also holds the best score.
        (2, ['best_rising_epoch_1.pth', 'best_rising_epoch_2.pth', 'epoch_2.pth']),
    ],
)
def test_full_disk_leaves_a_best_checkpoint(tmp_path, monkeypatch, allowed, expected):
    changes = dict(val_evaluator=dict(type='RisingScore'), default_hooks=dict(checkpoint=BEST))
    toy_runner(tmp_path, 1, **changes).train()
    with monkeypatch.context() as patch, pytest.raises(OSError, match='No space left'):
        patch.setattr(hooks.os, 'fsync', disk_of(allowed))
        toy_runner(tmp_path, 2, **changes).train()
    assert names(tmp_path) == expected


def test_best_checkpoint_of_the_same_name_stays(tmp_path):
    """In an iteration-based training, mmengine gives each best checkpoint the same name if the hook counts epochs."""
    train_cfg = dict(by_epoch=False, max_iters=6, val_interval=2)
    changes = dict(val_evaluator=dict(type='RisingScore'), default_hooks=dict(checkpoint=BEST), train_cfg=train_cfg)
    toy_runner(tmp_path, 1, **changes).train()
    (best,) = tmp_path.glob('best_*.pth')
    last = toy_runner(tmp_path / 'again', 1, **changes).train().state_dict()
    for key, value in weights(best).items():
        assert torch.equal(value, last[key]), key


def test_evaluation_without_a_training(tmp_path):
    assert toy_runner(tmp_path, 1).val()['images'] == 8


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from soft_mm import hooks
from test_training_faults import toy_runner

written = []

def kill(number):
    written.append(number)
    # The second file is written, but does not have its name yet.
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

hooks.os.fsync = kill
toy_runner(sys.argv[1], 3).train()
"""


def test_kill_while_a_checkpoint_is_written(tmp_path, environment):
    program = KILLED.format(tests=str(Path(__file__).parent))
    run = tmp_path / 'run'
    done = subprocess.run([sys.executable, '-c', program, str(run)], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert names(run) == ['epoch_1.pth']
    assert len(list(run.glob('.epoch_2.pth.*.part'))) == 1
    toy_runner(run, 3).train()
    toy_runner(tmp_path / 'whole', 3).train()
    assert_same_weights(run / 'epoch_3.pth', tmp_path / 'whole/epoch_3.pth')
    assert not list(run.glob('.*.part'))


@pytest.mark.long
@pytest.mark.parametrize('unit', ['epoch', 'iter'])
def test_kill_between_two_checkpoints(workspace, tmp_path, environment, unit):
    """A classifier of mmpretrain with a data process, killed in the middle of the second of three epochs."""
    cfg = small_classifier()
    cfg.train_dataloader.num_workers, cfg.custom_hooks = 1, EMA
    if unit == 'iter':
        cfg.train_cfg, cfg.log_processor.by_epoch = dict(by_epoch=False, max_iters=18, val_interval=18), False
        cfg.train_dataloader.sampler.type = 'InfiniteSampler'
        cfg.default_hooks.checkpoint.update(by_epoch=False, interval=6)
    cfg.dump(tmp_path / 'whole.py')
    cfg.custom_imports.imports.append('test_training_faults')
    cfg.custom_hooks = [*EMA, dict(type='KillHook', step=9)]
    cfg.dump(tmp_path / 'killed.py')
    environment = environment | dict(PYTHONPATH=f'{ROOT}{os.pathsep}{ROOT / "tests"}')

    def train(config, folder, *options):
        command = [sys.executable, str(ROOT / 'tools/train.py'), str(tmp_path / config), '--work-dir', str(folder)]
        done = subprocess.run([*command, *options], cwd=workspace, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    run, whole = tmp_path / 'run', tmp_path / 'whole'
    first, last = (f'epoch_{n}.pth' if unit == 'epoch' else f'iter_{6 * n}.pth' for n in (1, 3))
    code, said = train('killed.py', run)
    assert code == -signal.SIGKILL, said[-2000:]
    assert names(run) == [first] and not list(run.glob('.*.part'))
    code, said = train('whole.py', run, '--resume')
    assert code == 0 and re.search(r'resumed epoch: \d+, iter: 6\b', said), said[-2000:]
    assert names(run) == [last]
    assert train('whole.py', whole)[0] == 0
    assert_same_weights(run / last, whole / last)


# Settings of a training without random numbers, and their random forms.
RANDOM = dict(
    shuffle={'train_dataloader.sampler.shuffle': (False, True)},
    drop_path={'model.backbone.drop_path_rate': (0.0, 0.5)},
    augmentation={
        'train_dataloader.dataset.pipeline': (
            [dict(type='PackInputs')],
            [
                dict(type='RandomResizedCrop', scale=64),
                dict(type='RandAugment', policies='timm_increasing', num_policies=2, total_level=10, magnitude_level=9),
                dict(type='RandomErasing', erase_prob=0.5, mode='rand'),
                dict(type='PackInputs'),
            ],
        ),
        'model.train_cfg': (None, dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)])),
    },
)


@pytest.mark.parametrize('parts', [[], ['shuffle'], ['drop_path'], ['augmentation'], [*RANDOM]], ids='-'.join)
def test_same_seed_gives_the_same_weights_twice(workspace, tmp_path, monkeypatch, parts):
    """Another seed, from the same start, gives others if and only if something is random."""
    monkeypatch.chdir(workspace)
    cfg = small_classifier()
    cfg.train_dataloader.num_workers, cfg.train_cfg.max_epochs = 2, 1
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    for part, settings in RANDOM.items():
        cfg.merge_from_dict({key: values[part in parts] for key, values in settings.items()})
    cfg.load_from = str(tmp_path / 'start.pth')
    torch.manual_seed(0)
    torch.save(dict(state_dict=build_model(cfg).state_dict()), cfg.load_from)
    for name, seed in (('one', 1), ('again', 1), ('other', 2)):
        cfg.randomness = dict(seed=seed)
        cfg.dump(tmp_path / f'{name}.py')
        done = run_tool('train.py', tmp_path / f'{name}.py', '--work-dir', tmp_path / name)
        assert done.returncode == 0, done
    one, again, other, start = (
        weights(path) for path in (*(tmp_path / f'{n}/epoch_1.pth' for n in ('one', 'again', 'other')), cfg.load_from)
    )
    assert all(torch.equal(again[key], value) for key, value in one.items())
    assert all(torch.equal(other[key], value) for key, value in one.items()) == (not parts)
    assert any(not torch.equal(start[key], value) for key, value in one.items())


@pytest.mark.parametrize('content', ['', None, '/moved/work_dirs/run/epoch_2.pth'])
def test_newest_checkpoint_is_found_without_its_name(tmp_path, content):
    """A full disk leaves ``last_checkpoint`` empty, and a moved folder leaves it wrong."""
    assert find_newest_checkpoint(tmp_path) is None
    for number, name in enumerate(['epoch_1.pth', 'epoch_10.pth', 'best_score_epoch_2.pth', 'weights.pth']):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (number, number))
    if content is not None:
        (tmp_path / 'last_checkpoint').write_text(content)
    assert find_newest_checkpoint(tmp_path) == str(tmp_path / 'epoch_10.pth')
    # The name counts more than the times, which a copy changes.
    (tmp_path / 'last_checkpoint').write_text('/moved/work_dirs/run/epoch_1.pth')
    assert find_newest_checkpoint(tmp_path) == str(tmp_path / 'epoch_1.pth')


@pytest.mark.parametrize(
    ('hook', 'expected'),
    [
        (dict(type='CheckpointHook', interval=5), dict(type='soft_mm.SafeCheckpointHook', interval=5)),
        (dict(type='mmengine.CheckpointHook'), dict(type='soft_mm.SafeCheckpointHook')),
        (dict(type='mmengine.hooks.CheckpointHook'), dict(type='soft_mm.SafeCheckpointHook')),
        (dict(type=CheckpointHook), dict(type='soft_mm.SafeCheckpointHook')),
        (dict(type='EMAHook'), dict(type='EMAHook')),
        (None, None),
    ],
)
def test_only_the_hook_of_mmengine_is_replaced(hook, expected):
    cfg = Config(dict(default_hooks=dict(checkpoint=hook)))
    protect_checkpoints(cfg)
    assert cfg.default_hooks.checkpoint == expected


def test_training_without_a_checkpoint_hook_gets_one():
    cfg = Config({})
    protect_checkpoints(cfg)
    assert cfg.default_hooks.checkpoint == dict(type='soft_mm.SafeCheckpointHook')


def relative_difference(found, expected, start):
    """Norm of the difference of two checkpoints, relative to the way from the weights that they started from."""
    found, expected = weights(found), weights(expected)
    assert found.keys() == expected.keys() == start.keys()
    keys = [key for key, value in start.items() if value.is_floating_point()]
    difference, way = (
        torch.cat([(a[key].double() - b[key].double()).flatten() for key in keys]).norm().item()
        for a, b in ((found, expected), (expected, start))
    )
    assert way > 0
    return difference / way


def train(*arguments, **options):
    """Train, and return the weights before."""
    runner = toy_runner(*arguments, **options)
    runner._init_model_weights()
    start = copy.deepcopy(runner.model.state_dict())
    runner.train()
    return start


SGD = dict(type='SGD', lr=0.1)
# BatchNorm would otherwise see the small batches.
FROZEN_BATCHNORM = {'model.norm_eval': True}


def test_accumulated_gradients_equal_a_large_batch(tmp_path, float64):
    for name, batch_size, count in (('large', 4, 1), ('small', 2, 2)):
        changes = {'train_dataloader.batch_size': batch_size, **FROZEN_BATCHNORM}
        optim_wrapper = dict(optimizer=SGD, accumulative_counts=count)
        start = train(tmp_path / name, 1, **changes, optim_wrapper=optim_wrapper)
    difference = relative_difference(tmp_path / 'small/epoch_1.pth', tmp_path / 'large/epoch_1.pth', start)
    assert difference <= 1e-10
