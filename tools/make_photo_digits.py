"""Write photo-digits, the embedded data set, into a folder."""

import argparse

from soft_mm.datasets.export import export_photo_digits
from soft_mm.datasets.photo_digits import SPLITS


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out', help='folder to write; new, empty, or made by this program')
    parser.add_argument('--split', nargs='+', choices=SPLITS, default=SPLITS, help='default: both')
    parser.add_argument('--crops', type=int, default=1000, help='crops per split (%(default)s)')
    parser.add_argument('--scenes', type=int, default=200, help='scenes per split (%(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='default: %(default)s')
    parser.add_argument('--size', type=int, default=256, help='side of a scene (%(default)s px)')
    parser.add_argument('--crop-size', type=int, default=64, help='side of a crop (%(default)s px)')
    parser.add_argument(
        '--num-digits',
        type=int,
        nargs=2,
        default=(2, 6),
        metavar=('MIN', 'MAX'),
        help='digits per scene (2 6)',
    )
    parser.add_argument(
        '--digit-size',
        type=int,
        nargs=2,
        metavar=('MIN', 'MAX'),
        help='longest side of the digits of a scene in pixels (20 100, less in small scenes)',
    )
    parser.add_argument(
        '--background',
        type=float,
        default=1.0,
        help='from 0, mean colour, to 1, photograph (%(default)s)',
    )
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    try:
        written = export_photo_digits(
            args.out,
            splits=args.split,
            num_crops=args.crops,
            num_scenes=args.scenes,
            seed=args.seed,
            crop_options=dict(size=args.crop_size, background=args.background),
            scene_options=dict(
                size=args.size,
                num_digits=args.num_digits,
                digit_size=args.digit_size,
                background=args.background,
            ),
        )
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    print(f'{args.out}: ' + ('written' if written else 'complete already, nothing to do'))


if __name__ == '__main__':
    main()
