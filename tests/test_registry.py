"""The plugin in the registries of all three toolboxes, with and without the others, and alone."""

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLBOXES = ('mmpretrain', 'mmdet', 'mmseg')
BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)

sys.meta_path.insert(0, Block())
"""
BUILD = """
from mmengine.config import Config
from mmengine.registry import init_default_scope
from {toolbox}.registry import MODELS
import torch

cfg = Config(dict(backbone=dict(type={name!r}, arch='tiny', attention=dict(normalized=True)), {custom_imports}))
init_default_scope('{toolbox}')
{import_toolbox}
backbone = MODELS.build(cfg.backbone)
maps = backbone.eval()(torch.zeros(1, 3, 32, 64))
assert [m.shape[1] for m in maps] == [64, 128, 320, 512]
assert type(backbone).__module__ == 'soft_mm.models.soft'
"""


def run(code, blocked=(), cwd=None):
    """Run code in a process in which the packages ``blocked`` cannot be imported."""
    code = (BLOCK.format(blocked=set(blocked)) if blocked else '') + textwrap.dedent(code)
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=cwd or ROOT, timeout=300)


@pytest.mark.parametrize('alone', [False, True], ids=['together', 'alone'])
@pytest.mark.parametrize('name', ['soft_mm.SOFT', 'SOFT'])
@pytest.mark.parametrize('toolbox', TOOLBOXES)
def test_builds_from_config_in_every_toolbox(toolbox, name, alone):
    """By the scoped name without custom_imports, by the bare one with it; alone: the others cannot be imported."""
    custom_imports = "custom_imports=dict(imports=['soft_mm'])" if name == 'SOFT' else ''
    others = [other for other in TOOLBOXES if other != toolbox] if alone else []
    # mmseg's own modules import mmdet's where they can; importing all of them is the toolbox being really used.
    code = BUILD.format(
        toolbox=toolbox, name=name, custom_imports=custom_imports, import_toolbox=f'import {toolbox}.models'
    )
    if name == 'SOFT':
        code = code.replace(
            'init_default_scope(', "cfg = Config.fromstring(cfg.pretty_text, '.py')\ninit_default_scope(", 1
        )
    done = run(code, blocked=others)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize('toolbox', TOOLBOXES)
def test_bare_name_is_unknown_without_the_import(toolbox):
    done = run(BUILD.format(toolbox=toolbox, name='SOFT', custom_imports='', import_toolbox=''))
    assert done.returncode != 0 and 'SOFT is not in the' in done.stderr


def test_import_needs_torch_and_mmengine_only():
    code = """
    import torch, sys
    import soft_mm, soft_mm.checkpoints.convert, soft_mm.inference, soft_mm.complexity, soft_mm.ops.reference
    from mmengine.registry import MODELS
    soft_mm.SOFT('tiny', out_indices=(0,)).eval()(torch.zeros(1, 3, 32, 32))
    MODELS.build(dict(type='soft_mm.SOFT')), MODELS.build(dict(type='SOFT'))
    """
    done = run(code, blocked=['mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'sklearn', 'skimage', 'pycocotools', 'timm'])
    assert done.returncode == 0, done.stderr[-2000:]


def test_missing_mmengine_names_the_command_that_installs_it():
    done = run('import soft_mm', blocked=['mmengine'])
    assert done.returncode != 0
    assert 'ModuleNotFoundError: soft_mm needs mmengine' in done.stderr
    assert "pip install 'soft_mm[maintained]'" in done.stderr and "pip install 'soft_mm[original]'" in done.stderr


@pytest.mark.parametrize('toolbox', ['mmengine', 'mmdet'])
@pytest.mark.parametrize(
    ('broken', 'message'),
    [
        ('import no_such_dependency', 'no_such_dependency'),
        ('import torch\ntorch.no_such_function', 'no_such_function'),
        ('1 / 0', 'ZeroDivisionError'),
    ],
)
@pytest.mark.parametrize('module', ['models/soft.py', 'registry.py'])
def test_an_error_in_the_plugin_shows_itself(tmp_path, module, broken, message, toolbox):
    """And not as "SOFT is not in the registry"."""
    package = tmp_path / 'soft_mm'
    shutil.copytree(ROOT / 'soft_mm', package, ignore=shutil.ignore_patterns('__pycache__', '.mim'))
    path = package / module
    path.write_text(f'{broken}\n{path.read_text()}')
    code = f"""
    import sys
    sys.path.insert(0, {str(tmp_path)!r})
    from {toolbox}.registry import MODELS
    MODELS.build(dict(type='soft_mm.SOFT'))
    """
    done = run(code, cwd=tmp_path)
    assert done.returncode != 0 and message in done.stderr.splitlines()[-1], done.stderr[-2000:]


def test_layer_decay_constructor_of_mmpretrain():
    code = """
    from mmengine.registry import init_default_scope
    init_default_scope('mmpretrain')
    import mmpretrain.models, mmpretrain.engine
    from mmengine.optim import build_optim_wrapper
    from mmpretrain.registry import MODELS
    model = MODELS.build(dict(
        type='ImageClassifier',
        backbone=dict(type='soft_mm.SOFT', arch='tiny', out_indices=(3,), out_type='cls_token'),
        head=dict(type='LinearClsHead', num_classes=10, in_channels=512)))
    wrapper = build_optim_wrapper(model, dict(
        optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.1),
        constructor='LearningRateDecayOptimWrapperConstructor',
        paramwise_cfg=dict(layer_decay_rate=0.5)))
    rates = {id(group['params'][0]): group['lr'] for group in wrapper.param_groups}
    rate = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    assert rate['head.fc.weight'] == rate['backbone.stages.3.norm.weight'] == 1
    assert rate['backbone.stages.3.blocks.1.attn.qkv.weight'] == 0.5
    assert rate['backbone.stages.0.patch_embed.0.weight'] == 0.5 ** 9
    """
    done = run(code)
    assert done.returncode == 0, done.stderr[-2000:]
