"""The main job: pretrain a classifier on photo-digits, plug it into a detector and a segmentor, train both, and sum up.

What was interrupted is resumed and what is finished is not done again, see :mod:`soft_mm.analysis.training`.
"""

import multiprocessing
import platform
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.table import Table

from soft_mm.analysis.logs import last_checkpoint
from soft_mm.analysis.pictures import draw_loss_curves, draw_predictions
from soft_mm.analysis.training import Task, train_task
from soft_mm.datasets.export import MANIFEST, export_photo_digits
from soft_mm.files import write_json

DATA = Path('data/photo_digits_demo')
NUM_VAL = dict(num_crops=1000, num_scenes=200)


CLASSIFICATION = Task(
    'classification', 'photo_digits/soft-tiny_photo-digits-crops.py', {'accuracy/top1': ('top1', 0.01)}
)
DETECTION = Task(
    'detection',
    'photo_digits/mask-rcnn_soft-tiny_fpn_photo-digits.py',
    {f'coco/{kind}_{name}': (f'{kind}_{name}', 1) for kind in ('bbox', 'segm') for name in ('mAP', 'mAP_50')},
)
SEGMENTATION = Task('segmentation', 'photo_digits/fpn_soft-tiny_photo-digits.py', {'mIoU': ('mIoU', 0.01)})


def run_demo(work_dir='work_dirs/demo', from_scratch=False):
    """Train what the demo trains, draw the pictures, and write ``summary.json``.

    Args:
        work_dir (str | Path): folder of everything but the data set, which is written to ``data/photo_digits_demo``.
        from_scratch (bool): train detector and segmentor from random initialisation, for comparison, and no classifier.

    Returns:
        dict: the summary.

    Raises:
        RuntimeError: if a training fails.
    """
    console = Console()
    work_dir = Path(work_dir)
    console.rule('photo-digits: validation data')
    if not export_photo_digits(DATA, splits=('val',), **NUM_VAL):
        console.print(f'{DATA} is there already')
    summary = {}
    pretrained = None
    tasks = (DETECTION, SEGMENTATION) if from_scratch else (CLASSIFICATION, DETECTION, SEGMENTATION)
    for task in tasks:
        console.rule(f'{task.name}: {task.config}')
        options = {}
        if task is not CLASSIFICATION:
            options = (
                {'model.backbone.init_cfg': None}
                if from_scratch
                else {'model.backbone.init_cfg.checkpoint': pretrained}
            )
        summary[task.name] = train_task(task, work_dir / task.name, DATA / MANIFEST, console, options, pretrained)
        if task is CLASSIFICATION:
            pretrained = last_checkpoint(work_dir / task.name)
    console.rule('pictures')
    draw_loss_curves({task.name: work_dir / task.name for task in tasks}, work_dir / 'loss_curves.png')
    for task in (DETECTION, SEGMENTATION):
        picture = work_dir / f'{task.name}.png'
        # A visualizer is shared by name within a process, so each toolbox draws in its own.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
            pool.submit(draw_predictions, task.config_file, last_checkpoint(work_dir / task.name), picture).result()
    summary['versions'] = _versions()
    path = work_dir / 'summary.json'
    write_json(path, summary)
    _print_summary(summary, console)
    console.print(f'{path}, and beside it loss_curves.png, detection.png, segmentation.png')
    return summary


def _versions():
    names = ('torch', 'mmengine', 'mmcv', 'mmpretrain', 'mmdet', 'mmseg', 'soft_mm')
    return dict(python=platform.python_version(), **{name: import_module(name).__version__ for name in names})


def _print_summary(summary, console):
    table = Table('task', 'metric', 'value', title='photo-digits, validation split')
    for name, values in summary.items():
        if name == 'versions':
            continue
        for metric, value in values.items():
            table.add_row(name, metric, f'{value:.1f}' if metric == 'seconds' else f'{value:.4f}')
    console.print(table)
