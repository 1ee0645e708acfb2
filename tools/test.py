"""Evaluate a checkpoint with a config of mmpretrain, mmdet or mmsegmentation."""

import json
from pathlib import Path

from mmengine.dist import is_main_process

from soft_mm.inference import check_weights, read_whole_model
from soft_mm.runner import build_runner, load_config, missing_files, runner_parser


def main():
    parser = runner_parser(__doc__)
    parser.add_argument('checkpoint', help='checkpoint file, or its http(s) address')
    parser.add_argument('--json', metavar='FILE', help='write the metrics to this JSON file')
    args = parser.parse_args()
    with missing_files():
        try:
            cfg = load_config(parser, args)
            # Read safely first, because mmengine would run code in the file.
            try:
                cfg.load_from, weights = read_whole_model(args.checkpoint)
            except FileNotFoundError as error:
                parser.error(str(error))
            # The checkpoint sets every weight, so pretrained weights are not needed.
            cfg.model.backbone.init_cfg = None
            if args.amp:
                cfg.test_cfg.fp16 = True
            runner = build_runner(cfg)
            check_weights(runner.model, weights, args.checkpoint)
        except ValueError as error:
            parser.error(str(error))
        metrics = runner.test()
    if args.json and is_main_process():
        # Not written atomically, because a device such as /dev/stdout cannot be renamed.
        Path(args.json).write_text(json.dumps({key: float(value) for key, value in metrics.items()}, indent=2) + '\n')


if __name__ == '__main__':
    main()
