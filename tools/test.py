"""Evaluate a checkpoint with a config of mmpretrain, mmdet or mmsegmentation."""

import json
from pathlib import Path

from soft_mm.cli import build_runner, runner_parser


def main():
    parser = runner_parser(__doc__)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--json', metavar='FILE', help='write the metrics to this file')
    args = parser.parse_args()
    metrics = build_runner(args, load_from=args.checkpoint).test()
    if args.json:
        Path(args.json).write_text(json.dumps({key: float(value) for key, value in metrics.items()}, indent=2) + '\n')


if __name__ == '__main__':
    main()
