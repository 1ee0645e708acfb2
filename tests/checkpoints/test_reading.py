"""Reading of checkpoints from files and addresses: the weights arrive, and no code runs."""

import argparse
import datetime
import pickle
import sys
import tarfile
import threading
import zipfile
from collections import Counter, OrderedDict, defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from authors import Harmful
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.optim import OneCycleLR
from mmengine.utils import digit_version

from soft_mm import SOFT
from soft_mm.checkpoints import load_weights, read_checkpoint
from soft_mm.checkpoints.reading import local_file
from soft_mm.inference import check_weights, read_whole_model


def test_backbone_refuses_code(tmp_path):
    path, trace = tmp_path / 'harmful.pth', tmp_path / 'trace'
    state_dict = {f'backbone.{key}': value for key, value in SOFT('tiny').state_dict().items()}
    torch.save(dict(state_dict=state_dict, extra=Harmful(trace)), path)
    init_cfg = dict(type='Pretrained', checkpoint=str(path), prefix='backbone.')
    with pytest.raises(ValueError, match='harmful.pth is refused'):
        SOFT('tiny', init_cfg=init_cfg).init_weights()
    assert not trace.exists()


def test_backbone_starts_from_a_checkpoint_of_the_runner(tmp_path):
    """Log histories, milestones of schedulers and settings are skipped."""
    path, source = tmp_path / 'epoch_1.pth', SOFT('tiny')
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    others = dict(
        message_hub=dict(log_scalars=dict(loss=history), resumed_keys=OrderedDict(loss=True)),
        param_schedulers=[dict(milestones=Counter([8, 11]), seen={1, 2}, rate=np.float64(0.1), table=np.eye(3))],
        meta=dict(dataset_meta=ConfigDict(classes=('a', 'b')), shape=torch.Size([1, 2])),
    )
    torch.save(dict(others, state_dict={f'backbone.{k}': v for k, v in source.state_dict().items()}), path)
    target = SOFT('tiny', init_cfg=dict(type='Pretrained', checkpoint=str(path), prefix='backbone.'))
    target.init_weights()
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in target.state_dict().items())


class Leads:
    """Pickled as a getattr that might lead to code."""

    def __init__(self, *names):
        self.names = names

    def __reduce__(self):
        return getattr, self.names


@pytest.mark.parametrize('names', [(HistoryBuffer, '__init__'), (OrderedDict, 'get'), (dict, 'get')], ids=str)
def test_attributes_of_anything_else_are_refused(tmp_path, names):
    path = tmp_path / 'leads.pth'
    torch.save(dict(state_dict={}, extra=Leads(*names)), path)
    with pytest.raises(ValueError, match='leads.pth is refused'):
        load_weights(str(path))


