"""Faults of a user's data, on the small sets that docs/get_started.md makes: what the user sees, and what is read."""

import json
import runpy
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from programs import run_tool
from test_documents import write_files

from soft_mm.hooks import _check_annotations
from soft_mm.utils import DataError

PAGE = Path(__file__).resolve().parents[1] / 'docs/get_started.md'
QUICK = """
_base_ = './{name}.py'
arch = dict(_delete_=True, embed_dims=(8, 8, 8, 8), num_heads=(1, 1, 1, 1), depths=(1, 1, 1, 1))
model = dict(backbone=dict(arch=arch), {head})
train_dataloader = dict(batch_size=4, num_workers=0)
val_dataloader = dict(num_workers=0)
test_dataloader = dict(num_workers=0)
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=1, val_interval=1)
param_scheduler = []
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=1))
log_processor = dict(by_epoch=False)
"""
# Narrow heads, for speed.
HEADS = dict(
    my_detector="""
    neck=dict(in_channels=[8, 8, 8, 8], out_channels=8),
    rpn_head=dict(in_channels=8, feat_channels=8),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=8),
        bbox_head=dict(in_channels=8, fc_out_channels=8),
        mask_roi_extractor=dict(out_channels=8),
        mask_head=dict(in_channels=8, conv_out_channels=8),
    ),
    test_cfg=dict(rcnn=dict(score_thr=0.0)),
""",
    my_segmentor="""
    neck=dict(in_channels=[8, 8, 8, 8], out_channels=8),
    decode_head=dict(in_channels=[8, 8, 8, 8], channels=8),
""",
    my_classifier='head=dict(in_channels=8)',
)


@pytest.fixture(scope='session')
def shapes(tmp_path_factory):
    """A folder with the configs of the page, and its data set with four images in each split."""
    folder = tmp_path_factory.mktemp('shapes')
    files = write_files(PAGE, folder)
    assert {file.stem for file in files} == {'make_shapes', *HEADS}
    script = folder / 'make_shapes.py'
    text = script.read_text()
    assert 'train=160, val=40' in text
    script.write_text(text.replace('train=160, val=40', 'train=4, val=4'))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runpy.run_path(str(script))
    for name, head in HEADS.items():
        (folder / f'quick_{name}.py').write_text(QUICK.format(name=name, head=head))
    return folder


