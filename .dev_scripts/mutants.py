"""Mutation testing of `soft_mm/ops` or `soft_mm/checkpoints` by cosmic-ray, in a clone of this repository.

`make mutants` calls it in a separate environment with cosmic-ray. The clone holds the last commit.
"""

import argparse
import os
import random
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome

REPOSITORY = Path(__file__).parents[1]
TESTS = {
    'ops': 'tests/ops tests/models/test_masks.py tests/models/test_equality.py tests/models/test_fused_layers.py '
    'tests/models/test_onnx.py::test_iterations_converge_to_the_inverse',
    'checkpoints': 'tests/checkpoints tests/models/test_pretrained.py tests/models/test_stage4.py',
}
# A bit operator on floats or in a type hint always raises a TypeError: such mutants would only raise the share killed.
LEFT_OUT = ('Bit', 'Shift')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('part', choices=sorted(TESTS))
    parser.add_argument('--count', type=int, default=60, help='number of mutants')
    parser.add_argument('--seed', type=int, default=0, help='seed of the choice of mutants')
    return parser.parse_args()


def choose(session: Path, count: int, seed: int) -> None:
    """Keep `count` mutants, at most one of the same kind at the same place of the source."""
    with use_db(session, WorkDB.Mode.open) as db:
        items = sorted(db.work_items, key=lambda item: str(item.mutations))
        rng = random.Random(seed)
        rng.shuffle(items)
        places = {}
        for item in items:
            (mutation,) = item.mutations
            if not any(word in mutation.operator_name for word in LEFT_OUT):
                kind = mutation.operator_name.split('_')[0]
                places.setdefault((str(mutation.module_path), mutation.start_pos, kind), item)
        chosen = rng.sample(sorted(places.values(), key=lambda item: str(item.mutations)), min(count, len(places)))
        print(f'{len(items)} mutants at {len(places)} places, {len(chosen)} chosen with seed {seed}', flush=True)
        db.clear()
        db.add_work_items(chosen)


def report(session: Path) -> None:
    with use_db(session, WorkDB.Mode.open) as db:
        results = [result for _, result in db.results]
    counts = Counter(
        'timed out' if result.output == 'timeout' else (result.test_outcome or result.worker_outcome).value
        for result in results
    )
    for result in results:
        if result.test_outcome != TestOutcome.KILLED:
            print(result.diff, end='\n\n')
    print(f'{len(results)} mutants:', ', '.join(f'{count} {name}' for name, count in counts.most_common()))


def main() -> None:
    args = parse_args()
    if subprocess.run(['git', 'diff', '--quiet', 'HEAD'], cwd=REPOSITORY).returncode:
        sys.exit('There are uncommitted changes, which the clone would not have: commit or stash them.')
    with tempfile.TemporaryDirectory(prefix=f'mutants-{args.part}-') as folder:
        clone = Path(folder, 'clone')
        subprocess.run(['git', 'clone', '-q', REPOSITORY, clone], check=True)
        python = shlex.quote(str(REPOSITORY / '.venv/bin/python'))
        Path(folder, 'config.toml').write_text(
            f'[cosmic-ray]\nmodule-path = "soft_mm/{args.part}"\ntimeout = 900.0\nexcluded-modules = []\n'
            f'test-command = "{python} -m pytest -q -x -p no:cacheprovider {TESTS[args.part]}"\n'
            '[cosmic-ray.distributor]\nname = "local"\n'
        )
        environment = {**os.environ, 'PYTHONPATH': str(clone), 'OMP_NUM_THREADS': '1'}

        def cosmic_ray(*arguments: str) -> None:
            subprocess.run([sys.executable, '-m', 'cosmic_ray.cli', *arguments], check=True, cwd=clone, env=environment)

        cosmic_ray('baseline', '../config.toml')
        cosmic_ray('init', '../config.toml', '../session.sqlite')
        choose(Path(folder, 'session.sqlite'), args.count, args.seed)
        cosmic_ray('exec', '../config.toml', '../session.sqlite')
        report(Path(folder, 'session.sqlite'))


if __name__ == '__main__':
    main()
