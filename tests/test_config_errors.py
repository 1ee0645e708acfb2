"""Errors of a config: one sentence with the file and the key, exit code 1, and the traceback on request."""

import re
from pathlib import Path

import pytest
import torch
from digits_workspace import CLASSIFIER, ROOT
from programs import run_tool, tool

from soft_mm.config_errors import config_errors, config_place

FPN = ROOT / 'configs/ade20k/fpn_soft-tiny-norm_8xb4-80k_ade20k-512x512.py'
RETINANET = ROOT / 'configs/coco/retinanet_soft-tiny-norm_fpn_1x_coco.py'
SHORT = """
train_cfg = dict(max_iters=2, val_interval=2)
param_scheduler = []
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
"""
NO_DATA = """
data_root = 'data/none'
train_dataloader = dict(dataset=dict(data_root=data_root))
model = dict(backbone=dict(init_cfg=None))
"""
# A base, further lines, and the message after the name of the file.
WRONG = [
    (FPN, 'model = dict(backbone=dict(depht=3))', r"model\.backbone: SOFT does not take the keywords \['depht'\]"),
    (FPN, 'model = dict(backbone=dict(attention=dict(max_landmarks=0)))', 'model.backbone: max_landmarks=0: expected'),
    (
        FPN,
        "model = dict(backbone=dict(type='soft_mm.SOFTT'))",
        r"model\.backbone\.type: soft_mm\.SOFTT is not in the mmseg::model registry; did you mean 'SOFT'\?$",
    ),
    (
        FPN,
        'model = dict(decode_head=dict(num_clases=3))',
        r"model\.decode_head\.num_clases: .* argument 'num_clases'; did you mean 'num_classes'\?$",
    ),
    (
        FPN,
        "model = dict(_delete_=True, type='EncoderDecoder')",
        r"model: .*missing 2 required positional arguments: 'backbone' and 'decode_head'$",
    ),
    (
        FPN,
        "model = dict(type='mmfoo.Encoder')",
        r"model\.type: mmfoo\.Encoder is not in the .*, because mmfoo cannot be imported: No module named 'mmfoo'$",
    ),
    (FPN, "default_scope = 'mmfoo'", r'visualizer\.type: .*, because mmfoo cannot be imported: No module named'),
    (FPN, NO_DATA, r"train_dataloader\.dataset: .*'data/none/images/training'; if it .*, set data_root of train_data"),
    (FPN, 'x = undefined + 1', r"line 2: NameError: name 'undefined' is not defined \(--traceback shows the code\)$"),
    (FPN, 'model = dict(backbone=dict(', r"line 2: '\(' was never closed: model = dict\(backbone=dict\($"),
    (
        FPN,
        "custom_imports = dict(imports=['no.module'], allow_failed_imports=False)",
        r"custom_imports: ModuleNotFoundError: No module named 'no' ",
    ),
    (CLASSIFIER, "param_scheduler = [dict(type='PolyLRR')]", r"param_scheduler\[0\]\.type: .*did you mean 'PolyLR'\?$"),
    (
        CLASSIFIER,
        'optim_wrapper = dict(optimizer=dict(learning=3))',
        r"optim_wrapper\.optimizer\.learning: AdamW\.__init__\(\) got an unexpected keyword argument 'learning'$",
    ),
    (CLASSIFIER, "val_evaluator = dict(type='Accuracyy')", r"val_evaluator\.type: .*did you mean 'Accuracy'\?$"),
    (CLASSIFIER, 'val_dataloader = dict(pin=3)', r"val_dataloader\.pin: .*unexpected keyword argument 'pin'$"),
    (CLASSIFIER, "custom_hooks = [dict(type='EMAHook'), dict(type='IterTimerHook', a=1)]", r'custom_hooks\[1\]\.a: '),
    (
        CLASSIFIER,
        "val_dataloader = dict(dataset=dict(pipeline=[dict(type='LoadImageFromFile'), dict(type='Resize', scal=3)]))",
        r"val_dataloader\.dataset\.pipeline\[1\]\.scal: .*did you mean 'scale'\?$",
    ),
    (None, 'x = 1', "the config has no 'model'$"),
]


def write_config(path, base, lines):
    header = '' if base is None else f'_base_ = {str(base)!r}\n'
    path.write_text(f'{header}{SHORT if base == CLASSIFIER else ""}{lines}\n')
    return path.name


@pytest.mark.parametrize('number', range(len(WRONG)))
def test_file_and_key_are_named(number, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    base, lines, message = WRONG[number]
    # Runners of one name that start in the same second share their default scope.
    name = write_config(workspace / f'wrong{number}.py', base, lines)
    said = run_tool('train.py', name, '--work-dir', 'work_dirs/wrong').returncode
    assert isinstance(said, str) and re.match(rf'wrong{number}\.py: {message}', said), said
    assert len(said.splitlines()) == 1


def test_base_that_is_missing_is_named_with_the_file_that_names_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'inner.py').write_text("_base_ = './none.py'\n")
    (tmp_path / 'outer.py').write_text("_base_ = './inner.py'\n")
    said = run_tool('train.py', 'outer.py').returncode
    assert said.startswith('inner.py: _base_: ') and str(tmp_path / 'none.py') in said and 'data_root' not in said
    (tmp_path / 'none.py').write_text('a = b\n')
    assert run_tool('train.py', 'outer.py').returncode.startswith("none.py: line 1: NameError: name 'b'")
    (tmp_path / 'none.py').write_text('a =\n')
    assert run_tool('train.py', 'outer.py').returncode.startswith('none.py: line 1: invalid syntax: a =')


