"""Metafiles, configs, models and README tables agree."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from test_zoo import empty_model

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = '.dev_scripts/model_zoo.py'


def load_script():
    spec = importlib.util.spec_from_file_location('model_zoo', ROOT / SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


zoo = load_script()
METAFILES = zoo.read_metafiles(ROOT)
MODELS = [model for content in METAFILES.values() for model in content['Models']]


def test_every_config_has_an_entry():
    files = list((ROOT / 'configs').glob('[!_]*/*.py'))
    # A project has a metafile if its configs define whole models.
    files += [config for file in METAFILES for config in (file.parent / 'configs').glob('*.py')]
    configs = {path.relative_to(ROOT).as_posix() for path in files}
    assert {model['Config'] for model in MODELS} == configs
    assert len({model['Name'] for model in MODELS}) == len(MODELS)


def test_index_is_read_by_the_model_index_package():
    modelindex = pytest.importorskip('modelindex')
    index = modelindex.load(str(ROOT / 'model-index.yml'))
    index.build_models_with_collections()
    # The projects are not part of the wheel, and the index imports only what the wheel carries.
    projects = [model for model in MODELS if model['Config'].startswith('projects/')]
    assert projects and len(index.models) == len(MODELS) - len(projects)


@pytest.mark.parametrize('model', MODELS, ids=lambda model: model['Name'])
def test_parameters_match_the_model(model):
    built = empty_model(ROOT / model['Config'])
    assert model['Metadata']['Parameters'] == sum(parameter.numel() for parameter in built.parameters())
    for result in model['Results'] or []:
        assert all(key.endswith(zoo.PUBLISHED) for key in result['Metrics'])


@pytest.mark.parametrize(
    'model',
    # Mask2Former is computed, not only counted, at 1024x2048 pixels.
    [
        pytest.param(
            m, marks=[] if 'tiny' in m['Name'] and 'mask2former' not in m['Name'] else pytest.mark.long, id=m['Name']
        )
        for m in MODELS
    ],
)
def test_multiply_adds_match_the_model(model):
    assert zoo.measure(ROOT, model)['FLOPs'] == pytest.approx(model['Metadata']['FLOPs'], rel=1e-3)


def test_tables_match_the_metafiles():
    done = subprocess.run([sys.executable, SCRIPT, '--check'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_stale_table_is_found(tmp_path):
    for file in ('model-index.yml', 'README.md', 'README_zh-CN.md'):
        (tmp_path / file).write_text((ROOT / file).read_text())
    for file in (*(ROOT / 'configs').glob('*/*.[my][dm]*'), *(ROOT / 'projects').glob('*/*.[my][dm]*')):
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text())
    assert zoo.stale_readmes(tmp_path, write=False) == []
    metafile = tmp_path / 'configs/coco/metafile.yml'
    metafile.write_text(metafile.read_text().replace(': 41.2', ': 41.3'))
    stale = zoo.stale_readmes(tmp_path, write=True)
    assert {file.relative_to(tmp_path).as_posix() for file in stale} == {
        'configs/coco/README.md',
        'README.md',
        'README_zh-CN.md',
    }
    assert '41.3' in stale[0].read_text() and zoo.stale_readmes(tmp_path, write=False) == []


def test_readme_without_markers_is_named():
    with pytest.raises(ValueError, match='README.md: expected the lines .* exactly once each'):
        zoo.replace_table('text', '| table |', 'README.md')
