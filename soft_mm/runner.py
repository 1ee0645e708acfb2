"""Command line and runner of ``tools/train.py`` and ``tools/test.py``, for configs of any toolbox."""

import argparse
import ast
import contextlib
import errno
import json
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.registry import HOOKS, RUNNERS
from mmengine.runner import FlexibleRunner, Runner, find_latest_checkpoint

from .checkpoints.reading import is_address
from .config_errors import add_traceback_option
from .hooks import batchnorm_needs_images, no_images
from .registry import find_registered
from .utils import DataError, check_config_name, dicts_in, inner_dataset, read_config


class ConfigOptions(DictAction):
    """mmengine's ``DictAction``, which also takes dicts and quoted strings.

    ``DictAction`` removes the spaces of a string, so it cannot name every file, and does not end for ``{...}``.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Read ``KEY=VALUE`` pairs."""
        options = dict(getattr(namespace, self.dest) or {})
        for pair in values:
            key, sign, text = pair.partition('=')
            if not sign:
                parser.error(f'--cfg-options {pair}: expected KEY=VALUE')
            try:
                value = _read_literal(text)
            except (SyntaxError, ValueError):
                if text.startswith(('{', 'dict(')):
                    parser.error(
                        f'--cfg-options {key}: {text!r} is not a dict of numbers, strings, lists and dicts; quote '
                        f'strings, as in {key}="dict(type=\'name\')"'
                    )
                # A list of quoted strings.
                value = None
            options[key] = self._parse_iterable(text) if value is None else value
        setattr(namespace, self.dest, options)


def _read_literal(text: str) -> Any:
    """Read a quoted string, a string with spaces or a dict. Return None for what ``DictAction`` reads."""
    if text.startswith(('"', "'", '{', 'dict(')):
        value = _evaluate(ast.parse(text, mode='eval').body)
        return None if isinstance(value, tuple) else value
    return text if ' ' in text.strip() and not set(text) & set(',[](){}\'"') else None


