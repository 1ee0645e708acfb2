"""Draw the predictions of a trained model: class scores, boxes and masks, or a segmentation.

The model is a config with a checkpoint, or a file that tools/export_onnx.py wrote: predict.py IMAGE MODEL.onnx.
"""

import argparse

from soft_mm.config_errors import add_traceback_option, config_errors
from soft_mm.inference import find_images, predict
from soft_mm.onnx_model import predict_onnx
from soft_mm.utils import check_device


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('images', metavar='IMAGE|FOLDER', help='image file, or folder of image files')
    parser.add_argument(
        'config', metavar='CONFIG|MODEL.onnx', help='config file of mmpretrain, mmdet or mmsegmentation, or ONNX file'
    )
    parser.add_argument(
        'checkpoint', nargs='?', help='checkpoint file of the model of the config, or its http(s) address'
    )
    parser.add_argument(
        '--out-dir',
        default='outputs',
        help='output folder; pictures go to its subfolder vis/ (default: %(default)s)',
    )
    parser.add_argument('--device', help='cpu, cuda or cuda:i (default: a GPU if there is one)')
    parser.add_argument(
        '--score-thr', type=float, help='smallest score of a box to draw, for detectors only (default: 0.3)'
    )
    add_traceback_option(parser)
    args = parser.parse_args()
    try:
        if args.device:
            check_device(args.device)
        images = find_images(args.images)
        if args.config.endswith('.onnx'):
            if args.checkpoint or args.device not in (None, 'cpu'):
                parser.error(f'{args.config} needs no checkpoint and runs on the CPU: leave both out')
            pictures = predict_onnx(images, args.config, args.out_dir, args.score_thr)
        elif args.checkpoint is None:
            parser.error(f'{args.config} is a config: give its checkpoint too')
        else:
            with config_errors(args.config, args.traceback):
                pictures = predict(images, args.config, args.checkpoint, args.out_dir, args.device, args.score_thr)
    except (FileNotFoundError, ValueError) as error:
        if args.traceback:
            raise
        parser.error(str(error))
    print(f'pictures written to {pictures}: {len(images)}')


if __name__ == '__main__':
    main()
