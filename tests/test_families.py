"""Each config family trains and is evaluated through its own data pipeline, on photographs laid out as its data set is.

Only the depth of the backbone, the length of the training, the batch size and the workers are cut down. What else a CPU
needs is noted at the family.
"""

import json
import math
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from programs import tool

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[1]
NAMES = ('chelsea', 'astronaut', 'camera', 'coins')  # of these, camera and coins are grey


def photographs():
    """Return four photographs to train with, and three to evaluate. One of each is a portrait, the sizes differ."""
    from projects.photo_digits.sources import PHOTOGRAPHS, load_photographs

    train = dict(zip([p.name for p in PHOTOGRAPHS if p.split == 'train'], load_photographs('train')))
    train['chelsea'] = np.ascontiguousarray(train['chelsea'].transpose(1, 0, 2))
    coffee, flower, _, rocket = load_photographs('val')
    portrait = flower[:, 160:460]
    assert all(image.shape[0] > image.shape[1] for image in (portrait, train['chelsea']))
    return dict(train=[train[name] for name in NAMES], val=[coffee, np.ascontiguousarray(portrait), rocket])


def regions(image, count):
    """Label an image by its brightness, in ``count`` levels of equal areas."""
    grey = cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), (0, 0), 8)
    return np.searchsorted(np.quantile(grey, np.linspace(0, 1, count + 1)[1:-1]), grey).astype(np.uint8)


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def write_imagenet(root):
    """Write ImageNet's layout: folders of synsets, and lists of files with labels."""
    for split, images in photographs().items():
        lines = []
        for number, image in enumerate(images):
            name = f'n0144076{number}/{split}_{number}.JPEG'
            save(root / split / name, image)
            lines.append(f'{name} {number * 300}')
        (root / 'meta').mkdir(exist_ok=True)
        (root / f'meta/{split}.txt').write_text('\n'.join(lines) + '\n')


