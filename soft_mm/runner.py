"""Command line and runner of ``tools/train.py`` and ``tools/test.py``, for configs of any toolbox."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from .utils import read_config


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
        '--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='override settings of the config'
    )
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
        cfg = read_config(args.config)
    except ValueError as error:
        parser.error(str(error))
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs') / Path(args.config).stem)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    return cfg


def build_runner(cfg: Config) -> Runner:
    """Build mmengine's runner, or the runner that the config names as ``runner_type``.

    Args:
        cfg (Config): Config with a ``launcher``.

    Returns:
        Runner: The runner.
    """
    if cfg.launcher == 'pytorch' and get_device() == 'cpu':
        # mmengine's initialisation of several processes needs one GPU per process.
        torch.distributed.init_process_group('gloo')
        cfg.setdefault('model_wrapper_cfg', dict(type='MMDistributedDataParallel', broadcast_buffers=False))
        cfg.model_wrapper_cfg.setdefault('find_unused_parameters', cfg.get('find_unused_parameters', False))
        cfg.model_wrapper_cfg.setdefault('device_ids', None)
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


@contextlib.contextmanager
def missing_files() -> Iterator[None]:
    """Exit with one sentence instead of a traceback if a file or a data set is missing.

    Yields:
        None
    """
    try:
        yield
    except FileNotFoundError as error:
        # The message about pretrained weights already says what to do.
        datasets = 'train_dataloader.dataset, val_dataloader.dataset and test_dataloader.dataset'
        hint = f'; if it belongs to a data set, set data_root of {datasets}'
        sys.exit(f'{error}{"" if "init_cfg" in str(error) else hint}')
