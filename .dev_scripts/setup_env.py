#!/usr/bin/env python3
"""Make the environment of the demo and the tests: `.venv/` in the repository root.

With --openmmlab, make `.venv-openmmlab/` with OpenMMLab's own packages instead.
Needs only the standard library. If nothing has changed, a second run returns immediately. An interrupted
run continues where it stopped. The environment counts as ready only after every import has worked once.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPENMMLAB = '--openmmlab' in sys.argv[1:]  # decides all paths below
VENV = ROOT / ('.venv-openmmlab' if OPENMMLAB else '.venv')
PYTHON = VENV / 'bin' / 'python'
LOG = VENV / 'setup.log'
STAMP = VENV / '.soft_mm-ready'
MMCV_RECORD = VENV / '.mmcv-torch'  # the torch that the installed mmcv was compiled against
LOCK = ROOT / f'{VENV.name}.lock'  # outside the venv, which may be recreated while the lock is held
REQUIREMENTS = ROOT / 'requirements' / ('openmmlab' if OPENMMLAB else '')
SHARED = [ROOT / 'requirements' / name for name in ('constraints.txt', 'dev.txt')]  # used by both environments
MMCV = 'mmcv' if OPENMMLAB else 'onedl-mmcv'

SUPPORTED = ((3, 10), (3, 12))
IMPORTS = ('mmcv', 'mmengine', 'mmdet', 'mmseg', 'mmpretrain')
VENV_GB, DOWNLOAD_GB, UPDATE_GB = 8, 4, 2  # the x86-64 wheels of torch are CUDA builds
HEARTBEAT = 20  # seconds between two progress messages

NETWORK = (
    r'NewConnectionError|Max retries exceeded|Connection refused|timed out|ConnectTimeout|'
    r'Temporary failure in name resolution|Name or service not known|Network is unreachable|'
    r'No route to host|Connection reset|ProxyError|Connection broken|RemoteDisconnected'
)
FULL_DISK = r'No space left on device|Disk quota exceeded'
NO_MEMORY = r'Killed signal|fatal error: Killed|virtual memory exhausted|annot allocate memory'
CAUSES = (
    (FULL_DISK, 'the disk is full: free some space'),
    (NO_MEMORY, 'the compiler ran out of memory: set MAX_JOBS=1'),
    (NETWORK, 'the package index was not reached: check the network and the proxy settings'),
)
AGAIN = 'then run the same command again; installed packages are kept'


class SetupError(Exception):
    """One sentence that says what is wrong and what to do."""


def check_python():
    """Raise SetupError if the pinned packages have no wheels for this Python."""
    low, high = ('.'.join(map(str, version)) for version in SUPPORTED)
    if not SUPPORTED[0] <= tuple(sys.version_info[:2]) <= SUPPORTED[1]:
        given = '.'.join(map(str, sys.version_info[:3]))
        raise SetupError(
            f'Python {given} ({sys.executable}) is not supported, {low} to {high} are: name one with '
            '`make PYTHON=/path/to/python3 ...` (apt install python3 python3-venv python3-dev).'
        )
    if struct.calcsize('P') != 8:
        raise SetupError(
            f'{sys.executable} is a 32-bit Python, for which torch has no wheels: name a 64-bit '
            'one with `make PYTHON=/path/to/python3 ...`.'
        )


def debian_name(part):
    """Return the name of a Debian package for this version of Python."""
    return 'python{}.{}-{}'.format(*sys.version_info[:2], part)


def check_venv_module():
    """Raise SetupError if `venv` or `ensurepip` is missing: Debian and Ubuntu package them separately."""
    if find_spec('venv') is None or find_spec('ensurepip') is None:
        raise SetupError(
            f'{sys.executable} cannot make virtual environments (venv or ensurepip is missing): '
            f'apt install python3-venv ({debian_name("venv")} if it is not the default Python).'
        )


def find_compiler():
    """Return the first C++ compiler that compiles a program: mmcv's operators are built here."""
    named = os.environ.get('CXX')
    candidates = [named] if named else ['g++', 'c++', 'clang++']
    found = [name for name in candidates if shutil.which(shlex.split(name)[0])]
    if not found:
        raise SetupError(
            f'no C++ compiler was found (looked for {", ".join(candidates)}): apt install g++, '
            'or name one with CXX=/path/to/compiler.'
        )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, 'trivial.cpp')
        source.write_text('#include <vector>\nint main() { return std::vector<int>().size(); }\n')
        for name in found:
            command = [*shlex.split(name), '-std=c++17', str(source), '-o', f'{folder}/trivial']
            tried = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            if tried.returncode == 0:
                return name
    reason = last_error(tried.stdout.decode(errors='replace'))
    raise SetupError(
        f'{name} does not compile a trivial C++17 program ({reason}): apt install g++, '
        'or name another compiler with CXX=/path/to/compiler.'
    )


