"""Evaluate a checkpoint with a config of mmpretrain, mmdet or mmsegmentation, or an ONNX file exported from it."""

import json
import os

from mmengine.dist import is_main_process

from soft_mm.config_errors import config_errors
from soft_mm.export import check_task
from soft_mm.inference import check_weights, read_whole_model
from soft_mm.onnx_model import OnnxModel
from soft_mm.runner import (
    add_hooks,
    build_runner,
    data_errors,
    load_config,
    plain_values,
    runner_parser,
    show_pictures,
    use_test_time_augmentation,
    writable_file,
)
from soft_mm.utils import without_pretrained


def main():
    parser = runner_parser(__doc__)
    parser.add_argument('checkpoint', help='checkpoint file, or its http(s) address, or file of export_onnx.py')
    parser.add_argument('--json', metavar='FILE', help='write the metrics to this JSON file')
    parser.add_argument(
        '--show-dir', metavar='FOLDER', help='draw the predictions of every test image into this folder'
    )
    parser.add_argument(
        '--tta', action='store_true', help='test-time augmentation: tta_model, tta_pipeline of the config'
    )
    args = parser.parse_args()
    with config_errors(args.config, args.traceback), data_errors():
        cfg = load_config(parser, args)
        exported = args.checkpoint.endswith('.onnx')
        try:
            json_file = writable_file(args.json) if args.json else None
            if exported:
                if args.amp or args.tta or args.launcher != 'none':
                    parser.error(f'{args.checkpoint} takes neither --amp nor --tta nor --launcher: leave them out')
                # Checked here, because the runner adds the names of its own classes to a message.
                file = os.path.expanduser(args.checkpoint)
                check_task(OnnxModel(file), cfg)
                cfg.model, cfg.load_from = dict(type='OnnxTestModel', file=file), None
            else:
                # Read safely first, because mmengine would run code in the file.
                cfg.load_from, weights = read_whole_model(args.checkpoint)
                without_pretrained(cfg.model)
                # Resuming would run the config in the metadata of the checkpoint.
                cfg.resume = False
            if args.tta:
                use_test_time_augmentation(cfg)
            if args.show_dir:
                if args.tta and cfg.get('default_scope') == 'mmpretrain':
                    parser.error('--show-dir: mmpretrain draws no pictures of augmented images: leave out one of both')
                show_pictures(cfg, args.show_dir)
        except (FileNotFoundError, ValueError) as error:
            parser.error(str(error))
        if args.amp:
            cfg.test_cfg.fp16 = True
        add_hooks(cfg, 'soft_mm.DataCheckHook')
        runner = build_runner(cfg)
        if not exported:
            try:
                check_weights(runner.model, weights, args.checkpoint)
            except ValueError as error:
                parser.error(str(error))
        metrics = runner.test()
    if json_file and is_main_process():
        # Not written atomically, because a device such as /dev/stdout cannot be renamed.
        json_file.write_text(json.dumps(plain_values(metrics), indent=2) + '\n')


if __name__ == '__main__':
    main()