def _evaluate(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict' and not node.args:
        if any(keyword.arg is None for keyword in node.keywords):
            raise ValueError('** in a dict')
        return {str(keyword.arg): _evaluate(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Set):
        raise ValueError('a set')
    return ast.literal_eval(node)


def runner_parser(description: str) -> argparse.ArgumentParser:
    """Build a parser with the arguments that training and testing share.

    Args:
        description (str): Description of the program.

    Returns:
        argparse.ArgumentParser: The parser.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='folder of logs and checkpoints (default: work_dirs/<config name>)')
    parser.add_argument('--amp', action='store_true', help='use automatic mixed precision')
    parser.add_argument(
        '--launcher', choices=('none', 'pytorch', 'slurm', 'mpi'), default='none', help='launcher of a distributed job'
    )
    # torch.distributed.launch passes this argument, but mmengine reads the environment variable LOCAL_RANK.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument(
        '--cfg-options', nargs='+', action=ConfigOptions, metavar='KEY=VALUE', help='override settings of the config'
    )
    add_traceback_option(parser)
    return parser


def load_config(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Config:
    """Read the config of the command line and apply the overrides. Exit with a message if it is no config file.

    Args:
        parser (argparse.ArgumentParser): Parser of :func:`runner_parser`.
        args (argparse.Namespace): Parsed arguments.

    Returns:
        Config: The config.
    """
    if not Path(args.config).is_file():
        parser.error(f'{args.config} does not exist: expected a config file, such as those in configs/')
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    try:
        check_config_name(args.config)
    except ValueError as error:
        parser.error(str(error))
    cfg = read_config(args.config)
    cfg.launcher = args.launcher
    work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs') / Path(args.config).stem)
    cfg.work_dir = os.path.expanduser(work_dir)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        if (cfg.get(name) or {}).get('num_workers') == 0:
            # Without workers, PyTorch refuses these two settings, which the toolboxes' bases have.
            cfg[name].persistent_workers = False
            cfg[name].pop('prefetch_factor', None)
    return cfg


def find_newest_checkpoint(work_dir: str | Path) -> str | None:
    """Find the checkpoint to resume from.

    Args:
        work_dir (str | Path): Work directory of the training.

    Returns:
        str | None: The checkpoint that ``last_checkpoint`` of mmengine names, also in a folder that was moved. If there
        is none, as after a full disk, the newest of the files ``epoch_*.pth`` and ``iter_*.pth``. None without any.
    """
    named = find_latest_checkpoint(str(work_dir)) or None
    if named and (is_address(named) or os.path.exists(named)):
        return named
    if named and (moved := Path(work_dir, Path(named).name)).exists():
        return str(moved)
    files = [path for path in Path(work_dir).glob('*.pth') if re.fullmatch(r'(epoch|iter)_\d+', path.stem)]
    if not files:
        return named
    newest = str(max(files, key=lambda path: (path.stat().st_mtime_ns, int(path.stem.partition('_')[2]))))
    problem = f'names {named}, which does not exist' if named else 'is missing or empty'
    print_log(f'{work_dir}/last_checkpoint {problem}: {newest} is the newest', 'current', logging.WARNING)
    return newest


def protect_checkpoints(cfg: Config) -> None:
    """Save checkpoints by :class:`~soft_mm.hooks.SafeCheckpointHook` if the config has mmengine's own hook.

    Args:
        cfg (Config): Config of a training, changed in place. Hooks in ``custom_hooks`` stay as they are.
    """
    if cfg.get('default_hooks') is None:
        cfg.default_hooks = {}
    hook = cfg.default_hooks.get('checkpoint', dict(type='CheckpointHook'))
    if hook and find_registered(HOOKS, hook.get('type')) is CheckpointHook:
        cfg.default_hooks.checkpoint = dict(hook, type='soft_mm.SafeCheckpointHook')


def add_hooks(cfg: Config, *kinds: str) -> None:
    """Add hooks to ``custom_hooks``. A hook that the config has already keeps its options.

    Args:
        cfg (Config): Config, changed in place.
        kinds (str): Types of the hooks.
    """
    hooks = list(cfg.get('custom_hooks') or [])
    known = {str(hook.get('type')).rpartition('.')[2] for hook in hooks if isinstance(hook, dict)}
    cfg.custom_hooks = [*hooks, *(dict(type=kind) for kind in kinds if kind.rpartition('.')[2] not in known)]


def find_start(cfg: Config, resume: str | None) -> None:
    """Set the checkpoint from which a training starts.

    Args:
        cfg (Config): Config with a ``work_dir``. ``load_from`` and ``resume`` are set.
        resume (str | None): None: as the config says. A checkpoint: resume from it. ``'auto'``: resume from the newest
            checkpoint in the work dir. If there is none, start from ``load_from`` of the config.
    """
    if resume is None and cfg.get('resume') and not cfg.get('load_from'):
        # mmengine would find the checkpoint by itself and read it unchecked.
        resume = 'auto'
    if resume == 'auto':
        resume = find_newest_checkpoint(cfg.work_dir)
        if resume is None:
            cfg.resume = False
            origin = f'the weights of {cfg.load_from}' if cfg.get('load_from') else 'the beginning'
            print_log(f'--resume: {cfg.work_dir} has no checkpoint yet, so training starts from {origin}', 'current')
            return
    if resume:
        cfg.resume, cfg.load_from = True, resume


def check_resume(checkpoint: dict[str, Any], path: str) -> None:
    """Check that mmengine can resume from a checkpoint without running code in it.

    Args:
        checkpoint (dict): Content of the checkpoint, see :func:`~soft_mm.checkpoints.load_weights`.
        path (str): File of the checkpoint, for the message.

    Raises:
        ValueError: If its ``meta`` has a ``config``, which mmengine runs as Python and never writes itself, or is no
            plain dict. Placeholders as keys or as ``meta`` may hide such an entry.
    """
    meta = checkpoint.get('meta')
    if not isinstance(meta, dict) or 'config' in meta or not all(isinstance(key, str) for key in (*checkpoint, *meta)):
        raise ValueError(
            f"{path} is refused: to resume, meta must be a dict without the entry 'config', which mmengine would run "
            'as code. Give a checkpoint of mmengine, or start from it by load_from without resume'
        )


def use_mixed_precision(optim_wrapper: dict[str, Any]) -> None:
    """Train in mixed precision, on the GPU by mmengine's ``AmpOptimWrapper``, otherwise by ``CPUAmpOptimWrapper``.

    Args:
        optim_wrapper (dict): Config of the optimiser's wrapper, changed in place.
    """
    if get_device() == 'cpu':
        optim_wrapper['type'] = 'soft_mm.CPUAmpOptimWrapper'
        # For the loss in float16.
        optim_wrapper.pop('loss_scale', None)
    else:
        optim_wrapper['type'] = 'AmpOptimWrapper'
        optim_wrapper.setdefault('loss_scale', 'dynamic')


def use_test_time_augmentation(cfg: Config) -> None:
    """Set up the evaluation with test-time augmentation, as the toolboxes' own ``--tta`` does.

    Args:
        cfg (Config): Config with ``tta_model`` and ``tta_pipeline``. The model is wrapped, and the pipeline replaced.

    Raises:
        ValueError: If the config lacks one of them, or the model predicts masks, which mmdet does not merge.
    """
    missing = [name for name in ('tta_model', 'tta_pipeline') if name not in cfg]
    if missing:
        raise ValueError(f'--tta: the config has no {" and no ".join(missing)}: define them, or leave the option out')
    has_masks = any(part.get('mask_head') for part in dicts_in(cfg.model))
    if has_masks and cfg.tta_model.type.rpartition('.')[2] == 'DetTTAModel':
        raise ValueError(
            '--tta: mmdet merges the boxes of augmented images but no masks: evaluate this model without it'
        )
    inner_dataset(cfg.test_dataloader)['pipeline'] = cfg.tta_pipeline
    cfg.model = dict(cfg.tta_model, module=cfg.model)


def show_pictures(cfg: Config, folder: str) -> None:
    """Let the evaluation draw its predictions of every test image.

    Args:
        cfg (Config): Config of mmpretrain, mmdet or mmsegmentation.
        folder (str): Folder of the pictures. mmsegmentation writes to its subfolder ``vis_data/vis_image``.

    Raises:
        ValueError: If the config belongs to another toolbox, or has a launcher.
    """
    scope = cfg.get('default_scope')
    if scope not in ('mmpretrain', 'mmdet', 'mmseg'):
        raise ValueError(
            f"--show-dir: default_scope={scope!r}: expected 'mmpretrain', 'mmdet' or 'mmseg'; for another toolbox, set "
            'default_hooks.visualization in the config instead'
        )
    if cfg.get('launcher', 'none') != 'none':
        raise ValueError('--show-dir: only the first of several processes draws its pictures: leave out --launcher')
    hook: dict[str, Any] = dict((cfg.get('default_hooks') or {}).get('visualization') or {})
    folder = os.path.abspath(os.path.expanduser(folder))
    if scope == 'mmpretrain':
        hook |= dict(type='VisualizationHook', enable=True, out_dir=folder, interval=1)
    elif scope == 'mmdet':
        # mmdet joins the folder to its own; an absolute path replaces it.
        hook |= dict(type='DetVisualizationHook', draw=True, test_out_dir=folder)
    else:
        hook |= dict(type='SegVisualizationHook', draw=True, interval=1)
        cfg.visualizer.save_dir = folder
    cfg.setdefault('default_hooks', {})
    cfg.default_hooks.visualization = hook
    if scope != 'mmseg':
        # mmsegmentation adds a number to each name.
        add_hooks(cfg, 'soft_mm.PictureNameHook')


def writable_file(path: str | Path) -> Path:
    """Check that a file can be written, before the work whose result it will hold. Its folder is made.

    Args:
        path (str | Path): File, or a device such as ``/dev/stdout``. An old file keeps its content.

    Returns:
        Path: The file, with ``~`` replaced by the home folder.

    Raises:
        ValueError: If it cannot be written.
    """
    try:
        file = Path(path).expanduser()
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            file.touch()
            file.unlink(missing_ok=True)
        elif file.is_dir():
            raise IsADirectoryError('it is a folder')
        elif not os.access(file, os.W_OK):
            raise PermissionError('it is write-protected')
    except (OSError, RuntimeError) as error:
        # RuntimeError: there is no home folder.
        raise ValueError(f'{path} cannot be written: {error}; give a file in a folder where you may write') from None
    return file


def plain_values(metrics: Any) -> Any:
    """Convert metrics to values that JSON can represent.

    Args:
        metrics (Any): Numbers, arrays, tensors, and dicts and lists of them.

    Returns:
        Any: Numbers, text, lists and dicts. An object of another type becomes its text.
    """
    if isinstance(metrics, dict):
        return {str(key): plain_values(value) for key, value in metrics.items()}
    if isinstance(metrics, (list, tuple)):
        return [plain_values(value) for value in metrics]
    if isinstance(metrics, (np.ndarray, np.generic, torch.Tensor)):
        return metrics.tolist()
    return metrics if metrics is None or isinstance(metrics, (bool, int, float, str)) else str(metrics)


def revert_sync_batchnorm(model: dict[str, Any]) -> None:
    """Replace ``SyncBN`` by ``BN`` in the config of a model, because PyTorch synchronises BatchNorm on GPUs only.

    Args:
        model (dict): Config of the model, changed in place.
    """
    for part in dicts_in(model):
        if part.get('type') in ('SyncBN', 'MMSyncBN'):
            part['type'] = 'BN'


def build_runner(cfg: Config) -> Runner:
    """Build mmengine's runner, or the runner that the config names as ``runner_type``.

    Args:
        cfg (Config): Config with a ``launcher``.

    Returns:
        Runner: The runner, with a model that is built.
    """
    left_out = None
    if cfg.launcher == 'pytorch' and get_device() == 'cpu':
        # mmengine's initialisation of several processes needs one GPU per process.
        torch.distributed.init_process_group('gloo')
        wrapper = dict(
            type='MMDistributedDataParallel',
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
            device_ids=None,
        )
        cfg.model_wrapper_cfg = wrapper | dict(cfg.get('model_wrapper_cfg') or {})
        revert_sync_batchnorm(cfg.model)
        # FlexibleRunner has the option in its strategy.
        for options in (cfg, cfg.get('strategy') or {}):
            if options.get('sync_bn'):
                left_out, options['sync_bn'] = options['sync_bn'], None
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    if left_out:
        print_log(
            f'sync_bn={left_out!r} is left out, because PyTorch synchronises BatchNorm on GPUs only: each process '
            'normalises its own images',
            'current',
            logging.WARNING,
        )
    if isinstance(runner, FlexibleRunner):
        # By itself, it builds the model after the tools have checked its weights.
        runner.model = runner.strategy.build_model(runner.model)
    return runner


@contextlib.contextmanager
def full_disk(work_dir: str | Path) -> Iterator[None]:
    """Exit with one sentence instead of a traceback if a disk is full or a limit of the size of files is reached.

    Args:
        work_dir (str | Path): Work directory of the training.

    Yields:
        None
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        newest = find_newest_checkpoint(work_dir)
        kept = f'the newest checkpoint is {newest}' if newest and os.path.exists(newest) else 'there is no checkpoint'
        sys.exit(f'{error}: the training stopped, {kept}; free space in {work_dir} and go on with --resume')


def _local_in_traceback(error: BaseException, name: str, function: str | None = None) -> Any:
    """Find a local variable in the frames of a traceback, or of one function in it. None if there is none."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if name in frame.f_locals and function in (None, frame.f_code.co_name):
            return frame.f_locals[name]
    return None


@contextlib.contextmanager
def _dead_worker() -> Iterator[None]:
    """Exit with one sentence if a process that loads data died."""
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        # PyTorch notices it by a signal, or when it reads from the process.
        killed = re.search(r'DataLoader worker .*(killed by signal|exited unexpectedly)', str(error))
        reading = _local_in_traceback(error, 'self', function='_try_get_data') is not None
        if not killed and (isinstance(error, RuntimeError) or not reading):
            raise
        sys.exit(
            f'{str(error).splitlines()[0].strip().rstrip(".") if killed else type(error).__name__}. A process that '
            'loads data died, often because memory or shared memory (/dev/shm) is used up: set a smaller num_workers '
            'or batch_size of the dataloader. A training goes on with --resume'
        )


def _end_with_parent() -> None:
    """Start a thread that ends this process when its parent has ended.

    PyTorch's data processes look for their parent too, but not while they wait for it to take a large sample.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    parent = os.getppid()
    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def data_errors() -> Iterator[None]:
    """Exit with one sentence instead of a traceback if a file is missing, or data cannot be read or do not fit.

    From then on, processes that this one forks, such as those that load data, end soon after it, even if it is killed.

    Yields:
        None
    """
    if hasattr(os, 'register_at_fork'):
        os.register_at_fork(after_in_child=_end_with_parent)
    datasets = 'train_dataloader.dataset, val_dataloader.dataset and test_dataloader.dataset'
    try:
        # Twice, because the signal may arrive while another error of the dead process is handled.
        with _dead_worker(), _dead_worker():
            yield
    except FileNotFoundError as error:
        message = str(error)
        if message.startswith('Caught FileNotFoundError in DataLoader worker'):
            # The worker's traceback stands before the message itself.
            message = message.strip().splitlines()[-1]
        # The message about pretrained weights says what to do.
        hint = f'; if it belongs to a data set, set data_root of {datasets}'
        sys.exit(f'{message}{"" if "init_cfg" in message else hint}')
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        file = _local_in_traceback(error, 'annotation_file')
        if file is None:
            raise
        sys.exit(f'{file} is no JSON: {error}. The file may be empty, cut or compressed: replace it')
    except DataError as error:
        sys.exit(str(error))
    except KeyError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        dataset = frame.f_locals.get('self')
        if frame.f_code.co_name != 'parse_data_info' or frame.f_globals['__name__'] != 'mmdet.datasets.coco':
            raise
        sys.exit(f'{getattr(dataset, "ann_file", "annotation file")}: an image or annotation has no {error}: add it')
    except RuntimeError as error:
        # The data sets of mmpretrain stop here if there is no image.
        if 'Found 0 files in subfolders of' not in str(error):
            raise
        sys.exit(f'{error} Check data_root, data_prefix and extensions of {datasets}')
    except ValueError as error:
        if str(error).startswith('Expected more than 1 value per channel when training'):
            sys.exit(batchnorm_needs_images())
        # mmengine concatenates the images of a data set, which fails in NumPy without any.
        dataset = _local_in_traceback(error, 'self', function='_serialize_data')
        if dataset is None or 'need at least one array to concatenate' not in str(error):
            raise
        sys.exit(no_images(dataset))
    except cv2.error as error:
        if '!buf.empty()' not in str(error):
            raise
        sys.exit('an image file is empty: `find FOLDER -size 0` lists such files. Replace it, or leave it out')
    except AssertionError as error:
        # A worker adds its traceback to the message, with the line of code before the message itself.
        unreadable = re.findall(r'failed to load image: (.+)', str(error))
        if not unreadable:
            raise
        sys.exit(f'{unreadable[-1]} cannot be read as an image. It may be cut: replace it, or leave it out')
