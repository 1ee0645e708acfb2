"""Safe reading of checkpoints from files and addresses. Code in a file is never run.

Every file is read by ``torch.load(weights_only=True)``. Checkpoints of mmengine's runner hold more than tensors: log
histories, settings and NumPy arrays. Each of these objects is read as an empty placeholder. The classes to replace are
``_PLACEHOLDERS`` and all classes of mmengine that the file names. A file with any other object is refused.
"""

import argparse
import codecs
import contextlib
import hashlib
import pickle
import re
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlparse

import torch


def is_address(source: str | Path) -> bool:
    """Return whether the source of a checkpoint is an address instead of a file.

    Args:
        source (str | Path): File, or address such as ``'https://...'``.

    Returns:
        bool: True for an address of any scheme.
    """
    return '://' in str(source)


def local_file(source: str | Path) -> str:
    """Return the local file of a checkpoint, and download it first if necessary.

    Downloads are cached in the folder ``checkpoints`` of PyTorch's hub folder, with one subfolder per address.

    Args:
        source (str | Path): File, or http or https address.

    Returns:
        str: Local file.

    Raises:
        ValueError: If the address has another scheme, or the download fails.
    """
    source = str(source)
    if not is_address(source):
        return source
    address = urlparse(source)
    if address.scheme not in ('http', 'https'):
        raise ValueError(f'{source}: expected a file, or an http or https address; download the file and give its path')
    folder = Path(torch.hub.get_dir(), 'checkpoints', hashlib.sha256(source.encode()).hexdigest()[:16])
    name = Path(address.path).name
    file = folder / (name if name not in ('', '..') else 'checkpoint.pth')
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(source, str(file), progress=sys.stderr.isatty())
        except (OSError, HTTPException, ValueError) as error:
            raise ValueError(f'{source} cannot be downloaded: {error}; check the address and the network') from None
    return str(file)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of the authors. It may hold tensors, containers and an ``argparse.Namespace``.

    Args:
        path (str | Path): File of PyTorch, or of safetensors if its name ends in ``.safetensors``.

    Returns:
        dict: Content of the file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not a checkpoint, is truncated or holds other objects, or if it needs safetensors,
            which is not installed.
    """
    return _read(path, [argparse.Namespace])


def load_weights(source: str | Path) -> dict[str, Any]:
    """Read the checkpoint from which a backbone or a model starts.

    Args:
        source (str | Path): File of PyTorch, of mmengine's runner or of safetensors, or an http or https address.

    Returns:
        dict: Content of the file. Objects other than tensors and containers are replaced by empty placeholders. A file
        of safetensors becomes a dict with ``state_dict`` and ``meta``, whose values are strings.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: As in :func:`read_checkpoint` and :func:`local_file`.
    """
    file = local_file(source)
    try:
        content = _read(file, [*_PLACEHOLDERS, *_mmengine_placeholders(file)])
        if not file.endswith('.safetensors'):
            return content
        with import_safetensors(file).safe_open(file, 'pt') as opened:
            return dict(state_dict=content, meta=opened.metadata() or {})
    except ValueError as error:
        if not is_address(source):
            raise
        # Otherwise the cache would return a damaged download again.
        Path(file).unlink(missing_ok=True)
        raise ValueError(f'{source}: {error}. The download was removed; try again') from None


def import_safetensors(path: str | Path) -> ModuleType:
    """Import the package ``safetensors``.

    Args:
        path (str | Path): File to read or write with it, for the message.

    Returns:
        module: ``safetensors``.

    Raises:
        ValueError: If the package is not installed.
    """
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise ValueError(f'{path} needs the package safetensors: pip install safetensors') from None
    return safetensors


def _read(path: str | Path, safe_globals: list[type]) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist')
    with path.open('rb') as file:
        start = file.read(512).removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if start.startswith((b'<!', b'<html', b'<?xml')):
        raise ValueError(f'{path} is a web page, not a checkpoint: download the file itself')
    if path.suffix == '.safetensors':
        safetensors = import_safetensors(path)
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, ValueError) as error:
            raise ValueError(
                f'{path} cannot be read as safetensors, it may be cut off: {error}; copy it again'
            ) from None
    if _is_script(path):
        # PyTorch before 2.6 runs the code of such archives even with weights_only.
        raise ValueError(
            f'{path} is refused: it is a TorchScript or tar archive, which may run code when it is read; give a file '
            'that torch.save wrote, with a state dict'
        )
    try:
        with _admit(safe_globals):
            loaded = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:
        # For files of other formats, the unpickler raises exceptions of many types.
        if match := re.search(r'GLOBAL [\w.]+|unrecognized function', str(error), re.I):
            raise ValueError(
                f'{path} is refused: it holds an object that may run code when it is read ({match[0]}). Allowed are '
                f'tensors, containers, settings and log histories{_OLD_TORCH}. Give a file with only the state dict'
            ) from None
        message = str(error).partition('WeightsUnpickler error:')[2] or str(error)
        reason = (message.strip() or type(error).__name__).splitlines()[0][:120]
        raise ValueError(f'{path} is not a checkpoint of PyTorch, or is cut off ({reason})') from None
    if not isinstance(loaded, dict):
        raise ValueError(f'{path} holds a {type(loaded).__name__}: expected a dict of weights')
    return loaded


def _is_script(path: Path) -> bool:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith('/constants.pkl') for name in archive.namelist())
    return tarfile.is_tarfile(path)


_OLD_TORCH = '' if hasattr(torch.serialization, 'add_safe_globals') else ' (the last two need PyTorch 2.4 or newer)'
# PyTorch has one list of safe globals per process.
_LOCK = threading.Lock()


@contextlib.contextmanager
def _admit(classes: list[Any]) -> Iterator[None]:
    serialization = torch.serialization
    if not hasattr(serialization, 'add_safe_globals'):
        # PyTorch before 2.4 can read only tensors and containers safely.
        yield
        return
    with _LOCK:
        # The user's list may allow the real classes, which would take precedence over the placeholders.
        before = list(serialization.get_safe_globals())
        serialization.clear_safe_globals()
        serialization.add_safe_globals(classes)
        try:
            yield
        finally:
            serialization.clear_safe_globals()
            serialization.add_safe_globals(before)


class _Placeholder:
    """Empty replacement of an object that is not needed."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass


