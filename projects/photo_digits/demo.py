"""Demo: pretrain a classifier on photo-digits, then train a detector and a segmentor with its backbone, and export.

An interrupted demo is resumed, and finished trainings are not repeated, see :mod:`projects.common.training`.
"""

import argparse
import multiprocessing
import platform
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path

import mmcv
from rich.console import Console
from rich.table import Table

from projects.common.arguments import at_least
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

NUM_VAL = dict(num_crops=1000, num_scenes=200)

_BOX_AND_MASK = [f'{kind}_{name}' for kind in ('bbox', 'segm') for name in ('mAP', 'mAP_50')]


def _make_tasks(folder='', ending=''):
    names = 'soft-tiny_photo-digits-crops', 'mask-rcnn_soft-tiny_fpn_photo-digits', 'fpn_soft-tiny_photo-digits'
    classifier, detector, segmentor = (f'projects/photo_digits/configs/{folder}{name}{ending}.py' for name in names)
    return (
        Task('classification', classifier, {'accuracy/top1': ('top1', 0.01)}),
        Task('detection', detector, {f'coco/{name}': (name, 1) for name in _BOX_AND_MASK}),
        Task('segmentation', segmentor, {'mIoU': ('mIoU', 0.01)}),
    )


CLASSIFICATION, DETECTION, SEGMENTATION = TASKS = _make_tasks()
HARD_TASKS = _make_tasks('hard/', '-hard')


def run_demo(work_dir='work_dirs/demo', from_scratch=False, hard=False, seed=0):
    """Train all models of the demo, draw the pictures, and write ``summary.json`` and ``report.html``.

    Args:
        work_dir (str | Path): Folder of all results. Only the data set is written elsewhere, to
            ``data/photo_digits_demo`` or ``data/photo_digits_hard``. Defaults to ``'work_dirs/demo'``.
        from_scratch (bool): Whether to skip the classifier, and train the detector and the segmentor from random
            initialisation. Defaults to False.
        hard (bool): Whether to use the configs in ``configs/hard``: digits that are smaller, overlap, turn further and
            have less contrast. Defaults to False.
        seed (int): Seed of the initialisation and of the order of the scenes. Defaults to 0.

    Returns:
        dict: The summary: the metrics and ``seconds`` of each task by its name, and the ``versions`` of the packages.

    Raises:
        RuntimeError: If a training fails.
    """
    console = Console()
    work_dir = Path(work_dir)
    tasks = HARD_TASKS if hard else TASKS
    classification, detection, segmentation = tasks
    crops, scenes = (read_config(task.config_file) for task in (classification, detection))
    data = Path(crops.data_root)
    console.rule('photo-digits: validation data')
    data_options = dict(
        crop_options=crops.crop_options.to_dict(),
        scene_options=scenes.scene_options.to_dict(),
    )
    # Demos with other options use the same data, whose export takes seconds.
    with folder_lock(data, wait=120):
        found = (data / MANIFEST).is_file()
        if not export_photo_digits(data, splits=('val',), **NUM_VAL, **data_options):
            console.print(f'{data} is already complete')
        elif found:
            console.print(f'{data} was incomplete or had other options, so it has been written again')
    summary = {}
    pretrained = None
    if from_scratch:
        tasks = tasks[1:]
    for task in tasks:
        console.rule(f'{task.name}: {task.config}')
        options = {'randomness.seed': seed} if seed else {}
        if from_scratch:
            options['model.backbone.init_cfg'] = None
        elif pretrained:
            options['model.backbone.init_cfg.checkpoint'] = pretrained
        summary[task.name] = train_task(task, work_dir / task.name, data / MANIFEST, console, options, pretrained)
        if not from_scratch:
            # The segmentor starts from the detector's backbone, which has learned on scenes.
            pretrained = last_checkpoint(work_dir / task.name)
    console.rule('pictures')
    draw_loss_curves({task.name: work_dir / task.name for task in tasks}, work_dir / 'loss_curves.png')
    pictures = {}
    for task in (detection, segmentation):
        picture = work_dir / f'{task.name}.png'
        checkpoint = last_checkpoint(work_dir / task.name)
        # mmengine shares visualizers of the same name within a process, so each toolbox draws in a separate process.
        pictures[task.name] = _in_new_process(draw_predictions, task.config_file, checkpoint, picture)
    checkpoint = last_checkpoint(work_dir / detection.name)
    attention = _in_new_process(
        draw_attention_rows, detection.config_file, checkpoint, work_dir / 'attention.png', data / 'val/scenes'
    )
    summary['versions'] = _versions()
    path = work_dir / 'summary.json'
    write_json(path, summary)
    losses = {task.name: read_losses(work_dir / task.name) for task in tasks}
    write_report(work_dir / 'report.html', summary, losses, pictures, attention, hard, seed)
    _print_summary(summary, console)
    names = 'loss_curves.png, detection.png, segmentation.png, attention.png'
    console.print(f'Results: {path}; pictures in the same folder: {names}')
    console.print(f'Everything on one page, to open in a browser: {work_dir / "report.html"}')
    if not from_scratch:
        # Models to export, with the folder of the images for the check.
        _export([(classification, data / 'val/crops'), (segmentation, data / 'val/scenes/images')], work_dir, console)
    return summary


def _export(models, work_dir, console):
    """Export models to ONNX and say where the files are, or why there is none."""
    console.rule('export')
    try:
        import_extra('onnx', 'onnxscript', 'onnxruntime')
    except ValueError as error:
        console.print(f'No ONNX files: {error}', markup=False)
        return
    files = []
    for task, folder in models:
        images = sorted(folder.rglob('*.png'))[:3]
        file = work_dir / f'{task.name}.onnx'
        shape = mmcv.imread(images[0]).shape[:2]
        arguments = (task.config_file, last_checkpoint(work_dir / task.name), file, shape, 'batch')
        try:
            lines = _in_new_process(export_onnx, *arguments, images=[str(image) for image in images], force=True)
        except ValueError as error:
            console.print(f'No ONNX file of the {task.name}: {error}', markup=False)
            continue
        for line in lines:
            console.print(f'{file}: {line}')
        files.append(str(file))
    if files:
        console.print(f'ONNX files: {", ".join(files)}')


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
        description='Train a classifier, a detector and a segmentor on photo-digits; write metrics and pictures to '
        'work_dirs/demo. Each option adds its name to the name of the folder.',
    )
    parser.add_argument(
        '--hard',
        action='store_true',
        help='use digits that are smaller, overlap, turn further and have less contrast; adds -hard',
    )
    parser.add_argument(
        '--from-scratch',
        action='store_true',
        help='train the detector and the segmentor from random initialisation; adds -scratch',
    )
    parser.add_argument(
        '--seed', type=at_least(0), default=0, metavar='N', help='seed of the trainings (default: 0); adds -seed-N'
    )
    args = parser.parse_args()
    parts = ['work_dirs/demo']
    parts += ['hard'] if args.hard else []
    parts += ['scratch'] if args.from_scratch else []
    parts += [f'seed-{args.seed}'] if args.seed else []
    work_dir = '-'.join(parts)
    with resumable_job(), folder_lock(work_dir):
        run_demo(work_dir, args.from_scratch, args.hard, args.seed)


if __name__ == '__main__':
    main()