def check_headers():
    """Raise SetupError if Python.h is missing: Debian and Ubuntu package it separately."""
    header = Path(sysconfig.get_path('include'), 'Python.h')
    if not header.is_file():
        raise SetupError(
            f'{header} is missing, so nothing can be compiled for {sys.executable}: '
            f'apt install python3-dev ({debian_name("dev")} if it is not the default Python).'
        )


def check_disk():
    """Raise SetupError if a disk has too little space for the venv, the downloads and pip's cache."""
    needs = [(ROOT, UPDATE_GB)]
    if not torch_is_installed():
        needs = [(ROOT, VENV_GB), (Path(tempfile.gettempdir()), DOWNLOAD_GB)]
        if os.environ.get('PIP_NO_CACHE_DIR', '').lower() not in ('1', 'true', 'yes', 'on'):
            home = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
            cache = Path(os.environ.get('PIP_CACHE_DIR') or Path(home, 'pip')).absolute()
            existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
            needs.append((existing, DOWNLOAD_GB))
    disks = {}
    for folder, size in needs:
        disks.setdefault(os.stat(folder).st_dev, []).append((folder, size))
    for parts in disks.values():
        needed = sum(size for _, size in parts)
        free = shutil.disk_usage(parts[0][0]).free / 1e9
        if free < needed:
            where = ', '.join(dict.fromkeys(str(folder) for folder, _ in parts))
            raise SetupError(
                f'the disk of {where} has {free:.1f} GB free and the set-up takes {needed} GB: '
                'free some, move the downloads with TMPDIR and PIP_CACHE_DIR, or set PIP_NO_CACHE_DIR=1.'
            )


def pinned(file, name):
    """Return the version of a distribution that a requirement file pins."""
    text = (REQUIREMENTS / file).read_text()
    match = re.search(rf'^{re.escape(name)}==(\S+)', text, re.MULTILINE)
    if match is None:
        raise SetupError(f'{REQUIREMENTS / file} does not pin {name}: add a line `{name}==VERSION`.')
    return match.group(1)


def installed(name):
    """Return the version of a distribution in the venv, or None. Does not start the venv's Python."""
    found = sorted(VENV.glob(f'lib/python*/site-packages/{name.replace("-", "_")}-*.dist-info'))
    return found[0].name[len(name) + 1 : -len('.dist-info')] if found else None


def torch_is_installed():
    """Return whether the venv holds the pinned torch, in any build (2.8.0, 2.8.0+cpu, ...)."""
    return (installed('torch') or '').split('+')[0] == pinned('torch.txt', 'torch')


def wants_cuda():
    """Return whether CUDA operators of mmcv are requested now, or were when the venv's mmcv was compiled."""
    return os.environ.get('FORCE_CUDA') == '1' or (MMCV_RECORD.is_file() and '+cuda' in MMCV_RECORD.read_text())


def mmcv_key():
    """Return a text that changes with everything that the compiled operators depend on."""
    cuda = '+cuda' if wants_cuda() else ''
    return f'mmcv {pinned("mmcv.txt", MMCV)}{cuda} for torch {installed("torch")}'


def mmcv_is_current():
    """Return whether the venv's mmcv was compiled completely, against the installed torch."""
    wanted = pinned('mmcv.txt', MMCV)
    record = MMCV_RECORD.read_text() if MMCV_RECORD.is_file() else ''
    return installed(MMCV) == wanted and record == mmcv_key()


def requirement_files():
    """Return the files that pin this environment."""
    return sorted({*SHARED, *REQUIREMENTS.glob('*.txt')})


def digest():
    """Return a hash of everything that the environment depends on, including its path."""
    result = hashlib.sha256(repr((sys.version_info[:2], str(ROOT))).encode())
    for file in [ROOT / 'setup.py', *requirement_files()]:
        result.update(repr((file.name, file.read_bytes())).encode())
    return result.hexdigest()


