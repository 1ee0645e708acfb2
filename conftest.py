import importlib
import os

import pytest
from mmengine.registry import DefaultScope

pytest_plugins = ['digits_workspace']
ROOT = os.path.dirname(os.path.abspath(__file__))


@pytest.fixture(scope='session')
def environment():
    """Child processes must find the package from a source tree that is not installed, too."""
    return dict(os.environ, PYTHONPATH=ROOT, OMP_NUM_THREADS='1')


@pytest.fixture(scope='session')
def root():
    return ROOT


@pytest.fixture
def float64():
    """Train in double precision, where rounding is far below a fault. In float32, a few steps amplify it."""
    import torch

    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def classifier_checkpoint(tmp_path):
    """A checkpoint file of a classifier with plain attention, and the backbone in it."""
    import torch
    from authors import REDUCED_ARCH

    from soft_mm import SOFT

    torch.manual_seed(0)
    backbone = SOFT(REDUCED_ARCH, out_type='cls_token')
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    state_dict = {f'backbone.{key}': value for key, value in backbone.state_dict().items()}
    state_dict['head.fc.weight'] = torch.zeros(10, 128)
    path = tmp_path / 'classifier.pth'
    torch.save(dict(meta=dict(normalized=False), state_dict=state_dict), path)
    return str(path), backbone


@pytest.fixture
def log(tmp_path):
    """What the current logger wrote."""
    from mmengine.logging import MMLogger

    path = tmp_path / 'log.txt'
    MMLogger.get_instance(f'log-{tmp_path.name}', log_file=str(path))
    return path.read_text


@pytest.fixture
def use():
    """Make a toolbox's scope the default one for the rest of the test, as its runner does."""
    scopes = []

    def enter(toolbox):
        pytest.importorskip(toolbox)
        importlib.import_module(f'{toolbox}.datasets')
        scopes.append(DefaultScope.overwrite_default_scope(toolbox))
        scopes[-1].__enter__()

    yield enter
    for scope in reversed(scopes):
        scope.__exit__(None, None, None)
