"""Trainings: threads, output and command line of parallel trainings, and changed data."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from projects.common.training import ROOT, Task, train_task


@pytest.fixture
def task(tmp_path):
    config = tmp_path / 'small.py'
    config.write_text('max_iters = 1\n')
    return Task('small', str(config), {'accuracy/top1': ('top1', 0.01)})


def test_config_is_relative_to_the_repository():
    assert Task('small', 'projects/a.py', {}).config_file == ROOT / 'projects' / 'a.py'
    assert (ROOT / 'tools' / 'train.py').is_file() and (ROOT / 'soft_mm').is_dir()


def test_number_of_threads_and_log(task, monkeypatch, tmp_path):
    """The evaluation after an interruption has the same number of threads and options; both write to one log."""
    calls = []

    def run(command, check, stdout, stderr, env):
        assert env['PYTHONPATH'].split(os.pathsep)[0] == str(ROOT)
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
    found = train_task(task, tmp_path / 'run', tmp_path / 'data.json', Console(quiet=True), options, threads=3)
    given = ['a.b=(1,2)', 'c=None', 'd=a folder/file']
    assert calls == [('train.py', '3', given), ('test.py', '3', given)] and found['top1'] == 0.25
    assert (tmp_path / 'run/output.log').read_text() == 'train.py\ntest.py\n'


def test_changed_data_repeat_the_training(task, monkeypatch, tmp_path):
    trained = []

    def run(command, check, env):
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
        assert train_task(task, tmp_path / 'run', data, Console(quiet=True))['top1'] == 0.5
        assert len(trained) == count