def is_ready():
    """Return whether the venv was completed from the present files."""
    return STAMP.is_file() and PYTHON.exists() and STAMP.read_text() == digest() and mmcv_is_current()


def write_atomically(path, text):
    """Write a temporary file and rename it, so that an interruption leaves the old content or the new."""
    temporary = path.with_name(path.name + '.new')
    temporary.write_text(text)
    os.replace(temporary, path)


def is_sound():
    """Return whether an incomplete venv can be continued: its Python and pip work and belong to this path."""
    pip = VENV / 'bin' / 'pip'
    # pip's first lines hold the path of its Python: a different path means that the venv was moved
    if not pip.is_file() or f'{VENV}/bin/' not in pip.read_text()[:400]:
        return False
    program = 'import pip, sys; print(sys.version_info[:2])'
    try:
        run = subprocess.run([PYTHON, '-c', program], stdout=subprocess.PIPE, text=True)
    except OSError:
        return False
    return run.returncode == 0 and run.stdout.strip() == str(sys.version_info[:2])


def last_error(output):
    """Return the last line that names an error, or the last line if none does."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ['no output']
    named = [line for line in lines if re.search(r'error: ', line, re.IGNORECASE)]
    return (named or lines)[-1][:300]


def explain(output, action):
    """Return one sentence about the output of a failed command."""
    # a build needs no network, even if pip reported a failing index earlier
    build = 'subprocess-exited-with-error' in output
    for pattern, sentence in CAUSES:
        if re.search(pattern, output) and not (build and pattern is NETWORK):
            return f'{action} failed, {sentence}, {AGAIN} (log: {LOG}).'
    return f'{action} failed with "{last_error(output)}": read {LOG}, {AGAIN}.'


def progress(output):
    """Return a few words about the progress of pip or of the compiler that it runs."""
    compiled = re.findall(r'^\s*\[(\d+)/(\d+)\]', output, re.MULTILINE)
    if compiled:
        return 'compiled {} of {} files'.format(*compiled[-1])
    steps = re.findall(r'^\s*((?:Collecting|Downloading|Building|Installing) .*)', output, re.MULTILINE)
    return steps[-1][:70] if steps else 'working'


def run(command, action, environment):
    """Run a command, write its output to the log, and print its progress regularly."""
    with LOG.open('ab') as log:
        start = log.tell()
        # a new process group: an interruption must also stop the compilers that pip started
        child = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=VENV,
            start_new_session=True,
        )

    def output():
        with LOG.open('rb') as log:
            log.seek(start)
            return log.read().decode(errors='replace')

    began = time.monotonic()
    try:
        while child.poll() is None:
            try:
                child.wait(HEARTBEAT)
            except subprocess.TimeoutExpired:
                print(f'      {progress(output())} ({time.monotonic() - began:.0f} s)', flush=True)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGTERM)
            child.wait()
    if child.returncode:
        raise SetupError(explain(output(), action))


def child_environment(compiler):
    """Return the environment variables for pip and for the build of mmcv."""
    # these would redirect pip to another folder, or a build to another Python or make
    leave_out = 'PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX PIP_USER MAKEFLAGS MFLAGS'.split()
    environment = {name: value for name, value in os.environ.items() if name not in leave_out}
    # CAUSES matches English messages
    environment.update(LC_ALL='C.UTF-8', PYTHONNOUSERSITE='1', PIP_NO_INPUT='1')
    environment.update(CXX=compiler, MMCV_WITH_OPS='1')
    memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    jobs = max(1, min(len(os.sched_getaffinity(0)), memory // 2**31))  # a file needs up to 2 GB
    environment.setdefault('MAX_JOBS', str(jobs))
    if wants_cuda():
        environment['FORCE_CUDA'] = '1'
    else:
        # if the build sees a GPU, it requires the CUDA compiler that matches torch
        environment['CUDA_VISIBLE_DEVICES'] = ''
    return environment


@contextlib.contextmanager
def step(number, text):
    """Print a step when it starts, and its duration when it ends."""
    print(f'[{number}/6] {text}', flush=True)
    began = time.monotonic()
    yield
    print(f'      done in {time.monotonic() - began:.0f} s', flush=True)


@contextlib.contextmanager
def exclusive():
    """Allow only one set-up of this repository at a time."""
    import fcntl  # missing on Windows, where the checks must still run

    with LOCK.open('w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print('another set-up of this repository is running: waiting for it', flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_venv():
    """Create the venv with the interpreter that runs this program. An existing one is replaced."""
    import venv  # may be missing on Debian and Ubuntu: check_venv_module() reports it

    try:
        venv.create(VENV, clear=True, symlinks=True, with_pip=True)
    except subprocess.CalledProcessError as error:
        reason = last_error((error.output or b'').decode(errors='replace'))
        raise SetupError(
            f'{sys.executable} could not make a virtual environment ("{reason}"): apt install python3-venv.'
        ) from error


def set_up():
    """Run the six steps. Write the stamp only if all succeed."""
    STAMP.unlink(missing_ok=True)
    with step(1, 'checking Python, compiler and disk'):
        check_venv_module()
        compiler = find_compiler()
        check_headers()
        check_disk()
    environment = child_environment(compiler)

    # without -vv, pip does not report that an index was not reached
    pip = [PYTHON, '-m', 'pip', 'install', '-vv']
    for file in requirement_files():
        pip += ['-c', file]
    local = ['--no-build-isolation', '--no-deps']

    def install(name, *options):
        file = next(file for file in requirement_files() if file.name == name)
        run([*pip, *options, '-r', file], f'installing {name}', environment)

    with step(2, f'virtual environment {VENV} and build tools'):
        if not is_sound():
            make_venv()
        install('build.txt')
    with step(3, 'torch (downloads of up to 4 GB)'):
        install('torch.txt')
    if mmcv_is_current():
        print('[4/6] mmcv is compiled already')
    else:
        with step(4, 'compiling mmcv: this takes 6 to 10 minutes on two cores'):
            key = mmcv_key()
            MMCV_RECORD.unlink(missing_ok=True)
            # pip's cache may hold a wheel that was compiled against another torch
            fresh = ['--no-cache-dir', '--force-reinstall']
            install('mmcv.txt', *fresh, *local)
            write_atomically(MMCV_RECORD, key)
    with step(5, 'toolboxes, libraries and test tools'):
        install('stack.txt')
        install('dev.txt')
        install('toolboxes.txt', *local)
    with step(6, 'soft_mm itself, and a first import of everything'):
        run([*pip, *local, '-e', ROOT], 'installing soft_mm', environment)
        # -I keeps this folder and the user's own packages off sys.path
        options = ['--openmmlab'] * OPENMMLAB
        run([PYTHON, '-I', __file__, '--verify', *options], 'the first import', environment)
    write_atomically(STAMP, digest())


def verify():
    """Check, inside the venv, that every import works and comes from only one distribution."""
    import importlib
    import importlib.metadata

    import torch
    from mmcv.ops import nms

    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1.9], [5, 5, 6, 6]])
    kept = nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5)[1].tolist()
    if kept != [0, 2]:
        raise SetupError(f'error: mmcv.ops.nms keeps boxes {kept} instead of [0, 2]')
    for name in (*IMPORTS, 'soft_mm'):
        importlib.import_module(name)
    providers = importlib.metadata.packages_distributions()
    for name in IMPORTS:
        found = sorted(set(providers[name]))
        if len(found) != 1:
            raise SetupError(f'error: {name} comes from {", ".join(found)}; run `make clean-env`')


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--openmmlab', action='store_true', help="use OpenMMLab's own packages, in .venv-openmmlab")
    parser.add_argument('--verify', action='store_true', help='check the venv of the running Python')
    options = parser.parse_args(arguments)
    try:
        check_python()
        if options.verify:
            verify()
        elif not is_ready():
            with exclusive():
                if not is_ready():
                    set_up()
                    print(f'the environment is ready: {VENV}')
    except SetupError as error:
        print(f'set-up: {error}', file=sys.stderr)
        return 1
    except OSError as error:
        full = 'free some space' if error.errno == errno.ENOSPC else 'fix this'
        print(f'set-up: {error}: {full}, {AGAIN}.', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('set-up: interrupted; the same command continues where it stopped.', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    # compilers run in another process group: a signal that ends this program must end them as well
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup
            signal.signal(number, signal.default_int_handler)
    sys.exit(main())
