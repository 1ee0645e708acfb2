"""Tools run in the process of a test, because to start one takes longer than most of them, or in two processes."""

import contextlib
import io
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_tool(name, *arguments):
    """Run ``tools/name``. Return ``returncode`` (or the message of ``sys.exit``), ``stdout`` and ``stderr``."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [name, *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / 'tools' / name), run_name='__main__')
        except SystemExit as end:
            code = end.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def _run(command, cwd, timeout, **variables):
    # A config may import modules of the tests.
    paths = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / 'tests'), os.environ.get('PYTHONPATH'))))
    environment = os.environ | dict(PYTHONPATH=paths, OMP_NUM_THREADS='1') | variables
    command = [str(part) for part in command]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


def tool(name, *arguments, cwd, timeout=300):
    """Run ``tools/name`` in a process of its own. Return the finished process."""
    return _run([sys.executable, ROOT / 'tools' / name, *arguments], cwd, timeout)


def run_in_processes(name, *arguments, cwd):
    """Run a launcher ``tools/name``, for example ``dist_train.sh``, on a free port. Return the finished process."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    path = f'{sys.exec_prefix}/bin{os.pathsep}{os.environ["PATH"]}'
    return _run([ROOT / 'tools' / name, *arguments], cwd, timeout=600, PORT=port, PATH=path)
