"""Export a trained model to ONNX, from RGB images (0 to 255) to probabilities, a class map, or boxes and masks.

The file contains the normalisation. It is compared with the toolbox's predictions, and not written if it differs.
"""

import argparse
from pathlib import Path

from soft_mm.config_errors import add_traceback_option, config_errors
from soft_mm.export import DYNAMIC, INPUT_DTYPES, export_onnx


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file of mmpretrain, mmdet or mmsegmentation')
    parser.add_argument('checkpoint', help='checkpoint file of the model, or its http(s) address')
    parser.add_argument('out', metavar='OUT', help='file to write (.onnx)')
    parser.add_argument(
        '--shape', type=int, nargs=2, required=True, metavar=('H', 'W'), help='image height and width in pixels'
    )
    parser.add_argument(
        '--dynamic',
        choices=DYNAMIC,
        default='none',
        help='what may vary: nothing, the number of images, or also their size (default: %(default)s)',
    )
    parser.add_argument('--input-dtype', choices=INPUT_DTYPES, default='float32', help='default: %(default)s')
    parser.add_argument(
        '--images',
        nargs='+',
        default=[],
        metavar='IMAGE',
        help='image files for the check (default: one of matplotlib)',
    )
    parser.add_argument('--no-check', action='store_true', help='do not compare the file with the toolbox')
    parser.add_argument('--force', action='store_true', help='replace an existing file')
    add_traceback_option(parser)
    args = parser.parse_args()
    try:
        with config_errors(args.config, args.traceback):
            lines = export_onnx(
                args.config,
                args.checkpoint,
                args.out,
                tuple(args.shape),
                args.dynamic,
                args.input_dtype,
                args.images,
                not args.no_check,
                args.force,
            )
    except (FileNotFoundError, ValueError) as error:
        if args.traceback:
            raise
        parser.error(str(error))
    print('\n'.join([*lines, f'written: {args.out}, {Path(args.out).stat().st_size / 2**20:.1f} MiB']))


if __name__ == '__main__':
    main()
