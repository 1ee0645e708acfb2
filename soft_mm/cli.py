"""What command-line tools share: arguments and the runner of a config of any toolbox, and how long jobs end."""

import argparse
import contextlib
import os
import sys
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.registry import RUNNERS
from mmengine.runner import Runner


def runner_parser(description):
    """A parser with the arguments that every run of a config has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='folder of logs and checkpoints (default: work_dirs/<config name>)')
    parser.add_argument('--launcher', choices=('none', 'pytorch', 'slurm', 'mpi'), default='none', help='job launcher')
    # Given by torch.distributed.launch, read by mmengine from the environment.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='settings that override the config'
    )
    return parser


def build_runner(args, **settings):
    """The runner of ``args.config``, with its overrides and then ``settings`` set in the config.

    Args:
        args (argparse.Namespace): of :func:`runner_parser`.
        **settings: top-level keys of the config.

    Returns:
        Runner: of mmengine, or of the type that the config's ``runner_type`` names.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs') / Path(args.config).stem)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    for key, value in settings.items():
        cfg[key] = value
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


@contextlib.contextmanager
def resumable_job():
    """End the program with one sentence where its job fails or is interrupted, and not with a traceback."""
    try:
        yield
    except (RuntimeError, ImportError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit('interrupted; the same command goes on from the newest checkpoint')
