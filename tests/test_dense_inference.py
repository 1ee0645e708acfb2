"""Inference of whole dense models: sliding windows of segmentors, and models that contain others."""

import copy
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from authors import REDUCED_ARCH
from digits_workspace import DETECTOR
from mmengine.config import Config
from programs import ROOT, run_tool

from soft_mm.utils import build_model, without_pretrained

IMAGES = 'data/photo_digits_demo/val/scenes/images'
ADE20K = ROOT / 'configs/ade20k'
SEGMENTORS = dict(
    fpn=ADE20K / 'fpn_soft-tiny-norm_8xb4-80k_ade20k-512x512.py',
    upernet=ADE20K / 'upernet_soft-tiny-norm_8xb2-160k_ade20k-512x512.py',
)
MASK2FORMER = ROOT / 'configs/cityscapes/mask2former_soft-tiny-norm_8xb2-90k_cityscapes-512x1024.py'
# Height and width of the images, which are not multiples of 32.
SIZE = (101, 139)


def reduced_segmentor(name):
    """The segmentor of a config with the reduced arch, narrow heads and seven classes, as it is initialised."""
    cfg, widths = Config.fromfile(SEGMENTORS[name]), [*REDUCED_ARCH['embed_dims']]
    without_pretrained(cfg.model)
    cfg.model.backbone.arch = REDUCED_ARCH
    cfg.model.decode_head.update(num_classes=7, channels=16, norm_cfg=dict(type='BN'))
    if name == 'fpn':
        cfg.model.neck.update(in_channels=widths, out_channels=16)
        cfg.model.decode_head.in_channels = [16] * 4
    else:
        cfg.model.decode_head.in_channels = widths
        cfg.model.auxiliary_head = None
    torch.manual_seed(0)
    model = build_model(cfg)
    model.init_weights()
    return model.eval()


def logits_of(model, images, **test_cfg):
    """Logits of a batch of images, through the preprocessing and the post-processing of mmsegmentation."""
    from mmseg.structures import SegDataSample

    model.test_cfg.update(test_cfg)
    size = tuple(images.shape[-2:])
    samples = [SegDataSample(metainfo=dict(img_shape=size, ori_shape=size)) for _ in images]
    with torch.no_grad():
        predictions = model.test_step(dict(inputs=list(images), data_samples=samples))
    logits = torch.stack([sample.seg_logits.data for sample in predictions])
    classes = torch.stack([sample.pred_sem_seg.data for sample in predictions])
    assert torch.equal(classes, logits.argmax(1, keepdim=True))
    return logits


@pytest.mark.parametrize(
    ('crop_size', 'stride', 'rows', 'columns'),
    [
        # The last window of a row and of a column is moved back into the image.
        ((61, 75), (29, 41), (0, 29, 40), (0, 41, 64)),
        # Higher than the image.
        ((150, 75), (29, 41), (0,), (0, 41, 64)),
        # Larger than the image.
        ((150, 175), (29, 41), (0,), (0,)),
    ],
    ids=['smaller', 'higher', 'larger'],
)
@pytest.mark.parametrize('name', SEGMENTORS)
def test_sliding_windows_are_averaged(name, crop_size, stride, rows, columns, use):
    use('mmseg')
    model, torch_rng = reduced_segmentor(name), torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8, generator=torch_rng)
    total, count = torch.zeros(2, 7, *SIZE, dtype=torch.float64), torch.zeros(SIZE, dtype=torch.float64)
    for top in rows:
        for left in columns:
            window = (..., slice(top, top + crop_size[0]), slice(left, left + crop_size[1]))
            total[window] += logits_of(model, images[window], mode='whole')
            count[window] += 1
    found = logits_of(model, images, mode='slide', crop_size=crop_size, stride=stride)
    assert found.shape == total.shape and torch.isfinite(found).all()
    scale = found.std()
    torch.testing.assert_close(found.double() / scale, total / count / scale, rtol=0, atol=1e-5)
    whole = logits_of(model, images, mode='whole')
    if len(rows) == len(columns) == 1:
        assert torch.equal(found, whole)
    else:
        assert (found - whole).abs().max() > 0.01 * scale


