"""Draw what a trained model says of images: class scores, boxes and masks, or a segmentation."""

import argparse
import os

from soft_mm.analysis.sweep import check_device
from soft_mm.inference import find_images, predict


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('images', metavar='IMAGE|FOLDER', help='image file, or folder of image files')
    parser.add_argument('config', help='config file of mmpretrain, mmdet or mmsegmentation')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument('--out-dir', default='outputs', help='pictures go to vis/ in this folder (%(default)s)')
    parser.add_argument('--device', help='cpu, cuda or cuda:i (a GPU where there is one)')
    parser.add_argument('--score-thr', type=float, default=0.3, help='least score of a box (%(default)s)')
    args = parser.parse_args()
    for file in (args.config, args.checkpoint):
        if not os.path.isfile(file):
            parser.error(f'there is no file {file}')
    try:
        if args.device:
            check_device(args.device)
        images = find_images(args.images)
        pictures = predict(images, args.config, args.checkpoint, args.out_dir, args.device, args.score_thr)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    print(f'{len(images)} pictures are in {pictures}')


if __name__ == '__main__':
    main()
