"""Write the data set ListOps of Long Range Arena to a folder."""

import argparse

from .listops_data import write_listops


def build_parser():
    """Build the argument parser.

    Returns:
        argparse.ArgumentParser: The parser.
    """
    parser = argparse.ArgumentParser('python -m projects.listops.make_listops', description=__doc__)
    parser.add_argument('out', help='folder to write: new, empty, or written by this program before')
    parser.add_argument(
        '--train', type=int, default=96000, help='number of samples for training (default: %(default)s)'
    )
    parser.add_argument('--val', type=int, default=2000, help='number of samples for validation (default: %(default)s)')
    parser.add_argument('--test', type=int, default=2000, help='number of samples for testing (default: %(default)s)')
    parser.add_argument(
        '--min-length', type=int, default=500, help='sequences have more tokens than this (default: %(default)s)'
    )
    parser.add_argument(
        '--max-length', type=int, default=2000, help='sequences have fewer tokens than this (default: %(default)s)'
    )
    parser.add_argument('--max-depth', type=int, default=10, help='maximum depth of a tree (default: %(default)s)')
    parser.add_argument(
        '--max-args', type=int, default=10, help='maximum number of arguments of an operator (default: %(default)s)'
    )
    parser.add_argument('--seed', type=int, default=0, help='seed of the samples (default: %(default)s)')
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    try:
        written = write_listops(
            args.out,
            num_train=args.train,
            num_val=args.val,
            num_test=args.test,
            min_length=args.min_length,
            max_length=args.max_length,
            max_depth=args.max_depth,
            max_args=args.max_args,
            seed=args.seed,
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f'{args.out}: ' + ('written' if written else 'already complete, nothing to do'))


if __name__ == '__main__':
    main()
