"""The preflight of the set-up names each problem and its remedy; the requirement files pin everything with hashes."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PREFLIGHT = ROOT / '.dev_scripts' / 'preflight.py'
STACKS = ('maintained', 'openmmlab', 'gpu')
PIN = re.compile(r'^([\w.-]+)(?:\[\w+\])?==([\w.+]+)(?= |$)', re.MULTILINE)


@pytest.fixture
def preflight():
    spec = importlib.util.spec_from_file_location('preflight', PREFLIGHT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(**environment):
    done = subprocess.run(
        [sys.executable, PREFLIGHT], env={**os.environ, **environment}, capture_output=True, text=True, cwd='/'
    )
    return done.returncode, done.stderr


def test_this_machine_is_ready(preflight):
    """But for the disk, which the installed environment may have filled."""
    assert [preflight.check_python(), preflight.check_headers(), preflight.check_compiler()] == [None] * 3


@pytest.mark.parametrize(
    ('version', 'ok'), [((3, 9, 2), False), ((3, 10, 0), True), ((3, 12, 9), True), ((3, 13), False)]
)
def test_python_version(preflight, monkeypatch, version, ok):
    monkeypatch.setattr(preflight.sys, 'version_info', version)
    problem = preflight.check_python()
    assert (problem is None) == ok
    if not ok:
        assert '.'.join(map(str, version)) in problem and 'make PYTHON=' in problem


def test_32_bit_python(preflight, monkeypatch):
    monkeypatch.setattr(preflight.struct, 'calcsize', lambda _: 4)
    assert '32-bit' in preflight.check_python()


@pytest.mark.parametrize('missing', ['venv', 'ensurepip'])
def test_missing_venv_module(preflight, monkeypatch, missing):
    monkeypatch.setattr(preflight.importlib.util, 'find_spec', lambda name: None if name == missing else object())
    assert 'apt install python3-venv' in preflight.check_python()


def test_missing_headers(preflight, monkeypatch, tmp_path):
    monkeypatch.setattr(preflight.sysconfig, 'get_path', lambda _: str(tmp_path))
    assert f'{tmp_path}/Python.h is missing' in preflight.check_headers()
    assert 'apt install python3-dev' in preflight.check_headers()


@pytest.mark.parametrize(
    ('compiler', 'problem'), [('/nonexistent/c++', 'is missing'), ('false', 'cannot compile a C++17 program')]
)
def test_compiler_in_a_real_run(compiler, problem):
    code, message = run(CXX=compiler)
    assert code == 1 and all(line.startswith('set-up: ') for line in message.splitlines())
    assert repr(compiler) in message and problem in message and 'apt install g++' in message


def test_compiler_with_options(preflight, monkeypatch):
    monkeypatch.setenv('CXX', 'c++ -O1')
    assert preflight.check_compiler() is None


def test_too_little_disk(preflight, monkeypatch, tmp_path):
    monkeypatch.setenv('UV_CACHE_DIR', str(tmp_path / 'not' / 'made yet'))
    monkeypatch.setattr(preflight.shutil, 'disk_usage', lambda _: SimpleNamespace(free=1e9))
    assert '1 GB free' in preflight.check_disk() and 'UV_CACHE_DIR=' in preflight.check_disk()


def test_each_full_disk_is_named(preflight, monkeypatch, tmp_path):
    monkeypatch.setenv('UV_CACHE_DIR', str(tmp_path))
    monkeypatch.setattr(preflight.shutil, 'disk_usage', lambda _: SimpleNamespace(free=1e9))
    monkeypatch.setattr(
        preflight, 'os', SimpleNamespace(environ=os.environ, stat=lambda path: SimpleNamespace(st_dev=path))
    )
    problem = preflight.check_disk()
    assert f'the disk of {tmp_path} has 1 GB free' in problem and f'the disk of {ROOT} has 1 GB free' in problem


def test_every_problem_is_reported(preflight, monkeypatch, capsys):
    monkeypatch.setattr(preflight, 'check_headers', lambda: 'no headers')
    monkeypatch.setattr(preflight, 'check_disk', lambda: 'no space')
    assert preflight.main() == 1
    assert capsys.readouterr().err == 'set-up: no headers\nset-up: no space\n'


def make(*arguments, folder=ROOT):
    done = subprocess.run(['make', *arguments], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ('target', 'stack', 'mmcv'), [('env', 'maintained', 'onedl-mmcv'), ('test-openmmlab', 'openmmlab', 'mmcv')]
)
def test_mmcv_is_compiled_for_the_cpu_or_for_cuda(target, stack, mmcv):
    code, commands = make('-n', target)
    assert code == 0 and re.search(
        rf'CUDA_VISIBLE_DEVICES= .* pip sync .*requirements/{stack}.txt', commands, re.DOTALL
    )
    assert 'FORCE_CUDA' not in commands
    code, commands = make('-n', target, 'FORCE_CUDA=1')
    assert code == 0 and 'CUDA_VISIBLE_DEVICES' not in commands
    assert f'--reinstall-package {mmcv} --config-settings-package {mmcv}:FORCE_CUDA=1' in commands


def test_missing_python_is_named():
    code, said = make('python', 'PYTHON=')
    assert code != 0 and 'no Python 3.10, 3.11 or 3.12 was found: apt install python3' in said


@pytest.mark.skipif(torch.cuda.is_available(), reason='it is for machines without a GPU')
def test_missing_gpu_is_named():
    code, said = make('test-gpu', 'PYTHON=python3')
    assert code != 0 and 'make test-gpu needs a CUDA GPU, and nvidia-smi finds none.' in said.splitlines()
    command = [sys.executable, '-m', 'pytest', '-m', 'gpu', 'tests/gpu']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and 'these tests need a CUDA GPU, and PyTorch finds none' in done.stdout


@pytest.mark.parametrize(('installed', 'again'), [('(3, 11)', False), ('(3, 10)', True), ('', True)])
def test_environment_of_another_python_is_made_again(tmp_path, installed, again):
    """With scripts in place of Python and uv, which write down how they were called."""
    for name in ('Makefile', 'requirements', '.dev_scripts'):
        (tmp_path / name).symlink_to(ROOT / name)
    scripts = {'python': "echo '(3, 11)'", '.venv/bin/python': f"echo '{installed}'", '.venv/bin/uv': 'true'}
    for name, answer in scripts.items():
        script = tmp_path / name
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls\n{answer}\n')
        script.chmod(0o755)
    code, said = make('env', f'PYTHON={tmp_path / "python"}', folder=tmp_path)
    assert code == 0, said
    calls = (tmp_path / 'calls').read_text()
    assert ('python -m venv --clear .venv' in calls) == again
    assert 'uv pip sync' in calls and 'requirements/maintained.txt' in calls


def read(name):
    return (ROOT / 'requirements' / name).read_text(encoding='utf-8')


@pytest.mark.parametrize('stack', STACKS)
def test_every_requirement_is_pinned_with_hashes(stack):
    """Without the address of an index, so that the user's own is used."""
    text = read(f'{stack}.txt')
    assert '://' not in text and '--index' not in text and '--find-links' not in text
    entries = re.split(r'\n(?=\S)', re.sub(r'(?m)^\s*#.*\n', '', text).strip())
    assert len(entries) > 50
    for entry in entries:
        assert entry == '-e .' or (PIN.match(entry) and '--hash=sha256:' in entry), entry


@pytest.mark.parametrize('stack', STACKS)
def test_compiled_file_is_up_to_date(stack):
    """`make requirements` was run after the last change of a pin."""
    compiled = PIN.findall(read(f'{stack}.txt'))
    pins = PIN.findall(read(f'{stack}.in')) + (PIN.findall(read('test.in')) if stack != 'gpu' else [])
    assert len(pins) > 8
    assert [(name, version) for name, version in pins if (name.lower(), version) not in compiled] == []


@pytest.mark.parametrize('stack', STACKS)
def test_only_headless_opencv_is_installed(stack):
    names = [name for name, _ in PIN.findall(read(f'{stack}.txt'))]
    assert [name for name in names if name.startswith('opencv')] == ['opencv-python-headless']


def test_one_version_of_each_package():
    """The tests ran with it. Other versions are named with the Python that they are for."""
    for stack in STACKS:
        lines = [line for line in read(f'{stack}.txt').splitlines() if PIN.match(line)]
        names = [
            PIN.match(line)[1] for line in lines if not re.search("python_full_version (>= '3.14'|< '3.11')", line)
        ]
        assert len(names) == len(set(names))
