"""The registered data sets, alone and in the pipelines of the toolboxes."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS

from projects.photo_digits import (
    CLASSES,
    CropGenerator,
    PhotoDigitsCrops,
    PhotoDigitsScenes,
    SceneGenerator,
)


def test_pipeline_of_mmpretrain(use):
    use('mmpretrain')
    from mmpretrain.evaluation import Accuracy

    dataset = DATASETS.build(
        dict(
            type='PhotoDigitsCrops',
            split='val',
            length=30,
            pipeline=[dict(type='PackInputs')],
        )
    )
    generator = CropGenerator('val')
    metric = Accuracy()
    for index in range(30):
        image, label = generator.generate(index)
        data = dataset[index]
        assert data['inputs'].shape == (3, 64, 64) and data['inputs'].dtype == torch.uint8
        assert (data['inputs'].permute(1, 2, 0).numpy() == image).all()
        sample = data['data_samples']
        assert sample.gt_label.tolist() == [label]
        assert sample.img_path == f'photo-digits/val/crop/{index:06d}'
        assert sample.sample_idx == index and sample.img_shape == sample.ori_shape == (64, 64)
        wrong = index % 3 == 0
        sample.set_pred_score(torch.eye(10)[(label + wrong) % 10])
        metric.process(None, [sample.to_dict()])
    assert abs(metric.evaluate(30)['accuracy/top1'] - 200 / 3) < 1e-4


def test_pipeline_of_mmdet(use):
    use('mmdet')
    dataset = DATASETS.build(
        dict(
            type='PhotoDigitsScenes',
            length=10,
            generator=dict(size=(96, 128)),
            pipeline=[
                dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
                dict(type='Resize', scale=(256, 192), keep_ratio=True),
                dict(type='PackDetInputs'),
            ],
        )
    )
    generator = SceneGenerator(size=(96, 128))
    assert dataset.metainfo['classes'] == CLASSES
    for index in range(10):
        scene, data = generator.generate(index), dataset[index]
        assert data['inputs'].shape == (3, 192, 256) and data['inputs'].dtype == torch.uint8
        sample = data['data_samples']
        assert sample.ori_shape == (96, 128) and sample.img_shape == (192, 256)
        assert sample.img_id == index
        instances = sample.gt_instances
        assert instances.labels.tolist() == scene.labels.tolist()
        assert torch.equal(instances.bboxes.tensor, torch.from_numpy(scene.boxes * 2))
        assert (instances.masks.masks[:, ::2, ::2] == scene.masks).all()


def test_pipeline_of_mmseg(use):
    use('mmseg')
    dataset = DATASETS.build(
        dict(
            type='PhotoDigitsScenes',
            length=10,
            annotations='semantic',
            generator=dict(size=(96, 128)),
            pipeline=[
                dict(type='Resize', scale=(256, 192), keep_ratio=True),
                dict(type='PackSegInputs'),
            ],
        )
    )
    generator = SceneGenerator(size=(96, 128))
    assert dataset.metainfo['classes'] == ('background', *CLASSES)
    assert len(dataset.metainfo['palette']) == 11
    for index in range(10):
        scene, data = generator.generate(index), dataset[index]
        assert data['inputs'].shape == (3, 192, 256) and data['inputs'].dtype == torch.uint8
        sample = data['data_samples']
        assert sample.ori_shape == (96, 128) and sample.reduce_zero_label is False
        target = sample.gt_sem_seg.data
        assert target.shape == (1, 192, 256) and target.dtype == torch.int64
        assert (target[0, ::2, ::2].numpy() == scene.semantic).all()


def test_importing_needs_no_toolbox(root, environment):
    code = """
