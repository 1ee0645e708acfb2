"""Hostile input: no text of a user becomes code, odd file names work, and nothing is written outside the folder."""

import argparse
import ast
import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from authors import REDUCED_ARCH, Classifier
from mmengine.config import ConfigDict
from mmengine.utils.package_utils import call_command
from PIL import Image
from programs import run_tool

from soft_mm import SOFT
from soft_mm.checkpoints import load_weights, read_checkpoint, to_official
from soft_mm.checkpoints.matching import conversion_command
from soft_mm.checkpoints.reading import local_file
from soft_mm.inference import find_images, predict, read_image, read_whole_model
from soft_mm.utils import atomic_path, read_config, write_json

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ('soft_mm', 'tools', 'benchmarks', 'projects', 'configs', '.dev_scripts')
SOURCES = sorted(
    file for folder in FOLDERS for file in (ROOT / folder).rglob('*.py') if not {'tests', '.mim'} & set(file.parts)
)
NAMES = [
    'two words',
    '\'single\' "double"',
    'new\nline',
    'ünï-图',
    '$(touch trace); `touch trace` & #',
    '[bold] {0} %s {{ x }}',
    '..dots..',
    '*',
    '~',
]
pytestmark = pytest.mark.skipif(sys.platform == 'win32', reason='Windows allows no quotes and newlines in file names')


# No text of a user becomes code.

RUN_TEXT = {
    *('eval', 'exec', 'compile', '__import__', 'builtins.eval', 'builtins.exec', 'code.interact', 'runpy.run_path'),
    *('os.system', 'os.popen', 'subprocess.getoutput', 'subprocess.getstatusoutput', 'pty.spawn'),
}
UNPICKLE = {f'{module}.{name}' for module in ('pickle', 'cloudpickle', 'dill', 'joblib') for name in ('load', 'loads')}
UNPICKLE |= {'pickle.Unpickler', 'marshal.loads', 'shelve.open', 'torch.jit.load', 'torch.hub.load', 'yaml.unsafe_load'}
PROCESSES = {f'subprocess.{name}' for name in ('run', 'Popen', 'call', 'check_call', 'check_output')}


