"""Draw rows of the attention matrix over an image: how much a query pixel attends to every other pixel, per head."""

import argparse
import re

from soft_mm.attention_maps import draw_attention, image_attention
from soft_mm.config_errors import add_traceback_option, config_errors
from soft_mm.inference import find_images, load_model, read_image


def _point(text):
    if not re.fullmatch(r'\d+,\d+', text):
        raise argparse.ArgumentTypeError(f'{text!r}: expected x,y in pixels, such as 120,64')
    return tuple(int(part) for part in text.split(','))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('image', help='image file')
    parser.add_argument('config', help='config file of a model with a SOFT backbone')
    parser.add_argument('checkpoint', help='checkpoint file of the model, or its http(s) address')
    parser.add_argument('--points', type=_point, nargs='+', required=True, metavar='X,Y', help='query pixels')
    parser.add_argument('--stage', type=int, default=1, help='stage from 1 to 3 (default: %(default)s)')
    parser.add_argument('--block', type=int, default=-1, help='block of the stage, counted from 0 (default: the last)')
    parser.add_argument('--head', type=int, nargs='+', help='heads, counted from 0 (default: all)')
    parser.add_argument('--out', default='attention.png', help='picture to write (default: %(default)s)')
    add_traceback_option(parser)
    args = parser.parse_args()
    try:
        images = find_images(args.image)
        if len(images) > 1:
            raise ValueError(f'{args.image} holds {len(images)} images; give one image file')
        image = read_image(images[0])
        with config_errors(args.config, args.traceback):
            model = load_model(args.config, args.checkpoint)
        rows = image_attention(model, image, args.points, args.stage, args.block)
        draw_attention(image, rows, args.points, args.out, args.head)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f'written: {args.out}')


if __name__ == '__main__':
    main()
