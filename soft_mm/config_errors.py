"""Errors of a config in one sentence, which names the file and the key."""

import argparse
import contextlib
import difflib
import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import BaseLoop, Runner

# Functions of mmengine and of this package that build the parts of a runner, and the keys that they read.
_PARTS = {
    'build_model': 'model',
    'build_optim_wrapper': 'optim_wrapper',
    'build_param_scheduler': 'param_scheduler',
    'build_train_loop': 'train_cfg',
    'build_val_loop': 'val_cfg',
    'build_test_loop': 'test_cfg',
    'build_visualizer': 'visualizer',
    'build_log_processor': 'log_processor',
    'register_default_hooks': 'default_hooks',
    'register_custom_hooks': 'custom_hooks',
    'scale_lr': 'auto_scale_lr',
    'wrap_model': 'model_wrapper_cfg',
}
_BUILDERS = ('build_from_cfg', 'build_scheduler_from_cfg')
_BUILDING = {*_PARTS, *_BUILDERS, 'build_runner', 'init_weights', '_init_model_weights', 'toolbox_scope'}
_READING = ('_file2dict', '_parse_lazy_import')
_LONGEST_MESSAGE = 400


def add_traceback_option(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--traceback``.

    Args:
        parser (argparse.ArgumentParser): Parser of a tool that reads a config.
    """
    parser.add_argument('--traceback', action='store_true', help='show the traceback of an error, not only its message')


@contextlib.contextmanager
def config_errors(config: str | Path, show_traceback: bool = False) -> Iterator[None]:
    """Exit with one sentence if a config cannot be read, or if its model, data or another part cannot be built.

    Errors from elsewhere, such as the steps of a training, keep their traceback. If the block exits with a message
    because of an error of the config, the file and the key are put before it.

    Args:
        config (str | Path): Config file of the command line.
        show_traceback (bool): Raise all errors unchanged, also those for which the block would exit with a message.
            Defaults to False.

    Yields:
        None
    """
    try:
        yield
    except SystemExit as end:
        error = end.__context__
        if not isinstance(end.code, str) or not isinstance(error, Exception):
            raise
        if show_traceback:
            raise error from error.__cause__
        place = config_place(error, config)
        if place is None:
            raise
        # A missing base is no missing data.
        sys.exit(f'{place}: {_message(error) if _is_read(error) else end.code}')
    except Exception as error:
        place = None if show_traceback else config_place(error, config)
        if place is None:
            raise
        sys.exit(f'{place}: {_message(error)}')


def config_place(error: BaseException, config: str | Path) -> str | None:
    """Find the place in a config that caused an error.

    Args:
        error (BaseException): Error with a traceback.
        config (str | Path): Config file of the command line.

    Returns:
        str | None: The file, with a line or a key such as ``model.backbone`` if one is known. None if the error was not
        raised while a config was read or its parts were built.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [frame.f_code.co_name for frame in frames]
    if _is_read(error):
        return _place_in_file(error, config)
    if 'fromfile' in names and os.path.isfile(config):
        return f'{config}: custom_imports' if isinstance(error, ImportError) else str(config)
    if 'merge_from_dict' in names:
        return f'{config}: --cfg-options'
    loops = (frame for frame in frames if isinstance(frame.f_locals.get('self'), BaseLoop))
    if any(frame.f_code.co_name == 'run' for frame in loops):
        return None
    if _missing_key(error):
        return str(config)
    if not _BUILDING.intersection(names):
        return None
    key = _key_of_frames(frames)
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if key and unknown:
        key += f'.{unknown[1]}'
    if key and 'is not in the' in str(error) and isinstance(error, KeyError):
        key += '.type'
    return f'{config}: {key}' if key else str(config)


def _is_read(error: BaseException) -> bool:
    """Say whether an error was raised while a config file or one of its bases was read."""
    names = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
    # The syntax of a file is checked before it is read.
    return any(name in _READING or name == '_is_lazy_import' and isinstance(error, SyntaxError) for name in names)


def _missing_key(error: BaseException) -> str:
    """Return the name of a config key that is missing. Empty for other errors."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    looked_up = frame.f_code.co_name in ('__missing__', '__getattr__', '__getitem__')
    if not looked_up or frame.f_globals.get('__name__', '') != 'mmengine.config.config':
        return ''
    return re.findall(r'\w+', str(error))[-1]


def _place_in_file(error: BaseException, config: str | Path) -> str:
    """Name the file that was being read, which may be a base, with the line or ``_base_``."""
    steps = list(traceback.walk_tb(error.__traceback__))
    files = [frame.f_locals['filename'] for frame, _ in steps if frame.f_code.co_name in _READING]
    if isinstance(error, SyntaxError):
        checked = [frame.f_locals['filename'] for frame, _ in steps if frame.f_code.co_name == '_is_lazy_import']
        return f'{_relative((checked or files)[-1])}: line {_syntax_error(error).lineno}'
    if isinstance(error, FileNotFoundError) and len(files) > 1 and not os.path.exists(files[-1]):
        return f'{_relative(files[-2])}: _base_'
    file = _relative(files[-1])
    lines = [number for frame, number in steps if frame.f_code.co_filename == os.path.abspath(files[-1])]
    return f'{file}: line {lines[-1]}' if lines else file


def _syntax_error(error: SyntaxError) -> SyntaxError:
    """Return Python's own error, which mmengine may have replaced by one without a line."""
    return error.__context__ if isinstance(error.__context__, SyntaxError) else error


def _relative(path: str | Path) -> str:
    """Write a path relative to the current directory, if it is inside."""
    path = Path(path).resolve()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _key_of_frames(frames: list[FrameType]) -> str:
    """Find the key of the innermost part that was being built, such as ``model.backbone``. Empty if it is unknown."""
    configs = [value for frame in frames if isinstance(value := frame.f_locals.get('cfg'), Config)]
    if not configs:
        return ''
    # Other keys of a config are variables, and hold the same dicts once more.
    whole = {key: value for key, value in configs[0].items() if key in inspect.signature(Runner).parameters}
    key, part = '', None
    for frame in frames:
        name = frame.f_code.co_name
        phase = re.match(r'(train|val|test)_', key)
        if name in ('build_dataloader', 'build_evaluator') and phase:
            key = phase[0] + name.removeprefix('build_')
            part = whole.get(key)
        elif name in _PARTS and _PARTS[name] in whole:
            key = _PARTS[name]
            part = whole[key]
        elif name in _BUILDERS and isinstance(frame.f_locals.get('cfg'), dict):
            wanted = frame.f_locals['cfg']
            if found := _find(wanted, part):
                key, part = _join(key, found[0]), found[1]
            elif found := _find(wanted, whole):
                key, part = found
        elif name == 'init_weights' and (module := _module_name(frame, frames)):
            key, part = f'model.{module}.init_cfg', None
    return key


def _join(key: str, path: str) -> str:
    return key + path if not path or path.startswith('[') else f'{key}.{path}'


def _module_name(frame: FrameType, frames: list[FrameType]) -> str:
    """Name the module of the model whose method a frame runs. Empty if it is the model itself."""
    runners = [value for outer in frames if isinstance(value := outer.f_locals.get('self'), Runner)]
    if not runners:
        return ''
    names = {id(module): name for name, module in runners[0].model.named_modules()}
    return names.get(id(frame.f_locals.get('self')), '').removeprefix('module.')


def _find(wanted: dict[str, Any], whole: Any) -> tuple[str, Any] | None:
    """Find the dict of a config that is most like another one, which code may have copied and changed.

    Args:
        wanted (dict): Config of a part, with a ``type``.
        whole (Any): Dicts and lists, nested in any way.

    Returns:
        tuple[str, dict] | None: Path of the dict, such as ``dataset.pipeline[1]``, and the dict. None if no dict has
        the type.
    """
    best, found = 0, None
    for path, part in _paths(whole):
        if part is wanted:
            return path, part
        if part.get('type') == wanted.get('type') is not None:
            equal = sum(key in wanted and _same(value, wanted[key]) for key, value in part.items())
            if equal > best:
                best, found = equal, (path, part)
    return found


def _same(a: Any, b: Any) -> bool:
    """Compare two values of configs, which may be arrays."""
    try:
        return a is b or bool(a == b)
    except (RuntimeError, ValueError):
        return False


def _paths(whole: Any, path: str = '') -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every dict in dicts and lists with its path, outer ones first."""
    if isinstance(whole, dict):
        yield path, whole
        for key, value in whole.items():
            yield from _paths(value, f'{path}.{key}' if path else str(key))
    elif isinstance(whole, (list, tuple)):
        for number, value in enumerate(whole):
            yield from _paths(value, f'{path}[{number}]')


def _message(error: Exception) -> str:
    """Write the message of an error in one line, with a hint if a name is misspelt."""
    while isinstance(error, ImportError) and isinstance(error.__context__, ImportError):
        # mmengine's own message lists sys.path.
        error = error.__context__
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, SyntaxError):
        source = _syntax_error(error)
        return f'{source.msg}: {(source.text or "").strip()}'
    if isinstance(error, KeyError) and 'is not in the' in text:
        return text.split('. Please check')[0] + _hint_for_type(error)
    if missing := _missing_key(error):
        return f'the config has no {missing!r}'
    # Before 0.8.3, mmengine puts the names of the classes before the message.
    text = re.sub(r'^(class `\w+` in \S+: )+', '', ' '.join(text.split()))
    if not text:
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = f'{last.filename}, line {last.lineno}: {last.line}'
    if isinstance(error, FileNotFoundError) and error.filename:
        text = f'{os.path.normpath(error.filename)} does not exist'
    if len(text) > _LONGEST_MESSAGE:
        text = f'{text[:_LONGEST_MESSAGE]} ...'
    if isinstance(error, TypeError) and 'unexpected keyword argument' in text:
        return text + _hint_for_argument(error, text)
    if isinstance(error, (ValueError, FileNotFoundError)) or _is_signature(error):
        return text
    return f'{type(error).__name__}: {text} (--traceback shows the code)'


def _is_signature(error: BaseException) -> bool:
    """Return whether a TypeError says that the arguments of a part do not fit, or comes from this package."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    own = frame.f_globals.get('__name__', '').startswith('soft_mm.')
    return isinstance(error, TypeError) and (own or frame.f_code.co_name in _BUILDERS)


def _last_local(error: BaseException, name: str) -> Any:
    """Return a local variable of the innermost builder of mmengine, or None."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name in _BUILDERS]
    return frames[-1].f_locals.get(name) if frames else None


def _did_you_mean(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f'; did you mean {close[0]!r}?' if close else ''


def _hint_for_argument(error: BaseException, text: str) -> str:
    kind = _last_local(error, 'obj_cls')
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    if not inspect.isclass(kind) or not unknown:
        return ''
    known = [
        name
        for base in kind.__mro__
        if inspect.isfunction(initialise := vars(base).get('__init__'))
        for name, parameter in inspect.signature(initialise).parameters.items()
        if name != 'self' and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    return _did_you_mean(unknown[1], known)


def _hint_for_type(error: BaseException) -> str:
    kind, registry = _last_local(error, 'obj_type'), _last_local(error, 'registry')
    if not isinstance(kind, str) or registry is None:
        return ''
    scope, _, name = kind.rpartition('.')
    current = DefaultScope.get_current_instance()
    scope = scope or (current.scope_name if current else '')
    if scope.isidentifier():
        try:
            importlib.import_module(scope)
        except ImportError as failed:
            return f', because {scope} cannot be imported: {failed}'
    known: list[str] = []
    while registry is not None:
        known += registry.module_dict
        registry = registry.parent
    return _did_you_mean(name, known)
