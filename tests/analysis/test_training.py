"""Trainings of which several run at a time: their threads, their output, and what the command line is given."""

import json
import subprocess
from pathlib import Path

from rich.console import Console

from soft_mm.analysis.training import Task, train_task

TASK = Task('small', '_base_/comparison/listops.py', {'accuracy/top1': ('top1', 0.01)})


def test_training_with_its_share_of_the_threads(monkeypatch, tmp_path):
    """Interrupted before its evaluation, it is evaluated with the same share, and all is appended to one log."""
    calls = []

    def run(command, check, stdout, stderr, env):
        calls.append((Path(command[1]).name, env['OMP_NUM_THREADS'], command[command.index('--cfg-options') + 1 :]))
        stdout.write(f'{calls[-1][0]}\n')
        if calls[-1][0] == 'test.py':
            Path(command[command.index('--json') + 1]).write_text(json.dumps({'accuracy/top1': 25.0}))
        else:
            (tmp_path / 'run' / 'iter_1.pth').write_bytes(b'')
            (tmp_path / 'run' / 'last_checkpoint').write_text('iter_1.pth')

    monkeypatch.setattr(subprocess, 'run', run)
    (tmp_path / 'data.json').write_text('{}')
    options = {'a.b': (1, 2), 'c': None, 'd': Path('a folder/file')}
    found = train_task(TASK, tmp_path / 'run', tmp_path / 'data.json', Console(quiet=True), options, threads=3)
    given = ['a.b=(1,2)', 'c=None', 'd=a folder/file']
    assert calls == [('train.py', '3', given), ('test.py', '3', given)] and found['top1'] == 0.25
    assert (tmp_path / 'run/output.log').read_text() == 'train.py\ntest.py\n'


def test_changed_data_are_another_training(monkeypatch, tmp_path):
    trained = []

    def run(command, check):
        trained.append(command)
        folder = tmp_path / 'run'
        (folder / 'iter_1.pth').write_bytes(b'')
        (folder / 'last_checkpoint').write_text('iter_1.pth')
        scalars = folder / 'log' / 'vis_data' / 'scalars.json'
        scalars.parent.mkdir(parents=True, exist_ok=True)
        scalars.write_text(json.dumps({'accuracy/top1': 50.0, 'step': 1}))

    monkeypatch.setattr(subprocess, 'run', run)
    data = tmp_path / 'data.json'
    for content, count in (('{}', 1), ('{}', 1), ('{"seed": 1}', 2)):
        data.write_text(content)
        assert train_task(TASK, tmp_path / 'run', data, Console(quiet=True))['top1'] == 0.5
        assert len(trained) == count
