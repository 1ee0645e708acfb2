"""Write the tables of the model zoo into the READMEs, from the metafiles of the configs."""

import argparse
import sys
from pathlib import Path

from soft_mm.analysis.zoo import stale_readmes, write_measured

ROOT = Path(__file__).resolve().parents[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument('--measure', action='store_true', help='first count the models anew into the metafiles')
    choice.add_argument('--check', action='store_true', help='write nothing, and fail where a table is stale')
    args = parser.parse_args()
    if args.measure:
        write_measured(ROOT)
    stale = [str(file.relative_to(ROOT)) for file in stale_readmes(ROOT, write=not args.check)]
    if args.check and stale:
        sys.exit(f'stale tables: {", ".join(stale)}; run tools/make_model_zoo.py')
    print(f'{"written" if stale else "up to date"}{": " * bool(stale)}{", ".join(stale)}')


if __name__ == '__main__':
    main()
