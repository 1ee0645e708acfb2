"""Print the parameters and multiply-adds of the model of a config and of its modules."""

import argparse
import sys

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from soft_mm.complexity import config_complexity
from soft_mm.config_errors import add_traceback_option, config_errors


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file of mmpretrain, mmdet or mmsegmentation')
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        default=(224, 224),
        metavar=('H', 'W'),
        help='image height and width in pixels (default: 224 224); for a sequence, 1 and the number of tokens',
    )
    parser.add_argument('--backbone', action='store_true', help='count the backbone only')
    add_traceback_option(parser)
    args = parser.parse_args()
    try:
        with config_errors(args.config, args.traceback):
            parts = config_complexity(args.config, tuple(args.shape), args.backbone)
    except (FileNotFoundError, ValueError) as error:
        if args.traceback:
            raise
        parser.error(str(error))
    title = escape(f'{args.config} at {args.shape[0]}x{args.shape[1]}')
    table = Table('part', 'parameters', 'multiply-adds', title=title)
    for part in parts:
        table.add_row(part.name or 'whole', f'{part.parameters / 1e6:.2f} M', f'{part.multiply_adds / 1e9:.3f} G')
    # Outside a terminal, rich assumes 80 columns and would truncate the table.
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == '__main__':
    main()
