"""The wheel and an editable installation carry configs and tools, and need only torch and mmengine."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CARRIED = ('configs', 'tools', 'model-index.yml')


def copy_source(target):
    """Copy the files that builds read, without what an installation adds."""
    for name in ('soft_mm', 'configs', 'tools'):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns('__pycache__', '.mim'))
    for name in ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'model-index.yml', 'LICENSE'):
        shutil.copy(ROOT / name, target)
    return target


@pytest.fixture
def source(tmp_path):
    return copy_source(tmp_path / 'source')


def run(*command, cwd):
    # The installed package must be the one that is imported.
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def distributions_below(*names):
    """Return the installed distributions with these names, and all their dependencies."""
    found, left = {}, list(names)
    while left:
        name = re.sub(r'[-_.]+', '-', left.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            # A dependency for another platform or Python, or OpenCV under its other name.
            continue
        requires = found[name].requires or []
        left += [re.match(r'[\w.-]+', line)[0] for line in requires if 'extra ==' not in line]
    return found.values()


@dataclass
class Installation:
    """The wheel in a new environment that holds torch, mmengine and their dependencies."""

    folder: Path
    source: Path
    wheel: Path
    python: Path
    site: Path


@pytest.fixture(scope='module')
def installation(tmp_path_factory):
    folder = tmp_path_factory.mktemp('installation')
    source = copy_source(folder / 'source')
    venv.create(folder / 'clean', symlinks=True)
    (site,) = (folder / 'clean').glob('lib/python*/site-packages')
    (engine,) = set(importlib.metadata.packages_distributions()['mmengine'])
    names = ('torch', engine, 'opencv-python-headless', 'setuptools')
    for distribution in distributions_below(*names):
        for top in {file.parts[0] for file in distribution.files if file.parts[0] not in ('..', '__pycache__')}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    pip = (sys.executable, '-m', 'pip')
    run(*pip, 'wheel', '--no-deps', '--no-build-isolation', '-w', folder, source, cwd=folder)
    (wheel,) = folder.glob('*.whl')
    run(*pip, 'install', '--no-deps', '--target', site, wheel, cwd=folder)
    return Installation(folder, source, wheel, folder / 'clean/bin/python', site)


def test_wheel_holds_package_configs_and_tools_only(installation):
    source, files = installation.source, set(zipfile.ZipFile(installation.wheel).namelist())
    assert 'soft_mm/py.typed' in files
    carried = {name for name in files if name.startswith('soft_mm/.mim/')}
    expected = [source / 'model-index.yml', *(source / 'configs').rglob('*'), *(source / 'tools').rglob('*')]
    assert carried == {f'soft_mm/.mim/{path.relative_to(source).as_posix()}' for path in expected if path.is_file()}
    assert all(re.match(r'soft_mm(-[\d.]+(\.\w+)?\.dist-info)?/', name) for name in files)


def test_wheel_in_a_clean_environment(installation):
    code = """
import importlib.util, torch, soft_mm
from mmengine.config import Config
from mmengine.registry import MODELS
assert not any(importlib.util.find_spec(name) for name in ('mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'torchvision'))
backbone = MODELS.build(dict(type='soft_mm.SOFT', arch='tiny', out_indices=(0, 1)))
print([tuple(x.shape) for x in backbone(torch.rand(1, 3, 64, 64))])
names = soft_mm.config_names()
print(len(names), soft_mm.config_path(names[0]))
Config.fromfile(soft_mm.config_path('ade20k/upernet_soft-tiny-norm_8xb2-160k_ade20k-512x512.py'))
"""
    shapes, configs = run(installation.python, '-c', code, cwd=installation.folder).splitlines()
    assert shapes == '[(1, 64, 16, 16), (1, 128, 8, 8)]'
    count, path = configs.split(' ', 1)
    assert int(count) == len(list((ROOT / 'configs').glob('[!_]*/*.py'))) and '/site-packages/soft_mm/.mim/' in path


def test_every_module_and_tool_of_the_wheel_starts(installation):
    """None of them needs the repository, and none imports a toolbox before using it."""
    code = """
import importlib, pkgutil, soft_mm
for module in pkgutil.walk_packages(soft_mm.__path__, 'soft_mm.'):
    importlib.import_module(module.name)
    print(module.name)
"""
    assert 'soft_mm.complexity' in run(installation.python, '-c', code, cwd=installation.folder).splitlines()
    for tool in (installation.site / 'soft_mm/.mim/tools').glob('*.py'):
        assert 'usage:' in run(installation.python, tool, '--help', cwd=installation.folder), tool.name


def test_source_distribution_has_what_the_wheel_carries(source, tmp_path):
    code = "import sys; sys.argv = ['setup.py', '-q', 'sdist', '-d', 'sdist']; import runpy; runpy.run_path('setup.py')"
    run(sys.executable, '-c', code, cwd=source)
    (archive,) = (source / 'sdist').glob('*.tar.gz')
    shutil.unpack_archive(archive, tmp_path / 'unpacked')
    (unpacked,) = (tmp_path / 'unpacked').iterdir()
    for name in CARRIED:
        original = source / name
        files = [original] if original.is_file() else [path for path in original.rglob('*') if path.is_file()]
        assert all((unpacked / path.relative_to(source)).is_file() for path in files)


EDITABLE = """
import pathlib, runpy, sys
if {refuse}:
    def symlink_to(*args, **kwargs):
        raise OSError(1314, 'A required privilege is not held by the client')
    pathlib.Path.symlink_to = symlink_to
sys.argv = ['setup.py', '-q', 'editable_wheel', '-d', 'editable']
runpy.run_path('setup.py', run_name='__main__')
"""


@pytest.mark.parametrize('refuse', [False, True], ids=['links', 'copies where links are refused'])
def test_editable_installation_carries_them_too(source, refuse):
    for _ in range(2):
        run(sys.executable, '-c', EDITABLE.format(refuse=refuse), cwd=source)
    for name in CARRIED:
        carried = source / 'soft_mm' / '.mim' / name
        assert carried.exists() and carried.is_symlink() != refuse
    code = "import soft_mm; print(soft_mm.config_path('coco/retinanet_soft-tiny-norm_fpn_1x_coco.py'))"
    assert '.mim' in run(sys.executable, '-c', code, cwd=source)


def test_unknown_config_is_named():
    import soft_mm

    with pytest.raises(FileNotFoundError, match="the closest are .*'coco/retinanet_soft-tiny-norm_fpn_1x_coco.py'"):
        soft_mm.config_path('coco/retinanet_soft-tiny_fpn_1x_coco.py')


def test_inherits_through_the_installed_package(tmp_path):
    """A config in any folder can inherit without knowing the path of the package."""
    from mmengine.config import Config

    import soft_mm

    base = soft_mm.config_path('coco/mask-rcnn_soft-tiny-norm_fpn_1x_coco.py')
    # Every installation, editable or not, has this folder.
    assert Path(base).parts[-4:-2] == ('.mim', 'configs')
    mine = tmp_path / 'mine.py'
    mine.write_text(
        "_base_ = __import__('soft_mm').config_path('coco/mask-rcnn_soft-tiny-norm_fpn_1x_coco.py')\n"
        'model = dict(backbone=dict(frozen_stages=1), roi_head=dict(bbox_head=dict(num_classes=5)))\n'
    )
    cfg = Config.fromfile(mine)
    assert cfg.model.backbone.arch == 'tiny' and cfg.model.backbone.frozen_stages == 1
    assert cfg.model.type == 'MaskRCNN' and cfg.model.roi_head.bbox_head.num_classes == 5
    assert Path(cfg.filename) == mine
