"""The wheel and the editable installation carry configs and tools, and need torch and mmengine alone."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from test_configs import ROOT

CARRIED = ('configs', 'tools', 'model-index.yml')
OF_THE_REPOSITORY = {'setup_env.py', 'make_model_zoo.py', 'demo.py', 'compare_attention.py', 'compare_landmarks.py'}


@pytest.fixture
def source(tmp_path):
    """The repository as it is in version control."""
    target = tmp_path / 'source'
    for name in ('soft_mm', 'configs', 'tools'):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns('__pycache__', '.mim'))
    for name in ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'model-index.yml', 'LICENSE'):
        shutil.copy(ROOT / name, target)
    return target


def run(*command, cwd):
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def distributions_below(*names):
    """Installed distributions that these need, themselves included."""
    found, left = {}, list(names)
    while left:
        name = re.sub(r'[-_.]+', '-', left.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            # For another platform or Python, or OpenCV under its other name.
            continue
        requires = found[name].requires or []
        left += [re.match(r'[\w.-]+', line)[0] for line in requires if 'extra ==' not in line]
    return found.values()


@pytest.fixture
def clean_python(tmp_path):
    """The Python of a new environment that has torch and mmengine and what they need."""
    venv.create(tmp_path / 'clean', symlinks=True)
    (site,) = (tmp_path / 'clean').glob('lib/python*/site-packages')
    (engine,) = set(importlib.metadata.packages_distributions()['mmengine'])
    names = ('torch', engine, 'opencv-python-headless', 'setuptools')
    for distribution in distributions_below(*names):
        for top in {file.parts[0] for file in distribution.files if file.parts[0] not in ('..', '__pycache__')}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    return tmp_path / 'clean/bin/python'


def test_wheel_in_a_clean_environment(source, clean_python, tmp_path):
    run(sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-w', tmp_path, source, cwd=tmp_path)
    (wheel,) = tmp_path.glob('*.whl')
    carried = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith('soft_mm/.mim/')}
    expected = [source / 'model-index.yml', *(source / 'configs').rglob('*'), *(source / 'tools').rglob('*')]
    assert carried == {
        f'soft_mm/.mim/{path.relative_to(source).as_posix()}'
        for path in expected
        if path.is_file() and path.name not in OF_THE_REPOSITORY
    }
    (site,) = (tmp_path / 'clean').glob('lib/python*/site-packages')
    run(sys.executable, '-m', 'pip', 'install', '--no-deps', '--target', site, wheel, cwd=tmp_path)
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
    shapes, configs = run(clean_python, '-c', code, cwd=tmp_path).splitlines()
    assert shapes == '[(1, 64, 16, 16), (1, 128, 8, 8)]'
    count, path = configs.split(' ', 1)
    assert int(count) == len(list((ROOT / 'configs').glob('[!_]*/*.py'))) and '/site-packages/soft_mm/.mim/' in path


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

    with pytest.raises(FileNotFoundError, match="near it are .*'coco/retinanet_soft-tiny-norm_fpn_1x_coco.py'"):
        soft_mm.config_path('coco/retinanet_soft-tiny_fpn_1x_coco.py')


def test_inherits_through_the_installed_package(tmp_path):
    """From a folder elsewhere, without knowing where the package is."""
    from mmengine.config import Config

    import soft_mm

    base = soft_mm.config_path('coco/mask-rcnn_soft-tiny-norm_fpn_1x_coco.py')
    # As an installation has it, editable or not.
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
