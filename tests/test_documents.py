"""Examples, links, commands and messages of the documents work, and the site builds from them."""

import ast
import json
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import cv2
import pytest
import torch
from mmengine.config import Config

from benchmarks.ablations import ABLATIONS
from soft_mm import SOFT
from soft_mm.checkpoints import to_official
from soft_mm.utils import build_model

ROOT = Path(__file__).resolve().parents[1]
PATTERNS = ('*.md', 'docs/**/*.md', 'configs/**/*.md', 'projects/**/*.md', 'benchmarks/*.md')
DOCUMENTS = sorted(file for pattern in PATTERNS for file in ROOT.glob(pattern))
PAGES = [file for file in DOCUMENTS if file.is_relative_to(ROOT / 'docs')]
GUIDE = ROOT / 'docs/replace_backbone.md'


def name_of(file):
    return file.relative_to(ROOT).as_posix()


def read(file):
    return file.read_text(encoding='utf-8')


def broken_links(text, folder, root=ROOT):
    """Return the relative links and inclusions that point to no file or to no heading of a file."""
    broken = [file for file in re.findall(r'^--8<-- "([^":]+)', text, re.MULTILINE) if not (root / file).exists()]
    for link in re.findall(r'\]\((?!https?://|#)([^)]+)', text):
        file, _, anchor = link.partition('#')
        path = folder / file
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(link)
    return broken


def anchors(document):
    """Return the anchors of the headings of a document."""
    headings = re.findall(r'^#+ (.+)$', read(document), re.MULTILINE)
    return {re.sub(r'\s+', '-', re.sub(r'[^\w\s-]', '', heading).strip().lower()) for heading in headings}


def missing_programs(text):
    """Return the programs, modules and `make` targets that a text mentions and the repository does not have."""
    # The guides run tools from a folder of the user.
    text = text.replace('$SOFT_MM/', '')
    files = re.findall(r'(?<![\w./-])((?:tools|\.dev_scripts)/\w+\.(?:py|sh))', text)
    # A walk writes its own programs.
    shown = re.findall(r'^```python\n# (\w+\.py)$', text, re.MULTILINE)
    files += [name for name in re.findall(r'python (\S+\.py)', text) if name not in shown]
    modules = re.findall(r'python -m ((?:benchmarks|projects)(?:\.\w+)*)', text)
    targets = re.findall(r'^([a-z-]+):', read(ROOT / 'Makefile'), re.MULTILINE)
    return [
        *(file for file in files if not (ROOT / file).is_file()),
        *(name for name in modules if not is_program(ROOT.joinpath(*name.split('.')))),
        *(name for name in re.findall(r'(?:^|`)make ([a-z][a-z-]*)', text, re.MULTILINE) if name not in targets),
    ]


def missing_files(text):
    """Return the missing files among those that a page of the site names in code font instead of linking to them."""
    names = re.findall(r'(?<![\w./-])((?:configs|projects|tests)/[\w./-]+\.(?:py|md))', text)
    names += re.findall(r'`((?:configs|projects)/[a-z_\d]+)`', text)
    return [name for name in names if not (ROOT / name).exists()]


def is_program(path):
    return (path / '__main__.py').is_file() or path.with_suffix('.py').is_file()


def python_blocks(document):
    return re.findall(r'^```python\n(.*?)^```', read(document), re.DOTALL | re.MULTILINE)


def file_name(block):
    """Return the name of the file that an example shows, which is its first line. None for other examples."""
    match = re.match(r'# (\w+\.py)\n', block)
    return match and match[1]


def programs(document):
    """Return the Python examples of a document. Examples without imports are configs."""
    blocks = (block for block in python_blocks(document) if not file_name(block))
    return [block for block in blocks if re.search(r'^(import|from) ', block, re.MULTILINE)]


def write_files(document, folder):
    """Write the examples of a document whose first line is a file name. Return the files."""
    files = []
    for block in python_blocks(document):
        if name := file_name(block):
            files.append(folder / name)
            files[-1].write_text(block)
    return files


@pytest.mark.parametrize('document', DOCUMENTS, ids=name_of)
def test_links_point_to_files(document):
    assert broken_links(read(document), document.parent) == []


