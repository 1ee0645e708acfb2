"""Faults of data: a tool names the fault and the file in one sentence, and the checkpoints stay."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from digits_workspace import DETECTOR, SEGMENTOR
from mmengine.registry import DATASETS
from mmengine.structures import BaseDataElement, InstanceData
from programs import run_tool
from test_training_faults import NoiseImages, assert_same_weights, names, toy_runner
from torch.utils.data import get_worker_info

from soft_mm.hooks import DataCheckHook
from soft_mm.runner import data_errors
from soft_mm.utils import DataError

DIGITS = tuple('0123456789')
SHORT = """
model = dict(backbone=dict(init_cfg=None))
train_cfg = dict(max_iters=2, val_interval=2)
param_scheduler = []
val_dataloader = dict(num_workers=0)
test_dataloader = dict(num_workers=0)
"""


@pytest.fixture
def data(workspace, tmp_path, monkeypatch):
    """A copy of the data set that a test may damage. The configs read it as the workspace's."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(workspace / 'data', tmp_path / 'data')
    return tmp_path / 'data/photo_digits_demo'


@pytest.fixture
def train_detector(data, tmp_path):
    """Train on the COCO file of the validation split."""

    def run(classes=DIGITS, workers=0, val_classes=DIGITS, more=''):
        file = tmp_path / 'detector.py'
        file.write_text(f"""
_base_ = {str(DETECTOR)!r}
{SHORT}
{more}
val_dataloader = dict(num_workers=0, dataset=dict(metainfo=dict(classes={val_classes!r})))
train_dataloader = dict(
    batch_size=1,
    num_workers={workers},
    persistent_workers=False,
    dataset=dict(
        _delete_=True,
        type='CocoDataset',
        data_root={str(data)!r},
        ann_file='annotations/instances_val.json',
        data_prefix=dict(img='val/scenes/images/'),
        metainfo=dict(classes={classes!r}),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='PackDetInputs'),
        ],
    ),
)
""")
        return run_tool('train.py', file, '--work-dir', tmp_path / 'run')

    return run


def change_annotations(data, change):
    path = data / 'annotations/instances_val.json'
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_classes_in_another_order_than_the_file(train_detector):
    done = train_detector(('1', '0', *DIGITS[2:]))
    assert 'instances_val.json: ' in done.returncode and 'the file has the order 0, 1, 2' in done.returncode


def test_faults_are_warnings_on_demand(train_detector, tmp_path):
    hook = "custom_hooks = [dict(type='soft_mm.DataCheckHook', strict=False)]"
    assert train_detector(('1', '0', *DIGITS[2:]), more=hook).returncode == 0
    (log,) = (tmp_path / 'run').rglob('*.log')
    assert log.read_text().count('the file has the order 0, 1, 2') == 1


def test_class_that_the_file_lacks(train_detector):
    done = train_detector(('zero', *DIGITS[1:]))
    assert 'the file has no category zero' in done.returncode


def test_last_class_that_the_file_lacks(train_detector, tmp_path):
    """A training gets the right labels. mmdet's metric would stop at the first box of this class."""
    assert train_detector((*DIGITS[:9], 'nine')).returncode == 0
    (log,) = (tmp_path / 'run').rglob('*.log')
    assert 'instances_val.json has no category nine' in log.read_text()
    assert 'the file has no category nine' in train_detector(val_classes=(*DIGITS[:9], 'nine')).returncode


def test_category_that_the_config_does_not_know(train_detector, tmp_path):
    """Annotations of other categories are left out, which is a way to train on some of them, so it is a warning."""
    done = train_detector(DIGITS[:8])
    assert done.returncode == 0
    (log,) = (tmp_path / 'run').rglob('*.log')
    assert 'annotations of 2 categories that the config does not name are ignored: 8, 9' in log.read_text()


def test_more_classes_than_the_head_has(train_detector, data):
    def change(content):
        content['categories'].append(dict(id=99, name='ten'))
        for annotation in content['annotations']:
            annotation['category_id'] = 99

    change_annotations(data, change)
    done = train_detector((*DIGITS, 'ten'))
    assert 'has the labels [10], but ' in done.returncode and ' has the classes 0 to 9' in done.returncode
    assert str(data / 'val/scenes/images') in done.returncode


@pytest.mark.parametrize('content', [b'', b'[1, 2', b'{"images": [', b'\x1f\x8b\x08\x00'])
def test_annotation_file_that_is_no_json(train_detector, data, content):
    (data / 'annotations/instances_val.json').write_bytes(content)
    done = train_detector()
    assert f'{data}/annotations/instances_val.json is no JSON: ' in done.returncode


def test_annotation_file_without_annotations(train_detector, data):
    change_annotations(data, lambda content: content['annotations'].clear())
    done = train_detector()
    assert 'CocoDataset(ann_file=' in done.returncode and 'has no images' in done.returncode


@pytest.mark.parametrize('workers', [0, 1])
def test_truncated_image(train_detector, data, workers):
    images = sorted((data / 'val/scenes/images').iterdir())
    for image in images:
        image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    done = train_detector(workers=workers)
    assert any(done.returncode.startswith(f'{image} cannot be read as an image') for image in images)
    for image in images:
        image.write_bytes(b'')
    assert 'an image file is empty' in train_detector(workers=workers).returncode


@pytest.mark.parametrize('workers', [0, 1])
def test_missing_image(train_detector, data, workers):
    images = sorted((data / 'val/scenes/images').iterdir())
    for image in images:
        image.unlink()
    done = train_detector(workers=workers)
    assert any(str(image) in done.returncode for image in images) and 'data_root' in done.returncode
    assert len(done.returncode.splitlines()) == 1


