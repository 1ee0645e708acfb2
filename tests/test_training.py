"""Faults and settings of long trainings, with mmengine's runner and a small backbone."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import Dataset

from soft_mm import SOFT, hooks
from soft_mm.runner import find_newest_checkpoint, find_start, full_disk, protect_checkpoints

ARCH = dict(embed_dims=(4, 4, 6, 8), num_heads=(1, 1, 2, 2), depths=(1, 1, 1, 1))


class Images(Dataset):
    """Eight images of noise with a label each."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randn(3, 32, 48, generator=generator), index % 3


class Classifier(BaseModel):
    def __init__(self, **options):
        super().__init__()
        self.backbone = SOFT(ARCH, out_type='cls_token', **options)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, inputs, labels, mode='tensor'):
        scores = self.head(self.backbone(inputs)[-1])
        if mode == 'loss':
            return dict(loss=torch.nn.functional.cross_entropy(scores, labels))
        return scores


class Score(BaseMetric):
    """Mean of the largest scores, which depends on every weight."""

    def process(self, data_batch, data_samples):
        self.results.append(torch.stack(list(data_samples)).max().item())

    def compute_metrics(self, results):
        return dict(score=sum(results) / len(results))


def toy_runner(work_dir, epochs, **changes):
    """A runner of mmengine, with the hooks of ``tools/train.py``."""
    options = changes.pop('model', {})
    batch_size = changes.pop('batch_size', 2)
    cfg = Config(dict(default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1))))
    cfg.merge_from_dict(dict(work_dir=str(work_dir), **changes))
    protect_checkpoints(cfg)
    find_start(cfg, 'auto')
    torch.manual_seed(0)
    loader = dict(
        dataset=Images(),
        num_workers=0,
        collate_fn=dict(type='default_collate'),
        sampler=dict(type='DefaultSampler', shuffle=False),
    )
    return Runner(
        model=Classifier(**options),
        work_dir=cfg.work_dir,
        train_dataloader=dict(loader, batch_size=batch_size),
        train_cfg=dict(by_epoch=True, max_epochs=epochs, val_interval=1),
        val_dataloader=dict(loader, batch_size=3),
        val_cfg=dict(),
        val_evaluator=[Score()],
        optim_wrapper=cfg.get('optim_wrapper', dict(optimizer=dict(type='AdamW', lr=1e-3))),
        default_hooks=cfg.default_hooks,
        custom_hooks=cfg.get('custom_hooks'),
        load_from=cfg.get('load_from'),
        resume=cfg.get('resume', False),
        randomness=dict(seed=0, deterministic=False),
        experiment_name=f'{Path(work_dir).name}-{epochs}-{os.urandom(4).hex()}',
        cfg=dict(cfg.get('runner_cfg', {})),
    )


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
        assert [path.name for path in sorted((tmp_path / folder).glob('*.pth'))] == ['epoch_4.pth']
    for folder in ('again', 'parts'):
        assert_same_weights(tmp_path / folder / 'epoch_4.pth', tmp_path / 'whole/epoch_4.pth')


def disk_of(allowed, name):
    """A replacement of ``os.fsync`` for a disk that is full after some files."""
    left = [allowed]

    def sync(number):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)

    return sync


@pytest.mark.parametrize('save_best', [False, True])
def test_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch, save_best):
    """Also if only one checkpoint is kept."""
    hook = dict(type='CheckpointHook', interval=1, max_keep_ckpts=1)
    if save_best:
        hook.update(save_best='score', rule='greater')
    toy_runner(tmp_path / 'whole', 3, default_hooks=dict(checkpoint=hook)).train()
    run = tmp_path / 'run'
    toy_runner(run, 1, default_hooks=dict(checkpoint=hook)).train()
    before = sorted(path.name for path in run.glob('*.pth'))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught, full_disk(run):
        patch.setattr(hooks.os, 'fsync', disk_of(0, 'epoch_2.pth'))
        toy_runner(run, 3, default_hooks=dict(checkpoint=hook)).train()
    assert 'No space left' in str(caught.value) and f'the newest checkpoint is {run}/epoch_1.pth' in str(caught.value)
    assert sorted(path.name for path in run.glob('*.pth')) == before
    assert not list(run.glob('.*.part'))
    toy_runner(run, 3, default_hooks=dict(checkpoint=hook)).train()
    assert_same_weights(run / 'epoch_3.pth', tmp_path / 'whole/epoch_3.pth')


KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
torch.set_num_threads(1)
from soft_mm import hooks
from test_training import toy_runner

def kill(number):
    # The file is written, but has not its name yet.
    if {epoch} == len(saved):
        os.kill(os.getpid(), signal.SIGKILL)
    saved.append(number)

saved = [None]
hooks.os.fsync = kill
toy_runner(sys.argv[1], 3).train()
"""


def test_kill_while_a_checkpoint_is_written(tmp_path, environment):
    root = Path(__file__).resolve().parents[1]
    program = KILLED.format(root=str(root), tests=str(root / 'tests'), epoch=2)
    run = tmp_path / 'run'
    done = subprocess.run([sys.executable, '-c', program, str(run)], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert [path.name for path in run.glob('*.pth')] == ['epoch_1.pth']
    assert len(list(run.glob('.epoch_2.pth.*.part'))) == 1
    toy_runner(run, 3).train()
    toy_runner(tmp_path / 'whole', 3).train()
    assert_same_weights(run / 'epoch_3.pth', tmp_path / 'whole/epoch_3.pth')
    assert not list(run.glob('.*.part'))


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
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_1.pth'))
    assert find_newest_checkpoint(tmp_path) == str(tmp_path / 'epoch_1.pth')


@pytest.mark.parametrize(
    ('hook', 'expected'),
    [
        (dict(type='CheckpointHook', interval=5), dict(type='soft_mm.SafeCheckpointHook', interval=5)),
        (dict(type='mmengine.CheckpointHook'), dict(type='soft_mm.SafeCheckpointHook')),
        (dict(type='MyHook'), dict(type='MyHook')),
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


def test_accumulated_gradients_equal_a_large_batch(tmp_path):
    """With BatchNorm in evaluation mode, which otherwise sees the small batches."""
    for name, batch_size, count in (('large', 4, 1), ('small', 2, 2)):
        optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1), accumulative_counts=count)
        changes = dict(model=dict(norm_eval=True), batch_size=batch_size, optim_wrapper=optim_wrapper)
        toy_runner(tmp_path / name, 1, **changes).train()
    found, expected = (weights(tmp_path / name / 'epoch_1.pth') for name in ('small', 'large'))
    start = Classifier().state_dict()
    assert any(not torch.equal(value, start[key]) for key, value in expected.items())
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5)
