"""Configs and their models, files written atomically, figures and devices."""

import contextlib
import importlib
import json
import os
import sys
import threading
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

# mmengine 0.10.7 reloads pkg_resources while it resolves `mmdet::`, and fails if another thread does the same.
_CONFIG_LOCK = threading.Lock()


def read_config(path):
    """Read a config file. Its ``custom_imports`` may name modules in the current directory, such as ``projects.*``.

    Args:
        path (str | Path): Config file.

    Returns:
        Config: The config.

    Raises:
        FileNotFoundError: If the file does not exist.
    """
    with _CONFIG_LOCK:
        if os.getcwd() not in sys.path:
            # At the end, so that no installed package is hidden.
            sys.path.append(os.getcwd())
        return Config.fromfile(path)


@contextlib.contextmanager
def toolbox_scope(cfg):
    """Make the registries of a config's toolbox the default ones. Yields the name of the scope.

    Args:
        cfg (Config): Config with a ``default_scope``. Without it the scope is mmengine's.
    """
    scope = cfg.get('default_scope', 'mmengine')
    if scope != 'mmengine':
        importlib.import_module(f'{scope}.models')
    with DefaultScope.overwrite_default_scope(scope):
        yield scope


def build_model(cfg, backbone_only=False):
    """Build the model of a config in the scope of its toolbox. Its ``init_cfg`` is not applied.

    Args:
        cfg (Config): Config with a ``model``.
        backbone_only (bool): Build ``model.backbone`` alone. Defaults to False.

    Returns:
        nn.Module: The model.
    """
    with toolbox_scope(cfg):
        if backbone_only:
            return MODELS.build(cfg.model.backbone)
        model = dict(cfg.model)
        if 'data_preprocessor' in cfg:
            # mmengine's runner does the same.
            model.setdefault('data_preprocessor', cfg.data_preprocessor)
        return MODELS.build(model)


@contextlib.contextmanager
def atomic_path(path):
    """Write a file atomically. Yields a temporary path in the same folder, which is renamed to ``path`` at the end.

    If the block raises an error, the temporary file is removed and the old file stays.

    Args:
        path (str | Path): File to write.
    """
    path = Path(path)
    # The process id keeps parallel writers of one file apart.
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.part')
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file atomically (temporary file, then rename)."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding='utf-8')


def write_json(path, content, indent=2):
    """Write a JSON file atomically (temporary file, then rename)."""
    write_text(path, json.dumps(content, indent=indent) + '\n')


def make_figure(rows, columns, size):
    """Return a matplotlib figure, and its axes as a 2-D array. It needs no display.

    Args:
        rows (int): Rows of axes.
        columns (int): Columns of axes.
        size (tuple[float, float]): Width and height in inches.

    Returns:
        tuple[Figure, ndarray]: Figure and axes ``(rows, columns)``. Save it by ``figure.savefig(path, dpi=120)``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout='constrained')
    return figure, figure.subplots(rows, columns, squeeze=False)


def check_device(name):
    """Check that a device exists.

    Args:
        name (str): ``'cpu'``, ``'cuda'`` or ``'cuda:i'``.

    Raises:
        ValueError: If it does not exist.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ('cpu', 'cuda'):
        raise ValueError(f'device {name!r} is unknown; choose cpu, cuda or cuda:i')
    if device.type == 'cuda':
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(
                f'device {name!r} does not exist: PyTorch sees {count} CUDA devices; choose another or cpu'
            )