def test_mask2former_merges_augmented_images_but_takes_no_windows(use):
    """As docs/training.md says. Its head returns masks for the size of the whole image."""
    use('mmseg')
    from mmseg.structures import SegDataSample

    cfg = Config.fromfile(MASK2FORMER)
    without_pretrained(cfg.model)
    cfg.model.backbone.arch = REDUCED_ARCH
    head = cfg.model.decode_head
    head.in_channels = [*REDUCED_ARCH['embed_dims']]
    head.pixel_decoder.encoder.num_layers = head.transformer_decoder.num_layers = 1
    cfg.model = dict(cfg.tta_model, module=cfg.model)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    with torch.no_grad():
        # Otherwise, every pixel would get the same class.
        for layer in (model.module.decode_head.cls_embed, model.module.decode_head.mask_embed[-1]):
            layer.weight.mul_(20)
    images = torch.randint(0, 256, (1, 3, *SIZE), dtype=torch.uint8)
    mirrored = images.flip(-1)
    meta = dict(img_shape=SIZE, ori_shape=SIZE, img_path='', flip_direction='horizontal')
    samples = [[SegDataSample(metainfo=dict(meta, flip=flip))] for flip in (False, True)]
    with torch.no_grad():
        (merged,) = model.test_step(dict(inputs=[[*images], [*mirrored]], data_samples=samples))
    segmentor = model.module
    one, two = logits_of(segmentor, images), logits_of(segmentor, mirrored).flip(-1)
    assert torch.isfinite(one).all() and not torch.equal(one, two)
    classes = (one.softmax(1) + two.softmax(1)).argmax(1)
    assert len(classes.unique()) > 2 and not torch.equal(classes, one.argmax(1))
    assert torch.equal(merged.pred_sem_seg.data, classes)
    with pytest.raises(RuntimeError, match='The size of tensor'):
        logits_of(segmentor, images, mode='slide', crop_size=(61, 75), stride=(29, 41))


@pytest.fixture(scope='module')
def detectors(workspace, tmp_path_factory):
    """Configs and checkpoints of a detector, and of mmdet's SoftTeacher with this detector as its teacher.

    The configs ``*-tta.py`` wrap the model for test-time augmentation. All configs name pretrained weights that do not
    exist. The student has other weights than the teacher.
    """
    folder, cfg = tmp_path_factory.mktemp('detectors'), Config.fromfile(DETECTOR)
    detector = cfg.model
    # mmdet merges no masks of augmented images.
    detector.type, detector.roi_head.mask_head, detector.roi_head.mask_roi_extractor = 'FasterRCNN', None, None
    detector.backbone.arch, detector.neck.in_channels = REDUCED_ARCH, [*REDUCED_ARCH['embed_dims']]
    detector.backbone.attention.normalized = True
    detector.test_cfg.rcnn.max_per_img = 20
    cfg.test_evaluator = dict(cfg.test_evaluator, metric='bbox', outfile_prefix='found')
    cfg.test_dataloader = dict(cfg.val_dataloader, num_workers=0)
    zoo = Config.fromfile(ROOT / 'configs/_base_/tta/detection.py')
    cfg.tta_model, cfg.tta_pipeline = zoo.tta_model, zoo.tta_pipeline
    cfg.tta_model.tta_cfg.max_per_img = 20
    cfg.tta_pipeline[1].transforms[0] = [dict(type='Resize', scale=scale) for scale in ((160, 128), (192, 160))]
    teacher = dict(
        type='SoftTeacher',
        detector=detector,
        data_preprocessor=dict(type='MultiBranchDataPreprocessor', data_preprocessor=detector.data_preprocessor),
        semi_train_cfg=dict(freeze_teacher=True),
        semi_test_cfg=dict(predict_on='teacher'),
    )
    for name, model in (('detector', detector), ('teacher', teacher)):
        cfg.model = model
        cfg.dump(folder / f'{name}.py')
        wrapped = copy.deepcopy(cfg)
        wrapped.model = dict(cfg.tta_model, module=model)
        wrapped.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        wrapped.dump(folder / f'{name}-tta.py')
    without_pretrained(cfg.model)
    torch.manual_seed(0)
    model = build_model(cfg)
    model.init_weights()
    meta = dict(normalized=True, dataset_meta=dict(classes=cfg.classes, palette=cfg.palette))
    for name, part in (('detector', model.teacher), ('teacher', model)):
        torch.save(dict(meta=meta, state_dict=part.state_dict()), folder / f'{name}.pth')
    return folder


