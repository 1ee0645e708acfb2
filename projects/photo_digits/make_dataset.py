"""Write the data set photo-digits to a folder."""

import argparse

from projects.common.arguments import at_least

from .dataset_files import export_photo_digits
from .option_checks import MIN_SIDE
from .rendering import MIN_CONTRAST
from .sources import SPLITS


def build_parser():
    """Build the argument parser.

    Returns:
        argparse.ArgumentParser: The parser.
    """
    parser = argparse.ArgumentParser('python -m projects.photo_digits.make_dataset', description=__doc__)
    parser.add_argument(
        'out', help='folder to write: new, empty, or written by this program before; its data set is then replaced'
    )
    parser.add_argument('--split', nargs='+', choices=SPLITS, default=SPLITS, help='splits to write (default: both)')
    parser.add_argument(
        '--crops', type=at_least(1), default=1000, help='number of crops per split (default: %(default)s)'
    )
    parser.add_argument(
        '--scenes', type=at_least(1), default=200, help='number of scenes per split (default: %(default)s)'
    )
    parser.add_argument('--seed', type=at_least(0), default=0, help='seed of the samples (default: %(default)s)')
    parser.add_argument(
        '--size', type=at_least(MIN_SIDE), default=256, help='side of a scene in pixels (default: %(default)s)'
    )
    parser.add_argument(
        '--crop-size', type=at_least(MIN_SIDE), default=64, help='side of a crop in pixels (default: %(default)s)'
    )
    parser.add_argument(
        '--num-digits',
        type=int,
        nargs=2,
        default=(2, 6),
        metavar=('MIN', 'MAX'),
        help='minimum and maximum number of digits per scene (default: 2 6)',
    )
    parser.add_argument(
        '--digit-size',
        type=int,
        nargs=2,
        metavar=('MIN', 'MAX'),
        help='smallest and largest digit of a scene, longest side in pixels (default: 20 100, less in small scenes)',
    )
    parser.add_argument(
        '--crop-digit-size',
        type=float,
        nargs=2,
        default=(0.5, 0.9),
        metavar=('MIN', 'MAX'),
        help='smallest and largest digit of a crop, longest side as a fraction of the crop (default: 0.5 0.9)',
    )
    parser.add_argument(
        '--max-angle', type=float, default=30.0, help='largest rotation of a digit in degrees (default: %(default)s)'
    )
    parser.add_argument(
        '--min-contrast',
        type=float,
        default=MIN_CONTRAST,
        help='smallest contrast of a digit with the picture below it, in grey levels (default: %(default)s)',
    )
    parser.add_argument(
        '--gap',
        type=int,
        metavar='PIXELS',
        help='smallest distance between the boxes of two digits of a scene (default: digits may overlap)',
    )
    parser.add_argument(
        '--background',
        type=float,
        default=1.0,
        help='strength of the photograph, from 0 (its mean colour) to 1 (unchanged) (default: %(default)s)',
    )
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    common = dict(max_angle=args.max_angle, min_contrast=args.min_contrast, background=args.background)
    try:
        written = export_photo_digits(
            args.out,
            splits=args.split,
            num_crops=args.crops,
            num_scenes=args.scenes,
            seed=args.seed,
            crop_options=dict(size=args.crop_size, digit_size=args.crop_digit_size, **common),
            scene_options=dict(
                size=args.size,
                num_digits=args.num_digits,
                digit_size=args.digit_size,
                gap=args.gap,
                **common,
            ),
        )
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    print(f'{args.out}: ' + ('written' if written else 'already complete, nothing to do'))


if __name__ == '__main__':
    main()
