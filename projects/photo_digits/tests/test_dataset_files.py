"""The data set on disk: the same samples, readable by pycocotools and the data sets of the toolboxes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.registry import DATASETS

from projects.photo_digits import CLASSES, CropGenerator, SceneGenerator, dataset_files, demo, make_dataset
from projects.photo_digits.dataset_files import MANIFEST, export_photo_digits
from soft_mm.utils import read_config

README = Path(__file__).parents[1] / 'README.md'

NUM_CROPS, NUM_SCENES, SIZE = 40, 6, (96, 128)
OPTIONS = dict(
    num_crops=NUM_CROPS,
    num_scenes=NUM_SCENES,
    seed=3,
    crop_options=dict(size=32),
    scene_options=dict(size=SIZE),
)
SMALL = dict(splits=['val'], num_crops=3, num_scenes=2, scene_options=dict(size=64))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp('data') / 'photo-digits'
    assert export_photo_digits(out, **OPTIONS) is True
    return out


def snapshot(folder):
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob('*')
        if path.is_file()
    }


@pytest.mark.parametrize('split', ['train', 'val'])
def test_files_hold_the_generators_pixels(folder, split):
    crops, scenes = CropGenerator(split, 3, size=32), SceneGenerator(split, 3, size=SIZE)
    assert len(list((folder / split / 'crops').rglob('*.png'))) == NUM_CROPS
    for index in range(NUM_CROPS):
        image, label = crops.generate(index)
        stored = cv2.imread(str(folder / split / 'crops' / str(label) / f'{index:06d}.png'))
        np.testing.assert_array_equal(stored, image)
    for index in range(NUM_SCENES):
        scene, name = scenes.generate(index), f'{index:06d}.png'
        stored = cv2.imread(str(folder / split / 'scenes' / 'images' / name), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(stored, scene.image)
        path = folder / split / 'scenes' / 'semantic' / name
        stored = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert stored.dtype == np.uint8
        np.testing.assert_array_equal(stored, scene.semantic)
    assert cv2.imread(str(folder / f'contact_sheet_{split}.png')) is not None


@pytest.mark.parametrize('split', ['train', 'val'])
def test_coco_annotations(folder, split, capsys):
    coco_module = pytest.importorskip('pycocotools.coco')
    from pycocotools import mask as mask_utils
    from pycocotools.cocoeval import COCOeval

    coco = coco_module.COCO(str(folder / 'annotations' / f'instances_{split}.json'))
    assert coco.getCatIds() == list(range(1, 11))
    assert len(coco.getImgIds()) == NUM_SCENES
    generator = SceneGenerator(split, 3, size=SIZE)
    for index in coco.getImgIds():
        scene = generator.generate(index)
        annotations = coco.loadAnns(coco.getAnnIds(index))
        assert len(annotations) == len(scene.labels)
        for k, annotation in enumerate(annotations):
            assert annotation['id'] > 0 and annotation['iscrowd'] == 0
            assert annotation['category_id'] == scene.labels[k] + 1
            assert annotation['area'] == scene.areas[k]
            np.testing.assert_array_equal(coco.annToMask(annotation), scene.masks[k])
            box = mask_utils.toBbox(coco.annToRLE(annotation))
            np.testing.assert_array_equal(annotation['bbox'], box)
    results = coco.loadRes([dict(a, score=1.0) for a in coco.dataset['annotations']])
    for kind in ('bbox', 'segm'):
        evaluation = COCOeval(coco, results, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] == 1.0


def test_folder_read_by_mmpretrain(folder, use):
    use('mmpretrain')
    dataset = DATASETS.build(dict(type='CustomDataset', data_prefix=f'{folder}/train/crops'))
    assert len(dataset) == 40
    assert dataset.CLASSES == tuple('0123456789')
    generator = CropGenerator('train', 3, size=32)
    for index in range(40):
        info = dataset.get_data_info(index)
        assert generator.generate(int(info['img_path'][-10:-4]))[1] == info['gt_label']


def test_folder_read_by_mmdet(folder, use):
    use('mmdet')
    dataset = DATASETS.build(
        dict(
            type='CocoDataset',
            data_root=folder,
            ann_file='annotations/instances_train.json',
            data_prefix=dict(img='train/scenes/images/'),
            metainfo=dict(classes=CLASSES),
            filter_cfg=dict(filter_empty_gt=True, min_size=32),
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
                dict(type='PackDetInputs'),
            ],
        )
    )
    assert len(dataset) == 6
    generator = SceneGenerator('train', 3, size=(96, 128))
    for index in range(6):
        scene, data = generator.generate(index), dataset[index]
        instances = data['data_samples'].gt_instances
        assert (data['inputs'].permute(1, 2, 0).numpy() == scene.image).all()
        assert instances.labels.tolist() == scene.labels.tolist()
        assert (instances.bboxes.tensor.numpy() == scene.boxes).all()
        assert (instances.masks.masks == scene.masks).all()


def test_folder_read_by_mmseg(folder, use):
    use('mmseg')
    dataset = DATASETS.build(
        dict(
            type='BaseSegDataset',
            data_root=folder,
            img_suffix='.png',
            seg_map_suffix='.png',
            data_prefix=dict(img_path='train/scenes/images', seg_map_path='train/scenes/semantic'),
            metainfo=dict(classes=('background', *CLASSES)),
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations'),
                dict(type='PackSegInputs'),
            ],
        )
    )
    assert len(dataset) == 6
    generator = SceneGenerator('train', 3, size=(96, 128))
    for index in range(6):
        scene, data = generator.generate(index), dataset[index]
        assert (data['inputs'].permute(1, 2, 0).numpy() == scene.image).all()
        assert (data['data_samples'].gt_sem_seg.data[0].numpy() == scene.semantic).all()


def test_manifest(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest['complete'] is True
    assert manifest['options']['train']['scene']['size'] == list(SIZE)
    assert manifest['options']['val']['crop']['seed'] == 3
    assert len(manifest['photographs']) == 15
    assert all(photograph['licence'] for photograph in manifest['photographs'])


def test_complete_folder_is_left_alone(folder):
    before = snapshot(folder)
    assert export_photo_digits(folder, **OPTIONS) is False
    assert snapshot(folder) == before


def test_other_options_rewrite_own_files_only(tmp_path):
    export_photo_digits(tmp_path, **SMALL)
    kept = [tmp_path / 'notes.txt', tmp_path / 'val' / 'scenes' / 'images' / 'mine.png']
    for path in kept:
        path.write_text('mine')
    assert export_photo_digits(tmp_path, **dict(SMALL, num_scenes=1, seed=9)) is True
    assert [path.read_text() for path in kept] == ['mine', 'mine']
    images = sorted(path.name for path in (tmp_path / 'val' / 'scenes' / 'images').iterdir())
    assert images == ['000000.png', 'mine.png']
    assert len(list((tmp_path / 'val' / 'crops').rglob('*.png'))) == 3
    assert export_photo_digits(tmp_path, **dict(SMALL, splits=['train'])) is True
    assert not (tmp_path / 'annotations' / 'instances_val.json').exists()
    assert not (tmp_path / 'val' / 'crops').exists() and kept[1].exists()


def test_foreign_folders_are_refused(tmp_path):
    (tmp_path / 'train').mkdir()
    (tmp_path / 'train' / 'photo.png').write_text('mine')
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match='nothing was written'):
        export_photo_digits(tmp_path, **SMALL)
    assert snapshot(tmp_path) == before
    (tmp_path / MANIFEST).write_text('{"name": "something else"}')
    with pytest.raises(FileExistsError, match='nothing was written'):
        export_photo_digits(tmp_path, **SMALL)
    with pytest.raises(FileExistsError, match='is a file, not a folder'):
        export_photo_digits(tmp_path / MANIFEST, **SMALL)


def test_an_interrupted_run_is_completed(tmp_path, monkeypatch):
    write, written = dataset_files._write_image, []

    def interrupted(path, image):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(path)
        write(path, image)

    monkeypatch.setattr(dataset_files, '_write_image', interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_photo_digits(tmp_path, **SMALL)
    assert json.loads((tmp_path / MANIFEST).read_text())['complete'] is False
    monkeypatch.undo()
    assert export_photo_digits(tmp_path, **SMALL) is True
    assert json.loads((tmp_path / MANIFEST).read_text())['complete'] is True
    assert export_photo_digits(tmp_path, **SMALL) is False


@pytest.mark.parametrize(
    'options, error, message',
    [
        (dict(splits=['test']), ValueError, "split='test'"),
        (dict(splits=[]), ValueError, r'splits=\[\]: expected one or more'),
        (dict(splits=['val', 'val']), ValueError, 'each at most once'),
        (dict(num_crops=0), ValueError, 'num_crops=0: expected an integer >= 1'),
        (dict(num_scenes=1.5), ValueError, 'num_scenes=1.5: '),
        (dict(scene_options=dict(size=4)), ValueError, 'size=4: '),
        (dict(crop_options=dict(flip=True)), TypeError, 'flip'),
    ],
)
def test_bad_options_touch_nothing(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        export_photo_digits(tmp_path / 'new', **options)
    assert not (tmp_path / 'new').exists()


def test_command_line(tmp_path, monkeypatch, capsys):
    def run(*options):
        arguments = [str(tmp_path / 'out'), '--split', 'val', '--crops', '2', '--scenes', '1']
        monkeypatch.setattr('sys.argv', ['make_dataset.py', *arguments, *options])
        make_dataset.main()
        return capsys.readouterr().out

    assert 'written' in run('--size', '64', '--num-digits', '1', '2')
    image = cv2.imread(str(tmp_path / 'out' / 'val' / 'scenes' / 'images' / '000000.png'))
    expected = SceneGenerator('val', size=64, num_digits=(1, 2)).generate(0).image
    np.testing.assert_array_equal(image, expected)
    assert 'nothing to do' in run('--size', '64', '--num-digits', '1', '2')
    with pytest.raises(SystemExit) as exit_info:
        run('--size', '8')
    assert exit_info.value.code == 2 and "--size: '8': expected an integer >= 16" in capsys.readouterr().err


def test_command_of_the_readme_writes_the_data_of_the_demo(monkeypatch, root):
    (line,) = re.findall(
        r'python -m projects.photo_digits.make_dataset (data/.*?)(?:\s#.*)?$', README.read_text(), re.M
    )
    calls = []
    monkeypatch.setattr(make_dataset, 'export_photo_digits', lambda out, **options: calls.append((out, options)))
    monkeypatch.setattr('sys.argv', ['make_dataset.py', *line.split()])
    make_dataset.main()
    ((out, options),) = calls
    crops, scenes = (read_config(task.config_file) for task in (demo.CLASSIFICATION, demo.DETECTION))
    assert f'{out}/' == crops.data_root == scenes.data_root and options['splits'] == ['val']
    assert (options['num_crops'], options['num_scenes']) == tuple(demo.NUM_VAL.values())
    for generator, written, wanted in (
        (CropGenerator, options['crop_options'], crops.crop_options),
        (SceneGenerator, options['scene_options'], scenes.scene_options),
    ):
        assert generator('val', 0, **written).options == generator('val', 0, **wanted).options


@pytest.mark.parametrize('name', ['make_dataset', 'demo'])
def test_programs_start_from_the_repository_root(name, root):
    command = [sys.executable, '-m', f'projects.photo_digits.{name}', '--help']
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and 'Traceback' not in done.stderr, done.stderr
    assert f'usage: python -m projects.photo_digits.{name}' in done.stdout