@pytest.fixture
def folder(shapes, tmp_path, monkeypatch):
    """A copy that a test may damage, as the current directory."""
    shutil.copytree(shapes, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path()


def train(name):
    """Train for one step and evaluate. Return 0 or the message, and the log."""
    done = run_tool('train.py', f'quick_{name}.py', '--work-dir', 'run')
    logs = sorted(Path('run').rglob('*.log'))
    return done.returncode, logs[-1].read_text() if logs else ''


def change(split, alter):
    file = Path(f'shapes/{split}.json')
    content = json.loads(file.read_text())
    alter(content)
    file.write_text(json.dumps(content))


def for_annotations(**values):
    def alter(content):
        for annotation in content['annotations']:
            annotation.update(values)

    return alter


def without(key):
    def alter(content):
        del content['annotations'][0][key]

    return alter


def without_size(content):
    del content['images'][0]['height']


@pytest.mark.parametrize(
    ('split', 'alter', 'message'),
    [
        (
            'train',
            for_annotations(category_id=0),
            'have the category_id 0, which is the id of no category: the ids are 1, 2',
        ),
        ('val', for_annotations(category_id=7), 'have the category_id 7, which is the id of no category'),
        ('train', without('segmentation'), 'have no segmentation, but the config reads masks'),
        ('train', for_annotations(segmentation=[]), 'have no segmentation, but the config reads masks'),
        ('train', without('area'), "an image or annotation has no 'area'"),
        ('val', without('bbox'), "an image or annotation has no 'bbox'"),
        ('val', without_size, "an image or annotation has no 'height'"),
        ('val', without('iscrowd'), '1 annotations have no iscrowd'),
    ],
)
def test_faults_of_a_coco_file(split, alter, message, folder):
    change(split, alter)
    code, _ = train('my_detector')
    assert message in str(code) and f'shapes/{split}.json' in code and len(code.splitlines()) == 1


def test_boxes_that_are_left_out_or_reach_beyond_their_image(folder):
    def alter(content):
        first, second, third = content['annotations'][:3]
        first['bbox'][2] = 0
        second['image_id'] = 999
        # x1, y1, x2, y2 instead of x, y, width, height.
        third['bbox'] = [64, 64, 120, 120]

    change('train', alter)
    code, log = train('my_detector')
    assert code == 0
    assert 'shapes/train.json: 2 of ' in log and ' annotations are left out' in log
    assert (
        'shapes/train.json: 1 of ' in log and ' boxes reach beyond their image: bbox must be [x, y, width, hei' in log
    )


def test_image_without_annotations_is_evaluated_but_not_trained_on(folder):
    def alter(content):
        content['annotations'] = [item for item in content['annotations'] if item['image_id'] != 0]

    change('train', alter)
    change('val', alter)
    # A training image that cannot be read would be a fault.
    Path('shapes/images/train/000.png').unlink()
    code, log = train('my_detector')
    assert code == 0 and 'coco/bbox_mAP' in log and '[4/4]' in log


def turn(path):
    """Store an image as cameras do: turned by 90 degrees, with an EXIF orientation. Its size is no square."""
    image = Image.open(path).convert('RGB').crop((0, 0, 128, 96))
    orientation = Image.Exif()
    orientation[0x0112] = 6
    image.save(path, exif=orientation)


@pytest.mark.parametrize('damage', [turn, lambda path: Image.open(path).resize((64, 64)).save(path)])
def test_image_of_another_size_than_the_coco_file_gives(damage, folder):
    for file in Path('shapes/images/val').iterdir():
        damage(file)
    change('val', lambda content: [image.update(height=96, width=128) for image in content['images']])
    code, _ = train('my_detector')
    assert 'pixels, but the annotation file gives 128x96. Boxes and masks would be at wrong places' in str(code)
    assert code.startswith(
        'shapes/images/val/000.png has 96x128' if damage is turn else 'shapes/images/val/000.png has 64'
    )


def grey(image):
    return Image.fromarray(image).convert('L')


def transparent(image):
    return Image.fromarray(np.dstack([image, np.arange(image.shape[1])[None].repeat(len(image), 0).astype(np.uint8)]))


def cmyk(image):
    return Image.fromarray(image).convert('CMYK')


def sixteen_bits(image):
    return image.astype(np.uint16) * 257


def twelve_bits(image):
    return image.astype(np.uint16) * 16


@pytest.mark.parametrize(
    ('convert', 'suffix', 'read'),
    [
        (grey, '.png', lambda image: np.asarray(grey(image))[..., None].repeat(3, 2)),
        (transparent, '.png', lambda image: image),
        (cmyk, '.jpg', lambda image: image),
        (sixteen_bits, '.png', lambda image: image),
        # The upper byte: nearly black.
        (twelve_bits, '.png', lambda image: image // 16),
    ],
)
def test_images_of_other_kinds_become_three_channels_of_eight_bits(convert, suffix, read, folder):
    from mmcv.transforms import LoadImageFromFile

    for file in list(Path('shapes/crops').rglob('*.png')):
        image = np.asarray(Image.open(file).convert('RGB'))
        if suffix == '.jpg':
            # JPEG keeps smooth pictures.
            image = cv2.GaussianBlur(image, (0, 0), 6)
        converted = convert(image)
        file.unlink()
        file = file.with_suffix(suffix)
        if isinstance(converted, Image.Image):
            converted.save(file, quality=100)
        else:
            assert cv2.imwrite(str(file), converted[..., ::-1])
        found = LoadImageFromFile()(dict(img_path=str(file)))['img'][..., ::-1]
        assert found.dtype == np.uint8
        np.testing.assert_allclose(found.astype(int), read(image), atol=8 if suffix == '.jpg' else 0)
    code, log = train('my_classifier')
    assert code == 0 and 'accuracy/top1' in log


def test_split_without_the_folder_of_a_class(folder):
    assert train('my_classifier')[0] == 0
    shutil.rmtree('shapes/crops/val/circle')
    message = 'the class square has the label 0, but the training'
    code, _ = train('my_classifier')
    assert message in code and 'has 1. The classes are square, triangle, and there circle, square, triangle' in code
    done = run_tool('test.py', 'quick_my_classifier.py', 'run/iter_1.pth', '--work-dir', 'test')
    assert f'{message} of the checkpoint has 1.' in done.returncode
    # An empty folder keeps the numbers.
    Path('shapes/crops/val/circle').mkdir()
    assert run_tool('test.py', 'quick_my_classifier.py', 'run/iter_1.pth', '--work-dir', 'test').returncode == 0


def test_files_that_mmdet_reads_are_not_refused():
    """Images alone, as those of test-dev; annotations that mmdet skips before it reads them."""
    content = dict(categories=[dict(id=1, name='a')], images=[dict(id=7, width=9, height=9)])
    _check_annotations(content, 'a.json', evaluated=False)
    skipped = [dict(ignore=1, image_id=7), dict(image_id=8, category_id=1)]
    whole = dict(image_id=7, category_id=1, bbox=[1, 1, 5, 5], area=25)
    _check_annotations(dict(content, annotations=[*skipped, whole]), 'a.json', evaluated=False)
    with pytest.raises(DataError, match='category_id 3'):
        _check_annotations(dict(content, annotations=[dict(whole, category_id=3)]), 'a.json', evaluated=False)


def test_folders_without_images(folder):
    for file in Path('shapes/crops/train').rglob('*.png'):
        file.rename(file.with_suffix('.txt'))
    code, _ = train('my_classifier')
    assert 'train_dataloader.dataset: Found 0 files in subfolders of' in code and len(code.splitlines()) == 1


def test_more_folders_than_classes(folder):
    Path('shapes/crops/train/zebra').mkdir()
    Path('shapes/crops/val/zebra').mkdir()
    for file in Path('shapes/crops/train/circle').iterdir():
        shutil.copy(file, 'shapes/crops/train/zebra')
    for name in ('circle', 'square', 'triangle'):
        shutil.rmtree(f'shapes/crops/train/{name}')
        Path(f'shapes/crops/train/{name}').mkdir()
    code, _ = train('my_classifier')
    assert 'has the labels [3], but LinearClsHead has the classes 0 to 2' in code


def change_label_maps(split, convert):
    for file in Path(f'shapes/labels/{split}').iterdir():
        converted = convert(np.asarray(Image.open(file)))
        (converted if isinstance(converted, Image.Image) else Image.fromarray(converted)).save(file)


def coloured(labels):
    return np.uint8([[0, 0, 0], [255, 0, 0], [0, 1, 0], [0, 0, 1]])[labels]


def with_palette(labels):
    image = Image.fromarray(labels)
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    assert image.mode == 'P'
    return image


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize(
    ('convert', 'message'),
    [
        (coloured, ' has 3 channels: a label map has one channel (or a palette), whose values are the numbers of the'),
        (lambda labels: Image.fromarray(coloured(labels)).convert('RGBA'), ' has 4 channels: '),
        (lambda labels: labels[::2, ::2], ' has 64x64 pixels, but its image '),
        (lambda labels: labels[:, :100], ' has 100x128 pixels, but its image '),
        (lambda labels: labels + np.uint16(256), ' has labels up to 25'),
    ],
)
def test_label_maps_of_a_wrong_form(convert, message, split, folder):
    change_label_maps(split, convert)
    code, _ = train('my_segmentor')
    assert message in str(code) and f'shapes/labels/{split}/' in code and len(code.splitlines()) == 1


def test_label_map_of_a_photograph_that_was_not_turned(folder):
    for file in Path('shapes/images/train').iterdir():
        turn(file)
    change_label_maps('train', lambda labels: labels[:96])
    code, _ = train('my_segmentor')
    assert ' has 128x96 pixels, but its image shapes/images/train/' in code and ' has 96x128. ' in code


@pytest.mark.parametrize('convert', [with_palette, lambda labels: labels.astype(np.uint16)])
def test_label_maps_with_a_palette_or_16_bits_are_read_as_others(convert, folder):
    from mmseg.datasets.transforms import LoadAnnotations

    def read():
        files = sorted(Path('shapes/labels').rglob('*.png'))
        return [
            LoadAnnotations()(dict(seg_map_path=str(file), reduce_zero_label=False, seg_fields=[]))['gt_seg_map']
            for file in files
        ]

    before = read()
    change_label_maps('train', convert)
    change_label_maps('val', convert)
    np.testing.assert_array_equal(read(), before)
    assert train('my_segmentor')[0] == 0


def test_label_maps_of_black_and_white_are_reported(folder):
    """255 is ignored, so the model would learn nothing but the background, with an mIoU of 100."""
    change_label_maps('val', lambda labels: np.where(labels > 0, 255, 0).astype(np.uint8))
    code, log = train('my_segmentor')
    share = np.mean([np.asarray(Image.open(file)) == 255 for file in Path('shapes/labels/val').iterdir()])
    assert code == 0
    assert 'No pixel of the evaluated label maps has the class circle, square, triangle: mIoU leaves such ' in log
    assert f'{share:.1%} of the pixels have the label 255, which is ignored' in log
    assert 'No pixel' not in train_with_every_class()


def train_with_every_class():
    labels = np.zeros((128, 128), np.uint8)
    labels[:4] = [[1], [2], [3], [255]]
    change_label_maps('val', lambda _: labels)
    shutil.rmtree('run')
    return train('my_segmentor')[1]


def test_missing_label_map(folder):
    Path('shapes/labels/train/002.png').unlink()
    code, _ = train('my_segmentor')
    assert 'shapes/labels/train/002.png' in code and len(code.splitlines()) == 1
