"""Draw the predictions of a trained model: class scores, boxes and masks, or a segmentation."""

import argparse

from soft_mm.inference import find_images, predict
from soft_mm.utils import check_device


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('images', metavar='IMAGE|FOLDER', help='image file, or folder of image files')
    parser.add_argument('config', help='config file of mmpretrain, mmdet or mmsegmentation')
    parser.add_argument('checkpoint', help='checkpoint file of the model, or its http(s) address')
    parser.add_argument(
        '--out-dir',
        default='outputs',
        help='output folder; pictures go to its subfolder vis/ (default: %(default)s)',
    )
    parser.add_argument('--device', help='cpu, cuda or cuda:i (default: a GPU if there is one)')
    parser.add_argument(
        '--score-thr', type=float, help='smallest score of a box to draw, for detectors only (default: 0.3)'
    )
    args = parser.parse_args()
    try:
        if args.device:
            check_device(args.device)
        images = find_images(args.images)
        pictures = predict(images, args.config, args.checkpoint, args.out_dir, args.device, args.score_thr)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    print(f'pictures written to {pictures}: {len(images)}')


if __name__ == '__main__':
    main()