def test_exit_code_and_traceback(tmp_path):
    name = write_config(tmp_path / 'wrong.py', FPN, WRONG[1][1])
    short = tool('train.py', name, cwd=tmp_path)
    assert short.returncode == 1 and 'Traceback' not in short.stderr
    assert short.stderr.splitlines()[-1].startswith('wrong.py: model.backbone: max_landmarks=0')
    whole = tool('train.py', name, '--traceback', cwd=tmp_path)
    assert whole.returncode == 1 and 'Traceback' in whole.stderr
    assert whole.stderr.splitlines()[-1].startswith('ValueError: max_landmarks=0')


def test_traceback_of_an_error_that_has_a_message_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = write_config(tmp_path / 'wrong.py', FPN, NO_DATA)
    with pytest.raises(FileNotFoundError, match='data/none/images/training'):
        run_tool('train.py', name, '--traceback')


@pytest.mark.parametrize(
    'program', ['test.py', 'predict.py', 'get_complexity.py', 'export_onnx.py', 'visualize_attention.py']
)
def test_other_tools(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(meta={}, state_dict={}), 'some.pth')
    image = ROOT / 'docs/images/growth.png'
    arguments = dict(
        [
            ('test.py', ['wrong.py', 'some.pth']),
            ('predict.py', [image, 'wrong.py', 'some.pth']),
            ('get_complexity.py', ['wrong.py']),
            ('export_onnx.py', ['wrong.py', 'some.pth', 'some.onnx', '--shape', 64, 64]),
            ('visualize_attention.py', [image, 'wrong.py', 'some.pth', '--points', '1,1']),
        ]
    )[program]
    write_config(tmp_path / 'wrong.py', RETINANET, 'model = dict(bbox_head=dict(num_clases=3))')
    said = run_tool(program, *arguments).returncode
    assert isinstance(said, str) and said.startswith('wrong.py: model.bbox_head.num_clases: '), said
    with pytest.raises(TypeError, match='num_clases'):
        run_tool(program, *arguments, '--traceback')
    write_config(tmp_path / 'wrong.py', RETINANET, 'model = dict(backbone=dict(attention=dict(max_landmarks=0)))')
    with pytest.raises(ValueError, match='max_landmarks=0'):
        run_tool(program, *arguments, '--traceback')


def test_error_in_the_code_of_a_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('value.py').write_text("model = dict()\nnumber = int('many')\n")
    assert run_tool('train.py', 'value.py').returncode.startswith('value.py: line 2: invalid literal for int()')


def test_own_bug_names_the_way_to_its_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('buggy.py').write_text(
        'from mmengine.registry import MODELS\nfrom torch import nn\n\n\n@MODELS.register_module(force=True)\n'
        'class Buggy(nn.Module):\n    def __init__(self):\n        super().__init__()\n        None[0]\n'
    )
    bug = "custom_imports = dict(imports=['buggy'])\nmodel = dict(backbone=dict(_delete_=True, type='Buggy'))"
    write_config(tmp_path / 'mine.py', FPN, bug)
    said = run_tool('train.py', 'mine.py').returncode
    assert said.startswith('mine.py: model.backbone: TypeError: ') and said.endswith('(--traceback shows the code)')


def test_overrides_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / 'mine.py', FPN, '')
    said = run_tool('train.py', 'mine.py', '--cfg-options', 'model.backbone.attention.max_landmarks=0').returncode
    assert said.startswith('mine.py: model.backbone: max_landmarks=0: expected')
    said = run_tool('train.py', 'mine.py', '--cfg-options', 'train_pipeline.99.type=A').returncode
    assert said.startswith('mine.py: --cfg-options: ') and '99' in said


def test_weights_of_another_arch(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    torch.save(dict(state_dict={'backbone.weight': torch.zeros(1)}), 'other.pth')
    lines = "model = dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='other.pth', prefix='backbone.')))"
    name = write_config(workspace / 'wrong.py', CLASSIFIER, lines)
    said = run_tool('train.py', name, '--work-dir', 'work_dirs/wrong').returncode
    assert said.startswith('wrong.py: model.backbone.init_cfg: the checkpoint other.pth ')


def test_errors_of_the_training_keep_their_traceback(workspace, monkeypatch):
    """An error in a step, and one in code that a step calls to build something."""
    monkeypatch.chdir(workspace)
    name = write_config(workspace / 'mine.py', CLASSIFIER, '')
    monkeypatch.setattr('mmpretrain.models.LinearClsHead.loss', lambda *_, **__: {}['a bug'])
    with pytest.raises(KeyError, match='a bug'):
        run_tool('train.py', name, '--work-dir', 'work_dirs/mine')


def test_errors_from_elsewhere():
    for error in (ValueError('a'), KeyError('a'), AttributeError('a')):
        with pytest.raises(type(error)), config_errors('mine.py'):
            raise error
        try:
            raise error
        except type(error) as caught:
            assert config_place(caught, 'mine.py') is None
    for code in (2, 'a message'):
        with pytest.raises(SystemExit) as end, config_errors('mine.py'):
            raise SystemExit(code)
        assert end.value.code == code
