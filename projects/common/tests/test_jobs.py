"""How a resumable job ends."""

import subprocess
import sys

import pytest

from projects.common.jobs import resumable_job

LONG_JOB = """
import subprocess, sys
from projects.common.jobs import resumable_job
with resumable_job():
    subprocess.run([sys.executable, '-c', 'import time; print("started", flush=True); time.sleep(120)'], check=True)
"""


def test_sigterm_ends_the_child_process_too(environment):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    job = subprocess.Popen([sys.executable, '-c', LONG_JOB], text=True, env=environment, **pipes)
    assert job.stdout.readline() == 'started\n'
    job.terminate()
    # The child process holds the pipe until it ends.
    error = job.communicate(timeout=60)[1]
    assert (
        job.returncode == 1
        and error == 'interrupted; run the same command again to resume from the newest checkpoint, if there is one\n'
    )


@pytest.mark.parametrize('error', [RuntimeError, ImportError, OSError])
def test_failure_is_a_message(error):
    with pytest.raises(SystemExit, match='^the reason$'), resumable_job():
        raise error('the reason')