def dangers(text):
    """Return the calls in a Python source that may run text or unpickle a file, as ``line: name``."""
    tree = ast.parse(text)
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {name.asname: name.name for name in node.names if name.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            aliases |= {name.asname or name.name: f'{node.module}.{name.name}' for name in node.names}
    lists = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = full_name(node.func, aliases)
        options = {keyword.arg: keyword.value for keyword in node.keywords}
        first = node.args[0] if node.args else options.get('args')
        if name in RUN_TEXT | UNPICKLE or name.startswith(('os.exec', 'os.spawn')) or name.endswith('.extractall'):
            bad = True
        elif name in PROCESSES:
            is_list = isinstance(first, ast.List) or (isinstance(first, ast.Name) and first.id in lists)
            bad = not is_list or not is_constant(options.get('shell'), None, False)
        elif name == 'torch.load':
            bad = not is_constant(options.get('weights_only'), True)
        elif name in ('numpy.load', 'np.load'):
            bad = not is_constant(options.get('allow_pickle'), None, False)
        elif name == 'yaml.load':
            bad = True
        else:
            bad = not name.startswith('subprocess.') and not is_constant(options.get('shell'), None, False)
        if bad:
            found.append(f'{node.lineno}: {name}')
    return found


def full_name(node, aliases):
    """Return the dotted name of a called function, with the names of imports resolved."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    parts.append(aliases.get(node.id, node.id) if isinstance(node, ast.Name) else '')
    return '.'.join(reversed(parts))


def is_constant(node, *values):
    """Return whether an argument is one of the values. A missing argument counts as None."""
    return (node.value if isinstance(node, ast.Constant) else ... if node else None) in values


@pytest.mark.parametrize('file', SOURCES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_no_text_is_run_and_no_file_is_unpickled(file):
    assert dangers(file.read_text(encoding='utf-8')) == []


@pytest.mark.parametrize(
    'text',
    [
        'eval(x)',
        'exec(open(x).read())',
        'import os\nos.system(f"rm {x}")',
        'from os import system as call\ncall(x)',
        'os.popen(x)',
        'subprocess.run(x)',
        'subprocess.run(f"rm {x}", shell=True)',
        'import subprocess as sp\nsp.check_output("ls " + x)',
        'command = ["rm", x]\nsubprocess.run(command, shell=True)',
        'run(x, shell=True)',
        'torch.load(x)',
        'torch.load(x, weights_only=False)',
        'import pickle\npickle.load(x)',
        'import numpy as np\nnp.load(x, allow_pickle=True)',
        'yaml.load(x, yaml.Loader)',
        'archive.extractall(x)',
    ],
)
def test_the_check_finds(text):
    assert len(dangers(text)) == 1


@pytest.mark.parametrize(
    'text',
    [
        'ast.literal_eval(x)',
        'model.eval()',
        'subprocess.run(["rm", x], check=True)',
        'command = ["rm", x]\nsubprocess.Popen(command)',
        'torch.load(x, weights_only=True)',
        'yaml.safe_load(x)',
        're.compile(x)',
    ],
)
def test_the_check_accepts(text):
    assert dangers(text) == []


@pytest.mark.parametrize('name', ['dist_train.sh', 'dist_test.sh'])
def test_launchers_pass_arguments_unchanged(tmp_path, name):
    """A stand-in for ``python`` prints what it receives."""
    stand_in = tmp_path / 'python'
    stand_in.write_text('#!/bin/sh\nfor argument; do printf "%s\\0" "$argument"; done\n')
    stand_in.chmod(0o755)
    arguments = [f'{NAMES[2]}.py', *['odd.pth'] * (name == 'dist_test.sh'), '2', *NAMES]
    environment = dict(os.environ, PATH=f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')
    command = [str(ROOT / 'tools' / name), *arguments]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split('\0')[-len(NAMES) - 1 : -1] == NAMES
    assert arguments[0] in done.stdout.split('\0')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['python']


@pytest.mark.parametrize('name', NAMES)
def test_printed_commands_can_be_copied_to_a_shell(name):
    command = conversion_command(f'{name}.pth', f'{name} converted.pth', normalized=True).strip('`')
    assert shlex.split(command)[2:] == [f'{name}.pth', f'{name} converted.pth', '--normalized']


# No code in a checkpoint is run, by soft_mm or by a toolbox that reads the file again.


class Call:
    """Pickled as a call of a function of mmengine, which touches a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return call_command, (['touch', self.path],)


def test_objects_that_a_toolbox_would_build_are_refused(tmp_path):
    """The toolboxes read a file again after soft_mm has checked it, and then build what soft_mm skips."""
    path, trace = tmp_path / 'call.pth', tmp_path / 'trace'
    torch.save(dict(state_dict={}, extra=Call(trace)), path)
    with pytest.raises(ValueError, match='call.pth is refused'):
        read_whole_model(path)
    assert not trace.exists()


def start_tool(monkeypatch, name, *arguments):
    """Run a tool up to its runner. Return the config of the runner, or what the tool said when it refused."""
    spec = importlib.util.spec_from_file_location(name, ROOT / 'tools' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    runners = []

    def build_runner(cfg):
        runners.append(cfg)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, 'build_runner', build_runner)
    monkeypatch.setattr(sys, 'argv', [name, *map(str, arguments)])
    err = io.StringIO()
    with contextlib.redirect_stderr(err), pytest.raises((SystemExit, KeyboardInterrupt)):
        module.main()
    return runners[0] if runners else err.getvalue()


@pytest.fixture
def config(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text("model = dict(backbone=dict(type='soft_mm.SOFT'))\ntest_cfg = dict()\n")
    return path


@pytest.mark.parametrize('option', ['--resume', '--cfg-options'])
@pytest.mark.parametrize(
    'content',
    [
        dict(meta=dict(epoch=1, iter=2, config='raise SystemExit')),
        # soft_mm reads these as placeholders, and mmengine as a dict and as text.
        dict(meta=ConfigDict(epoch=1, iter=2, config='raise SystemExit')),
        dict(meta={'epoch': 1, 'iter': 2, np.str_('config'): 'raise SystemExit'}),
        {'meta': dict(epoch=1, iter=2), np.str_('meta'): dict(epoch=1, iter=2, config='raise SystemExit')},
    ],
    ids=['dict', 'ConfigDict', 'key of NumPy', 'meta of NumPy'],
)
def test_a_config_in_a_checkpoint_is_not_run(monkeypatch, tmp_path, config, option, content):
    """mmengine runs ``meta['config']`` as Python when it resumes. It never writes this entry itself."""
    path = tmp_path / 'config.pth'
    torch.save(dict(content, state_dict={}), path)
    given = [path] if option == '--resume' else ['resume=True', f'load_from={path}']
    said = start_tool(monkeypatch, 'train', config, '--work-dir', tmp_path, option, *given)
    assert isinstance(said, str) and 'config.pth is refused' in said


def test_the_newest_checkpoint_is_read_safely_if_the_config_resumes(monkeypatch, tmp_path, config):
    torch.save(dict(state_dict={}, extra=argparse.ArgumentParser), tmp_path / 'newest.pth')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'newest.pth'))
    said = start_tool(monkeypatch, 'train', config, '--work-dir', tmp_path, '--cfg-options', 'resume=True')
    assert isinstance(said, str) and 'newest.pth is refused' in said


