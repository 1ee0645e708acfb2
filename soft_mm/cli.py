"""What command-line tools share: arguments and the runner of a config of any toolbox, and how long jobs end."""

import argparse
import contextlib
import os
import signal
import sys
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner


def runner_parser(description):
    """A parser with the arguments that every run of a config has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='folder of logs and checkpoints (default: work_dirs/<config name>)')
    parser.add_argument('--amp', action='store_true', help='mixed precision')
    parser.add_argument('--launcher', choices=('none', 'pytorch', 'slurm', 'mpi'), default='none', help='job launcher')
    # Given by torch.distributed.launch, read by mmengine from the environment.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='settings that override the config'
    )
    return parser


def load_config(parser, args):
    """The config of the command line, with its overrides, or the end of the program where there is no such file.

    Args:
        parser (argparse.ArgumentParser): of :func:`runner_parser`.
        args (argparse.Namespace): what it has read.
    """
    if not Path(args.config).is_file():
        parser.error(f'there is no config {args.config}; those of soft_mm are in configs/')
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs') / Path(args.config).stem)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    return cfg


def build_runner(cfg):
    """The runner of a config: mmengine's, or of the type that its ``runner_type`` names."""
    if cfg.launcher == 'pytorch' and get_device() == 'cpu':
        # mmengine's own start of several processes asks for a GPU each.
        torch.distributed.init_process_group('gloo')
        cfg.setdefault('model_wrapper_cfg', dict(type='MMDistributedDataParallel', broadcast_buffers=False))
        cfg.model_wrapper_cfg.setdefault('find_unused_parameters', cfg.get('find_unused_parameters', False))
        cfg.model_wrapper_cfg.setdefault('device_ids', None)
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


@contextlib.contextmanager
def missing_files():
    """End the program with one sentence where a file or a data set is missing, and not with a traceback."""
    try:
        yield
    except FileNotFoundError as error:
        # Weights, and data that a tool makes, are named with what to do about them.
        known = 'init_cfg' in str(error) or 'tools/make_' in str(error)
        hint = '; if it is of a data set, set the data_root of train_dataloader.dataset, and of val and test'
        sys.exit(f'{error}{"" if known else hint}')


@contextlib.contextmanager
def resumable_job():
    """End the program with one sentence, not a traceback, where its job fails or is interrupted, by SIGTERM too."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    # Or the training that it waits for would outlive it, and write beside that of the next start.
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except (RuntimeError, ImportError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit('interrupted; the same command goes on from the newest checkpoint, if one was written')