def test_missing_safetensors_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    path = tmp_path / 'tiny.safetensors'
    path.write_bytes(b'\0' * 16)
    with pytest.raises(ValueError, match='pip install safetensors'):
        read_checkpoint(path)


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a local server, and the folder that it serves. Downloads go to a folder of the test."""
    folder = tmp_path / 'served'
    folder.mkdir()
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(QuietHandler, directory=str(folder))) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f'http://127.0.0.1:{http.server_port}', folder
        http.shutdown()
        thread.join()


def test_backbone_starts_from_an_address(server):
    address, folder = server
    source = SOFT('tiny', out_indices=(0,))
    torch.save(dict(state_dict={f'backbone.{k}': v for k, v in source.state_dict().items()}), folder / 'tiny.pth')
    init_cfg = dict(type='Pretrained', checkpoint=f'{address}/tiny.pth', prefix='backbone.')
    for _ in range(2):
        target = SOFT('tiny', out_indices=(0,), init_cfg=init_cfg)
        target.init_weights()
        assert all(torch.equal(value, source.state_dict()[key]) for key, value in target.state_dict().items())
        # The second backbone uses the download of the first.
        (folder / 'tiny.pth').unlink(missing_ok=True)


@pytest.mark.parametrize('whole_file', [False, True], ids=['beside weights', 'whole file'])
@pytest.mark.parametrize(
    'read',
    [
        load_weights,
        read_whole_model,
        lambda url: SOFT('tiny', init_cfg=dict(type='Pretrained', checkpoint=url)).init_weights(),
    ],
    ids=['load_weights', 'read_whole_model', 'init_cfg'],
)
def test_code_at_an_address_does_not_run(server, tmp_path, read, whole_file):
    address, folder = server
    trace = tmp_path / 'trace'
    content = Harmful(trace) if whole_file else dict(state_dict={}, extra=Harmful(trace))
    torch.save(content, folder / 'harmful.pth')
    with pytest.raises(ValueError, match='harmful.pth is refused: it holds an object that may run code'):
        read(f'{address}/harmful.pth')
    assert not trace.exists()


def test_addresses_with_one_file_name_are_kept_apart(server):
    address, folder = server
    for name in ('one', 'two'):
        (folder / name).mkdir()
        torch.save(dict(name=name), folder / name / 'epoch_1.pth')
    assert [load_weights(f'{address}/{name}/epoch_1.pth')['name'] for name in ('one', 'two')] == ['one', 'two']


def test_an_address_that_fails_is_named(server):
    with pytest.raises(ValueError, match=r'none.pth cannot be downloaded: .*404'):
        load_weights(f'{server[0]}/none.pth')
    with pytest.raises(ValueError, match='expected a file, or an http or https address'):
        load_weights('openmmlab://resnet50')
    assert local_file('folder/file.pth') == 'folder/file.pth'


needs_safe_globals = pytest.mark.skipif(
    not hasattr(torch.serialization, 'get_safe_globals'), reason='PyTorch before 2.4 has no list of safe globals'
)


@pytest.fixture
def history_file(tmp_path):
    """A checkpoint with an object of mmengine and a NumPy array."""
    content = dict(state_dict={'weight': torch.ones(2)}, log=HistoryBuffer([1.0], [1]), table=np.eye(2))
    torch.save(content, tmp_path / 'history.pth')
    return str(tmp_path / 'history.pth')


@needs_safe_globals
def test_safe_globals_of_the_user_stay_and_do_not_matter(history_file, tmp_path):
    """Reading leaves PyTorch's list of safe globals as it was, and ignores the real classes in it."""
    old = list(torch.serialization.get_safe_globals())
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([argparse.Namespace, HistoryBuffer, np.ndarray])
    try:
        before = set(torch.serialization.get_safe_globals())
        assert torch.equal(load_weights(history_file)['state_dict']['weight'], torch.ones(2))
        torch.save(dict(args=argparse.Namespace(model='soft_tiny')), tmp_path / 'theirs.pth')
        assert read_checkpoint(tmp_path / 'theirs.pth')['args'].model == 'soft_tiny'
        assert set(torch.serialization.get_safe_globals()) == before
        with pytest.raises(pickle.UnpicklingError):
            # Placeholders are gone, so PyTorch still refuses what it does not know.
            torch.load(history_file, weights_only=True)
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(old)


def test_threads_read_at_the_same_time(history_file):
    with ThreadPoolExecutor(4) as pool:
        for loaded in pool.map(load_weights, [history_file] * 60):
            assert torch.equal(loaded['state_dict']['weight'], torch.ones(2))


def test_states_of_schedulers_are_skipped(tmp_path):
    weight = torch.nn.Parameter(torch.ones(2))
    scheduler = OneCycleLR(torch.optim.SGD([weight], 0.1), eta_max=1.0, total_steps=10)
    torch.save(dict(state_dict=dict(w=weight.data), param_schedulers=[scheduler.state_dict()]), tmp_path / 'run.pth')
    assert torch.equal(load_weights(str(tmp_path / 'run.pth'))['state_dict']['w'], torch.ones(2))