def test_an_evaluation_does_not_resume(monkeypatch, tmp_path, config):
    torch.save(dict(state_dict={}), tmp_path / 'weights.pth')
    cfg = start_tool(monkeypatch, 'test', config, tmp_path / 'weights.pth', '--cfg-options', 'resume=True')
    assert not cfg.get('resume')


@pytest.mark.parametrize('count', [5, 1024, 2**30])
def test_a_storage_larger_than_its_data_is_refused(tmp_path, count):
    """PyTorch before 2.10 reads memory beyond the data (CVE-2026-24747)."""
    torch.save(dict(state_dict=dict(weight=torch.ones(4))), tmp_path / 'right.pth')
    with zipfile.ZipFile(tmp_path / 'right.pth') as right, zipfile.ZipFile(tmp_path / 'wrong.pth', 'w') as wrong:
        for name in right.namelist():
            data = right.read(name)
            if name.endswith('data.pkl'):
                # The number 4 occurs in the size of the storage and in the shape.
                assert data.count(b'K\x04') == 2
                data = data.replace(b'K\x04', b'J' + count.to_bytes(4, 'little'))
            wrong.writestr(zipfile.ZipInfo(name), data)
    assert torch.equal(load_weights(tmp_path / 'right.pth')['state_dict']['weight'], torch.ones(4))
    with pytest.raises(ValueError, match='wrong.pth is not a checkpoint of PyTorch, or is cut off'):
        load_weights(tmp_path / 'wrong.pth')


def test_a_damaged_archive_is_named(tmp_path):
    path = tmp_path / 'damaged.pth'
    torch.save(dict(state_dict=dict(weight=torch.ones(4))), path)
    data = bytearray(path.read_bytes())
    for place in (match.start() for match in re.finditer(b'PK\x01\x02', bytes(data))):
        data[place] ^= 255
    path.write_bytes(data)
    with pytest.raises(ValueError, match='damaged.pth is not a checkpoint of PyTorch, or is cut off'):
        load_weights(path)


# Odd file names work.


@pytest.fixture(scope='module')
def official():
    """The authors' state dict of a small classifier."""
    model = Classifier(SOFT(REDUCED_ARCH, out_type='cls_token'), 10)
    return to_official(model.state_dict())


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('name', NAMES)
def test_the_converter_takes_any_file_name(official, tmp_path, monkeypatch, name, suffix):
    monkeypatch.chdir(tmp_path)
    source, target = tmp_path / f'{name} theirs.pth', tmp_path / f'{name} new' / f'{name} ours{suffix}'
    torch.save(official, source)
    done = run_tool('convert_checkpoint.py', source, target)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source.name, target.parent.name])
    content = load_weights(target)
    assert content['meta']['source'] == source.name and len(content['state_dict']) > 0
    # The printed config is Python in which the name is nothing but text.
    printed = ast.parse(done.stdout.split('config:\n')[1])
    assert all(isinstance(statement, ast.Assign) for statement in printed.body)
    assert str(target) in [node.value for node in ast.walk(printed) if isinstance(node, ast.Constant)]


@pytest.mark.parametrize('name', NAMES)
def test_images_are_found_by_any_name(tmp_path, name):
    folder = tmp_path / f'{name} images'
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    for file in (folder / f'{name}.png', folder / f'.{name}.PNG'):
        Image.fromarray(pixels).save(file)
    found = find_images(folder)
    assert found == sorted(map(str, folder.iterdir())) and len(found) == 2
    assert find_images(found[0]) == found[:1]
    assert all((read_image(file) == pixels).all() for file in found)


@pytest.mark.parametrize('name', NAMES)
def test_files_are_written_atomically_under_any_name(tmp_path, name):
    path = tmp_path / f'{name}.json'
    for content in (dict(name=name), [name]):
        write_json(path, content)
        assert json.loads(path.read_text(encoding='utf-8')) == content
    with pytest.raises(RuntimeError, match='halfway'), atomic_path(path) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text('half')
        raise RuntimeError('halfway')
    assert json.loads(path.read_text(encoding='utf-8')) == [name]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize('name', NAMES)
