"""tools/export_onnx.py, and what reads its files: predictions, evaluation, and what both refuse."""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from exports import slow
from mmengine.config import Config
from mmengine.structures import InstanceData
from programs import run_tool

from soft_mm import export
from soft_mm.export import export_onnx, photographs
from soft_mm.image_models import image_model
from soft_mm.onnx_model import OnnxModel
from soft_mm.utils import build_model

pytest.importorskip('onnxruntime', reason='requirements/openmmlab.txt has no onnxruntime')

ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(embed_dims=(16, 32, 48, 64), num_heads=(1, 2, 3, 4), depths=(1, 1, 1, 1))
BACKBONE = f"""dict(_delete_=True, type='soft_mm.SOFT', arch=dict({', '.join(f'{k}={v}' for k, v in SMALL.items())}),
    attention=dict(normalized=True, solver='cholesky', max_landmarks=49)"""
ADE = "__import__('mmseg').__path__[0] + '/.mim/configs"
CONFIGS = {
    'classifier': f"""
_base_ = 'mmpretrain::resnet/resnet50_8xb32_in1k.py'
model = dict(backbone={BACKBONE}, out_indices=(3,), out_type='cls_token'), neck=None, head=dict(in_channels=64))
""",
    'fpn': f"""
_base_ = {ADE}/sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py'
model = dict(pretrained=None, backbone={BACKBONE}), neck=dict(in_channels=[16, 32, 48, 64]))
""",
    'upernet': f"""
_base_ = {ADE}/upernet/upernet_r50_4xb4-80k_ade20k-512x512.py'
model = dict(pretrained=None, backbone={BACKBONE}), auxiliary_head=None,
    decode_head=dict(in_channels=[16, 32, 48, 64], channels=32, norm_cfg=dict(type='BN')))
""",
    'retinanet': f"""
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
model = dict(backbone={BACKBONE}), neck=dict(in_channels=[16, 32, 48, 64]))
""",
    'mask-rcnn': f"""
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
model = dict(backbone={BACKBONE}), neck=dict(in_channels=[16, 32, 48, 64]),
    test_cfg=dict(rpn=dict(max_per_img=50)))
""",
}


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A config and a checkpoint per model. The weights are random, so that many boxes have a score above 0.05."""
    folder = tmp_path_factory.mktemp('trained')
    found = {}
    for name, text in CONFIGS.items():
        config, checkpoint = folder / f'{name}.py', folder / f'{name}.pth'
        config.write_text(text)
        torch.manual_seed(0)
        model = build_model(Config.fromfile(config))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if 'backbone' in key:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                elif key.endswith(('fc_cls.weight', 'fc_reg.weight', 'retina_reg.weight')):
                    parameter.mul_(20)
                elif key.endswith('head.fc.weight'):
                    parameter.mul_(5)
                elif key.endswith('retina_cls.weight'):
                    parameter.mul_(3)
                elif key.endswith('conv_seg.weight'):
                    parameter.mul_(50)
        torch.save(dict(state_dict=model.state_dict()), checkpoint)
        found[name] = (config, checkpoint)
    return found


@pytest.mark.parametrize(
    ('name', 'dynamic', 'outputs'),
    [
        ('classifier', 'all', [(1, 1000)]),
        slow('fpn', 'all', [(1, 96, 140)]),
        slow('upernet', 'batch', [(1, 96, 140)]),
        slow('retinanet', 'all', [(1, 100, 4), (1, 100), (1, 100)]),
        ('mask-rcnn', 'none', [(1, 100, 4), (1, 100), (1, 100), (1, 100, 28, 28)]),
        slow('mask-rcnn', 'batch', [(1, 100, 4), (1, 100), (1, 100), (1, 100, 28, 28)]),
    ],
)
def test_exported_file_matches_the_toolbox(trained, tmp_path, name, dynamic, outputs):
    out = tmp_path / 'model.onnx'
    lines = export_onnx(*trained[name], out, (96, 140), dynamic)
    assert len(lines) == dict(none=1, batch=2, all=4)[dynamic]
    if name in ('retinanet', 'mask-rcnn'):
        # The comparison is of many boxes.
        assert all(int(line.split(' of ')[1].split()[0]) > 40 for line in lines), lines
    model = OnnxModel(out)
    assert [output.shape for output in model(photographs((), 1, (96, 140)))] == outputs
    assert len(model.classes) == dict(classifier=1000, fpn=150, upernet=150).get(name, 80)
    assert [file.name for file in tmp_path.iterdir()] == ['model.onnx']


@pytest.fixture(scope='module')
def segmentor(trained, tmp_path_factory):
    """An exported Semantic FPN for one image of 96x140 pixels."""
    file = tmp_path_factory.mktemp('exported') / 'fpn.onnx'
    export_onnx(*trained['fpn'], file, (96, 140), input_dtype='uint8')
    return file


def program(name, *arguments):
    """Run a tool in this process. Return its exit code and its whole output."""
    done = run_tool(name, *arguments)
    return done.returncode, done.stdout + done.stderr


def test_predictions_of_a_file_are_drawn(segmentor, tmp_path, monkeypatch, capsys):
    picture = photographs((), 1, (120, 100))[0].transpose(1, 2, 0)
    cv2.imwrite(str(tmp_path / 'image.png'), picture[..., ::-1])
    code, said = program('predict.py', tmp_path / 'image.png', segmentor, '--out-dir', tmp_path)
    assert code == 0, said
    drawn = cv2.imread(str(tmp_path / 'vis' / 'image.png'))
    assert drawn.shape[:2] == (120, 100) and (drawn != picture[..., ::-1]).any()
    code, said = program('predict.py', tmp_path / 'image.png', segmentor, 'some.pth')
    assert code == 2 and 'needs no checkpoint' in said


def test_metadata_describe_the_file(segmentor):
    model = OnnxModel(segmentor)
    assert (model.task, model.shape, model.dtype) == ('segmentation', (1, 96, 140), np.uint8)
    assert model.classes[:2] == ['wall', 'building'] and len(model.palette) == 150
    assert model.mean == pytest.approx([123.675, 116.28, 103.53])
    with pytest.raises(ValueError, match='takes images x height x width = 1x96x140, not 1x96x141'):
        model(photographs((), 1, (96, 141)))


def test_file_that_differs_is_not_written(trained, tmp_path, monkeypatch):
    def changed(model, *arguments):
        # A copy, because the toolbox's predictions come from the same weights.
        model = copy.deepcopy(model)
        with torch.no_grad():
            model.model.head.fc.weight.mul_(1.01)
        return to_onnx(model, *arguments)

    to_onnx = export._to_onnx
    monkeypatch.setattr(export, '_to_onnx', changed)
    with pytest.raises(ValueError, match='does not match PyTorch: probabilities differ by at most'):
        export_onnx(*trained['classifier'], tmp_path / 'model.onnx', (64, 64))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(shape=('31', '64')), 'shape of 31x64 pixels: expected both sides >= 32'),
        (dict(out='model.pt'), 'expected a file name that ends in .onnx'),
        (dict(out='none/model.onnx'), 'none does not exist: make it first'),
        (dict(out='old.onnx'), 'old.onnx exists: give another name, or --force'),
        (dict(config='none.py'), 'none.py'),
        (dict(checkpoint='none.pth'), 'none.pth does not exist'),
        (dict(checkpoint='fpn'), 'does not fit the model of this config'),
        (dict(config='detr'), 'a DeformableDETR cannot be exported: supported are ImageClassifier, EncoderDecoder'),
    ],
)
def test_what_cannot_be_exported_is_refused(trained, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'old.onnx').write_text('old')
    config, checkpoint = trained['classifier']
    given = dict(config=config, checkpoint=checkpoint, out='model.onnx', shape=('64', '64')) | change
    if given['checkpoint'] == 'fpn':
        given['checkpoint'] = trained['fpn'][1]
    if given['config'] == 'detr':
        given['config'] = ROOT / 'configs/coco/deformable-detr_soft-tiny-norm_16xb2-50e_coco.py'
        monkeypatch.setattr('soft_mm.inference.check_weights', lambda model, content, path: model.state_dict())
    arguments = (given['config'], given['checkpoint'], given['out'], '--shape', *given['shape'])
    code, said = program('export_onnx.py', *arguments)
    assert code == 2 and message in said and 'Traceback' not in said
    assert [file.name for file in tmp_path.iterdir()] == ['old.onnx'] and (tmp_path / 'old.onnx').read_text() == 'old'


def instances(**changes):
    boxes = torch.tensor([[10.0, 10.0, 50.0, 60.0], [70.0, 5.0, 90.0, 20.0]])
    masks = torch.zeros(2, 80, 100, dtype=torch.bool)
    masks[0, 10:60, 10:50] = masks[1, 5:20, 70:90] = True
    values = dict(bboxes=boxes, scores=torch.tensor([0.9, 0.5]), labels=torch.tensor([0, 3]), masks=masks) | changes
    return [SimpleNamespace(pred_instances=InstanceData(**values))]


@pytest.mark.parametrize(
    'changes',
    [
        dict(bboxes=instances()[0].pred_instances.bboxes + 0.5),
        dict(labels=torch.tensor([3, 0])),
        dict(scores=torch.tensor([0.9, 0.4])),
        dict(masks=~instances()[0].pred_instances.masks),
        dict(scores=torch.tensor([0.9, torch.nan])),
    ],
)
def test_other_boxes_do_not_match(changes):
    assert export._compare_detection(instances(), instances()).startswith('4 of 4 boxes match, to 0.0e+00 pixels')
    with pytest.raises(ValueError, match='does not match PyTorch: .* boxes match'):
        export._compare_detection(instances(), instances(**changes))


def test_comparison_without_a_box_says_so():
    nothing = [SimpleNamespace(pred_instances=instances()[0].pred_instances[:0])]
    assert export._compare_detection(nothing, nothing) == (
        'no box was found, so none was compared: give --images with objects'
    )
    with pytest.raises(ValueError, match='0 of 2 boxes match'):
        export._compare_detection(nothing, instances())


def maps(logits):
    data = SimpleNamespace(data=logits.argmax(0, keepdim=True))
    return [SimpleNamespace(seg_logits=SimpleNamespace(data=logits), pred_sem_seg=data)]


def test_other_class_maps_do_not_match():
    logits = torch.randn(3, 20, 30)
    assert export._compare_segmentation(maps(logits), maps(logits)).startswith('0.0000% of the pixels differ')
    other = logits.clone()
    other[:, 4, 5] = -other[:, 4, 5]
    with pytest.raises(ValueError, match='does not match PyTorch: 0.1667% of the pixels differ'):
        export._compare_segmentation(maps(logits), maps(other))
    with pytest.raises(ValueError, match='nan of the largest logit'):
        export._compare_segmentation(maps(logits * torch.nan), maps(logits))


def test_probabilities_that_are_not_numbers_do_not_match():
    good, bad = torch.tensor([0.7, 0.3]), torch.tensor([0.7, torch.nan])
    good, bad = (SimpleNamespace(pred_score=score) for score in (good, bad))
    export._compare_classification([good, good], [good, good])
    with pytest.raises(ValueError, match='probabilities differ by at most nan'):
        export._compare_classification([good, good], [good, bad])


@pytest.mark.parametrize(
    ('name', 'change', 'reason'),
    [
        ('retinanet', {'model.test_cfg.nms.type': 'soft_nms'}, "suppresses overlapping boxes by {'type': 'soft_nms'"),
        ('retinanet', {'model.test_cfg.min_bbox_size': 4}, 'min_bbox_size is 4, which depends on the original image'),
        ('retinanet', {'model.test_cfg.max_per_img': -1}, 'RetinaHead has max_per_img=-1'),
        ('retinanet', {'model.bbox_head.bbox_coder.clip_border': False}, 'RetinaHead are not clipped to the image'),
        ('mask-rcnn', {'model.test_cfg.rpn.nms_pre': 0}, 'RPNHead has nms_pre=0'),
        ('mask-rcnn', {'model.roi_head.bbox_roi_extractor.roi_layer.pool_mode': 'max'}, "pools by ['max']"),
        ('fpn', {'model.test_cfg': dict(mode='slide', crop_size=(64, 64), stride=(42, 42))}, "'slide' and not 'whole'"),
        ('classifier', {'model.head.type': 'StackedLinearClsHead', 'model.head.mid_channels': [8]}, 'and not a Linear'),
    ],
)
def test_reasons_are_named(name, change, reason, tmp_path):
    (tmp_path / 'config.py').write_text(CONFIGS[name])
    cfg = Config.fromfile(tmp_path / 'config.py')
    cfg.merge_from_dict(change)
    with pytest.raises(ValueError, match='cannot be exported, because') as error:
        image_model(build_model(cfg))
    assert reason in str(error.value)


def test_file_of_another_task_is_not_evaluated(segmentor, trained, monkeypatch, capsys):
    config, _ = trained['classifier']
    code, said = program('test.py', config, segmentor)
    assert code == 2 and 'is for segmentation, but the config is one of mmpretrain' in said
    code, said = program('test.py', trained['fpn'][0], segmentor, '--amp')
    assert code == 2 and 'takes neither --amp nor --tta nor --launcher' in said


def test_file_of_other_classes_is_not_evaluated(segmentor, trained):
    cfg = Config.fromfile(trained['fpn'][0])
    export.check_task(OnnxModel(segmentor), cfg)
    cfg.test_dataloader.dataset.metainfo = dict(classes=['building', 'wall'])
    with pytest.raises(ValueError, match="but the data set of the config has \\['building', 'wall'\\]"):
        export.check_task(OnnxModel(segmentor), cfg)


def test_images_of_another_form_are_refused(segmentor):
    model = OnnxModel(segmentor)
    with pytest.raises(ValueError, match='takes images of uint8, not float32'):
        model(photographs((), 1, (96, 140)).astype(np.float32))


def test_classes_come_from_the_checkpoint_or_the_config(tmp_path):
    cfg = Config(dict(default_scope='mmseg', test_dataloader=dict(dataset=dict(type='ADE20KDataset'))))
    recorded = dict(classes=('a', 'b'), palette=[[1, 2, 3], [4, 5, 6]])
    assert export.class_names(cfg, dict(meta=dict(dataset_meta=recorded))) == recorded
    names = export.class_names(cfg, {})
    assert names['classes'][:2] == ('wall', 'building') and len(names['palette']) == 150
    cfg.test_dataloader.dataset.metainfo = dict(classes=('building', 'sky'))
    names = export.class_names(cfg, dict(meta={}))
    assert names['classes'] == ('building', 'sky') and names['palette'] == [[180, 120, 120], [6, 230, 230]]
    (tmp_path / 'names.txt').write_text('one\ntwo\n')
    cfg.test_dataloader.dataset.metainfo = dict(classes=str(tmp_path / 'names.txt'))
    names = export.class_names(cfg, {})
    assert names['classes'] == ['one', 'two'] and names['palette'] is None


def test_images_in_memory_are_refused():
    pipeline = [dict(type='PackInputs')]
    cfg = Config(dict(test_dataloader=dict(dataset=dict(type='RepeatDataset', dataset=dict(pipeline=pipeline)))))
    with pytest.raises(ValueError, match='has no LoadImageFromFile, so the order of the colour channels is not known'):
        export._check_reading(cfg)


def test_missing_packages_are_named(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(ValueError, match='onnxscript must be installed for ONNX: pip install onnx'):
        export_onnx(*trained['classifier'], tmp_path / 'model.onnx', (64, 64))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match='none.onnx does not exist'):
        OnnxModel(tmp_path / 'none.onnx')
    (tmp_path / 'text.onnx').write_text('text')
    with pytest.raises(ValueError, match='text.onnx is not an ONNX file that onnxruntime can read'):
        OnnxModel(tmp_path / 'text.onnx')
