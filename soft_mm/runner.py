"""Arguments and runner of ``tools/train.py`` and ``tools/test.py``, for a config of any toolbox."""

import argparse
import contextlib
import os
import sys
from pathlib import Path

import torch
from mmengine.config import DictAction
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from .utils import read_config


def runner_parser(description):
    """Return a parser with the arguments that training and testing share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='folder of logs and checkpoints (default: work_dirs/<config name>)')
    parser.add_argument('--amp', action='store_true', help='mixed precision')
    parser.add_argument('--launcher', choices=('none', 'pytorch', 'slurm', 'mpi'), default='none', help='job launcher')
    # torch.distributed.launch passes it. mmengine reads it from the environment.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='settings that override the config'
    )
    return parser


def load_config(parser, args):
    """Read the config of the command line with its overrides. If there is no such file, end the program.

    Args:
        parser (argparse.ArgumentParser): Parser of :func:`runner_parser`.
        args (argparse.Namespace): Its parsed arguments.

    Returns:
        Config: The config.
    """
    if not Path(args.config).is_file():
        parser.error(f'there is no config {args.config}; configs of soft_mm are in configs/')
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = read_config(args.config)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs') / Path(args.config).stem)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    return cfg


def build_runner(cfg):
    """Build mmengine's runner, or the ``runner_type`` of the config.

    Args:
        cfg (Config): Config with a ``launcher``.

    Returns:
        Runner: The runner.
    """
    if cfg.launcher == 'pytorch' and get_device() == 'cpu':
        # mmengine's own start of several processes needs one GPU per process.
        torch.distributed.init_process_group('gloo')
        cfg.setdefault('model_wrapper_cfg', dict(type='MMDistributedDataParallel', broadcast_buffers=False))
        cfg.model_wrapper_cfg.setdefault('find_unused_parameters', cfg.get('find_unused_parameters', False))
        cfg.model_wrapper_cfg.setdefault('device_ids', None)
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


@contextlib.contextmanager
def missing_files():
    """If a file or a data set is missing, end the program with one sentence instead of a traceback."""
    try:
        yield
    except FileNotFoundError as error:
        # The message about weights already says what to do.
        hint = '; if it belongs to a data set, set the data_root of train_dataloader.dataset, and of val and test'
        sys.exit(f'{error}{"" if "init_cfg" in str(error) else hint}')