@pytest.mark.parametrize('document', [file for file in DOCUMENTS if file.name != 'CHANGELOG.md'], ids=name_of)
def test_programs_exist(document):
    assert missing_programs(read(document)) == []


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_named_files_exist(page):
    assert missing_files(read(page)) == []


def test_broken_link_and_missing_program_are_found():
    text = (
        '[a](README.md) [b](docs/none.md#top) ![c](https://example.org/none) [d](README.md#none)\n--8<-- "none.md:a"\n'
    )
    assert broken_links(text, ROOT) == ['none.md', 'docs/none.md#top', 'README.md#none']
    text = 'python tools/train.py; `tools/none.sh`; python -m benchmarks; python -m projects.none\n'
    text += '`make test`; `make none`; python $SOFT_MM/tools/none.py'
    assert missing_programs(text) == ['tools/none.sh', 'tools/none.py', 'tools/none.py', 'projects.none', 'none']
    assert missing_files('`projects/listops`, `configs/none.py`, `tests/test_zoo.py`') == ['configs/none.py']


@pytest.mark.parametrize(
    'document, config',
    [
        *((readme, 'my_mask_rcnn.py') for readme in ('README.md', 'README_zh-CN.md')),
        *(
            ('docs/replace_backbone.md', f'my_{name}.py')
            for name in ('mask_rcnn', 'digits', 'semantic_fpn', 'classifier')
        ),
    ],
)
def test_config_example_builds_in_another_folder(document, config, tmp_path):
    """In a new process that imports only the toolbox: mmengine must import the plugin."""
    assert tmp_path / config in write_files(ROOT / document, tmp_path)
    code = f"""
import importlib, torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
cfg = Config.fromfile({config!r})
init_default_scope(cfg.default_scope)
cfg.model.backbone.init_cfg = None
model = importlib.import_module(cfg.default_scope + '.registry').MODELS.build(cfg.model).eval()
with torch.no_grad():
    features = model.extract_feat(torch.rand(1, 3, 64, 64))
print(type(model.backbone).__name__, sum(parameter.numel() for parameter in model.parameters()), len(features))
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split()[-3:-2] == ['SOFT'], done.stderr[-2000:]
    if config == 'my_mask_rcnn.py' and document.startswith('docs'):
        assert f'│ {int(done.stdout.split()[-2]) / 1e6:.2f} M ' in read(ROOT / document)


def script_of_section(document, heading):
    """Turn the examples of a section into one shell script: files are written, and commands are run."""
    section = re.search(rf'^## {heading}\n(.*?)(?=^## |\Z)', read(document), re.DOTALL | re.MULTILINE)[1]
    parts = []
    for language, block in re.findall(r'^```(python|bash)\n(.*?)^```', section, re.DOTALL | re.MULTILINE):
        if language == 'python':
            block = f"cat > {file_name(block)} <<'END_OF_FILE'\n{block}END_OF_FILE\n"
        parts.append(block.replace('/path/to/soft_mm', str(ROOT)))
    return ''.join(parts)


@pytest.mark.long
def test_walk_with_your_own_data(tmp_path, environment):
    """All commands, from an empty folder to predictions. The metrics are not below those that the page gives."""
    page = ROOT / 'docs/get_started.md'
    environment = dict(environment, PATH=f'{sys.exec_prefix}/bin:{environment["PATH"]}')
    command = ['bash', '-euc', script_of_section(page, 'Your own data')]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    documented = re.findall(r'^\| `(my_\w+)\.py` \| `(\S+)` \| ([\d.]+) ', read(page), re.MULTILINE)
    assert {name for name, _, _ in documented} == {'my_detector', 'my_classifier', 'my_segmentor'}
    for name, metric, value in documented:
        (scalars,) = (tmp_path / 'my_shapes/work_dirs' / name).rglob('scalars.json')
        measured = json.loads(scalars.read_text().splitlines()[-1])
        # Runs on other machines differ by rounding.
        assert measured[metric] >= float(value) - (10 if float(value) > 1 else 0.1), (name, metric)
    for folder in ('vis', 'segmentor/vis'):
        pictures = {path.name for path in (tmp_path / 'my_shapes/outputs' / folder).iterdir()}
        assert pictures == {f'{number:03}.png' for number in range(40)}
    assert len(list((tmp_path / 'my_shapes/outputs/classifier/vis').iterdir())) == 23


OUTPUTS = {
    'README.md': ['[(1, 64, 128, 160), (1, 128, 64, 80), (1, 320, 32, 40), (1, 512, 16, 20)]', 'torch.Size([2, 512])'],
    'docs/attention.md': [
        "newton_iterations=5 has no effect with solver='cholesky'",
        'NystromAttention',
        'torch.Size([1, 4032, 64])',
        'torch.Size([4, 2048, 64])',
        'padding changes nothing: True',
        'torch.Size([2, 10, 4])',
        '(1, 512, 2, 3)',
    ],
    'docs/deployment.md': ['thing '],
    'docs/configs.md': ['mask-rcnn_soft-tiny-norm_fpn_1x_coco.py'],
}
OUTPUTS['README_zh-CN.md'] = OUTPUTS['docs/index.md'] = OUTPUTS['README.md']


@pytest.fixture
def exported(tmp_path):
    """A folder with the image and the exported models that docs/deployment.md reads."""
    pytest.importorskip('onnxruntime', reason='requirements/openmmlab.txt has no onnxruntime')
    from soft_mm.export import export_onnx, photographs

    (tmp_path / 'config.py').write_text(
        f"""
