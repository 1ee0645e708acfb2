"""Tests of the comparison of bounds on the landmarks: the trainings, their start weights and their options."""

import argparse
import itertools
import json
import subprocess
from pathlib import Path

import pytest
from mmengine.config import DictAction

from projects.attention_study import landmark_bounds
from projects.photo_digits import SceneGenerator
from projects.photo_digits.demo import DETECTION, SEGMENTATION
from soft_mm.utils import read_config


def overridden(command):
    """Read the config of a ``tools/train.py`` command, with the overrides parsed as the tool parses them."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    cfg = read_config(command[2])
    cfg.merge_from_dict(parser.parse_args(command[command.index('--cfg-options') :]).cfg_options)
    return cfg


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """Record the commands of the trainings instead of running them."""
    done = []

    def run(command, check, env):
        done.append(command)
        work_dir = Path(command[command.index('--work-dir') + 1])
        (work_dir / 'iter_1.pth').write_bytes(b'')
        (work_dir / 'last_checkpoint').write_text('iter_1.pth')
        record = dict(mIoU=50.0, step=1, **{key: 0.5 for key in DETECTION.metrics})
        scalars = work_dir / 'run' / 'vis_data' / 'scalars.json'
        scalars.parent.mkdir(parents=True)
        scalars.write_text(json.dumps(record))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, 'run', run)
    monkeypatch.setattr(landmark_bounds, 'NUM_SCENES', 1)
    return done


def test_every_solver_and_bound_is_trained_from_the_demo_checkpoints(commands, tmp_path):
    for task in (DETECTION, SEGMENTATION):
        folder = tmp_path / 'demo' / task.name
        folder.mkdir(parents=True)
        (folder / 'iter_9.pth').write_text(task.name)
        (folder / 'last_checkpoint').write_text('iter_9.pth')
    rows = landmark_bounds.compare_bounds('demo', 'out')
    assert json.loads((tmp_path / 'out' / 'summary.json').read_text()) == rows
    cases = list(itertools.product(('detection', 'segmentation'), landmark_bounds.SOLVERS, landmark_bounds.BOUNDS))
    assert [(row['task'], row['solver'], row['max_landmarks']) for row in rows] == cases
    for command, (task, solver, bound) in zip(commands, cases, strict=True):
        cfg = overridden(command)
        attention = cfg.model.backbone.attention
        assert (attention.solver, attention.max_landmarks) == (solver, bound)
        assert cfg.load_from == f'demo/{task}/iter_9.pth' and cfg.model.backbone.init_cfg is None
        written = SceneGenerator(**{**cfg.train_dataloader.dataset.generator, 'recolour': 0.0}).options
        scenes = json.loads((tmp_path / 'data/photo_digits_480/photo_digits.json').read_text())['options']['val'][
            'scene'
        ]
        # JSON has lists for tuples.
        for name, value in json.loads(json.dumps(written)).items():
            assert name in ('split', 'length') or scenes[name] == value, name
        for loader in (cfg.val_dataloader, cfg.test_dataloader):
            assert loader.dataset.pipeline[1] == dict(type='Resize', scale=(480, 480))
            assert loader.dataset.data_root == 'data/photo_digits_480/'
        assert max(scheduler.end for scheduler in cfg.param_scheduler) == cfg.train_cfg.max_iters


def test_error_without_the_demo_names_the_command(commands):
    with pytest.raises(FileNotFoundError, match='run `make demo`'):
        landmark_bounds.compare_bounds('nowhere', 'out')
    assert not commands