def write_coco(root):
    """Write COCO's layout: polygons of bright regions, a crowd, and in each split an image without annotations."""
    from mmdet.datasets import CocoDataset

    classes = CocoDataset.METAINFO['classes']
    # As in COCO, the ids have gaps.
    categories = [dict(id=2 * number + 1, name=name, supercategory='') for number, name in enumerate(classes)]
    for split, images in photographs().items():
        images = [*images, images[0][:300, :400]]
        content = dict(images=[], annotations=[], categories=categories)
        for number, image in enumerate(images):
            name, (height, width) = f'{number:012}.jpg', image.shape[:2]
            save(root / f'{split}2017' / name, image)
            content['images'].append(dict(id=number + 7, file_name=name, height=height, width=width))
            if number == len(images) - 1:
                continue
            mask = (regions(image, 3) == 2).astype(np.uint8)
            outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_TC89_KCOS)
            outlines = sorted((outline for outline in outlines if len(outline) > 3), key=cv2.contourArea)[-3:]
            for outline in outlines:
                content['annotations'].append(
                    dict(
                        id=len(content['annotations']) + 1,
                        image_id=number + 7,
                        category_id=categories[(5 * number) % 80]['id'],
                        bbox=list(map(float, cv2.boundingRect(outline))),
                        area=float(cv2.contourArea(outline)),
                        iscrowd=0,
                        segmentation=[outline.flatten().astype(float).tolist()],
                    )
                )
        # The left half of the first image is a crowd, as a run-length encoding in columns.
        height, width = images[0].shape[:2]
        half = width // 2 * height
        content['annotations'].append(
            dict(
                id=len(content['annotations']) + 1,
                image_id=7,
                category_id=1,
                bbox=[0.0, 0.0, width // 2, height],
                area=half,
                iscrowd=1,
                segmentation=dict(counts=[0, half, width * height - half], size=[height, width]),
            )
        )
        (root / 'annotations').mkdir(parents=True, exist_ok=True)
        (root / f'annotations/instances_{split}2017.json').write_text(json.dumps(content))


def write_ade20k(root):
    """Write ADE20K's layout: labels 1 to 150, and 0 for pixels without a label. One image has no labels at all."""
    for split, images in photographs().items():
        folder = dict(train='training', val='validation')[split]
        for number, image in enumerate(images):
            name, labels = f'ADE_{split}_{number:08}', regions(image, 7)
            save(root / f'images/{folder}/{name}.jpg', image)
            save(root / f'annotations/{folder}/{name}.png', labels * 21 if number else labels * 0)


def write_cityscapes(root, size, portraits=True):
    """Write Cityscapes' layout: one folder per city, labels 0 to 18 and 255. One image has no labels at all.

    Without ``portraits``, all images have the same size, as a training with whole images needs.
    """
    for split, images in photographs().items():
        for number, image in enumerate(images):
            image = image if portraits and image.shape[0] > image.shape[1] else cv2.resize(image, size)
            name, labels = f'ulm/ulm_{number:06}_000019', regions(image, 20)
            labels[labels == 19] = 255
            save(root / f'leftImg8bit/{split}/{name}_leftImg8bit.png', image)
            save(root / f'gtFine/{split}/{name}_gtFine_labelTrainIds.png', labels if number else labels * 0 + 255)


SMALL = """
_base_ = {base!r}
{change}
model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=(64, 128, 320, 512), num_heads=(2, 4, 10, 16), depths=(1, 1, 1, 1)),
        init_cfg=None,
    )
)
train_dataloader = dict(batch_size=2, num_workers=1)
val_dataloader = dict(batch_size=1, num_workers=1)
test_dataloader = dict(batch_size=1, num_workers=1)
default_hooks = dict(logger=dict(interval=1))
train_cfg = dict({length}={count}, val_interval={count})
"""


def train(config, tmp_path, change='', length='max_iters', **options):
    """Train the config for a few steps and evaluate it. Return the losses, the metrics and the evaluated images."""
    file = tmp_path / 'small.py'
    file.write_text(
        SMALL.format(
            base=str(ROOT / 'configs' / config),
            change=change,
            length=length,
            count=dict(max_iters=2, max_epochs=1)[length],
        )
    )
    options = [f'{key}={value}' for key, value in options.items()]
    arguments = [file, '--work-dir', 'run', *(['--cfg-options', *options] if options else [])]
    done = tool('train.py', *arguments, cwd=tmp_path, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    (scalars,) = (tmp_path / 'run').rglob('scalars.json')
    rows = [json.loads(line) for line in scalars.read_text().splitlines()]
    metrics = rows.pop()
    (log,) = (tmp_path / 'run').glob('*/*.log')
    evaluated = re.findall(r'\(val\).*\[ *(\d+)/(\d+)\] +eta', log.read_text())
    assert [int(now) for now, _ in evaluated] == list(range(1, int(evaluated[-1][1]) + 1))
    losses = [row['loss'] for row in rows]
    assert losses and all(math.isfinite(value) for row in rows for value in row.values())
    assert all(math.isfinite(value) for value in metrics.values())
    return losses, metrics, len(evaluated)


@pytest.mark.parametrize('config', ['soft-tiny_8xb128_in1k', 'soft-tiny-norm_8xb128_in1k'])
def test_imagenet(config, tmp_path):
    write_imagenet(tmp_path / 'data/imagenet')
    losses, metrics, evaluated = train(f'imagenet/{config}.py', tmp_path, length='max_epochs')
    assert len(losses) == 2 and evaluated == 3
    assert {'accuracy/top1', 'accuracy/top5'} <= set(metrics)


@pytest.mark.parametrize(
    ('config', 'metrics'),
    [
        ('retinanet_soft-tiny-norm_fpn_1x_coco', ['bbox']),
        ('deformable-detr_soft-tiny-norm_16xb2-50e_coco', ['bbox']),
        ('mask-rcnn_soft-tiny-norm_fpn_1x_coco', ['bbox', 'segm']),
        ('mask-rcnn_soft-small-norm_fpn_ms-crop-3x_coco', ['bbox', 'segm']),
    ],
)
def test_coco(config, metrics, tmp_path):
    write_coco(tmp_path / 'data/coco')
    # Without it, an untrained detector finds nothing, and mmdet computes no metrics.
    threshold = {
        'mask': {'model.test_cfg.rcnn.score_thr': 0.0},
        'reti': {'model.test_cfg.score_thr': 0.0},
    }.get(config[:4], {})
    losses, found, evaluated = train(f'coco/{config}.py', tmp_path, length='max_epochs', **threshold)
    # mmdet trains on the four images with annotations and evaluates all.
    assert len(losses) == 2 and evaluated == 4
    assert {f'coco/{metric}_{name}' for metric in metrics for name in ('mAP', 'mAP_50')} <= set(found)


@pytest.mark.parametrize(
    'config',
    [
        'fpn_soft-tiny-norm_8xb4-80k_ade20k-512x512',
        'upernet_soft-tiny-norm_8xb2-160k_ade20k-512x512',
        'upernet_soft-small-norm_8xb2-160k-layer-decay_ade20k-512x512',
    ],
)
def test_ade20k(config, tmp_path):
    write_ade20k(tmp_path / 'data/ade/ADEChallengeData2016')
    losses, metrics, evaluated = train(f'ade20k/{config}.py', tmp_path)
    assert len(losses) == 2 and evaluated == 3 and {'aAcc', 'mIoU', 'mAcc'} <= set(metrics)


def test_cityscapes_mask2former(tmp_path):
    write_cityscapes(tmp_path / 'data/cityscapes', (1024, 512))
    losses, metrics, evaluated = train(
        'cityscapes/mask2former_soft-tiny-norm_8xb2-90k_cityscapes-512x1024.py', tmp_path
    )
    assert len(losses) == 2 and evaluated == 3 and {'aAcc', 'mIoU', 'mAcc'} <= set(metrics)


def test_cityscapes_upernet(tmp_path):
    """Whole images of a quarter of the width and height: a step at 1024x2048 takes minutes on a CPU."""
    write_cityscapes(tmp_path / 'data/cityscapes', (512, 256), portraits=False)
    change = """
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = (512, 256)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
"""
    losses, metrics, evaluated = train(
        'cityscapes/upernet_soft-small-norm_8xb1-80k_cityscapes-1024x2048.py',
        tmp_path,
        change,
        **{'model.data_preprocessor.size': '(256,512)'},
    )
    assert len(losses) == 2 and evaluated == 3 and {'aAcc', 'mIoU', 'mAcc'} <= set(metrics)
