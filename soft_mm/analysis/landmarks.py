"""What bounding the landmarks does to accuracy: the demo's detector and segmentor, trained on at 480x480."""

import dataclasses
import itertools
from pathlib import Path

from rich.console import Console
from rich.table import Table

from soft_mm.datasets.export import MANIFEST, export_photo_digits
from soft_mm.demo import DETECTION, SEGMENTATION
from soft_mm.files import write_json

from .logs import last_checkpoint
from .training import train_task

DATA = Path('data/photo_digits_480')
SIZE, ITERATIONS, WARM_UP = 480, 60, 6
# Digits of the size that the demo trains with, in larger scenes: what differs is the number of tokens.
SCENES = dict(size=SIZE, num_digits=(6, 16))
SOLVERS = ('cholesky', 'newton')
#: Bounds on the landmarks. Unbounded, every stage has 225 of them at this size.
BOUNDS = (None, 196, 49, 16)
NUM_SCENES = 40


def compare_landmarks(demo_dir='work_dirs/demo', work_dir='work_dirs/landmarks', console=None):
    """Train on from the demo's detector and segmentor, once for each solver and bound.

    Every training sees the same scenes in the same order. What was interrupted is resumed.

    Args:
        demo_dir (str | Path): work dir of the demo, whose detector and segmentor are trained on.
        work_dir (str | Path): folder of the trainings, and of ``summary.json``.
        console (Console | None): where progress is shown. Defaults to a new one.

    Returns:
        list[dict]: one row a training: ``task``, ``solver``, ``max_landmarks``, the metrics, ``seconds``.

    Raises:
        FileNotFoundError: if the demo has left no checkpoint.
        RuntimeError: if a training fails.
    """
    console, work_dir = console or Console(), Path(work_dir)
    starts = [(task, last_checkpoint(Path(demo_dir) / task.name)) for task in (DETECTION, SEGMENTATION)]
    for task, start in starts:
        if start is None:
            raise FileNotFoundError(f'{Path(demo_dir) / task.name} holds no checkpoint to start from: run `make demo`')
    export_photo_digits(DATA, splits=('val',), num_crops=1, num_scenes=NUM_SCENES, scene_options=SCENES)
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
        'train_dataloader.dataset.generator.size': SIZE,
        'train_dataloader.dataset.generator.num_digits': SCENES['num_digits'],
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
        mine = [row for row in rows if row['task'] == task]
        table = Table(*(key for key in mine[0] if key != 'task'), title=f'{task} at {SIZE}x{SIZE}')
        for row in mine:
            table.add_row(*(str(value) for key, value in row.items() if key != 'task'))
        console.print(table)
