"""Train the demo's detector and segmentor on at 480x480 with bounded and unbounded landmarks, and compare them.

Sixteen trainings, which take hours on a CPU; what was interrupted is resumed.
"""

import argparse

from soft_mm.analysis.landmarks import compare_landmarks
from soft_mm.cli import resumable_job


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--demo-dir', default='work_dirs/demo', help='what `make demo` left (%(default)s)')
    parser.add_argument('--work-dir', default='work_dirs/landmarks', help='trainings and results (%(default)s)')
    args = parser.parse_args()
    with resumable_job():
        compare_landmarks(**vars(args))


if __name__ == '__main__':
    main()
