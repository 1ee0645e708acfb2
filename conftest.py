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