def found_boxes(config, checkpoint, *options):
    """Evaluate with ``tools/test.py``. Return the boxes that were found, with their scores and classes."""
    done = run_tool('test.py', config, checkpoint, '--work-dir', 'work', *options)
    assert done.returncode == 0, done
    file = Path('found.bbox.json')
    found = json.loads(file.read_text())
    file.unlink()
    assert len(found) == 3 * 20
    return found


def test_nested_detectors_are_evaluated(workspace, detectors, monkeypatch):
    """SoftTeacher, and its wrapper for test-time augmentation, find the boxes of the detector in them."""
    monkeypatch.chdir(workspace)
    ours, theirs = (detectors / 'detector.py', detectors / 'detector.pth'), detectors / 'teacher.pth'
    plain, augmented = found_boxes(*ours), found_boxes(*ours, '--tta')
    assert plain != augmented
    assert found_boxes(detectors / 'teacher.py', theirs) == plain
    assert found_boxes(detectors / 'teacher.py', theirs, '--tta') == augmented
    assert found_boxes(detectors / 'teacher-tta.py', theirs) == augmented
    student = ['--cfg-options', 'model.semi_test_cfg.predict_on=student']
    assert found_boxes(detectors / 'teacher.py', theirs, *student) != plain


@pytest.mark.parametrize('form', ['', '-tta'], ids=['plain', 'tta'])
def test_nested_detectors_predict(workspace, detectors, tmp_path, monkeypatch, form):
    monkeypatch.chdir(workspace)
    drawn = []
    for name in ('detector', 'teacher'):
        out, arguments = tmp_path / name, [IMAGES, detectors / f'{name}{form}.py', detectors / f'{name}.pth']
        done = run_tool('predict.py', *arguments, '--out-dir', out, '--score-thr', 0, '--device', 'cpu')
        assert done.returncode == 0, done
        drawn.append([cv2.imread(str(path)) for path in sorted((out / 'vis').iterdir())])
    originals = [cv2.imread(str(path)) for path in sorted(Path(IMAGES).iterdir())]
    assert len(originals) == len(drawn[0]) == len(drawn[1]) == 3
    for original, expected, found in zip(originals, *drawn):
        assert np.array_equal(found, expected) and not np.array_equal(found, original)


@pytest.mark.parametrize('tool', ['test.py', 'predict.py'])
@pytest.mark.parametrize('name', ['teacher', 'teacher-tta'])
def test_checkpoints_of_nested_detectors_are_checked(workspace, detectors, tmp_path, monkeypatch, name, tool):
    """The other form of attention, and a missing weight of a nested backbone."""
    monkeypatch.chdir(workspace)
    content = torch.load(detectors / 'teacher.pth', weights_only=False)
    torch.save(content | dict(meta=content['meta'] | dict(normalized=False)), tmp_path / 'plain.pth')
    key = 'teacher.backbone.stages.2.pos_embed'
    rest = {k: v for k, v in content['state_dict'].items() if k != key}
    torch.save(content | dict(state_dict=rest), tmp_path / 'cut.pth')
    for file, message in (
        ('plain.pth', 'plain.pth is plain, as recorded by tools/convert_checkpoint.py, but the config has normalized'),
        ('cut.pth', f"does not fit the model of this config. Of its {len(rest) + 1} weights: 1 missing ['{key}']"),
    ):
        options = ['--device', 'cpu'] if tool == 'predict.py' else ['--work-dir', 'work']
        image = [IMAGES] if tool == 'predict.py' else []
        done = run_tool(tool, *image, detectors / f'{name}.py', tmp_path / file, *options)
        assert done.returncode == 2 and message in done.stderr, done
