"""Each toolbox exists as two distributions. One of them is installed, and the package requires neither."""

import runpy
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

setuptools = pytest.importorskip('setuptools')

ROOT = Path(__file__).resolve().parents[1]
ORIGINAL = {'mmengine', 'mmcv', 'mmpretrain', 'mmdet', 'mmsegmentation'}
MAINTAINED = {
    'onedl-mmengine',
    'onedl-mmcv',
    'onedl-mmpretrain',
    'onedl-mmdetection',
    'onedl-mmsegmentation',
}


def name_of(requirement):
    for sign in '<>=!~;[ ':
        requirement = requirement.split(sign)[0]
    return requirement


@pytest.fixture
def metadata(monkeypatch):
    """The arguments that setup.py gives to setuptools."""
    given = {}
    monkeypatch.setattr(setuptools, 'setup', given.update)
    runpy.run_path(str(ROOT / 'setup.py'))
    return given


@pytest.mark.parametrize('name', ['mmcv', 'mmengine', 'mmdet', 'mmseg', 'mmpretrain'])
def test_one_distribution_provides(name):
    # a set, because one distribution may be listed several times
    providers = set(packages_distributions().get(name, ()))
    assert len(providers) == 1, f'{name} comes from {sorted(providers) or "no distribution"}'


def test_package_requires_only_torch(metadata):
    assert metadata['install_requires'] == ['torch>=2.0']


@pytest.mark.parametrize(
    ('extra', 'stack', 'other'),
    [('original', ORIGINAL, MAINTAINED), ('maintained', MAINTAINED, ORIGINAL)],
)
def test_extra_names_a_whole_stack_of_one_family(metadata, extra, stack, other):
    names = {name_of(requirement) for requirement in metadata['extras_require'][extra]}
    assert stack <= names
    assert not other & names


def test_other_extras_name_no_toolbox(metadata):
    for extra, requirements in metadata['extras_require'].items():
        if extra not in ('original', 'maintained'):
            names = {name_of(requirement) for requirement in requirements}
            assert not names & (ORIGINAL | MAINTAINED), extra


def test_extras_have_no_upper_bounds(metadata):
    """The exception is a bound that mmdet and mmsegmentation check at import but do not declare."""
    for requirements in metadata['extras_require'].values():
        for requirement in requirements:
            if requirement == 'mmcv>=2.0.0,<2.2.0':
                continue
            assert not set('<~!') & set(requirement), requirement
            assert '==' not in requirement


def test_version_is_read_without_an_import(metadata, monkeypatch):
    monkeypatch.setitem(sys.modules, 'soft_mm', None)
    version = runpy.run_path(str(ROOT / 'soft_mm' / 'version.py'))['__version__']
    assert metadata['version'] == version


def test_only_the_package_is_installed(metadata):
    assert 'soft_mm' in metadata['packages']
    assert all(name.split('.')[0] == 'soft_mm' for name in metadata['packages'])