_base_ = '{ROOT}/configs/imagenet/soft-tiny_8xb128_in1k.py'
model = dict(
    backbone=dict(arch=dict(_delete_=True, embed_dims=(8, 8, 8, 8), num_heads=(1, 1, 1, 1), depths=(1, 1, 1, 1))),
    head=dict(in_channels=8),
)
"""
    )
    model = build_model(Config.fromfile(tmp_path / 'config.py'))
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'model.pth')
    export_onnx(tmp_path / 'config.py', tmp_path / 'model.pth', tmp_path / 'classifier.onnx', (64, 64))
    (tmp_path / 'detector.py').write_text(
        f"""
_base_ = '{ROOT}/configs/coco/mask-rcnn_soft-tiny-norm_fpn_1x_coco.py'
model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=(8, 8, 8, 8), num_heads=(1, 1, 1, 1), depths=(1, 1, 1, 1)), init_cfg=None
    ),
    neck=dict(in_channels=[8, 8, 8, 8]),
    # The scores of a single class are about 0.5 without training, above the threshold of the example.
    roi_head=dict(bbox_head=dict(num_classes=1), mask_head=dict(num_classes=1)),
)
test_dataloader = dict(dataset=dict(metainfo=dict(classes=('thing',), palette=[(0, 200, 0)])))
"""
    )
    model = build_model(Config.fromfile(tmp_path / 'detector.py'))
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'detector.pth')
    export_onnx(tmp_path / 'detector.py', tmp_path / 'detector.pth', tmp_path / 'detector.onnx', (64, 96), check=False)
    picture = photographs((), 1, (80, 90))[0].transpose(1, 2, 0)
    cv2.imwrite(str(tmp_path / 'image.jpg'), picture)
    (tmp_path / 'data/calibration').mkdir(parents=True)
    cv2.imwrite(str(tmp_path / 'data/calibration/0.png'), picture)
    return tmp_path


@pytest.mark.parametrize('document', [file for file in DOCUMENTS if programs(file)], ids=name_of)
def test_python_examples_run(document, request):
    folder = request.getfixturevalue('exported') if document.name == 'deployment.md' else ROOT
    code = f'for block in {programs(document)!r}:\n    exec(block, dict(__name__="__main__"))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    for output in OUTPUTS.get(name_of(document), []):
        assert output in done.stdout


@pytest.mark.parametrize(
    'message, old, new',
    [
        ("SOFT does not take the keywords ['depth', ", '_delete_=True, **backbone', '**backbone'),
        (
            "attention keys ['max_landmarks', 'solver'] are unknown to NystromAttention",
            'normalized=True',
            "type='NystromAttention'",
        ),
        ("newton_iterations=5 has no effect with solver='cholesky'", 'max_landmarks=49', 'newton_iterations=5'),
        (
            'expected input[1, 64, 16, 16] to have 256 channels, but got 64 channels instead',
            'in_channels=[64, 128, 320, 512]',
            '',
        ),
        ('input of 24x64 pixels: expected both sides >= 32', '', ''),
    ],
)
def test_mistake_in_a_config_has_the_documented_message(message, old, new, tmp_path):
    assert f'`{message}' in read(GUIDE)
    config = write_files(GUIDE, tmp_path)[0]
    text = read(config).replace('init_cfg=weights', 'init_cfg=None')
    assert old in text
    config.write_text(text.replace(old, new))
    with pytest.raises((RuntimeError, TypeError, ValueError)) as raised:
        model = build_model(Config.fromfile(config)).eval()
        model.extract_feat(torch.rand(1, 3, 24 if not old else 64, 64))
    assert message in str(raised.value)


def test_unsuitable_checkpoint_has_the_documented_message(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = dict(embed_dims=(16, 32, 48, 64), num_heads=(1, 2, 3, 4), depths=(1, 1, 1, 1))
    state_dict = {f'backbone.{key}': value for key, value in SOFT(small).state_dict().items()}
    torch.save(to_official(state_dict), 'authors.pth')
    torch.save(dict(state_dict=state_dict), 'other.pth')
    torch.save(dict(state_dict=SOFT(small)), 'code.pth')
    whole = {f'backbone.{key}': value for key, value in SOFT('tiny').state_dict().items()}
    torch.save(dict(meta=dict(normalized=True), state_dict=whole), 'norm.pth')
    for checkpoint, message in {
        'classifier.pth': "init_cfg names the checkpoint 'classifier.pth', which does not exist",
        'authors.pth': "has the authors' names: convert it by",
        'other.pth': 'does not fit this SOFT backbone',
        'norm.pth': 'as recorded by tools/convert_checkpoint.py, but the config has normalized=',
        'code.pth': 'is refused: it holds an object that may run code when it is read',
    }.items():
        assert f'`{message}`' in read(GUIDE)
        backbone = SOFT('tiny', init_cfg=dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.'))
        with pytest.raises((FileNotFoundError, ValueError), match=re.escape(message)):
            backbone.init_weights()


def public_names():
    """Return the full names of the public classes, functions and methods of soft_mm that have a docstring."""

    def names(node, prefix):
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)) and child.name[0] != '_' and ast.get_docstring(child):
                yield f'{prefix}.{child.name}'
                if isinstance(child, ast.ClassDef):
                    yield from names(child, f'{prefix}.{child.name}')

    for file in (ROOT / 'soft_mm').rglob('[!_]*.py'):
        yield from names(ast.parse(read(file)), '.'.join(file.relative_to(ROOT).with_suffix('').parts))


def test_ablations_in_the_documents_exist():
    pages = [ROOT / 'docs/long_inputs.md', ROOT / 'benchmarks/README.md']
    named = {name for page in pages for name in re.findall(r'@([a-z]+(?:-[a-z]+)+)', read(page))}
    assert named == set(ABLATIONS)


def test_api_has_every_module():
    modules = {'.'.join(file.relative_to(ROOT).with_suffix('').parts) for file in (ROOT / 'soft_mm').rglob('[!_]*.py')}
    documented = {name for page in PAGES for name in re.findall(r'^::: ([\w.]+)', read(page), re.MULTILINE)}
    assert modules - documented == {'soft_mm.version'}


@pytest.mark.skipif(
    'onedl-mmengine' not in packages_distributions().get('mmengine', ()),
    reason='requirements/openmmlab.txt has no MkDocs',
)
def test_site_builds_and_needs_no_network(tmp_path):
    command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = [read(page) for page in tmp_path.rglob('*.html')]
    assert [name for name in public_names() if not any(f'id="{name}"' in html for html in pages)] == []
    for html in pages:
        assert re.findall(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="?https?:[^>]*>', html) == []
        # Markup of docstrings that is left as it was, outside the source code.
        assert not re.search(r':(?:func|class|mod|meth|data):<code>', html)
