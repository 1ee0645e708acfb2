"""Compare bounds on the landmarks: continue training the demo's detector and segmentor at 480x480 pixels with each.

Runs sixteen trainings, which take hours on a CPU. An interrupted run is resumed.
"""

import argparse
import dataclasses
import itertools
from pathlib import Path

from rich.console import Console
from rich.table import Table

from projects.common.jobs import resumable_job
from projects.common.run_logs import last_checkpoint
from projects.common.training import train_task
from projects.photo_digits.dataset_files import MANIFEST, export_photo_digits
from projects.photo_digits.demo import DETECTION, SEGMENTATION
from soft_mm.utils import read_config, write_json

DATA = Path('data/photo_digits_480')
SIZE, ITERATIONS, WARM_UP = 480, 60, 6
# Larger scenes with digits as in the demo, so that only the number of tokens differs.
SCENES = dict(size=SIZE, num_digits=(6, 16))
SOLVERS = ('cholesky', 'newton')
#: Values of ``max_landmarks``. Without a bound, every stage has 225 landmarks at this size.
BOUNDS = (None, 196, 49, 16)
NUM_SCENES = 40


def compare_bounds(demo_dir='work_dirs/demo', work_dir='work_dirs/landmarks', console=None):
    """Continue training the demo's detector and segmentor, once for each solver and bound.

    All trainings use the same scenes in the same order. An interrupted run is resumed.

    Args:
        demo_dir (str | Path): Work dir of the demo, with the checkpoints to start from. Defaults to
            ``'work_dirs/demo'``.
        work_dir (str | Path): Folder of the trainings and of ``summary.json``. Defaults to ``'work_dirs/landmarks'``.
        console (Console | None): Console for messages. Defaults to None: a new one.

    Returns:
        list[dict]: One row per training: ``task``, ``solver``, ``max_landmarks``, the metrics and ``seconds``.

    Raises:
        FileNotFoundError: If the demo has not written a checkpoint.
        RuntimeError: If a training fails.
    """
    console, work_dir = console or Console(), Path(work_dir)
    starts = [(task, last_checkpoint(Path(demo_dir) / task.name)) for task in (DETECTION, SEGMENTATION)]
    for task, start in starts:
        if start is None:
            raise FileNotFoundError(f'{Path(demo_dir) / task.name} holds no checkpoint to start from: run `make demo`')
    scenes = dict(read_config(DETECTION.config_file).scene_options, **SCENES)
    export_photo_digits(DATA, splits=('val',), num_crops=1, num_scenes=NUM_SCENES, scene_options=scenes)
    rows = []
    for (task, start), solver, bound in itertools.product(starts, SOLVERS, BOUNDS):
        name = f'{task.name}_{solver}_{bound}'
        console.rule(name)
        options = _options(task, start, solver, bound)
        run = dataclasses.replace(task, name=name)
        metrics = train_task(run, work_dir / name, DATA / MANIFEST, console, options, start)
        rows.append(dict(task=task.name, solver=solver, max_landmarks=bound, **metrics))
        write_json(work_dir / 'summary.json', rows)
    _print_rows(rows, console)
    return rows


def _options(task, start, solver, bound):
    options = {
        'load_from': start,
        'model.backbone.init_cfg': None,
        'model.backbone.attention.solver': solver,
        'model.backbone.attention.max_landmarks': bound,
        'train_dataloader.batch_size': 2,
        'train_dataloader.dataset.seed': 1,
        **{f'train_dataloader.dataset.generator.{name}': value for name, value in SCENES.items()},
        'optim_wrapper.optimizer.lr': 1e-4,
        'param_scheduler.0.end': WARM_UP,
        'param_scheduler.1.begin': WARM_UP,
        'param_scheduler.1.end': ITERATIONS,
        'train_cfg.max_iters': ITERATIONS,
        'train_cfg.val_interval': ITERATIONS,
    }
    for loader in ('val_dataloader', 'test_dataloader'):
        options[f'{loader}.dataset.data_root'] = f'{DATA}/'
        options[f'{loader}.dataset.pipeline.1.scale'] = (SIZE, SIZE)
    if task is DETECTION:
        for evaluator in ('val_evaluator', 'test_evaluator'):
            options[f'{evaluator}.ann_file'] = f'{DATA}/annotations/instances_val.json'
    return options


def _print_rows(rows, console):
    for task in dict.fromkeys(row['task'] for row in rows):
        own_rows = [row for row in rows if row['task'] == task]
        table = Table(*(key for key in own_rows[0] if key != 'task'), title=f'{task} at {SIZE}x{SIZE}')
        for row in own_rows:
            table.add_row(*(str(value) for key, value in row.items() if key != 'task'))
        console.print(table)


def main():
    parser = argparse.ArgumentParser('python -m projects.attention_study.landmark_bounds', description=__doc__)
    parser.add_argument('--demo-dir', default='work_dirs/demo', help='work dir of `make demo` (default: %(default)s)')
    parser.add_argument(
        '--work-dir', default='work_dirs/landmarks', help='folder of trainings and results (default: %(default)s)'
    )
    args = parser.parse_args()
    with resumable_job():
        compare_bounds(**vars(args))


if __name__ == '__main__':
    main()
