"""Examples, links and commands of the documents work."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    file for pattern in ('*.md', 'docs/*.md', 'configs/**/*.md', 'projects/**/*.md') for file in ROOT.glob(pattern)
)


def name_of(file):
    return file.relative_to(ROOT).as_posix()


def broken_links(text, folder):
    """Return the relative links that point to nothing."""
    links = re.findall(r'\]\((?!https?://)([^)#]+)', text)
    return [link for link in links if not (folder / link).exists()]


def missing_programs(text):
    """Return the programs, modules and `make` targets that a text mentions and the repository does not have."""
    files = re.findall(r'(?<![\w./-])((?:tools|\.dev_scripts)/\w+\.(?:py|sh))', text)
    files += re.findall(r'python (\S+\.py)', text)
    modules = re.findall(r'python -m ((?:benchmarks|projects)(?:\.\w+)*)', text)
    targets = re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(encoding='utf-8'), re.MULTILINE)
    return [
        *(file for file in files if not (ROOT / file).is_file()),
        *(name for name in modules if not is_program(ROOT.joinpath(*name.split('.')))),
        *(name for name in re.findall(r'(?:^|`)make ([a-z][a-z-]*)', text, re.MULTILINE) if name not in targets),
    ]


def is_program(path):
    return (path / '__main__.py').is_file() or path.with_suffix('.py').is_file()


@pytest.mark.parametrize('document', DOCUMENTS, ids=name_of)
def test_links_point_to_files(document):
    assert broken_links(document.read_text(encoding='utf-8'), document.parent) == []


@pytest.mark.parametrize('document', [file for file in DOCUMENTS if file.name != 'CHANGELOG.md'], ids=name_of)
def test_programs_exist(document):
    assert missing_programs(document.read_text(encoding='utf-8')) == []


def test_broken_link_and_missing_program_are_found():
    assert broken_links('[a](README.md) [b](docs/none.md#top) ![c](https://example.org/none)', ROOT) == ['docs/none.md']
    text = 'python tools/train.py; `tools/none.sh`; python -m benchmarks; python -m projects.none\n'
    text += '`make test`; `make none`'
    assert missing_programs(text) == ['tools/none.sh', 'projects.none', 'none']


def test_user_config_inherits_from_another_folder(tmp_path):
    """The README's config of ten lines puts SOFT into mmdet's Mask R-CNN."""
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    block = readme.split('```python\n# my_mask_rcnn.py\n')[1].split('```')[0]
    path = tmp_path / 'my_mask_rcnn.py'
    path.write_text(block)
    code = f"""
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmdet.registry import MODELS
init_default_scope('mmdet')
cfg = Config.fromfile({str(path)!r})
cfg.model.backbone.init_cfg = None
model = MODELS.build(cfg.model)
print(type(model.backbone).__name__, model.neck.in_channels)
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert 'SOFT [64, 128, 320, 512]' in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize('readme', ['README.md', 'README_zh-CN.md'])
def test_readme_python_example_runs(readme):
    block = (ROOT / readme).read_text(encoding='utf-8').split('```python\nimport torch\n')[1].split('```')[0]
    done = subprocess.run([sys.executable, '-c', 'import torch\n' + block], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.strip().splitlines()[0]
        == '[(1, 64, 128, 160), (1, 128, 64, 80), (1, 320, 32, 40), (1, 512, 16, 20)]'
    )
