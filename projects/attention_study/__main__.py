"""Compare the costs and the accuracy of attentions and their options on one small model, with several seeds.

Writes comparison.json, comparison.md and comparison.png. An interrupted study is resumed, and finished trainings are
not repeated.
"""

import argparse

from projects.common.arguments import at_least
from projects.common.jobs import resumable_job

from .compare import QUICK_SEEDS, SEEDS, compare_attention
from .studies import STUDIES


def main():
    titles = '; '.join(f'{name}: {", ".join(study.groups)}' for name, study in STUDIES.items())
    parser = argparse.ArgumentParser(
        'python -m projects.attention_study', description=__doc__, epilog=f'Titles of the tables: {titles}'
    )
    parser.add_argument('study', choices=STUDIES, help='study, named after its data set')
    parser.add_argument('--groups', nargs='+', metavar='TITLE', help='titles of the tables to fill (default: all)')
    parser.add_argument(
        '--seeds',
        type=at_least(0),
        nargs='+',
        help=f'seeds of weights and data (default: {SEEDS}; with --quick {QUICK_SEEDS})',
    )
    parser.add_argument('--quick', action='store_true', help='run only a few iterations, to test that everything works')
    parser.add_argument(
        '--jobs', type=int, help='number of trainings in parallel (default: one per CPU; one with a GPU)'
    )
    parser.add_argument('--work-dir', help='folder of trainings and results (default: work_dirs/attention/<study>)')
    args = parser.parse_args()
    try:
        with resumable_job():
            compare_attention(**vars(args))
    except ValueError as error:
        parser.error(str(error))


if __name__ == '__main__':
    main()
