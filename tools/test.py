"""Evaluate a checkpoint with a config of mmpretrain, mmdet or mmsegmentation, or an ONNX file exported from it."""

import json
from pathlib import Path

from mmengine.dist import is_main_process

from soft_mm.inference import check_weights, read_whole_model
from soft_mm.onnx_model import OnnxModel
from soft_mm.runner import build_runner, load_config, missing_files, runner_parser


def main():
    parser = runner_parser(__doc__)
    parser.add_argument('checkpoint', help='checkpoint file, or its http(s) address, or file of export_onnx.py')
    parser.add_argument('--json', metavar='FILE', help='write the metrics to this JSON file')
    args = parser.parse_args()
    with missing_files():
        try:
            cfg = load_config(parser, args)
            exported = args.checkpoint.endswith('.onnx')
            try:
                if exported:
                    # Read here first, because an error inside the runner would name its own classes.
                    OnnxModel(args.checkpoint)
                    cfg.model, cfg.load_from = dict(type='OnnxTestModel', file=args.checkpoint), None
                else:
                    # Read safely first, because mmengine would run code in the file.
                    cfg.load_from, weights = read_whole_model(args.checkpoint)
                    # The checkpoint sets every weight, so pretrained weights are not needed.
                    cfg.model.backbone.init_cfg = None
            except FileNotFoundError as error:
                parser.error(str(error))
            if args.amp:
                cfg.test_cfg.fp16 = True
            runner = build_runner(cfg)
            if not exported:
                check_weights(runner.model, weights, args.checkpoint)
        except ValueError as error:
            parser.error(str(error))
        metrics = runner.test()
    if args.json and is_main_process():
        # Not written atomically, because a device such as /dev/stdout cannot be renamed.
        Path(args.json).write_text(json.dumps({key: float(value) for key, value in metrics.items()}, indent=2) + '\n')


if __name__ == '__main__':
    main()
