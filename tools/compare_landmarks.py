"""Train the demo's detector and segmentor on at 512x512 with bounded and unbounded landmarks, and compare them."""

import argparse
import sys

from soft_mm.analysis.landmarks import compare_landmarks


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--demo-dir', default='work_dirs/demo', help='what `make demo` left (%(default)s)')
    parser.add_argument('--work-dir', default='work_dirs/landmarks', help='trainings and results (%(default)s)')
    try:
        compare_landmarks(**vars(parser.parse_args()))
    except (RuntimeError, ImportError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit('interrupted; the same command goes on from the newest checkpoint')


if __name__ == '__main__':
    main()
