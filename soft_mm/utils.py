"""Helpers for configs and models, atomic file writes, figures and devices."""

import contextlib
import importlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

# mmengine 0.10.7 reloads pkg_resources when it resolves `mmdet::`, and fails if two threads do so at once.
_CONFIG_LOCK = threading.Lock()
_CONFIG_SUFFIXES = ('.py', '.json', '.yaml', '.yml')


class DataError(ValueError):
    """Data do not fit the config or the model."""


def check_config_name(path: str | Path) -> None:
    """Check that a file has the name of a config.

    Args:
        path (str | Path): The file.

    Raises:
        ValueError: If the suffix is not one of a config.
    """
    if Path(path).suffix not in _CONFIG_SUFFIXES:
        raise ValueError(f'{path} is not a config file: expected a name that ends in {", ".join(_CONFIG_SUFFIXES)}')


def read_config(path: str | Path) -> Config:
    """Read a config file. Its ``custom_imports`` may name modules in the current directory, such as ``projects.*``.

    Args:
        path (str | Path): Config file.

    Returns:
        Config: The config.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not a config file.
    """
    with _CONFIG_LOCK:
        if os.getcwd() not in sys.path:
            # Appended, so that the folder cannot shadow installed packages.
            sys.path.append(os.getcwd())
        if not os.path.isfile(path):
            problem = 'is a folder' if os.path.isdir(path) else 'does not exist'
            raise FileNotFoundError(f'{path} {problem}: expected a config file')
        check_config_name(path)
        return Config.fromfile(path)


def dicts_in(config: Any) -> Iterator[dict[str, Any]]:
    """Yield a config and every dict in it.

    Args:
        config (Any): Dicts and lists, nested in any way.

    Yields:
        dict: Each dict, outer ones first.
    """
    if isinstance(config, dict):
        yield config
        config = list(config.values())
    if isinstance(config, (list, tuple)):
        for value in config:
            yield from dicts_in(value)


def inner_dataset(loader: dict[str, Any] | None) -> dict[str, Any]:
    """Return the data set of a dataloader's config, inside wrappers such as ``RepeatDataset``.

    Args:
        loader (dict | None): Config of a dataloader.

    Returns:
        dict: Config of the data set, empty if there is none.
    """
    dataset = (loader or {}).get('dataset') or {}
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    return dataset


def without_pretrained(model: dict[str, Any]) -> int:
    """Remove the pretrained weights of each backbone in the config of a model, because a checkpoint sets every weight.

    Args:
        model (dict): Config of the model, changed in place. Models that wrap others, such as mmdet's ``SoftTeacher``
            or a model for test-time augmentation, have their backbone at a deeper level.

    Returns:
        int: Number of backbones.
    """
    backbones = [part['backbone'] for part in dicts_in(model) if isinstance(part.get('backbone'), dict)]
    for backbone in backbones:
        backbone['init_cfg'] = None
    return len(backbones)


@contextlib.contextmanager
def toolbox_scope(cfg: Config) -> Iterator[str]:
    """Make the toolbox of a config the default scope of mmengine's registries.

    Args:
        cfg (Config): Config. Without ``default_scope`` in it, the scope is ``'mmengine'``.

    Yields:
        str: Name of the scope.
    """
    scope = cfg.get('default_scope', 'mmengine')
    if scope != 'mmengine':
        importlib.import_module(f'{scope}.models')
    with DefaultScope.overwrite_default_scope(scope):
        yield scope


def build_model(cfg: Config, backbone_only: bool = False) -> torch.nn.Module:
    """Build the model of a config in the scope of its toolbox, without applying its ``init_cfg``.

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
            # mmengine's runner also moves it into the model.
            model.setdefault('data_preprocessor', cfg.data_preprocessor)
        return MODELS.build(model)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Write a file atomically (temporary file, then rename).

    If the block raises an error, the temporary file is removed and the old file is kept.

    Args:
        path (str | Path): File to write.

    Yields:
        Path: Temporary file in the same folder, to be written by the block.
    """
    path = Path(path)
    # With the process id, parallel writers of one file use different temporary files.
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.part')
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def process_exists(process: int) -> bool:
    """Find out whether a process of this machine exists. Not for Windows, where the question itself would end it.

    Args:
        process (int): Process id.

    Returns:
        bool: Whether it exists, of whichever user.
    """
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        # Another user's process.
        pass
    return True


def remove_unfinished(folder: str | Path) -> None:
    """Remove the temporary files of :func:`atomic_path` whose processes have ended.

    Args:
        folder (str | Path): Folder in which they wrote.
    """
    for file in Path(folder).glob('.*.part'):
        writer = file.name.split('.')[-2]
        # In containers, a new process often has the id of the old one. Windows itself keeps files that are open.
        other = os.name != 'nt' and writer.isdecimal() and int(writer) != os.getpid()
        if other and process_exists(int(writer)):
            continue
        with contextlib.suppress(PermissionError):
            file.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, in UTF-8.

    Args:
        path (str | Path): File to write.
        text (str): Content.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding='utf-8')


def write_json(path: str | Path, content: object, indent: int | None = 2) -> None:
    """Write a JSON file atomically.

    Args:
        path (str | Path): File to write.
        content (object): Content that JSON can represent.
        indent (int | None): Indentation. None writes one line. Defaults to 2.
    """
    write_text(path, json.dumps(content, indent=indent) + '\n')


def make_figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """Create a matplotlib figure with a grid of axes. No display is needed.

    Args:
        rows (int): Rows of axes.
        columns (int): Columns of axes.
        size (tuple[float, float]): Width and height in inches.

    Returns:
        tuple[Figure, ndarray]: Figure, to be saved by ``figure.savefig(path)``, and axes ``(rows, columns)``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout='constrained')
    return figure, figure.subplots(rows, columns, squeeze=False)


def check_device(name: str) -> None:
    """Check that a device exists.

    Args:
        name (str): ``'cpu'``, ``'cuda'`` or ``'cuda:i'``.

    Raises:
        ValueError: If the name is unknown or the device does not exist.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ('cpu', 'cuda'):
        raise ValueError(f'device {name!r} is unknown; choose cpu, cuda or cuda:<index>')
    if device.type == 'cuda':
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(
                f'device {name!r} does not exist: PyTorch finds {count} CUDA device(s); choose another index or cpu'
            )
