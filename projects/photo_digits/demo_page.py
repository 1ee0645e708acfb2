"""The demo's page ``report.html``: one file with metrics, curves, pictures, versions and the next commands."""

import math
import os
import platform
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.ticker import MaxNLocator

from soft_mm.utils import write_text

from .sources import PHOTOGRAPHS

_TEMPLATE = Path(__file__).with_name('demo_page.html.jinja')
_LABELS = {
    'top1': 'top-1 accuracy',
    'bbox_mAP': 'box mAP',
    'bbox_mAP_50': 'box mAP_50',
    'segm_mAP': 'mask mAP',
    'segm_mAP_50': 'mask mAP_50',
    'mIoU': 'mIoU, background included',
}
# Size of a chart, and the edges of the area inside its axes, in the units of the SVG.
_CHART = dict(width=360, height=220, left=44, right=350, top=10, bottom=190)

_CONFIG = """\
_base_ = 'configs/coco/mask-rcnn_soft-tiny-norm_fpn_1x_coco.py'
classes = ('cat', 'dog')
folder = dict(data_root='data/my_data/', metainfo=dict(classes=classes))
train = dict(ann_file='train.json', data_prefix=dict(img='train/'), **folder)
val = dict(ann_file='val.json', data_prefix=dict(img='val/'), **folder)
train_dataloader = dict(dataset=train)
val_dataloader = dict(dataset=val)
test_dataloader = dict(dataset=val)
val_evaluator = dict(ann_file='data/my_data/val.json')
test_evaluator = dict(ann_file='data/my_data/val.json')
heads = dict(num_classes=len(classes))
model = dict(roi_head=dict(bbox_head=heads, mask_head=heads))
"""
#: The commands to go on with, in the order of the page.
STEPS = (
    dict(
        title='Train on your own COCO-style folder',
        text='Save this as my_data.py and set your classes and paths. Classes are the names of the categories in the '
        'JSON files. The option of the command trains from random initialisation; leave it out when you have the '
        'converted weights of the next step. docs/get_started.md and docs/replace_backbone.md say more.',
        config=_CONFIG,
        command='python tools/train.py my_data.py --auto-scale-lr --cfg-options model.backbone.init_cfg=None',
    ),
    dict(
        title="Convert the authors' weights",
        text='Download an ImageNet checkpoint of normalised SOFT-Tiny, which https://github.com/fudan-zvg/SOFT links. '
        'The configs of detectors and segmentors with SOFT-Tiny start from the file that this command writes. '
        'docs/checkpoints.md says more.',
        command='python tools/convert_checkpoint.py DOWNLOADED.pth checkpoints/soft-tiny-norm_in1k.pth --normalized',
    ),
    dict(
        title='Benchmark at your size',
        text='Time, peak memory and multiply-adds of the backbone for images of these heights and widths. '
        'docs/long_inputs.md says what to expect.',
        command='python -m benchmarks soft-tiny --sizes 512 800x1344 --batch-size 1',
    ),
)


def write_report(path, summary, losses, scenes, attention, hard=False, seed=0):
    """Write the page atomically.

    Args:
        path (str | Path): File to write.
        summary (dict): Summary of :func:`~projects.photo_digits.demo.run_demo`.
        losses (dict[str, list[tuple[int, float]]]): Maps the name of each part to the iterations and losses of its
            training, see :func:`~projects.common.run_logs.read_losses`.
        scenes (dict[str, list[Picture]]): Maps the name of a part to its pictures of ground truth and prediction.
        attention (Picture | None): Rows of the attention of two pixels.
        hard (bool): Whether the data have the hard form. Defaults to False.
        seed (int): Seed of the trainings. Defaults to 0.
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    parts = {name: values for name, values in summary.items() if name != 'versions'}
    start = 'The backbones of both start from random initialisation.'
    if 'classification' in parts:
        start = "The detector starts from the classifier, and the segmentor from the detector's backbone."
    digits = 'small, overlapping and of less contrast' if hard else 'large, apart and of high contrast'
    seconds = [values.get('seconds') for values in parts.values()]
    page = environment.get_template(_TEMPLATE.name).render(
        title='soft_mm: results of the demo',
        introduction='SOFT-Tiny on photo-digits, handwritten digits on photographs. The detector is a Mask R-CNN, and '
        f'the segmentor is a Semantic FPN. {start} The digits are {digits}. The seed is {seed}.',
        parts=[_describe_part(name, values) for name, values in parts.items()],
        minutes=None if None in seconds else f'{sum(seconds) / 60:.1f}',
        curves=[_chart(name, losses.get(name, [])) for name in parts],
        predictions=[dict(name=name, scenes=pictures) for name, pictures in scenes.items()],
        attention=attention,
        steps=STEPS,
        versions=[*summary['versions'].items(), ('processor', processor_name())],
        photographs=[photograph for photograph in PHOTOGRAPHS if photograph.split == 'val'],
    )
    write_text(path, page)


def processor_name():
    """Return the name of the processor and the number of its cores that the system reports."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path('/proc/cpuinfo')
    if cpuinfo.is_file():
        # On Linux, `platform` knows the architecture only.
        models = [line.partition(':')[2].strip() for line in cpuinfo.read_text().splitlines() if 'model name' in line]
        name = models[0] if models else name
    return f'{name}, {os.cpu_count()} cores'


def _describe_part(name, values):
    metrics = [(_LABELS.get(key, key), f'{value:.3f}') for key, value in values.items() if key != 'seconds']
    seconds = values.get('seconds')
    return dict(name=name, metrics=metrics, minutes='unknown' if seconds is None else f'{seconds / 60:.1f}')


def _chart(name, losses):
    """Lay out a chart of training losses in the units of its SVG."""
    finite = [(step, loss) for step, loss in losses if math.isfinite(loss)]
    if not finite:
        return dict(name=name, points='', caption='No training losses: the logs of this part hold none.')
    (first, start), (last, end) = finite[0], finite[-1]
    caption = f'Loss per iteration: {start:.3f} at iteration {first}, {end:.3f} at iteration {last}.'
    if left_out := len(losses) - len(finite):
        caption += f' Left out because they are not finite: {left_out}.'
    y_ticks = _ticks(max(loss for _, loss in finite))
    box, highest = _CHART, y_ticks[-1]

    def x(step):
        return round(box['left'] + (box['right'] - box['left']) * step / last, 1)

    def y(loss):
        return round(box['bottom'] - (box['bottom'] - box['top']) * loss / highest, 1)

    return dict(
        **box,
        name=name,
        points=' '.join(f'{x(step)},{y(loss)}' for step, loss in finite),
        x_ticks=[(x(tick), f'{tick:g}') for tick in _ticks(last) if tick <= last],
        y_ticks=[(y(tick), f'{tick:g}') for tick in y_ticks],
        alt=f'Training loss of the {name}.',
        caption=caption,
    )


def _ticks(highest):
    return [float(tick) for tick in MaxNLocator(4).tick_values(0, max(highest, 1e-6))]
