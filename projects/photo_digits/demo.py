"""Demo: pretrain a classifier on photo-digits, then train a detector and a segmentor with its backbone, and export.

An interrupted demo is resumed, and finished trainings are not repeated, see :mod:`projects.common.training`.
"""

import argparse
import multiprocessing
import platform
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.table import Table

from projects.common.jobs import resumable_job
from projects.common.locks import folder_lock
from projects.common.run_logs import last_checkpoint, read_losses
from projects.common.training import Task, train_task
from soft_mm.export import export_onnx
from soft_mm.onnx_model import import_extra
from soft_mm.utils import read_config, write_json

from .dataset_files import MANIFEST, export_photo_digits
from .demo_page import write_report
from .pictures import draw_attention_rows, draw_loss_curves, draw_predictions

DATA = Path('data/photo_digits_demo')
NUM_VAL = dict(num_crops=1000, num_scenes=200)

_CONFIGS = 'projects/photo_digits/configs'
CLASSIFICATION = Task(
    'classification',
    f'{_CONFIGS}/soft-tiny_photo-digits-crops.py',
    {'accuracy/top1': ('top1', 0.01)},
)
DETECTION = Task(
    'detection',
    f'{_CONFIGS}/mask-rcnn_soft-tiny_fpn_photo-digits.py',
    {f'coco/{kind}_{name}': (f'{kind}_{name}', 1) for kind in ('bbox', 'segm') for name in ('mAP', 'mAP_50')},
)
SEGMENTATION = Task('segmentation', f'{_CONFIGS}/fpn_soft-tiny_photo-digits.py', {'mIoU': ('mIoU', 0.01)})
# Models to export to ONNX, with the side of their images and the folder of those for the check.
_EXPORTS = ((CLASSIFICATION, 64, 'val/crops'), (SEGMENTATION, 192, 'val/scenes/images'))


def run_demo(work_dir='work_dirs/demo', from_scratch=False):
    """Train all models of the demo, draw the pictures, and write ``summary.json`` and ``report.html``.

    Args:
        work_dir (str | Path): Folder of all results. Only the data set is written elsewhere, to
            ``data/photo_digits_demo``. Defaults to ``'work_dirs/demo'``.
        from_scratch (bool): Whether to skip the classifier, and train the detector and the segmentor from random
            initialisation. Defaults to False.

    Returns:
        dict: The summary: the metrics and ``seconds`` of each task by its name, and the ``versions`` of the packages.

    Raises:
        RuntimeError: If a training fails.
    """
    console = Console()
    work_dir = Path(work_dir)
    console.rule('photo-digits: validation data')
    options = dict(
        crop_options=read_config(CLASSIFICATION.config_file).crop_options.to_dict(),
        scene_options=read_config(DETECTION.config_file).scene_options.to_dict(),
    )
    # The demo from scratch uses the same data.
    with folder_lock(DATA):
        found = (DATA / MANIFEST).is_file()
        if not export_photo_digits(DATA, splits=('val',), **NUM_VAL, **options):
            console.print(f'{DATA} is already complete')
        elif found:
            console.print(f'{DATA} was incomplete or had other options, so it has been written again')
    summary = {}
    pretrained = None
    tasks = (DETECTION, SEGMENTATION) if from_scratch else (CLASSIFICATION, DETECTION, SEGMENTATION)
    for task in tasks:
        console.rule(f'{task.name}: {task.config}')
        if task is CLASSIFICATION:
            options = {}
        elif from_scratch:
            options = {'model.backbone.init_cfg': None}
        else:
            options = {'model.backbone.init_cfg.checkpoint': pretrained}
        summary[task.name] = train_task(task, work_dir / task.name, DATA / MANIFEST, console, options, pretrained)
        if not from_scratch:
            # The segmentor starts from the detector's backbone, which has learned on scenes.
            pretrained = last_checkpoint(work_dir / task.name)
    console.rule('pictures')
    draw_loss_curves({task.name: work_dir / task.name for task in tasks}, work_dir / 'loss_curves.png')
    scenes = {}
    for task in (DETECTION, SEGMENTATION):
        picture = work_dir / f'{task.name}.png'
        checkpoint = last_checkpoint(work_dir / task.name)
        # mmengine shares visualizers of the same name within a process, so each toolbox draws in a separate process.
        scenes[task.name] = _in_new_process(draw_predictions, task.config_file, checkpoint, picture)
    checkpoint = last_checkpoint(work_dir / DETECTION.name)
    attention = _in_new_process(
        draw_attention_rows, DETECTION.config_file, checkpoint, work_dir / 'attention.png', DATA / 'val/scenes'
    )
    summary['versions'] = _versions()
    path = work_dir / 'summary.json'
    write_json(path, summary)
    losses = {task.name: read_losses(work_dir / task.name) for task in tasks}
    write_report(work_dir / 'report.html', summary, losses, scenes, attention)
    _print_summary(summary, console)
    pictures = 'loss_curves.png, detection.png, segmentation.png, attention.png'
    console.print(f'Results: {path}; pictures in the same folder: {pictures}')
    console.print(f'Everything on one page, to open in a browser: {work_dir / "report.html"}')
    if not from_scratch:
        _export(work_dir, console)
    return summary


def _export(work_dir, console):
    """Export models to ONNX and say where the files are, or which packages are missing."""
    console.rule('export')
    try:
        import_extra('onnx', 'onnxscript', 'onnxruntime')
    except ValueError as error:
        console.print(f'No ONNX files: {error}', markup=False)
        return
    files = []
    for task, side, folder in _EXPORTS:
        images = [str(image) for image in sorted((DATA / folder).rglob('*.png'))[:3]]
        files.append(work_dir / f'{task.name}.onnx')
        arguments = (task.config_file, last_checkpoint(work_dir / task.name), files[-1], (side, side), 'batch')
        for line in _in_new_process(export_onnx, *arguments, images=images, force=True):
            console.print(f'{files[-1]}: {line}')
    console.print(f'ONNX files: {", ".join(map(str, files))}')


def _in_new_process(function, *arguments, **options):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
        try:
            return pool.submit(function, *arguments, **options).result()
        except KeyboardInterrupt:
            # Otherwise the pool waits for the function.
            for process in multiprocessing.active_children():
                process.terminate()
            raise


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


def main():
    parser = argparse.ArgumentParser(
        'python -m projects.photo_digits.demo',
        description='Train a classifier, a detector and a segmentor on photo-digits; write metrics and pictures.',
    )
    parser.add_argument(
        '--from-scratch',
        action='store_true',
        help='train the detector and the segmentor from random initialisation, in work_dirs/demo-scratch',
    )
    args = parser.parse_args()
    work_dir = 'work_dirs/demo-scratch' if args.from_scratch else 'work_dirs/demo'
    with resumable_job(), folder_lock(work_dir):
        run_demo(work_dir, args.from_scratch)


if __name__ == '__main__':
    main()
