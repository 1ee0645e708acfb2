"""Metafiles, configs, models and tables agree."""

import subprocess
import sys

import pytest
from test_configs import ROOT
from test_zoo import empty_model

from soft_mm.analysis.zoo import PUBLISHED, measure, read_metafiles, replace_table, stale_readmes

MODELS = [model for content in read_metafiles(ROOT).values() for model in content['Models']]


def test_every_config_has_its_entry():
    configs = {str(path.relative_to(ROOT)) for path in (ROOT / 'configs').glob('[!_]*/*.py')}
    assert {model['Config'] for model in MODELS} == configs
    assert len({model['Name'] for model in MODELS}) == len(MODELS)


def test_index_is_read_by_the_model_index_package():
    modelindex = pytest.importorskip('modelindex')
    index = modelindex.load(str(ROOT / 'model-index.yml'))
    index.build_models_with_collections()
    assert len(index.models) == len(MODELS)


@pytest.mark.parametrize('model', MODELS, ids=lambda model: model['Name'])
def test_parameters_are_those_of_the_model(model):
    built = empty_model(ROOT / model['Config'])
    assert model['Metadata']['Parameters'] == sum(parameter.numel() for parameter in built.parameters())
    for result in model['Results'] or []:
        assert all(key.endswith(PUBLISHED) for key in result['Metrics'])


@pytest.mark.parametrize(
    'model',
    [pytest.param(m, marks=[] if 'tiny' in m['Name'] else pytest.mark.long, id=m['Name']) for m in MODELS],
)
def test_multiply_adds_are_those_of_the_model(model):
    assert measure(ROOT, model)['FLOPs'] == pytest.approx(model['Metadata']['FLOPs'], rel=1e-3)


def test_tables_are_those_of_the_metafiles():
    done = subprocess.run(
        [sys.executable, 'tools/make_model_zoo.py', '--check'], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_stale_table_is_found(tmp_path):
    for file in ('model-index.yml', 'README.md', 'README_zh-CN.md'):
        (tmp_path / file).write_text((ROOT / file).read_text())
    for file in (ROOT / 'configs').glob('*/*.[my][dm]*'):
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text())
    assert stale_readmes(tmp_path, write=False) == []
    metafile = tmp_path / 'configs/coco/metafile.yml'
    metafile.write_text(metafile.read_text().replace(': 41.2', ': 41.3'))
    stale = stale_readmes(tmp_path, write=True)
    assert {file.relative_to(tmp_path).as_posix() for file in stale} == {
        'configs/coco/README.md',
        'README.md',
        'README_zh-CN.md',
    }
    assert '41.3' in stale[0].read_text() and stale_readmes(tmp_path, write=False) == []


def test_readme_without_markers_is_named():
    with pytest.raises(ValueError, match='README.md must have the lines'):
        replace_table('text', '| table |', 'README.md')
