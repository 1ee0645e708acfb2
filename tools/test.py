"""Evaluate a checkpoint with a config of mmpretrain, mmdet or mmsegmentation."""

import json
import os
from pathlib import Path

from mmengine.dist import is_main_process

from soft_mm.cli import build_runner, load_config, missing_files, runner_parser
from soft_mm.inference import check_weights, load_whole_model


def main():
    parser = runner_parser(__doc__)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--json', metavar='FILE', help='write the metrics to this file')
    args = parser.parse_args()
    if '://' not in args.checkpoint and not os.path.isfile(args.checkpoint):
        parser.error(f'there is no checkpoint {args.checkpoint}')
    with missing_files():
        try:
            cfg = load_config(parser, args)
            # Before the runner reads it, which would run code from it.
            weights = load_whole_model(args.checkpoint)
            cfg.load_from = args.checkpoint
            # The checkpoint has every weight.
            cfg.model.backbone.init_cfg = None
            if args.amp:
                cfg.test_cfg.fp16 = True
            runner = build_runner(cfg)
            check_weights(runner.model, weights, args.checkpoint)
        except ValueError as error:
            parser.error(str(error))
        metrics = runner.test()
    if args.json and is_main_process():
        Path(args.json).write_text(json.dumps({key: float(value) for key, value in metrics.items()}, indent=2) + '\n')


if __name__ == '__main__':
    main()
