"""Command line of the token sweeps: ``python -m benchmarks``."""

import argparse
import json
import re
import sys
import textwrap
from pathlib import Path

from rich.console import Console

from .ablations import ABLATIONS
from .report import draw_report, print_report, sweep_report, write_csv
from .sweep import SweepOptions, run_sweep
from .targets import BACKBONES, OPERATORS, parse_target

# Lines are broken by hand, because argparse would break names at their hyphens.
_DESCRIPTION = """\
Measure time, peak memory and multiply-adds of attention operators and
backbones at several input sizes, and their growth with the number of tokens.

A target has the form NAME[:OPTIONS][@ABLATION]. NAME is one of:
  - a short name from the lists below,
  - a registered backbone with its scope, such as mmdet.ResNet:depth=50,
  - a config file, whose backbone is measured.
OPTIONS override the config of the target, for example
  soft-tiny:arch=small,attention.max_landmarks=196
An ABLATION replaces one implementation choice of SOFT, for example
  soft-tiny@composed-autograd

soft-tiny is SOFT-Tiny with the attention of the configs for detection and
segmentation: solver='cholesky' and at most 49 landmarks. soft-tiny-authors has
the authors' attention.

Sizes are image sizes in pixels; one number means a square. An operator alone
works on the grid of stage 1, whose sides are a quarter of the image's.

The exit code is 1 if no measurement succeeded."""


def parse_size(text):
    match = re.fullmatch(r'(\d+)(?:x(\d+))?', text)
    height, width = (int(side) for side in (match[1], match[2] or match[1])) if match else (0, 0)
    if height < 1 or width < 1:
        raise argparse.ArgumentTypeError(
            f'{text!r}: expected HxW in pixels, such as 512x1024, or one number for a square'
        )
    return height, width


def _file(text):
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f'{text!r}: the folder {str(Path(text).parent)!r} does not exist; create it')
    return Path(text)


def _name_lists():
    lists = dict(operators=OPERATORS, backbones=BACKBONES, ablations=ABLATIONS)
    return '\n\n'.join(
        textwrap.fill(f'{kind}: {", ".join(names)}', width=79, subsequent_indent='  ', break_on_hyphens=False)
        for kind, names in lists.items()
    )


def build_parser():
    """Build the argument parser.

    Returns:
        argparse.ArgumentParser: Parser whose options have the names of the fields of :class:`SweepOptions`.
    """
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks',
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_name_lists(),
    )
    parser.add_argument('targets', nargs='+', metavar='TARGET', help='target to measure')
    parser.add_argument(
        '--sizes', type=parse_size, nargs='+', required=True, metavar='HxW', help='sizes in pixels; for a sequence 1xN'
    )
    parser.add_argument('--peer', metavar='TARGET', help='compare each target with this one, both measured alternately')
    parser.add_argument('--train', action='store_true', help='run forward and backward (default: forward)')
    parser.add_argument(
        '--batch-size', type=int, default=1, help='number of images or sequences (default: %(default)s)'
    )
    parser.add_argument('--device', default='cpu', help='cpu, cuda or cuda:i (default: %(default)s)')
    parser.add_argument(
        '--repeats', type=int, default=7, help='number of measurements per target and size (default: %(default)s)'
    )
    parser.add_argument(
        '--seconds',
        type=float,
        default=30.0,
        help='per target and size, start no further repeat after this many seconds (default: %(default)s)',
    )
    parser.add_argument(
        '--time-limit',
        type=float,
        default=300.0,
        help='stop measuring a target at a size after this many seconds (default: %(default)s)',
    )
    parser.add_argument(
        '--max-memory',
        type=float,
        metavar='GIB',
        help='memory limit of a measurement on the CPU in GiB (default: 3/4 of the available memory)',
    )
    parser.add_argument('--no-memory', dest='memory', action='store_false', help='do not measure peak memory')
    parser.add_argument('--heads', type=int, default=2, help='number of heads of an operator (default: %(default)s)')
    parser.add_argument(
        '--head-dims', type=int, default=32, help='channels per head of an operator (default: %(default)s)'
    )
    parser.add_argument('--json', type=_file, metavar='FILE', help='write the report as JSON')
    parser.add_argument('--csv', type=_file, metavar='FILE', help='write the rows as CSV')
    parser.add_argument('--png', type=_file, metavar='FILE', help='draw a figure of time and memory against tokens')
    return parser


def main():
    parser = build_parser()
    args = vars(parser.parse_args())
    files = {kind: args.pop(kind) for kind in ('json', 'csv', 'png')}
    # Outside a terminal, rich assumes 80 columns and would truncate the table.
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        targets = [parse_target(text) for text in args.pop('targets')]
        sizes, peer = args.pop('sizes'), args.pop('peer')
        peer = peer and parse_target(peer)
        for name, minimum in dict(batch_size=1, repeats=2).items():
            if args[name] < minimum:
                raise ValueError(f'--{name.replace("_", "-")} {args[name]}: expected an integer >= {minimum}')
        options = SweepOptions(**args)
        rows = run_sweep(targets, sizes, options, peer, console)
    except ValueError as error:
        parser.error(str(error))
    report = sweep_report(rows, options, peer)
    print_report(report, console)
    # Not written atomically, because a device such as /dev/stdout cannot be renamed.
    if files['json']:
        files['json'].write_text(json.dumps(report, indent=2) + '\n')
    if files['csv']:
        write_csv(report, files['csv'])
    if files['png']:
        draw_report(report, files['png'])
    return 0 if any(row['status'] == 'ok' for row in rows) else 1


if __name__ == '__main__':
    sys.exit(main())
