"""The configs for mmpose, mmrotate and mmaction2 in docs/replace_backbone.md, where these toolboxes are installed."""

import json
import re

import cv2
import numpy as np
import pytest
import torch
from authors import REDUCED_ARCH
from mmengine.registry import MODELS
from programs import ROOT, tool

from soft_mm import SOFT

pytestmark = pytest.mark.long

GUIDE = ROOT / 'docs/replace_backbone.md'
INSTALL = f'to install it: {GUIDE.relative_to(ROOT)}, "Other toolboxes"'
# Data, head and arch of a short run. `data`, `small` and `arch` come first in the config.
POSE = """
train_dataloader = dict(batch_size=2, num_workers=0, dataset=data)
val_dataloader = dict(batch_size=2, num_workers=0, dataset=dict(data, bbox_file=None))
val_evaluator = dict(ann_file='persons.json')
test_evaluator = val_evaluator
test_dataloader = val_dataloader
model = dict(backbone=small, head=dict(in_channels=128))
"""
# The base resizes images to 1024x1024. Its DOTAMetric starts four processes, and RotatedCocoMetric fails with
# faster_coco_eval 1.8.0, so there is no evaluation.
ROTATED = """
pipeline = [
    dict(step, scale=(128, 96)) if step['type'] == 'mmdet.Resize' else step for step in _base_.train_pipeline
]
train_dataloader = dict(batch_size=2, num_workers=0, dataset=dict(data, pipeline=pipeline))
val_cfg = val_dataloader = val_evaluator = None
model = dict(backbone=small, neck=dict(in_channels=[32, 64, 96, 128]))
"""
# The base's test pipeline has 250 images per video.
RECOGNIZER = """
train_dataloader = dict(batch_size=2, num_workers=0, dataset=data)
val_dataloader = dict(batch_size=2, num_workers=0, dataset=dict(data, pipeline=_base_.val_pipeline))
test_dataloader = val_dataloader
model = dict(backbone=small, cls_head=dict(in_channels=128))
"""
COMMON = """
train_cfg = dict(max_epochs=1, val_interval=1)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=1))
"""


def write_images(folder, count=4):
    """Write images of noise. Return their names."""
    rng = np.random.default_rng(0)
    (folder / 'images').mkdir()
    names = [f'{index}.png' for index in range(count)]
    for name in names:
        cv2.imwrite(str(folder / 'images' / name), rng.integers(0, 256, (96, 128, 3), dtype=np.uint8))
    return names