@pytest.fixture
def segmentor(data, tmp_path):
    """A config that trains on the label maps of the validation split."""
    file = tmp_path / 'segmentor.py'
    file.write_text(f"""
_base_ = {str(SEGMENTOR)!r}
{SHORT}
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        _delete_=True,
        type='BaseSegDataset',
        data_root={str(data)!r},
        data_prefix=dict(img_path='val/scenes/images', seg_map_path='val/scenes/semantic'),
        img_suffix='.png',
        metainfo=dict(classes=('background', *{DIGITS!r})),
        reduce_zero_label=False,
        pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')],
    ),
)
""")
    return file


def test_label_that_the_config_does_not_know(segmentor, data, tmp_path):
    maps = sorted((data / 'val/scenes/semantic').iterdir())
    for path in maps:
        labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        # 255 is ignored, so it is no fault.
        labels[:4], labels[8:9, 3:5] = 255, 37
        cv2.imwrite(str(path), labels)
    done = run_tool('train.py', segmentor, '--work-dir', tmp_path / 'run')
    assert any(f'{path} has the labels [37], but FPNHead has the classes 0 to 10' in done.returncode for path in maps)


def test_ignored_label_trains_and_a_wrong_one_is_not_left_out_of_the_metrics(segmentor, data, tmp_path):
    maps = sorted((data / 'val/scenes/semantic').iterdir())
    labels = cv2.imread(str(maps[0]), cv2.IMREAD_UNCHANGED)
    labels[:4] = 255
    cv2.imwrite(str(maps[0]), labels)
    assert run_tool('train.py', segmentor, '--work-dir', tmp_path / 'run').returncode == 0
    labels[0, 0] = 11
    cv2.imwrite(str(maps[0]), labels)
    done = run_tool('test.py', segmentor, tmp_path / 'run/iter_2.pth', '--work-dir', tmp_path / 'test')
    assert f'{maps[0].relative_to(tmp_path)} has the labels [11], but BaseSegDataset' in done.returncode


@DATASETS.register_module()
class DyingImages(NoiseImages):
    """Its worker is killed at the sixth image as long as a file exists, as the kernel does when memory runs out."""

    def __init__(self, fatal, **options):
        super().__init__(**options)
        self.fatal = fatal

    def __getitem__(self, index):
        if index == 5 and get_worker_info() and os.path.exists(self.fatal):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


DEAD_WORKER = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from soft_mm.runner import data_errors
from test_data_faults import dying_runner
with data_errors():
    dying_runner(sys.argv[1], 3, sys.argv[2]).train()
"""


def dying_runner(work_dir, epochs, fatal):
    dataset = dict(type='DyingImages', fatal=str(fatal))
    return toy_runner(work_dir, epochs, **{'train_dataloader.dataset': dataset, 'train_dataloader.num_workers': 1})


def test_worker_that_dies_leaves_the_last_checkpoint(tmp_path, environment):
    run, fatal = tmp_path / 'run', tmp_path / 'fatal'
    dying_runner(run, 1, fatal).train()
    fatal.touch()
    program = DEAD_WORKER.format(tests=str(Path(__file__).parent))
    command = [sys.executable, '-c', program, str(run), str(fatal)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[-2000:]
    message = done.stderr.strip().splitlines()[-1]
    assert 'A process that loads data died' in message and 'set a smaller num_workers' in message
    assert names(run) == ['epoch_1.pth']
    fatal.unlink()
    again = dying_runner(run, 3, fatal)
    assert again._load_from == str(run / 'epoch_1.pth') and again._resume
    again.train()
    dying_runner(tmp_path / 'whole', 3, fatal).train()
    assert_same_weights(run / 'epoch_3.pth', tmp_path / 'whole/epoch_3.pth')


@pytest.mark.parametrize('length', [0, 4])
def test_heads_and_batches_of_other_forms_are_left_alone(tmp_path, length):
    """Batches without data samples, and a model without a head of a toolbox."""
    changes = {'train_dataloader.dataset.length': length, 'custom_hooks': [dict(type='soft_mm.DataCheckHook')]}
    with pytest.raises(SystemExit) if length == 0 else contextlib.nullcontext() as caught, data_errors():
        toy_runner(tmp_path, 1, **changes).train()
    assert length or 'NoiseImages() has no images' in str(caught.value)


def test_errors_from_elsewhere_keep_their_traceback():
    def join_nothing():
        np.concatenate([])

    def read_text():
        b'\xff'.decode()

    for fail, kind in ((join_nothing, ValueError), (read_text, UnicodeDecodeError)):
        with pytest.raises(kind), data_errors():
            fail()


class GuidedRPNHead(torch.nn.Module):
    num_classes = 1


class LinearHead(torch.nn.Module):
    num_classes = 3


@pytest.mark.parametrize(('head', 'refused'), [(GuidedRPNHead(), False), (LinearHead(), True), (None, False)])
def test_labels_are_compared_with_the_head_that_takes_them(head, refused):
    model = torch.nn.Module()
    model.bbox_head = head
    sample = BaseDataElement(metainfo=dict(img_path='a.png'))
    sample.gt_instances = InstanceData(labels=torch.tensor([0, 3]))
    with pytest.raises(DataError, match=r'a.png has the labels \[3\]') if refused else contextlib.nullcontext():
        DataCheckHook().before_train_iter(SimpleNamespace(model=model), 0, dict(data_samples=[sample]))
