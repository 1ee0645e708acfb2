"""The main job: classifier, detector and segmentor on photo-digits, with figures and pictures."""

import argparse

from soft_mm.cli import resumable_job
from soft_mm.demo import run_demo


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--from-scratch',
        action='store_true',
        help='detector and segmentor from random initialisation, in work_dirs/demo-scratch',
    )
    args = parser.parse_args()
    with resumable_job():
        run_demo('work_dirs/demo-scratch' if args.from_scratch else 'work_dirs/demo', args.from_scratch)


if __name__ == '__main__':
    main()