class Scripted(torch.nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize('zipped', [True, False])
def test_harmless_metadata_of_other_trainers_is_skipped(tmp_path, zipped):
    meta = dict(
        losses=defaultdict(list, first=[1.0]),
        counts=defaultdict(float),
        seen=Counter('abc'),
        folder=Path('/data'),
        time=datetime.datetime.now(datetime.timezone.utc),
        duration=datetime.timedelta(seconds=3),
        torch=torch.__version__,
    )
    weights = dict(weight=torch.ones(2))
    file = tmp_path / 'other.pth'
    torch.save(dict(state_dict=weights, meta=meta), file, _use_new_zipfile_serialization=zipped)
    content = load_weights(file)
    assert torch.equal(content['state_dict']['weight'], weights['weight']) and content['meta'].keys() == meta.keys()
    assert not isinstance(content['meta']['folder'], Path)


@pytest.mark.parametrize('read', [load_weights, read_checkpoint])
def test_archives_with_code_are_refused(tmp_path, read):
    torch.jit.script(Scripted()).save(str(tmp_path / 'script.pt'))
    with tarfile.open(tmp_path / 'old.pth', 'w') as archive:
        archive.add(tmp_path / 'script.pt', 'pickle')
    for name in ('script.pt', 'old.pth'):
        with pytest.raises(ValueError, match=f'{name} is refused: it is a TorchScript or tar archive'):
            read(str(tmp_path / name))


@pytest.mark.parametrize(
    ('name', 'damaged', 'message'),
    [
        ('tiny.pth', lambda whole: whole[: len(whole) // 2], 'is cut off'),
        ('tiny.pth', lambda whole: b'<!DOCTYPE html>', 'is a web page'),
        ('tiny.safetensors', lambda whole: whole[:-4], 'cannot be read as safetensors'),
    ],
)
def test_a_damaged_download_is_not_used_again(server, name, damaged, message):
    address, folder = server
    weights = dict(weight=torch.ones(2))
    if name.endswith('.pth'):
        torch.save(dict(state_dict=weights), folder / name)
    else:
        pytest.importorskip('safetensors.torch').save_file(weights, folder / name)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(damaged(whole))
    with pytest.raises(ValueError, match=rf'{name}: .* {message}.*\. The download was removed; try again$'):
        load_weights(f'{address}/{name}')
    (folder / name).write_bytes(whole)
    assert torch.equal(load_weights(f'{address}/{name}')['state_dict']['weight'], torch.ones(2))


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('code.pth', lambda path: dict(extra=Harmful(path)), 'is refused: it holds an object that may run code'),
        ('list.pth', lambda path: [torch.ones(1)], 'holds a list: expected a dict of weights'),
        ('tiny.safetensors', lambda path: {}, 'needs the package safetensors: pip install safetensors'),
    ],
)
def test_a_download_that_is_not_damaged_is_kept(server, tmp_path, monkeypatch, name, content, message):
    """Another download would not help."""
    address, folder = server
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    torch.save(content(tmp_path / 'trace'), folder / name)
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(f'{address}/{name}')
    assert 'try again' not in str(caught.value)
    served = (folder / name).read_bytes()
    (folder / name).unlink()
    assert Path(local_file(f'{address}/{name}')).read_bytes() == served


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (dict(state_dict=dict(weight=[1.0])), r"expected a dict of tensors, but the entries \['weight'\] are not"),
        (dict(state_dict=None), 'state_dict is a NoneType: expected a dict of tensors'),
    ],
)
def test_weights_that_are_no_tensors_are_named(tmp_path, content, message):
    path = str(tmp_path / 'odd.pth')
    torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        SOFT('tiny', init_cfg=dict(type='Pretrained', checkpoint=path)).init_weights()
    with pytest.raises(ValueError, match=message):
        check_weights(torch.nn.Linear(1, 1), load_weights(path), path)


def rewrite(path, name, change):
    """Change one record of a zip archive."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    records[f'{path.stem}/{name}'] = change(records[f'{path.stem}/{name}'])
    with zipfile.ZipFile(path, 'w') as archive:
        for key, content in records.items():
            archive.writestr(key, content)


@pytest.mark.parametrize('change', [lambda data: data + bytes(4), lambda data: data[:-4]], ids=['longer', 'shorter'])
@pytest.mark.skipif(digit_version(torch.__version__) >= digit_version('2.10'), reason='PyTorch compares them')
def test_storages_of_another_size_are_refused(tmp_path, change):
    path = tmp_path / 'file.pth'
    torch.save(dict(weight=torch.arange(4.0), half=torch.zeros(3, dtype=torch.bfloat16)), path)
    rewrite(path, 'data/0', lambda data: data)
    assert torch.equal(read_checkpoint(path)['weight'], torch.arange(4.0))
    rewrite(path, 'data/0', change)
    with pytest.raises(ValueError, match='the data of storage 0 do not have 16 bytes'):
        read_checkpoint(path)


def test_tensors_without_data_are_refused_wherever_they_are(tmp_path):
    without = torch.empty(2, device='meta')
    path = tmp_path / 'meta.pth'
    for content in (dict(a=without), dict(a=[1, (torch.ones(1), dict(b=without))]), dict(a=torch.ones(1), b=[without])):
        torch.save(content, path)
        with pytest.raises(ValueError, match='holds tensors without data, of the device "meta"'):
            read_checkpoint(path)
    nested = [torch.ones(1)]
    nested.append(nested)
    torch.save(dict(a=nested), path)
    assert torch.equal(read_checkpoint(path)['a'][0], torch.ones(1))
