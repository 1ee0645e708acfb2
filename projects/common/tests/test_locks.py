"""Locks of folders: whom they refuse, and when they end."""

import os
import subprocess
import sys

import pytest

from projects.common.locks import folder_lock, inherited_files

HOLD = """
import sys
import time
from projects.common.locks import folder_lock
with folder_lock(sys.argv[1]):
    print('held', flush=True)
    time.sleep(120)
"""


def test_second_job_is_refused_until_the_first_is_killed(tmp_path, environment):
    folder = tmp_path / 'not made yet/run'
    holder = subprocess.Popen([sys.executable, '-c', HOLD, folder], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert holder.stdout.readline() == 'held\n'
        with pytest.raises(RuntimeError, match=f'^process {holder.pid} already works in {folder}: '):
            with folder_lock(folder):
                pass
        with folder_lock(tmp_path / 'other'):
            pass
    finally:
        holder.kill()
        holder.wait()
    with folder_lock(folder):
        pass


def test_waits_for_a_job_on_demand(tmp_path, environment):
    command = [sys.executable, '-c', HOLD.replace('120', '1'), tmp_path / 'run']
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout.readline() == 'held\n'
        with pytest.raises(RuntimeError, match=f'^process {holder.pid} already works in '):
            with folder_lock(tmp_path / 'run', wait=0.1):
                pass
        with folder_lock(tmp_path / 'run', wait=60):
            pass


def test_child_process_keeps_the_lock(tmp_path):
    """A lock that is left is refused only after some patience, because child processes need time to end."""
    folder, program = tmp_path / 'run', 'import time; time.sleep(120)'
    assert inherited_files() == ()
    with folder_lock(folder):
        child = subprocess.Popen([sys.executable, '-c', program], pass_fds=inherited_files())
    try:
        (tmp_path / '.run.lock').write_text(str(ended_process()))
        with pytest.raises(RuntimeError, match='a process that an earlier job started still works in'):
            with folder_lock(folder, patience=0.5):
                pass
    finally:
        child.kill()
        child.wait()
    with folder_lock(folder, patience=0):
        assert (tmp_path / '.run.lock').read_text() == str(os.getpid())
        assert len(inherited_files()) == 1
    assert inherited_files() == ()


def ended_process():
    process = subprocess.Popen([sys.executable, '-c', ''])
    process.wait()
    return process.pid


def test_lock_file_without_a_process(tmp_path):
    (tmp_path / '.run.lock').touch()
    with folder_lock(tmp_path / 'run', patience=0):
        pass