def test_configs_are_read_under_any_name(tmp_path, name):
    folder = tmp_path / f'{name} configs'
    folder.mkdir()
    (folder / f'{name} base.py').write_text('x = 1\n')
    (folder / f'{name}.py').write_text(f'_base_ = {f"./{name} base.py"!r}\ny = 2\n')
    cfg = read_config(folder / f'{name}.py')
    assert (cfg.x, cfg.y) == (1, 2)


@pytest.mark.parametrize('name', NAMES)
def test_the_complexity_is_printed_for_any_name(tmp_path, name):
    config = tmp_path / f'{name}.py'
    config.write_text("model = dict(backbone=dict(type='soft_mm.SOFT', arch='tiny', out_indices=(0,)))\n")
    done = run_tool('get_complexity.py', config, '--backbone', '--shape', 64, 64)
    assert done.returncode == 0, done.stderr
    # The title is centred and may be wrapped.
    assert ''.join(f'{name}.py'.split()) in ''.join(done.stdout.split())


# What the documents say.


@pytest.mark.parametrize('file', ['maintained', 'openmmlab', 'test'])
def test_the_licence_of_every_direct_dependency_is_listed(file):
    page = (ROOT / 'docs/security.md').read_text(encoding='utf-8')
    rows = re.findall(r'^\| .+ \| (.+) \|$', page.partition('## Licences')[2], re.MULTILINE)
    listed = {name for row in rows for name in re.split('[,;] ', row)}
    pinned = (ROOT / f'requirements/{file}.in').read_text(encoding='utf-8')
    names = set(re.findall(r'^([\w-]+)(?:\[\w+\])?==', pinned, re.MULTILINE))
    assert len(names) > 5 and names - listed == set()


# Nothing is written outside the folder.


@pytest.mark.parametrize(
    'path',
    [
        '',
        '/',
        '/.',
        '/..',
        '/a/..',
        '/../../../a.pth',
        '/%2e%2e%2fa.pth',
        '/..%2f..%2fa.pth',
        '/%2fetc%2fpasswd',
        '/..\\..\\a.pth',
        '/a.pth/',
        '/..;a',
        '/a.pth?name=../../b.pth',
        '/a.pth#/../../b.pth',
        '/a b\'"\n图.pth',
        '//etc/passwd',
    ],
)
@pytest.mark.parametrize('host', ['http://example.org', 'https://..', 'HTTP://user:../..@example.org:80'])
def test_downloads_stay_in_their_folder(tmp_path, monkeypatch, host, path):
    hub, written = tmp_path / 'hub', []

    def download(address, file, progress=True):
        Path(file).write_bytes(b'data')
        written.append(Path(file))

    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(hub))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    file = Path(local_file(host + path))
    assert [file] == written == [found for found in tmp_path.rglob('*') if found.is_file()]
    assert file.resolve().parent.parent == hub.resolve() / 'checkpoints'
    assert re.fullmatch('[0-9a-f]{16}', file.resolve().parent.name)
    # The second call finds the download of the first.
    assert local_file(host + path) == str(file) and len(written) == 1


@pytest.mark.parametrize(
    'address', ['file:///etc/passwd', 'ftp://example.org/a.pth', 's3://a/b.pth', '://a', 'http://[']
)
def test_other_addresses_are_refused(tmp_path, monkeypatch, address):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    with pytest.raises(ValueError):
        local_file(address)
    assert list(tmp_path.iterdir()) == []


HOSTILE = ['../outside', '/tmp/outside', '..', '~/outside', 'a/../../outside']


@pytest.mark.parametrize('name', HOSTILE)
def test_names_in_a_checkpoint_lead_nowhere(official, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'in').mkdir()
    args = argparse.Namespace(model=name, output=name)
    torch.save({'state_dict': official, 'args': args, name: name}, tmp_path / 'in' / 'theirs.pth')
    done = run_tool('convert_checkpoint.py', 'in/theirs.pth', 'out/ours.pth')
    assert done.returncode == 0, done.stderr
    assert {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob('*') if file.is_file()} == {
        'in/theirs.pth',
        'out/ours.pth',
    }
    assert 'plain (default)' in done.stdout and read_checkpoint('out/ours.pth')['meta']['source'] == 'theirs.pth'
    torch.save({**official, f'{name}.weight': torch.ones(1)}, tmp_path / 'in' / 'theirs.pth')
    (tmp_path / 'out' / 'ours.pth').unlink()
    done = run_tool('convert_checkpoint.py', 'in/theirs.pth', 'out/ours.pth')
    assert done.returncode == 2 and list((tmp_path / 'out').iterdir()) == []


