"""`python -m soft_mm` prints the versions that a bug report needs."""

import subprocess
import sys
from importlib.metadata import packages_distributions, version

import torch

import soft_mm
from soft_mm.__main__ import versions


def test_command_prints_versions_and_distributions():
    done = subprocess.run([sys.executable, '-m', 'soft_mm'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert printed['soft_mm'] == soft_mm.__version__ and printed['torch'] == torch.__version__
    (engine,) = set(packages_distributions()['mmengine'])
    assert printed['mmengine'] == f'{version(engine)} ({engine})'


def test_two_distributions_of_a_package_are_both_named(monkeypatch):
    monkeypatch.setattr('soft_mm.__main__.packages_distributions', lambda: {'mmcv': ['torch', 'pytest', 'torch']})
    found = dict(versions())
    assert found['mmcv'] == f'{version("pytest")} (pytest), {version("torch")} (torch)'
    assert found['mmdet'] in ('unknown', 'not installed')