import sys
for name in ('mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'sklearn', 'skimage', 'pycocotools'):
    sys.modules[name] = None
from mmengine.registry import DATASETS
import projects.photo_digits
assert DATASETS.get('PhotoDigitsCrops') is projects.photo_digits.PhotoDigitsCrops
"""
    result = subprocess.run([sys.executable, '-c', code], cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ('broken', 'message'),
    [
        ('import no_such_dependency', 'no_such_dependency'),
        ('import cv2\ncv2.no_such_function', 'no_such_function'),
        ('1 / 0', 'ZeroDivisionError'),
    ],
)
def test_an_error_in_the_project_is_shown(tmp_path, root, environment, broken, message):
    """A config that imports the project fails with the project's error, not with an unknown data set."""
    ignore = shutil.ignore_patterns('__pycache__', 'tests')
    for package in ('common', 'photo_digits'):
        shutil.copytree(f'{root}/projects/{package}', tmp_path / 'projects' / package, ignore=ignore)
    (tmp_path / 'projects' / '__init__.py').touch()
    path = tmp_path / 'projects' / 'photo_digits' / 'generators.py'
    path.write_text(f'{broken}\n{path.read_text()}')
    config = tmp_path / 'config.py'
    config.write_text("custom_imports = dict(imports=['projects.photo_digits'], allow_failed_imports=False)\n")
    code = f"""
from mmengine.config import Config
from mmengine.registry import DATASETS
Config.fromfile({str(config)!r})
DATASETS.build(dict(type='PhotoDigitsCrops'))
"""
    environment = dict(environment, PYTHONPATH=f'{tmp_path}:{environment["PYTHONPATH"]}')
    result = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode != 0 and message in result.stderr, result.stderr
    assert 'not in the' not in result.stderr


def test_base_data_set_behaviour():
    dataset = DATASETS.build(
        dict(
            type='PhotoDigitsCrops',
            length=20,
            indices=[7, 3],
            lazy_init=True,
            serialize_data=False,
            generator=dict(size=32),
        )
    )
    assert not dataset._fully_initialized
    dataset.full_init()
    assert len(dataset) == 2
    data = dataset[0]
    image, label = CropGenerator(size=32).generate(7)
    np.testing.assert_array_equal(data['img'], image)
    assert (data['gt_label'], data['sample_idx']) == (label, 0)
    assert data['img_path'] == 'photo-digits/train/crop/000007'
    assert len(PhotoDigitsCrops(length=20, indices=5)) == 5
    named = PhotoDigitsCrops(length=2, metainfo=dict(classes=tuple('abcdefghij')))
    assert named.metainfo['classes'] == tuple('abcdefghij')
    assert PhotoDigitsCrops(length=2).metainfo['classes'] == tuple('0123456789')


def test_scenes_without_a_pipeline():
    scene = SceneGenerator('val').generate(1)
    data = PhotoDigitsScenes('val', 2)[1]
    assert (data['height'], data['width'], data['img_id']) == (256, 256, 1)
    assert [instance['bbox'] for instance in data['instances']] == scene.boxes.tolist()
    assert all(instance['ignore_flag'] == 0 for instance in data['instances'])
    data = PhotoDigitsScenes('val', 2, annotations='semantic')[1]
    np.testing.assert_array_equal(data['gt_seg_map'], scene.semantic)
    assert data['seg_fields'] == ['gt_seg_map'] and data['label_map'] is None
    assert 'instances' not in data


def test_worker_processes_make_the_same_samples():
    def collate(batch):
        return torch.stack([torch.from_numpy(data['img']) for data in batch])

    dataset = PhotoDigitsCrops(length=8)
    batches = [next(iter(torch.utils.data.DataLoader(dataset, 8, num_workers=n, collate_fn=collate))) for n in (0, 2)]
    assert torch.equal(*batches)


@pytest.mark.parametrize(
    'data_set, options, error, message',
    [
        (PhotoDigitsScenes, dict(annotations='panoptic'), ValueError, 'panoptic'),
        (PhotoDigitsScenes, dict(split='test'), ValueError, 'test'),
        (PhotoDigitsScenes, dict(length=0), ValueError, 'length'),
        (PhotoDigitsScenes, dict(metainfo=dict(classes=('a',))), ValueError, '10 classes'),
        (PhotoDigitsScenes, dict(ann_file='x.json'), TypeError, 'ann_file'),
        (PhotoDigitsScenes, dict(generator=dict(flip=True)), TypeError, 'flip'),
        (PhotoDigitsCrops, dict(generator=dict(num_digits=(1, 2))), TypeError, 'num_digits'),
        (PhotoDigitsCrops, dict(annotations='instances'), TypeError, 'annotations'),
    ],
)
def test_bad_options(data_set, options, error, message):
    with pytest.raises(error, match=message):
        data_set(**options)