def _placeholder(full_name: str, base: type = _Placeholder) -> type:
    # PyTorch 2.4 finds an allowed class by its own name only, so the placeholder takes the name of the original class.
    module, _, name = full_name.rpartition('.')
    return type(name, (base,), dict(__module__=module, __qualname__=name))


class _Attribute(_Placeholder):
    """Empty replacement of ``getattr`` on a placeholder. mmengine pickles ``getattr(HistoryBuffer, 'mean')``."""

    def __init__(self, owner: object, name: str) -> None:
        # An attribute of a real object may be code.
        if not (isinstance(owner, type) and issubclass(owner, _Placeholder)) or name.startswith('__'):
            raise pickle.UnpicklingError(f'GLOBAL builtins.getattr of {name}')


# Pickles of protocol 2 name the module `__builtin__`. PyTorch before 2.5 does not translate it to `builtins`.
_BUILTINS = ('builtins', '__builtin__')
_NAMES = (
    'argparse.Namespace',
    '_codecs.encode',
    'collections.Counter',
    'collections.defaultdict',
    'mmengine.config.config.ConfigDict',
    'mmengine.logging.history_buffer.HistoryBuffer',
    'mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler',
    'numpy.ndarray',
    'numpy.dtype',
    *(f'numpy.{core}.multiarray.{name}' for core in ('core', '_core') for name in ('_reconstruct', 'scalar')),
    *(f'{module}.{name}' for module in _BUILTINS for name in ('set', 'frozenset', 'slice', 'complex')),
)
_PLACEHOLDERS = [_placeholder(f'{module}.getattr', _Attribute) for module in _BUILTINS]
_PLACEHOLDERS += [_placeholder(name) for name in _NAMES]


def _mmengine_placeholders(path: str) -> list[type]:
    """Return placeholders for all classes of mmengine in a file, if this version of PyTorch can list them."""
    list_globals = getattr(torch.serialization, 'get_unsafe_globals_in_checkpoint', None)
    if list_globals is None or not zipfile.is_zipfile(path):
        return []
    try:
        names = list_globals(path)
    except Exception:
        # The file is damaged, which _read reports with a better message.
        return []
    known = {f'{cls.__module__}.{cls.__qualname__}' for cls in _PLACEHOLDERS}
    return [_placeholder(name) for name in names if name.startswith('mmengine.') and name not in known]