class OnnxStandIn:
    """Stands in for :class:`soft_mm.onnx_model.OnnxModel`: a classifier of two classes."""

    task, classes, palette, mean, shape = 'classification', ['a', 'b'], None, [0.0] * 3, (None, None, None)
    made_for = (32, 32)

    def __init__(self, file):
        pass

    def predict(self, images, samples):
        for sample in samples:
            sample.set_pred_score(torch.tensor([0.25, 0.75])).set_pred_label(torch.tensor([1]))
        return samples


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draw predictions for images of the given names. Return the names of the pictures."""
    pytest.importorskip('mmpretrain')
    from soft_mm import onnx_model

    monkeypatch.setattr(onnx_model, 'OnnxModel', OnnxStandIn)

    def start(names):
        images = [tmp_path / 'images' / name for name in names]
        images[0].parent.mkdir()
        for image in images:
            Image.new('RGB', (40, 40)).save(image, 'PNG')
        pictures = onnx_model.predict_onnx([str(image) for image in images], 'model.onnx', tmp_path / 'out')
        assert pictures == tmp_path / 'out' / 'vis'
        assert {file.parent for file in tmp_path.rglob('*') if file.is_file()} == {images[0].parent, pictures}
        return sorted(file.name for file in pictures.iterdir())

    return start


def test_pictures_stay_in_their_folder(draw):
    names = [*NAMES, 'two.parts']
    assert draw([f'{name}.jpg' for name in names]) == sorted(f'{name}.png' for name in names)


def test_pictures_of_an_onnx_file_do_not_replace_each_other(draw):
    with pytest.raises(ValueError, match='several images would be drawn'):
        draw(['a.png', 'a.jpg'])


@pytest.mark.parametrize('names', [('a.png', 'a.jpg'), ('a.1.jpg', 'a.2.jpg')])
def test_pictures_of_a_classifier_do_not_replace_each_other(tmp_path, names):
    """mmpretrain drops up to two suffixes of a name."""
    pytest.importorskip('mmpretrain')
    config, checkpoint = tmp_path / 'config.py', tmp_path / 'weights.pth'
    config.write_text("default_scope = 'mmpretrain'\nmodel = dict(type='none')\n")
    torch.save(dict(state_dict={}), checkpoint)
    with pytest.raises(ValueError, match='several images have the same name'):
        predict([str(tmp_path / name) for name in names], config, checkpoint, tmp_path / 'out', 'cpu')


def test_the_note_of_the_newest_checkpoint_leads_nowhere(tmp_path):
    from projects.common.run_logs import last_checkpoint

    work_dir, outside = tmp_path / 'run', tmp_path / 'outside.pth'
    work_dir.mkdir()
    outside.touch()
    for note in ('../outside.pth', str(outside), '..', '', 'none.pth'):
        (work_dir / 'last_checkpoint').write_text(note)
        assert last_checkpoint(work_dir) is None
    (work_dir / 'outside.pth').touch()
    (work_dir / 'last_checkpoint').write_text(str(outside))
    assert last_checkpoint(work_dir) == work_dir / 'outside.pth'


@pytest.mark.parametrize('split', ['../outside', 'ABSOLUTE'])
def test_a_changed_manifest_removes_nothing_outside(tmp_path, split):
    from projects.photo_digits import dataset_files

    outside, out = tmp_path / 'outside', tmp_path / 'out'
    file = outside / 'crops' / dataset_files.CLASSES[0] / dataset_files._file_name(0)
    file.parent.mkdir(parents=True)
    file.touch()
    out.mkdir()
    split = split.replace('ABSOLUTE', str(outside))
    dataset_files._remove_files(out, {split: dict(crop=dict(length=1), scene=dict(length=1))})
    assert file.exists()


def test_the_manifest_must_be_of_the_data_set(tmp_path):
    from projects.common.manifest import read_manifest

    (tmp_path / 'file.txt').touch()
    for content in ('', '[]', '{}', json.dumps(dict(name='other', options={}, complete=True)), '{"name": '):
        (tmp_path / 'manifest.json').write_text(content)
        with pytest.raises(FileExistsError, match='nothing was written'):
            read_manifest(tmp_path / 'manifest.json', 'mine')
    assert SimpleNamespace(**read_manifest(tmp_path / 'none' / 'manifest.json', 'mine') or {}) == SimpleNamespace()
