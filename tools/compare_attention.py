"""Compare attentions and their options on one small model: costs, and accuracy under one budget with several seeds.

Writes comparison.json, comparison.md and comparison.png. What was interrupted is resumed, and what is finished not done
again.
"""

import argparse

from soft_mm.analysis.comparison import QUICK_SEEDS, SEEDS, STUDIES, compare_attention
from soft_mm.cli import resumable_job


def main():
    titles = '; '.join(f'of {name}: {", ".join(study.groups)}' for name, study in STUDIES.items())
    parser = argparse.ArgumentParser(description=__doc__, epilog=f'groups {titles}')
    parser.add_argument('study', choices=STUDIES, help='data set and small model')
    parser.add_argument('--groups', nargs='+', metavar='TITLE', help='tables to fill (all)')
    parser.add_argument(
        '--seeds', type=int, nargs='+', help=f'of weights and data ({SEEDS}; {QUICK_SEEDS} with --quick)'
    )
    parser.add_argument('--quick', action='store_true', help='a few iterations, to see that everything runs')
    parser.add_argument('--jobs', type=int, help='trainings at a time, which share the CPUs (one a CPU; one on a GPU)')
    parser.add_argument('--work-dir', help='trainings and results (work_dirs/attention/<study>)')
    args = parser.parse_args()
    try:
        with resumable_job():
            compare_attention(**vars(args))
    except ValueError as error:
        parser.error(str(error))


if __name__ == '__main__':
    main()
