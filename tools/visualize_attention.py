"""Draw rows of the attention matrix over an image: what a query pixel attends to, compared with the average pixel.

Each map shows a row minus its multiple of the mean row of the head, in units of the mean row's mean weight: red where
the query attends more than the average pixel does, blue where it attends less. The title has the multiple. A ring marks
the query. The rows are without the local branch, a convolution over the tokens in the dashed square.
"""

import argparse
import re

from soft_mm.attention_maps import draw_attention, image_attention, local_window
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
    parser.add_argument('--stage', type=int, default=1, help='stage, counted from 1 (default: %(default)s)')
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
        rows, mean = (image_attention(model, image, points, args.stage, args.block) for points in (args.points, None))
        window = local_window(model, args.stage, args.block)
        draw_attention(image, rows, args.points, args.out, args.head, mean, window)
    except (OSError, ValueError) as error:
        if args.traceback:
            raise
        parser.error(str(error))
    print(f'written: {args.out}')


if __name__ == '__main__':
    main()
