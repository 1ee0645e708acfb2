"""Reading of checkpoints from files and addresses: the weights arrive, and no code runs."""

import sys
import threading
from collections import Counter, OrderedDict, deque
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from authors import Harmful
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer

from soft_mm import SOFT
from soft_mm.checkpoints import load_weights, read_checkpoint
from soft_mm.checkpoints.reading import local_file
from soft_mm.inference import read_whole_model


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


def test_safe_globals_of_the_user_stay(tmp_path):
    """Reading leaves PyTorch's list of safe globals as it was."""
    if not hasattr(torch.serialization, 'get_safe_globals'):
        pytest.skip('PyTorch before 2.4 has no such list')
    torch.serialization.add_safe_globals([deque])
    before = set(torch.serialization.get_safe_globals())
    torch.save(dict(state_dict={}), tmp_path / 'weights.pth')
    load_weights(str(tmp_path / 'weights.pth'))
    assert set(torch.serialization.get_safe_globals()) == before
