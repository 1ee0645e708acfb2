"""The main job: pretrain a classifier on photo-digits, plug it into a detector and a segmentor, train both, and sum up.

Every training is one run of ``tools/train.py`` in a process of its own, so that each toolbox has its own default
scope. A run that was interrupted is resumed from its newest checkpoint; a finished one is not done again while its
config, its pretrained weights and its data are what they were.
"""

import hashlib
import json
import multiprocessing
import platform
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from mmengine.config import Config
from rich.console import Console
from rich.table import Table

from soft_mm.analysis.logs import last_checkpoint, read_scalars
from soft_mm.analysis.pictures import draw_loss_curves, draw_predictions
from soft_mm.datasets.export import export_photo_digits

ROOT = Path(__file__).resolve().parent.parent
DATA = Path('data/photo_digits_demo')
NUM_VAL = dict(num_crops=1000, num_scenes=200)


@dataclass(frozen=True)
class Task:
    """One training of the demo.

    Attributes:
        name: key in the summary and folder below the work dir.
        config: config file, below ``configs/photo_digits``.
        metrics: the runner's name of a metric to the summary's name and its scale to the range 0 to 1.
    """

    name: str
    config: str
    metrics: dict

    @property
    def config_file(self):
        return ROOT / 'configs' / 'photo_digits' / self.config


CLASSIFICATION = Task('classification', 'soft-tiny_photo-digits-crops.py', {'accuracy/top1': ('top1', 0.01)})
DETECTION = Task(
    'detection',
    'mask-rcnn_soft-tiny_fpn_photo-digits.py',
    {f'coco/{kind}_{name}': (f'{kind}_{name}', 1) for kind in ('bbox', 'segm') for name in ('mAP', 'mAP_50')},
)
SEGMENTATION = Task('segmentation', 'fpn_soft-tiny_photo-digits.py', {'mIoU': ('mIoU', 0.01)})


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
                else {'model.backbone.init_cfg.checkpoint': str(pretrained)}
            )
        summary[task.name] = _train(task, work_dir / task.name, options, pretrained, console)
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
    _write(path, json.dumps(summary, indent=2) + '\n')
    _print_summary(summary, console)
    console.print(f'{path}, and beside it loss_curves.png, detection.png, segmentation.png')
    return summary


def _train(task, work_dir, options, pretrained, console):
    """Run or resume one training and return its metrics, or return those of the finished run."""
    work_dir.mkdir(parents=True, exist_ok=True)
    record_file = work_dir / 'demo.json'
    fingerprint = _fingerprint(task, pretrained)
    record = json.loads(record_file.read_text()) if record_file.is_file() else {}
    lost = 'metrics' in record and last_checkpoint(work_dir) is None
    if record and (record['fingerprint'] != fingerprint or lost):
        aside = work_dir.with_name(f'{work_dir.name}.{time.strftime("%Y%m%d-%H%M%S")}')
        work_dir.rename(aside)
        work_dir.mkdir()
        console.print(
            'config, weights or data have changed, or the checkpoint is gone: starting over, '
            f'the earlier run is kept in {aside}'
        )
        record = {}
    if 'metrics' in record:
        console.print('finished already')
        return dict(record['metrics'], seconds=record['seconds'])
    checkpoint = last_checkpoint(work_dir)
    record = dict(fingerprint=fingerprint, seconds=record.get('seconds', 0.0))
    start = time.time()
    try:
        _write(record_file, json.dumps(record))
        common = [str(task.config_file), '--work-dir', str(work_dir)]
        resume = ['--resume', str(checkpoint)] if checkpoint else []
        overrides = ['--cfg-options', *(f'{key}={value}' for key, value in options.items())] if options else []
        _run_tool('train.py', *common, *resume, *overrides)
        metrics_file = work_dir / 'metrics.json'
        if _logged_metrics(task, work_dir) is None:
            # Interrupted between its last checkpoint and its evaluation, a training has nothing left to do.
            _run_tool('test.py', *common, '--json', str(metrics_file), str(last_checkpoint(work_dir)))
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f'{task.name} failed with exit code {error.returncode}; its log is in {work_dir}') from error
    finally:
        record['seconds'] = round(record['seconds'] + time.time() - start, 1)
        _write(record_file, json.dumps(record))
    logged = _logged_metrics(task, work_dir) or json.loads(metrics_file.read_text())
    record['metrics'] = {name: round(logged[key] * scale, 4) for key, (name, scale) in task.metrics.items()}
    _write(record_file, json.dumps(record))
    return dict(record['metrics'], seconds=record['seconds'])


def _write(path, text):
    """Write a file at once, so that an interruption leaves the earlier one."""
    part = path.with_suffix('.part')
    part.write_text(text)
    part.replace(path)


def _run_tool(name, *arguments):
    subprocess.run([sys.executable, str(ROOT / 'tools' / name), *arguments], check=True)


def _fingerprint(task, pretrained):
    """What a finished run depends on: its config, the weights that it starts from and the validation data."""
    digest = hashlib.sha256(Config.fromfile(task.config_file).pretty_text.encode())
    digest.update((DATA / 'photo_digits.json').read_bytes())
    if pretrained:
        digest.update(pretrained.read_bytes())
    return digest.hexdigest()


def _logged_metrics(task, work_dir):
    """The last evaluation in the logs of the trainings, or None."""
    records = [record for record in read_scalars(work_dir) if all(name in record for name in task.metrics)]
    return records[-1] if records else None


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
