"""The set-up reports problems in one sentence, accepts no incomplete environment, and repeats no finished step."""

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = Path('.dev_scripts', 'setup_env.py')
SITE = 'lib/python{}.{}/site-packages'.format(*sys.version_info[:2])


@pytest.fixture
def skeleton(tmp_path):
    """A repository that holds only the files that the set-up reads."""
    root = tmp_path / 'repository'
    (root / SCRIPT.parent).mkdir(parents=True)
    shutil.copy(ROOT / SCRIPT, root / SCRIPT)
    shutil.copy(ROOT / 'setup.py', root)
    shutil.copytree(ROOT / 'requirements', root / 'requirements')
    return root


@pytest.fixture
def setup_env(skeleton, monkeypatch, request):
    """The set-up as a module. An indirect parameter gives its command-line options."""
    monkeypatch.setattr(sys, 'argv', ['setup_env.py', *getattr(request, 'param', [])])
    spec = importlib.util.spec_from_file_location('setup_env', skeleton / SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def steps(setup_env, monkeypatch):
    """A list of the commands that the set-up would run, in place of running them."""
    taken = []

    def make_venv():
        setup_env.PYTHON.parent.mkdir(parents=True, exist_ok=True)
        setup_env.PYTHON.touch()
        taken.append('venv')

    def run(command, action, environment):
        taken.append(action)
        if action == 'installing torch.txt':
            for old in setup_env.VENV.glob(f'{SITE}/torch-*'):
                old.rmdir()
            add_distribution(setup_env, 'torch', setup_env.pinned('torch.txt', 'torch'))
        if action == 'installing mmcv.txt':
            name = setup_env.MMCV
            add_distribution(setup_env, name.replace('-', '_'), setup_env.pinned('mmcv.txt', name))

    for name in ('check_venv_module', 'check_headers', 'check_disk'):
        monkeypatch.setattr(setup_env, name, lambda: None)
    monkeypatch.setattr(setup_env, 'find_compiler', lambda: 'c++')
    monkeypatch.setattr(setup_env, 'is_sound', lambda: setup_env.PYTHON.exists())
    monkeypatch.setattr(setup_env, 'make_venv', make_venv)
    monkeypatch.setattr(setup_env, 'run', run)
    return taken


def add_distribution(setup_env, name, version):
    folder = setup_env.VENV / SITE / f'{name}-{version}.dist-info'
    folder.mkdir(parents=True, exist_ok=True)


def change_pin(setup_env, file, old, new):
    path = setup_env.REQUIREMENTS / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def run_script(root, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in ('CXX', 'CC')}
    return subprocess.run(
        [sys.executable, root / SCRIPT],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def assert_one_sentence(text):
    assert text.startswith('set-up: ')
    assert text.endswith('\n')
    assert text.count('\n') == 1


# --- checks


@pytest.mark.parametrize('version', [(3, 8, 18), (3, 9, 0), (3, 13, 0)])
def test_wrong_python(setup_env, monkeypatch, version):
    python = SimpleNamespace(version_info=version, executable='/some/python')
    monkeypatch.setattr(setup_env, 'sys', python)
    with pytest.raises(setup_env.SetupError) as error:
        setup_env.check_python()
    for part in ('.'.join(map(str, version)), '/some/python', '3.10 to 3.12', 'make PYTHON='):
        assert part in str(error.value)


@pytest.mark.parametrize('version', [(3, 10, 0), (3, 11, 7), (3, 12, 9)])
def test_right_python(setup_env, monkeypatch, version):
    python = SimpleNamespace(version_info=version, executable='/some/python')
    monkeypatch.setattr(setup_env, 'sys', python)
    setup_env.check_python()


def test_32_bit_python(setup_env, monkeypatch):
    monkeypatch.setattr(setup_env.struct, 'calcsize', lambda code: 4)
    with pytest.raises(setup_env.SetupError, match='32-bit'):
        setup_env.check_python()


@pytest.mark.parametrize('missing', ['venv', 'ensurepip'])
def test_missing_venv_module(setup_env, monkeypatch, missing):
    monkeypatch.setattr(setup_env, 'find_spec', lambda name: None if name == missing else name)
    with pytest.raises(setup_env.SetupError, match='apt install python3-venv'):
        setup_env.check_venv_module()


def test_missing_headers(setup_env, monkeypatch, tmp_path):
    monkeypatch.setattr(setup_env.sysconfig, 'get_path', lambda name: str(tmp_path))
    with pytest.raises(setup_env.SetupError, match=r'Python\.h is missing.*python3-dev'):
        setup_env.check_headers()
    (tmp_path / 'Python.h').touch()
    setup_env.check_headers()


def test_missing_compiler(setup_env, monkeypatch):
    monkeypatch.delenv('CXX', raising=False)
    monkeypatch.setattr(setup_env.shutil, 'which', lambda name: None)
    with pytest.raises(setup_env.SetupError, match=r'g\+\+, c\+\+, clang\+\+.*apt install g\+\+'):
        setup_env.find_compiler()


def test_missing_compiler_in_a_real_run(skeleton, tmp_path):
    nowhere = tmp_path / 'bin'
    nowhere.mkdir()
    run = run_script(skeleton, PATH=str(nowhere))
    assert run.returncode == 1
    assert_one_sentence(run.stderr)
    assert 'no C++ compiler' in run.stderr
    assert not (skeleton / '.venv').exists()


def test_compiler_that_does_not_compile(setup_env, monkeypatch, tmp_path):
    broken = tmp_path / 'broken compiler'
    broken.write_text('#!/bin/sh\necho "fatal error: vector: no such file" >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv('CXX', f"'{broken}'")
    with pytest.raises(setup_env.SetupError, match='does not compile.*vector: no such file'):
        setup_env.find_compiler()


def test_named_compiler_is_the_one_used(setup_env, monkeypatch, tmp_path):
    working = tmp_path / 'mycxx'
    working.write_text('#!/bin/sh\nexit 0\n')
    working.chmod(0o755)
    monkeypatch.setenv('CXX', f'{working} -O1')
    assert setup_env.find_compiler() == f'{working} -O1'


def test_too_little_disk(setup_env, monkeypatch):
    usage = SimpleNamespace(free=setup_env.VENV_GB * 1e9 - 1)
    monkeypatch.setattr(setup_env.shutil, 'disk_usage', lambda path: usage)
    with pytest.raises(setup_env.SetupError, match=r'has 8\.0 GB free and .* takes \d+ GB'):
        setup_env.check_disk()


def test_disk_counts_only_what_is_still_to_come(setup_env, monkeypatch):
    usage = SimpleNamespace(free=setup_env.UPDATE_GB * 1e9)
    monkeypatch.setattr(setup_env.shutil, 'disk_usage', lambda path: usage)
    add_distribution(setup_env, 'torch', setup_env.pinned('torch.txt', 'torch') + '+cpu')
    setup_env.check_disk()


def test_disk_leaves_out_a_cache_that_is_off(setup_env, monkeypatch, tmp_path):
    monkeypatch.setattr(setup_env.tempfile, 'gettempdir', lambda: str(tmp_path))
    monkeypatch.setenv('PIP_CACHE_DIR', str(tmp_path / 'no' / 'such' / 'cache'))
    monkeypatch.delenv('PIP_NO_CACHE_DIR', raising=False)
    usage = SimpleNamespace(free=(setup_env.VENV_GB + setup_env.DOWNLOAD_GB) * 1e9)
    monkeypatch.setattr(setup_env.shutil, 'disk_usage', lambda path: usage)
    with pytest.raises(setup_env.SetupError, match='PIP_NO_CACHE_DIR'):
        setup_env.check_disk()
    monkeypatch.setenv('PIP_NO_CACHE_DIR', '1')
    setup_env.check_disk()


# --- failing commands


def test_no_network(skeleton):
    # with torch installed, the set-up asks for less disk space
    (skeleton / '.venv' / SITE / 'torch-2.8.0.dist-info').mkdir(parents=True)
    closed = 'http://127.0.0.1:9/simple'
    run = run_script(
        skeleton,
        PIP_INDEX_URL=closed,
        PIP_EXTRA_INDEX_URL='',
        PIP_FIND_LINKS='',
        PIP_NO_INDEX='0',
        PIP_CONFIG_FILE=os.devnull,
        PIP_RETRIES='0',
        no_proxy='127.0.0.1',
    )
    assert run.returncode == 1
    assert_one_sentence(run.stderr)
    assert 'package index was not reached' in run.stderr
    assert (skeleton / '.venv' / 'setup.log').is_file()
    assert not (skeleton / '.venv' / '.soft_mm-ready').exists()


@pytest.mark.parametrize(
    ('output', 'sentence'),
    [
        ('OSError: [Errno 28] No space left on device', 'the disk is full'),
        ('c++: fatal error: Killed signal terminated program cc1plus', 'MAX_JOBS=1'),
        ('[Errno -3] Temporary failure in name resolution', 'network and the proxy'),
        ('ReadTimeoutError: Read timed out.', 'network and the proxy'),
        ('a.cpp: error: no member named x\nninja: stopped', 'a.cpp: error: no member named x'),
        (
            'Connection refused\nerror: subprocess-exited-with-error\na.c: error: no x\nraise',
            'failed with "a.c: error: no x"',
        ),
    ],
)
def test_failures_are_told_apart(setup_env, output, sentence):
    message = setup_env.explain(output, 'installing')
    assert sentence in message
    assert str(setup_env.LOG) in message
    assert '\n' not in message


def test_failing_command_raises(setup_env):
    setup_env.VENV.mkdir()
    program = 'print("ERROR: no such thing"); raise SystemExit(3)'
    with pytest.raises(setup_env.SetupError, match='trying failed with "ERROR: no such thing"'):
        setup_env.run([sys.executable, '-c', program], 'trying', dict(os.environ))


def test_progress_reads_the_compiler(setup_env):
    output = 'Collecting a\n  [1/78] c++ -c a\n  [12/78] c++ -c b\n'
    assert setup_env.progress(output) == 'compiled 12 of 78 files'
    assert setup_env.progress('Collecting a\n  Downloading b.whl\nx\n') == 'Downloading b.whl'


# --- the stamp


def test_finished_set_up_is_ready_and_is_not_repeated(setup_env, steps):
    assert not setup_env.is_ready()
    assert setup_env.main([]) == 0
    assert setup_env.is_ready()
    assert steps[0] == 'venv'
    assert steps[-1] == 'the first import'
    steps.clear()
    assert setup_env.main([]) == 0
    assert steps == []


@pytest.mark.parametrize('setup_env', [['--openmmlab']], indirect=True)
def test_openmmlab_is_an_environment_apart(setup_env, steps):
    assert setup_env.main(['--openmmlab']) == 0
    assert setup_env.is_ready() and setup_env.VENV == setup_env.ROOT / '.venv-openmmlab'
    assert not (setup_env.ROOT / '.venv').exists()
    folders = {file.name: file.parent.name for file in setup_env.requirement_files()}
    assert folders.pop('constraints.txt') == folders.pop('dev.txt') == 'requirements'
    assert set(folders.values()) == {'openmmlab'} and set(folders) >= {'torch.txt', 'mmcv.txt', 'toolboxes.txt'}
    change_pin(setup_env, 'torch.txt', 'torch==2.4.1', 'torch==2.4.0')
    assert not setup_env.is_ready()


@pytest.mark.parametrize('file', ['requirements/dev.txt', 'requirements/new.txt', 'setup.py'])
def test_changed_requirements_are_not_ready(setup_env, steps, file):
    setup_env.main([])
    with (setup_env.ROOT / file).open('a') as stream:
        stream.write('\n# changed\n')
    assert not setup_env.is_ready()
    steps.clear()
    assert setup_env.main([]) == 0
    assert 'installing dev.txt' in steps
    assert 'venv' not in steps
    assert setup_env.is_ready()


def test_another_python_is_not_ready(setup_env, steps, monkeypatch):
    setup_env.main([])
    monkeypatch.setattr(setup_env.sys, 'version_info', (3, 99, 0))
    assert not setup_env.is_ready()


def test_another_place_is_not_ready(setup_env, steps, monkeypatch, tmp_path):
    setup_env.main([])
    shutil.copy(setup_env.ROOT / 'setup.py', tmp_path)
    monkeypatch.setattr(setup_env, 'ROOT', tmp_path)
    assert not setup_env.is_ready()


def test_venv_without_interpreter_is_not_ready(setup_env, steps):
    setup_env.main([])
    setup_env.PYTHON.unlink()
    assert not setup_env.is_ready()


@pytest.mark.parametrize(('stop', 'code'), [(KeyboardInterrupt(), 130), (OSError(28, 'No space left on device'), 1)])
def test_interrupted_set_up_is_not_ready_and_continues(setup_env, steps, monkeypatch, capsys, stop, code):
    setup_env.main([])
    change_pin(setup_env, 'dev.txt', 'pytest==', 'pytest==0')
    record = setup_env.run

    def stopping(command, action, environment):
        if action == 'installing stack.txt':
            raise stop
        record(command, action, environment)

    monkeypatch.setattr(setup_env, 'run', stopping)
    capsys.readouterr()
    assert setup_env.main([]) == code
    assert_one_sentence(capsys.readouterr().err)
    assert not setup_env.STAMP.exists()
    assert not setup_env.is_ready()

    monkeypatch.setattr(setup_env, 'run', record)
    steps.clear()
    assert setup_env.main([]) == 0
    assert 'venv' not in steps
    assert 'installing mmcv.txt' not in steps
    assert setup_env.is_ready()


def test_changed_torch_compiles_mmcv_again(setup_env, steps):
    setup_env.main([])
    assert 'installing mmcv.txt' in steps
    change_pin(setup_env, 'torch.txt', 'torch==2.8.0', 'torch==2.8.1')
    steps.clear()
    setup_env.main([])
    assert 'installing mmcv.txt' in steps
    assert 'torch 2.8.1' in setup_env.MMCV_RECORD.read_text()


def test_interrupted_compilation_is_repeated(setup_env, steps):
    setup_env.main([])
    assert setup_env.mmcv_is_current()
    setup_env.MMCV_RECORD.unlink()
    assert not setup_env.mmcv_is_current()


def test_asking_for_cuda_compiles_mmcv_again_and_is_remembered(setup_env, steps, monkeypatch):
    monkeypatch.delenv('FORCE_CUDA', raising=False)
    setup_env.main([])
    monkeypatch.setenv('FORCE_CUDA', '1')
    assert not setup_env.is_ready()
    steps.clear()
    setup_env.main([])
    assert 'installing mmcv.txt' in steps and '+cuda' in setup_env.MMCV_RECORD.read_text()
    monkeypatch.delenv('FORCE_CUDA')
    assert setup_env.is_ready() and setup_env.child_environment('g++')['FORCE_CUDA'] == '1'


def test_folder_that_is_no_venv_is_not_continued(setup_env):
    assert not setup_env.is_sound()
    pip = setup_env.VENV / 'bin' / 'pip'
    pip.parent.mkdir(parents=True)
    pip.write_text('#!/elsewhere/.venv/bin/python\n')
    setup_env.PYTHON.symlink_to(sys.executable)
    assert not setup_env.is_sound()


def test_missing_pin_is_named(setup_env):
    (setup_env.REQUIREMENTS / 'torch.txt').write_text('torch>=2\n')
    with pytest.raises(setup_env.SetupError, match='torch.txt does not pin torch'):
        setup_env.pinned('torch.txt', 'torch')


def test_second_run_waits_for_the_first(setup_env, capsys):
    entered = threading.Event()

    def second():
        with setup_env.exclusive():
            entered.set()

    with setup_env.LOCK.open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.3)
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert entered.wait(10)
        thread.join()
    assert 'another set-up of this repository is running' in capsys.readouterr().out


# --- the requirement files


def test_every_requirement_is_pinned():
    for file in (ROOT / 'requirements').glob('*.txt'):
        for line in file.read_text().splitlines():
            requirement = line.split('#')[0].split(';')[0].strip()
            assert not requirement or requirement.count('==') == 1, f'{file.name}: {line}'


def test_nothing_is_pinned_twice():
    names = []
    for file in (ROOT / 'requirements').glob('*.txt'):
        lines = [line.split('#')[0].strip() for line in file.read_text().splitlines()]
        names += [line.split('==')[0].lower().replace('_', '-') for line in lines if line]
    assert sorted(names) == sorted(set(names))
