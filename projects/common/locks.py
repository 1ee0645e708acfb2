"""Locks of folders, which end with the processes that hold them."""

import contextlib
import os
import sys
import time
from pathlib import Path

from soft_mm.utils import process_exists

try:
    import fcntl
except ImportError:
    import msvcrt

    fcntl = None

# On Windows, others cannot read a locked byte, so it is behind the process id.
_LOCKED_BYTE = 1 << 20
_held = set()


def _try_lock(file):
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(file, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        # Some network file systems have no locks.
        print(f'no lock: {error}. Do not run two jobs in one folder', file=sys.stderr)
    return True


def _owner(file):
    """Return the id of the process that took the lock, or None if it has ended."""
    os.lseek(file, 0, os.SEEK_SET)
    text = os.read(file, 20).decode(errors='replace')
    if fcntl is None:
        # The lock ends with this process itself.
        return text
    try:
        return text if process_exists(int(text)) else None
    except ValueError:
        return None


def inherited_files():
    """Return the file descriptors that a child process must inherit, so that a lock lasts until it has ended.

    Returns:
        tuple[int, ...]: Value for ``pass_fds`` of :class:`subprocess.Popen`, empty without a lock and on Windows.
    """
    return tuple(_held) if fcntl else ()


@contextlib.contextmanager
def folder_lock(folder, patience=15, wait=0):
    """Lock a folder for one job at a time.

    The operating system ends the lock with the last process that holds it, so a killed job leaves no lock behind. The
    file ``.NAME.lock`` beside the folder stays.

    Args:
        folder (str | Path): Folder, which need not exist.
        patience (float): Seconds to wait for the child processes of a job that has ended. Defaults to 15.
        wait (float): Seconds to wait for another job that holds the lock. Defaults to 0.

    Yields:
        None

    Raises:
        RuntimeError: If another job, or child processes of a killed job, still hold the lock after the wait.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Opened without truncation, because the file names the process that holds the lock.
    file = os.open(folder.with_name(f'.{folder.name}.lock'), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        start = time.monotonic()
        while not _try_lock(file):
            owner = _owner(file)
            if time.monotonic() - start >= (wait if owner else max(patience, wait)):
                holder = f'process {owner} already' if owner else 'a process that an earlier job started still'
                raise RuntimeError(f'{holder} works in {folder}: wait until it has ended, or end it')
            time.sleep(0.2)
        os.lseek(file, 0, os.SEEK_SET)
        os.ftruncate(file, 0)
        os.write(file, str(os.getpid()).encode())
        _held.add(file)
        yield
    finally:
        _held.discard(file)
        os.close(file)
