"""Write ListOps, the sequences of Long Range Arena, into a folder."""

import argparse

from soft_mm.datasets.listops import write_listops


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out', help='folder to write; new, empty, or made by this program')
    parser.add_argument('--train', type=int, default=96000, help='samples for training (%(default)s)')
    parser.add_argument('--val', type=int, default=2000, help='samples for validation (%(default)s)')
    parser.add_argument('--test', type=int, default=2000, help='samples for testing (%(default)s)')
    parser.add_argument('--min-length', type=int, default=500, help='sequences have more tokens (%(default)s)')
    parser.add_argument('--max-length', type=int, default=2000, help='sequences have fewer tokens (%(default)s)')
    parser.add_argument('--max-depth', type=int, default=10, help='of the trees (%(default)s)')
    parser.add_argument('--max-args', type=int, default=10, help='of an operator (%(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='default: %(default)s')
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
    print(f'{args.out}: ' + ('written' if written else 'complete already, nothing to do'))


if __name__ == '__main__':
    main()
