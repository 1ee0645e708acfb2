"""Check what the set-up needs and uv cannot install: Python, its headers, a C++ compiler and disk space.

Prints one sentence for each problem, and exits with 1 if there is one.
"""

import importlib.util
import os
import shlex
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUPPORTED = ((3, 10), (3, 12))  # the pinned packages have wheels for these
SIZE_GB = 10  # of the environment, and of the cache that its files are linked from; PyPI's torch is the CUDA build


def check_python():
    version = '.'.join(map(str, sys.version_info[:3]))
    if not SUPPORTED[0] <= sys.version_info[:2] <= SUPPORTED[1]:
        return f'Python {version} is not supported; 3.10 to 3.12 are: name one by `make PYTHON=/path/to/python3`.'
    if struct.calcsize('P') != 8:
        return f'{sys.executable} is a 32-bit Python: name a 64-bit one by `make PYTHON=/path/to/python3`.'
    if not all(map(importlib.util.find_spec, ('venv', 'ensurepip'))):
        return f'{sys.executable} has no venv or ensurepip module: apt install python3-venv.'


def check_headers():
    header = Path(sysconfig.get_path('include'), 'Python.h')
    if not header.is_file():
        return f'{header} is missing, and mmcv cannot be compiled without it: apt install python3-dev.'


def check_compiler():
    compiler = os.environ.get('CXX') or 'c++'
    if shutil.which(shlex.split(compiler)[0]) is None:
        return (
            f'the C++ compiler {compiler!r} is missing: apt install g++, or name another one by CXX=/path/to/compiler.'
        )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, 'check.cpp')
        source.write_text('#include <vector>\nint main() { return std::vector<int>().size(); }\n')
        command = [*shlex.split(compiler), '-std=c++17', str(source), '-o', f'{folder}/check']
        if subprocess.run(command, capture_output=True).returncode:
            return (
                f'the C++ compiler {compiler!r} cannot compile a C++17 program: apt install g++, or name another one '
                'by CXX=/path/to/compiler.'
            )


def check_disk():
    home = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    cache = Path(os.environ.get('UV_CACHE_DIR') or home / 'uv').absolute()
    cache = next(folder for folder in (cache, *cache.parents) if folder.exists())
    same_disk = os.stat(cache).st_dev == os.stat(ROOT).st_dev
    folders = {cache: "move uv's cache by UV_CACHE_DIR=/path/to/folder"}
    if not same_disk:
        folders[ROOT] = 'move this clone'
    free = {folder: shutil.disk_usage(folder).free / 1e9 for folder in folders}
    return ' '.join(
        f'the disk of {folder} has {free[folder]:.0f} GB free, and the set-up takes {SIZE_GB} GB: free some space, or '
        f'{remedy}.'
        for folder, remedy in folders.items()
        if free[folder] < SIZE_GB
    )


def main():
    problems = [problem for check in (check_python, check_headers, check_compiler, check_disk) if (problem := check())]
    for problem in problems:
        print(f'set-up: {problem}', file=sys.stderr)
    return 1 if problems else 0


if __name__ == '__main__':
    sys.exit(main())