def write_persons(folder):
    """Write images, and a person with 17 keypoints for each, in the format of COCO."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number, name in enumerate(write_images(folder), 1):
        points = np.concatenate([rng.integers(20, 80, (17, 2)), np.full((17, 1), 2)], axis=1)
        images.append(dict(id=number, file_name=name, height=96, width=128))
        annotations.append(
            dict(
                id=number,
                image_id=number,
                category_id=1,
                bbox=[10, 10, 80, 80],
                area=6400,
                iscrowd=0,
                num_keypoints=17,
                keypoints=points.flatten().tolist(),
            )
        )
    content = dict(images=images, annotations=annotations, categories=[dict(id=1, name='person')])
    (folder / 'persons.json').write_text(json.dumps(content))
    return "dict(data_root='', ann_file='persons.json', data_prefix=dict(img='images/'))"


def write_rotated_boxes(folder):
    """Write images, and a rotated box for each, in the format of DOTA."""
    (folder / 'boxes').mkdir()
    for name in write_images(folder):
        (folder / 'boxes' / name).with_suffix('.txt').write_text('20 30 60 20 70 50 30 60 ship 0\n')
    return "dict(data_root='', ann_file='boxes/', data_prefix=dict(img_path='images/'))"


def write_videos(folder):
    """Write videos of noise and their list."""
    rng = np.random.default_rng(0)
    lines = []
    for index in range(4):
        video = cv2.VideoWriter(str(folder / f'{index}.avi'), cv2.VideoWriter_fourcc(*'MJPG'), 10, (128, 96))
        for _ in range(8):
            video.write(rng.integers(0, 256, (96, 128, 3), dtype=np.uint8))
        video.release()
        lines.append(f'{index}.avi {index}\n')
    (folder / 'videos.txt').write_text(''.join(lines))
    return "dict(ann_file='videos.txt', data_prefix=dict(video=''))"


def train(folder, name, data, changes):
    """Train the config ``name`` of the guide for one epoch with a reduced arch, and count its model.

    Returns:
        dict: Content of the checkpoint.
    """
    (block,) = re.findall(rf'^```python\n(# {name}\n.*?)^```', GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    (folder / name).write_text(block)
    start = f"_base_ = './{name}'\ndata = {data}\nsmall = dict(arch=dict(_delete_=True, **{REDUCED_ARCH!r}))\n"
    (folder / 'short.py').write_text(start + changes + COMMON)
    # As tools/convert_checkpoint.py writes it, for images of 224x224.
    weights = {f'backbone.{key}': value for key, value in SOFT(REDUCED_ARCH).state_dict().items()}
    torch.save(dict(meta=dict(normalized=True), state_dict=weights), folder / 'classifier.pth')
    trained = tool('train.py', 'short.py', '--work-dir', 'work', cwd=folder)
    output = trained.stdout + trained.stderr
    assert trained.returncode == 0, output[-3000:]
    assert re.search(r'SOFT: all \d+ backbone keys loaded from classifier.pth', output)
    assert 'got no gradient' not in output
    content = torch.load(folder / 'work/epoch_1.pth', weights_only=False)
    for key, value in content['state_dict'].items():
        if key.startswith('backbone.') and value.ndim > 1 and value.shape == weights[key].shape:
            assert not torch.equal(value, weights[key]), key
    backbone_only = () if name == 'my_rotated_retinanet.py' else ('--backbone',)
    counted = tool('get_complexity.py', 'short.py', '--shape', 64, 96, *backbone_only, cwd=folder)
    assert counted.returncode == 0 and 'stages.3' in counted.stdout, counted.stderr[-3000:]
    return content


def evaluate(folder):
    """Test the checkpoint of :func:`train`. Return the metrics."""
    tested = tool('test.py', 'short.py', 'work/epoch_1.pth', '--json', 'metrics.json', cwd=folder)
    assert tested.returncode == 0, tested.stderr[-3000:]
    return json.loads((folder / 'metrics.json').read_text())


def test_pose_estimator_of_mmpose(tmp_path):
    pytest.importorskip('mmpose', reason=INSTALL)
    content = train(tmp_path, 'my_pose_estimator.py', write_persons(tmp_path), POSE)
    assert 0 <= evaluate(tmp_path)['coco/AP'] <= 1
    # The grid of a 256x192 image at stride 4.
    assert content['state_dict']['backbone.stages.0.pos_embed'].shape == (1, 32, 64, 48)
    # Layer-wise learning rates: the patch embedding of stage 1 has depth 0 of 0 to 6.
    rates = {round(group['initial_lr'] / 5e-4, 6) for group in content['optimizer']['param_groups']}
    assert rates == {round(0.8**power, 6) for power in range(7)}


def test_rotated_retinanet_of_mmrotate(tmp_path):
    pytest.importorskip('mmrotate', reason=INSTALL)
    train(tmp_path, 'my_rotated_retinanet.py', write_rotated_boxes(tmp_path), ROTATED)


def test_recognizer_of_mmaction2(tmp_path):
    pytest.importorskip('mmaction', reason=INSTALL)
    train(tmp_path, 'my_recognizer.py', write_videos(tmp_path), RECOGNIZER)
    assert 0 <= evaluate(tmp_path)['acc/top5'] <= 1


@pytest.mark.parametrize(
    ('model', 'head', 'shape', 'error', 'message'),
    [
        ('Recognizer2D', 'TSNHead', (2, 3, 3, 64, 64), AssertionError, 'x is tuple'),
        ('Recognizer3D', 'I3DHead', (2, 1, 3, 4, 64, 64), ValueError, 'input of shape (2, 3, 4, 64, 64): expected (B,'),
    ],
)
def test_documented_messages_of_mmaction2(model, head, shape, error, message, use):
    pytest.importorskip('mmaction', reason=INSTALL)
    use('mmaction')
    backbone = dict(type='soft_mm.SOFT', arch=REDUCED_ARCH, out_indices=(3,))
    cfg = dict(type=f'mmaction.{model}', backbone=backbone, cls_head=dict(type=head, num_classes=5, in_channels=128))
    recognizer = MODELS.build(cfg)
    assert message in GUIDE.read_text()
    with pytest.raises(error, match=re.escape(message)):
        recognizer(torch.rand(shape), None, mode='loss')
