"""Sweep the input size of attention operators and backbones: time, peak memory, multiply-adds and their growth.

A contender is one of the short names below, a registered backbone with its scope and options (mmdet.ResNet:depth=50),
or a config file, whose backbone is taken; options after a colon override, as in soft-
tiny:arch=small,attention.max_landmarks=196. soft-tiny is SOFT-Tiny with the attention of the dense configs, direct
solve and at most 49 landmarks; soft-tiny-authors has the authors'. Sizes are those of the image in pixels, and one
number is the side of a square; an operator alone works on the grid of stage 1, a quarter of either side. A variant
after an @, as in soft-tiny@composed-autograd, is SOFT the way that its engine does not take. The exit code is 1 where
no point could be measured.
"""

import argparse
import json
import math
import sys
from pathlib import Path

from rich.console import Console

from soft_mm.analysis.contenders import BACKBONES, OPERATORS, parse_contender
from soft_mm.analysis.sweep import SweepOptions, draw_report, print_report, run_sweep, sweep_report, write_csv
from soft_mm.analysis.variants import VARIANTS


def size(text):
    height, _, width = text.partition('x')
    if not (height.isdigit() and (width or height).isdigit()):
        raise argparse.ArgumentTypeError(f'{text!r}: give a size as HxW, or one number for a square')
    return int(height), int(width or height)


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='\n'.join(
            f'{kind}: {", ".join(names)}'
            for kind, names in dict(operators=OPERATORS, backbones=BACKBONES, variants=VARIANTS).items()
        ),
    )
    parser.add_argument('contenders', nargs='+', help='what to measure')
    parser.add_argument(
        '--sizes', type=size, nargs='+', required=True, metavar='HxW', help='sizes in pixels; of a sequence 1xN'
    )
    parser.add_argument('--peer', metavar='CONTENDER', help='compare the time of each with this one, in turns')
    parser.add_argument('--train', action='store_true', help='forward and backward (default: forward)')
    parser.add_argument('--batch-size', type=int, default=1, help='images (%(default)s)')
    parser.add_argument('--device', default='cpu', help='cpu, cuda or cuda:i (%(default)s)')
    parser.add_argument('--repeats', type=int, default=7, help='measurements of time at a point (%(default)s)')
    parser.add_argument(
        '--seconds', type=float, default=30.0, help='end the repeats at a point after this time (%(default)s)'
    )
    parser.add_argument('--time-limit', type=float, default=300.0, help='give a point up after (%(default)s s)')
    parser.add_argument(
        '--max-memory', type=float, metavar='GIB', help='bound of a measurement on the CPU (3/4 of what is free)'
    )
    parser.add_argument('--no-memory', dest='memory', action='store_false', help='do not measure memory')
    parser.add_argument('--heads', type=int, default=2, help='of an operator (%(default)s)')
    parser.add_argument('--head-dims', type=int, default=32, help='channels of a head (%(default)s)')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write everything as JSON')
    parser.add_argument('--csv', type=Path, metavar='FILE', help='write the rows as CSV')
    parser.add_argument('--png', type=Path, metavar='FILE', help='draw time and memory against tokens')
    return parser


def main():
    parser = build_parser()
    args = vars(parser.parse_args())
    files = {kind: args.pop(kind) for kind in ('json', 'csv', 'png')}
    # Not a terminal, it would be taken for a narrow one, and the table be cut.
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        contenders = [parse_contender(text) for text in args.pop('contenders')]
        sizes, peer = args.pop('sizes'), args.pop('peer')
        peer = peer and parse_contender(peer)
        if min(math.prod(pair) for pair in sizes) < 1 or args['batch_size'] < 1 or args['repeats'] < 2:
            raise ValueError('sizes and --batch-size must be at least 1, --repeats at least 2')
        options = SweepOptions(**args)
        rows = run_sweep(contenders, sizes, options, peer, console)
    except ValueError as error:
        parser.error(str(error))
    report = sweep_report(rows, options, peer)
    print_report(report, console)
    if files['json']:
        files['json'].write_text(json.dumps(report, indent=2) + '\n')
    if files['csv']:
        write_csv(report, files['csv'])
    if files['png']:
        draw_report(report, files['png'])
    return 0 if any(row['status'] == 'ok' for row in rows) else 1


if __name__ == '__main__':
    sys.exit(main())
