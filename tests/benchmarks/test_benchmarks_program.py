"""The program ``python -m benchmarks``: files, errors and help."""

import csv
import json
import re
import subprocess
import sys

import pytest
import torch

from benchmarks.__main__ import build_parser
from benchmarks.ablations import ABLATIONS
from benchmarks.targets import BACKBONES, OPERATORS


@pytest.fixture
def run_program(environment, root):
    def run(*arguments):
        command = [sys.executable, '-m', 'benchmarks', *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=root)

    return run


def test_program_writes_its_files(tmp_path, run_program):
    files = {kind: tmp_path / f'sweep.{kind}' for kind in ('json', 'csv', 'png')}
    options = [text for kind, path in files.items() for text in (f'--{kind}', path)]
    options += ['--repeats', 2, '--train', '--no-memory', '--peer', 'attn-softmax-fused']
    done = run_program('attn-soft', 'soft-tiny', '--sizes', '64', '64x128', *options)
    assert done.returncode == 0, done.stderr
    assert 'growth exponents' in done.stdout
    report = json.loads(files['json'].read_text())
    assert [row['status'] for row in report['rows']] == ['ok'] * 4
    assert report['machine']['torch'] == torch.__version__
    rows = list(csv.DictReader(files['csv'].open()))
    assert [(row['height'], row['width']) for row in rows] == [('64', '64'), ('64', '128')] * 2
    assert all(float(row['ratio_low']) <= float(row['ratio']) <= float(row['ratio_high']) for row in rows)
    assert files['png'].read_bytes().startswith(b'\x89PNG')


def test_program_that_measures_nothing_fails(run_program):
    done = run_program('soft-tiny', '--sizes', 16, '--json', '/dev/stdout')
    assert done.returncode == 1 and 'growth exponents' in done.stdout
    report = json.loads(done.stdout[done.stdout.index('{') :])
    assert [row['status'] for row in report['rows']] == ['error']


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['soft-tiny', '--sizes', '64', '--device', 'cuda:99'], "'cuda:99'"),
        (['soft-tony', '--sizes', '64'], "'soft-tony': unknown target"),
        (['soft-tiny', '--sizes', '64by64'], "'64by64': expected HxW"),
        (['soft-tiny', '--sizes', '64', '--repeats', '1'], '--repeats 1: expected an integer >= 2'),
        (['soft-tiny', '--sizes', '0x64'], "'0x64': expected HxW"),
        (['soft-tiny', '--sizes', '6x'], "'6x': expected HxW"),
        (['soft-tiny', '--sizes', '64', '--png', 'none/tokens.png'], "the folder 'none' does not exist"),
    ],
)
def test_program_names_bad_input(arguments, message, run_program):
    done = run_program(*arguments)
    assert done.returncode == 2 and message in ' '.join(done.stderr.split())


@pytest.mark.parametrize('columns', [80, 200])
def test_help_breaks_no_name(columns, monkeypatch):
    monkeypatch.setenv('COLUMNS', str(columns))
    lines = build_parser().format_help().splitlines()
    assert lines[0].startswith('usage: python -m benchmarks ')
    for name in (*OPERATORS, *BACKBONES, *ABLATIONS):
        assert any(re.search(rf'(?<![\w-]){name}(?![\w-])', line) for line in lines), name
    assert not [line for line in lines if line.endswith('-')]
    assert max(map(len, lines)) <= columns


def test_only_the_worker_needs_unix(environment, root):
    modules = 'targets', 'ablations', 'sweep', 'report', '__main__'
    code = f"""
import importlib, sys
for name in ('resource', 'fcntl', 'termios'):
    sys.modules[name] = None
for name in {modules!r}:
    importlib.import_module(f'benchmarks.{{name}}')
assert 'benchmarks.worker' not in sys.modules
"""
    done = subprocess.run([sys.executable, '-c', code], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
