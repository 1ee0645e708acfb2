"""Safe reading of checkpoints from files and addresses. Code in a file is never run.

Every file is read by ``torch.load(weights_only=True)``. Checkpoints of mmengine's runner hold more than tensors: log
histories, settings and NumPy arrays. Each of these objects is read as an empty placeholder. The classes to replace are
``_PLACEHOLDERS`` and no others: a toolbox may read the file again and build the real objects, so a name on this list
must be harmless to call with any arguments. A file with any other object is refused.
"""

import argparse
import codecs
import contextlib
import hashlib
import io
import os
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
        str: Local file, with ``~`` replaced by the home folder.

    Raises:
        ValueError: If the address has another scheme, or the download fails.
    """
    source = str(source)
    if not is_address(source):
        return os.path.expanduser(source)
    try:
        address = urlparse(source)
    except ValueError as error:
        raise ValueError(f'{source} is not an address: {error}') from None
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
        content = _read(file, _PLACEHOLDERS)
        if not file.endswith('.safetensors'):
            return content
        with import_safetensors(file).safe_open(file, 'pt') as opened:
            return dict(state_dict=content, meta=opened.metadata() or {})
    except _DamagedFile as error:
        if not is_address(source):
            raise
        # Otherwise the cache would return a damaged download again.
        Path(file).unlink(missing_ok=True)
        raise ValueError(f'{source}: {error}. The download was removed; try again') from None


class _DamagedFile(ValueError):
    """A file is cut off or something else than a checkpoint, so another download may help."""


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
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist')
    with path.open('rb') as file:
        head = file.read(512)
    # PyTorch recognises its archives by this alone.
    is_archive = head.startswith(b'PK\x03\x04')
    start = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if start.startswith((b'<!', b'<html', b'<?xml')):
        raise _DamagedFile(f'{path} is a web page, not a checkpoint: download the file itself')
    if path.suffix == '.safetensors':
        safetensors = import_safetensors(path)
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, ValueError) as error:
            raise _DamagedFile(
                f'{path} cannot be read as safetensors, it may be cut off: {error}; copy it again'
            ) from None
    try:
        script = _is_script(path, is_archive)
    except Exception as error:
        # Damaged archives raise exceptions of many types.
        raise _DamagedFile(f'{path} is not a checkpoint of PyTorch, or is cut off ({error})') from None
    if script:
        # PyTorch before 2.6 runs the code of such archives even with weights_only.
        raise ValueError(
            f'{path} is refused: it is a TorchScript or tar archive, which may run code when it is read; give a file '
            'that torch.save wrote, with a state dict'
        )
    try:
        with _admit(safe_globals):
            if _TRUSTS_SIZES and is_archive:
                _check_storages(path)
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
        raise _DamagedFile(f'{path} is not a checkpoint of PyTorch, or is cut off ({reason})') from None
    if not isinstance(loaded, dict):
        raise ValueError(f'{path} holds a {type(loaded).__name__}: expected a dict of weights')
    if _has_meta_tensor(loaded):
        raise ValueError(f'{path} holds tensors without data, of the device "meta": save the model with its weights')
    return loaded


def _has_meta_tensor(content: Any) -> bool:
    """Return whether nested dicts, lists and tuples hold a tensor of the device "meta"."""
    # A file can nest an object in itself, or many times.
    seen, todo = set(), [content]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor) and value.is_meta:
            return True
        if isinstance(value, (dict, list, tuple)):
            todo += value.values() if isinstance(value, dict) else value
    return False


def _is_script(path: Path, is_archive: bool) -> bool:
    if is_archive or zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            # PyTorch does not compare the checksums. 0 means that none was computed.
            for info in archive.infolist():
                if info.CRC:
                    with archive.open(info) as record:
                        while record.read(2**20):
                            pass
            return any(name.endswith('/constants.pkl') for name in archive.namelist())
    return tarfile.is_tarfile(path)


# PyTorch before 2.10 reads beyond the end of a storage whose size in the pickle is too large (CVE-2026-24747).
_TRUSTS_SIZES = tuple(map(int, torch.__version__.split('.')[:2])) < (2, 10)


def _check_storages(path: Path) -> None:
    """Compare the sizes of all storages in the pickle of a zip archive with the data in the archive."""
    from torch._weights_only_unpickler import Unpickler

    reader: Any = torch._C.PyTorchFileReader(str(path))
    sizes: dict[str, int] = {}

    def persistent_load(saved: tuple[Any, ...]) -> Any:
        _, storage_type, key, _, count = saved
        dtype = torch.uint8 if storage_type is torch.UntypedStorage else storage_type.dtype
        size = count * torch.empty((), dtype=dtype).element_size()
        if key not in sizes:
            sizes[key] = len(reader.get_record(f'data/{key}'))
        if sizes[key] != size:
            raise ValueError(f'the data of storage {key} do not have {size} bytes')
        # Without data, so nothing that the pickle does with it touches memory.
        storage = torch.UntypedStorage(size, device='meta')
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)

    unpickler: Any = Unpickler(io.BytesIO(reader.get_record('data.pkl')), encoding='utf-8')
    unpickler.persistent_load = persistent_load
    unpickler.load()


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
        ours = isinstance(owner, type) and issubclass(owner, _Placeholder) and owner.__module__.startswith('mmengine.')
        if not ours or name.startswith('__'):
            raise pickle.UnpicklingError(f'GLOBAL builtins.getattr of {name}')


# Pickles of protocol 2 name the module `__builtin__`. PyTorch before 2.5 does not translate it to `builtins`.
_BUILTINS = ('builtins', '__builtin__')
_NAMES = (
    'argparse.Namespace',
    '_codecs.encode',
    'collections.Counter',
    'collections.defaultdict',
    *(f'datetime.{name}' for name in ('date', 'datetime', 'time', 'timedelta', 'timezone')),
    *(
        f'{module}.{name}'
        for module in ('pathlib', 'pathlib._local')
        for name in ('Path', 'PosixPath', 'PurePath', 'PurePosixPath', 'PureWindowsPath', 'WindowsPath')
    ),
    'torch.torch_version.TorchVersion',
    'mmengine.config.config.ConfigDict',
    'mmengine.logging.history_buffer.HistoryBuffer',
    'mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler',
    'numpy.ndarray',
    'numpy.dtype',
    *(f'numpy.{core}.multiarray.{name}' for core in ('core', '_core') for name in ('_reconstruct', 'scalar')),
    *(
        f'{module}.{name}'
        for module in _BUILTINS
        # The second line has the usual factories of a defaultdict.
        for name in (
            *('set', 'frozenset', 'slice', 'complex'),
            *('list', 'dict', 'tuple', 'int', 'float', 'str', 'bool'),
        )
    ),
)
_PLACEHOLDERS = [_placeholder(f'{module}.getattr', _Attribute) for module in _BUILTINS]
_PLACEHOLDERS += [_placeholder(name) for name in _NAMES]
