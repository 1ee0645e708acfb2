"""Tests of the ListOps config: short training and evaluation, other lengths, other attentions."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from projects.listops.listops_data import VOCABULARY, write_listops
from soft_mm.runner import load_config, runner_parser
from soft_mm.utils import build_model, read_config

ROOT = Path(__file__).resolve().parents[3]
CONFIG = ROOT / 'projects/listops/configs/soft_listops.py'
LENGTHS = ['model.backbone.length=40', 'model.data_preprocessor.length=40']


def tool(name, *arguments, cwd, env):
    command = [sys.executable, str(ROOT / 'tools' / name), str(CONFIG), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def test_trains_and_evaluates(tmp_path, environment):
    """The data are in the folder that the config names, with twelve samples per split."""
    write_listops(tmp_path / 'data/listops', num_train=12, num_val=12, num_test=12, min_length=8, max_length=40)
    options = [
        *LENGTHS,
        'model.backbone.attention.max_landmarks=4',
        'train_cfg.max_iters=3',
        'train_cfg.val_interval=3',
        'param_scheduler=[]',
        'train_dataloader.batch_size=4',
        'train_dataloader.num_workers=0',
        'train_dataloader.persistent_workers=False',
        'val_dataloader.num_workers=0',
        'default_hooks.logger.interval=1',
    ]
    done = tool('train.py', '--work-dir', 'run', '--cfg-options', *options, cwd=tmp_path, env=environment)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-3000:]
    assert 'Iter(train) [3/3]' in log and 'Iter(val) [1/1]    accuracy/top1' in log
    state_dict = torch.load(tmp_path / 'run/iter_3.pth', weights_only=False)['state_dict']
    assert state_dict['backbone.pos_embed'].shape == (1, 40, 64)
    options = [*LENGTHS, 'model.backbone.attention.max_landmarks=4', 'test_dataloader.num_workers=0']
    arguments = ('run/iter_3.pth', '--json', 'metrics.json', '--cfg-options', *options)
    done = tool('test.py', *arguments, cwd=tmp_path, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert 0 <= json.loads((tmp_path / 'metrics.json').read_text())['accuracy/top1'] <= 100


def test_config_has_the_sizes_of_the_data():
    cfg = read_config(CONFIG)
    assert cfg.model.backbone.vocab_size == len(VOCABULARY)
    # Sequences have fewer than 2000 tokens.
    assert cfg.model.backbone.length == cfg.model.data_preprocessor.length >= 1999
    assert max(scheduler.end for scheduler in cfg.param_scheduler) == cfg.train_cfg.max_iters
    files = [cfg[f'{split}_dataloader'].dataset.ann_file for split in ('train', 'val', 'test')]
    assert files == ['basic_train.tsv', 'basic_val.tsv', 'basic_test.tsv']


@pytest.mark.parametrize('kind', ['SoftmaxAttention', 'LinformerAttention'])
def test_attention_can_be_replaced(kind):
    """As the README says, `_delete_` removes the keys of the default type."""
    options = ['model.backbone.attention._delete_=True', f'model.backbone.attention.type={kind}', *LENGTHS]
    parser = runner_parser('')
    cfg = load_config(parser, parser.parse_args([str(CONFIG), '--cfg-options', *options]))
    model = build_model(cfg)
    assert {type(block.attn).__name__ for block in model.backbone.blocks} == {kind}
    if kind == 'LinformerAttention':
        assert model.backbone.blocks[0].attn.key_weight.shape == (49, 1, 40)
    data = model.data_preprocessor(dict(inputs=[torch.tensor([12, 3, 10, 15])]))
    assert model(data['inputs'], mode='tensor').shape == (1, 10)
