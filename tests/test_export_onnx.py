"""tools/export_onnx.py, and what reads its files: predictions, evaluation, and what both refuse."""

import copy
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from soft_mm import export
from soft_mm.export import export_onnx, photographs
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


def long(*values):
    return pytest.param(*values, marks=pytest.mark.long)


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
        long('fpn', 'all', [(1, 96, 140)]),
        long('upernet', 'batch', [(1, 96, 140)]),
        long('retinanet', 'all', [(1, 100, 4), (1, 100), (1, 100)]),
        ('mask-rcnn', 'none', [(1, 100, 4), (1, 100), (1, 100), (1, 100, 28, 28)]),
        long('mask-rcnn', 'batch', [(1, 100, 4), (1, 100), (1, 100), (1, 100, 28, 28)]),
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


def program(monkeypatch, capsys, name, *arguments):
    """Run a tool in this process and return its exit code and what it printed."""
    monkeypatch.setattr(sys, 'argv', [name, *map(str, arguments)])
    code = 0
    try:
        runpy.run_path(str(ROOT / 'tools' / name), run_name='__main__')
    except SystemExit as error:
        code = error.code
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_predictions_of_a_file_are_drawn(segmentor, tmp_path, monkeypatch, capsys):
    picture = photographs((), 1, (120, 100))[0].transpose(1, 2, 0)
    cv2.imwrite(str(tmp_path / 'image.png'), picture[..., ::-1])
    code, said = program(monkeypatch, capsys, 'predict.py', tmp_path / 'image.png', segmentor, '--out-dir', tmp_path)
    assert code == 0, said
    drawn = cv2.imread(str(tmp_path / 'vis' / 'image.png'))
    assert drawn.shape[:2] == (120, 100) and (drawn != picture[..., ::-1]).any()
    code, said = program(monkeypatch, capsys, 'predict.py', tmp_path / 'image.png', segmentor, 'some.pth')
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
        (dict(config='detr'), 'a DeformableDETR of this form cannot be exported: supported are'),
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
    code, said = program(monkeypatch, capsys, 'export_onnx.py', *arguments)
    assert code == 2 and message in said and 'Traceback' not in said
    assert [file.name for file in tmp_path.iterdir()] == ['old.onnx'] and (tmp_path / 'old.onnx').read_text() == 'old'


def test_missing_packages_are_named(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(ValueError, match=r"onnxscript must be installed for ONNX: pip install 'soft_mm\[export\]'"):
        export_onnx(*trained['classifier'], tmp_path / 'model.onnx', (64, 64))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match='none.onnx does not exist'):
        OnnxModel(tmp_path / 'none.onnx')
    (tmp_path / 'text.onnx').write_text('text')
    with pytest.raises(ValueError, match='text.onnx is not an ONNX file that onnxruntime can read'):
        OnnxModel(tmp_path / 'text.onnx')
