"""The demo: which trainings are resumed, skipped or repeated, and what the summary holds."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mmcv
import numpy as np
import pytest
from mmengine.config import Config

from projects.common import training as training_module
from projects.photo_digits import CropGenerator, SceneGenerator, demo
from projects.photo_digits.pictures import Picture
from soft_mm.utils import read_config

METRICS = {
    'classification': {'accuracy/top1': 91.5},
    'detection': {
        'coco/bbox_mAP': 0.6,
        'coco/bbox_mAP_50': 0.9,
        'coco/segm_mAP': 0.5,
        'coco/segm_mAP_50': 0.85,
    },
    'segmentation': {'mIoU': 63.0},
}


def write_run(work_dir, name, records):
    folder = work_dir / name / 'vis_data'
    folder.mkdir(parents=True)
    (folder / 'scalars.json').write_text('\n'.join(json.dumps(record) for record in records))


class FakeTraining:
    """Replaces ``tools/train.py`` and ``tools/test.py``: writes a checkpoint and metrics, or fails."""

    def __init__(self):
        self.commands = []
        self.failing = set()
        self.without_evaluation = set()

    def __call__(self, command, check, env):
        assert env['PYTHONPATH'].split(os.pathsep)[0] == str(training_module.ROOT)
        self.commands.append(command)
        if command[1].endswith('test.py'):
            Path(command[command.index('--json') + 1]).write_text(json.dumps(METRICS['classification']))
            return
        work_dir = Path(command[command.index('--work-dir') + 1])
        # The weights depend on those from which the training starts.
        starts = [Path(option.partition('=')[2]).read_bytes() for option in command if 'init_cfg.checkpoint=' in option]
        (work_dir / 'iter_1.pth').write_bytes(b' '.join([work_dir.name.encode(), *starts]))
        (work_dir / 'last_checkpoint').write_text(str(work_dir / 'iter_1.pth'))
        if work_dir.name in self.failing:
            raise subprocess.CalledProcessError(3, command)
        if work_dir.name in self.without_evaluation:
            return
        write_run(
            work_dir, f'run{len(self.commands)}', [dict(loss=1.0, step=1), dict(step=1, **METRICS[work_dir.name])]
        )

    @property
    def trained(self):
        return [Path(c[c.index('--work-dir') + 1]).name for c in self.commands if c[1].endswith('train.py')]


@pytest.fixture
def training(monkeypatch, tmp_path):
    """Replace the trainings, the data and the pictures of predictions."""
    fake = FakeTraining()
    monkeypatch.chdir(tmp_path)
    # Only the trainings are replaced: matplotlib also runs programs, to build its font cache.
    monkeypatch.setattr(training_module, 'subprocess', SimpleNamespace(**{**vars(subprocess), 'run': fake}))

    def export(out, **kwargs):
        out.mkdir(parents=True, exist_ok=True)
        (out / 'photo_digits.json').write_text('{}')
        for folder in ('val/crops/0', 'val/scenes/images'):
            mmcv.imwrite(np.zeros((8, 12, 3), np.uint8), str(out / folder / '000000.png'))
        return True

    class Inline:
        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def submit(self, function, config, checkpoint, file, *arguments, **options):
            assert Path(config).is_file() and Path(checkpoint).is_file()
            file.write_bytes(b'')
            results = dict(
                draw_predictions=[Picture(b'jpeg', 2, 1, 'alt', f'{file.stem} {index}') for index in range(8)],
                draw_attention_rows=Picture(b'jpeg', 2, 1, 'alt', 'rows of two pixels'),
                export_onnx=['exported'],
            )
            return SimpleNamespace(result=lambda: results[function.__name__])

    monkeypatch.setattr(demo, 'export_photo_digits', export)
    monkeypatch.setattr(demo, 'ProcessPoolExecutor', Inline)
    return fake


def test_summary_and_order(training, tmp_path):
    summary = demo.run_demo('demo')
    assert training.trained == ['classification', 'detection', 'segmentation']
    assert f'model.backbone.init_cfg.checkpoint={Path("demo/classification/iter_1.pth")}' in training.commands[1]
    assert json.loads((tmp_path / 'demo/summary.json').read_text()) == summary
    assert summary['classification']['top1'] == 0.915
    assert summary['detection']['bbox_mAP_50'] == 0.9 and summary['segmentation']['mIoU'] == 0.63
    assert all(summary[task]['seconds'] >= 0 for task in METRICS)
    assert {'torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'soft_mm'} <= summary['versions'].keys()
    assert (tmp_path / 'demo/loss_curves.png').stat().st_size > 1000


def test_page_holds_the_results_and_is_written_again(training, tmp_path, capsys):
    demo.run_demo('demo')
    page = (tmp_path / 'demo/report.html').read_text()
    assert 'demo/report.html' in capsys.readouterr().out.replace('\n', '')
    for text in ('0.915', '0.850', '0.630', 'detection 0', 'detection 7', 'segmentation 7', 'rows of two pixels'):
        assert f'>{text}<' in page
    assert 'The detector starts from the classifier' in page and page.count('<polyline') == 3
    (tmp_path / 'demo/report.html').unlink()
    demo.run_demo('demo')
    assert len(training.commands) == 3 and (tmp_path / 'demo/report.html').read_text() == page
    demo.run_demo('scratch', from_scratch=True)
    page = (tmp_path / 'scratch/report.html').read_text()
    assert 'start from random initialisation' in page and page.count('<polyline') == 2 and 'top-1' not in page


def test_models_are_exported(training, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, 'import_extra', lambda *names: None)
    demo.run_demo('demo')
    assert sorted(file.name for file in (tmp_path / 'demo').glob('*.onnx')) == [
        'classification.onnx',
        'segmentation.onnx',
    ]
    assert 'ONNX files: demo/classification.onnx, demo/segmentation.onnx' in capsys.readouterr().out.replace('\n', ' ')
    demo.run_demo('scratch', from_scratch=True)
    assert not list((tmp_path / 'scratch').glob('*.onnx'))


def test_failed_export_ends_in_one_sentence(training, tmp_path, monkeypatch, capsys):
    def fail(*arguments, **options):
        if 'segmentation' in str(arguments[2]):
            raise ValueError('outputs differ by 3')
        return ['exported']

    monkeypatch.setattr(demo, 'import_extra', lambda *names: None)
    run = demo._in_new_process
    monkeypatch.setattr(
        demo, '_in_new_process', lambda f, *a, **o: fail(*a, **o) if f is demo.export_onnx else run(f, *a, **o)
    )
    demo.run_demo('demo')
    text = capsys.readouterr().out
    assert 'No ONNX file of the segmentation: outputs differ by 3' in text
    assert 'ONNX files: demo/classification.onnx\n' in text


def test_missing_packages_of_the_export_are_named(training, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    demo.run_demo('demo')
    assert not list((tmp_path / 'demo').glob('*.onnx'))
    assert 'No ONNX files: onnx' in capsys.readouterr().out


def test_finished_trainings_are_not_repeated(training):
    first = demo.run_demo('demo')
    assert demo.run_demo('demo') == first
    assert len(training.commands) == 3


def test_interrupted_demo_resumes(training):
    training.failing = {'detection'}
    with pytest.raises(RuntimeError, match='detection failed with exit code 3'):
        demo.run_demo('demo')
    training.failing = set()
    demo.run_demo('demo')
    assert training.trained == ['classification', 'detection', 'detection', 'segmentation']
    assert '--resume' in training.commands[2]


def test_training_interrupted_before_its_evaluation_is_evaluated(training):
    training.without_evaluation = {'classification'}
    assert demo.run_demo('demo')['classification']['top1'] == 0.915
    assert training.commands[1][1].endswith('test.py')


def test_finished_training_without_its_checkpoint_is_repeated(training, tmp_path):
    demo.run_demo('demo')
    (tmp_path / 'demo/classification/iter_1.pth').unlink()
    demo.run_demo('demo')
    assert training.trained[3] == 'classification'


def test_checkpoint_of_an_unknown_run_is_not_resumed(training, tmp_path):
    folder = tmp_path / 'demo' / 'classification'
    folder.mkdir(parents=True)
    (folder / 'iter_1.pth').write_bytes(b'of another run')
    (folder / 'last_checkpoint').write_text('iter_1.pth')
    demo.run_demo('demo')
    assert '--resume' not in training.commands[0]
    (kept,) = (tmp_path / 'demo').glob('classification.*-*')
    assert (kept / 'iter_1.pth').read_bytes() == b'of another run'


@pytest.mark.parametrize('tasks, folder', [(demo.TASKS, 'demo'), (demo.HARD_TASKS, 'demo-hard')])
def test_configs_name_the_checkpoint_of_the_demo(tasks, folder):
    for start, task in itertools.pairwise(tasks):
        iterations = Config.fromfile(start.config_file).train_cfg.max_iters
        checkpoint = Config.fromfile(task.config_file).model.backbone.init_cfg.checkpoint
        assert checkpoint == f'work_dirs/{folder}/{start.name}/iter_{iterations}.pth'


def test_segmentor_starts_from_the_backbone_of_the_detector(training):
    demo.run_demo('demo')
    assert f'model.backbone.init_cfg.checkpoint={Path("demo/detection/iter_1.pth")}' in training.commands[2]


def test_seed_is_passed_on(training):
    demo.run_demo('demo', seed=3)
    assert all('randomness.seed=3' in command for command in training.commands) and len(training.commands) == 3


def test_hard_form_has_its_own_configs_and_data(training, tmp_path):
    demo.run_demo('hard', hard=True)
    assert [Path(command[2]).parent.name for command in training.commands] == ['hard'] * 3
    assert [path.name for path in (tmp_path / 'data').iterdir() if path.is_dir()] == ['photo_digits_hard']


def test_hard_form_is_that_of_the_generators():
    crops, scenes, semantic = (read_config(task.config_file) for task in demo.HARD_TASKS)
    assert CropGenerator('val', **crops.crop_options).options == CropGenerator('val').options
    assert SceneGenerator('val', **scenes.scene_options).options == SceneGenerator('val', size=192).options
    assert scenes.scene_options == semantic.scene_options
    for cfg in (crops, scenes, semantic):
        assert (
            cfg.val_dataloader.dataset.data_root == cfg.test_dataloader.dataset.data_root == 'data/photo_digits_hard/'
        )
    assert scenes.val_evaluator.ann_file == scenes.test_evaluator.ann_file
    assert scenes.val_evaluator.ann_file.startswith('data/photo_digits_hard/')


@pytest.mark.parametrize('tasks', [demo.TASKS, demo.HARD_TASKS], ids=['easy', 'hard'])
def test_training_and_validation_have_the_same_difficulty(tasks):
    crops, scenes, semantic = (read_config(task.config_file) for task in tasks)
    for dataset in crops.train_dataloader.dataset.datasets:
        assert crops.crop_options.items() <= dataset.generator.items()
    for cfg in (scenes, semantic):
        assert cfg.scene_options.items() <= cfg.train_dataloader.dataset.generator.items()


@pytest.mark.parametrize(
    'arguments, folder, options',
    [
        ([], 'demo', (False, False, 0)),
        (['--hard', '--seed', '2'], 'demo-hard-seed-2', (False, True, 2)),
        (['--from-scratch'], 'demo-scratch', (True, False, 0)),
    ],
)
def test_options_name_the_folder(arguments, folder, options, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr(demo, 'run_demo', lambda *given: calls.append(given))
    monkeypatch.setattr('sys.argv', ['demo.py', *arguments])
    demo.main()
    assert calls == [(f'work_dirs/{folder}', *options)]


def test_changed_classifier_repeats_the_trainings_that_start_from_it_and_keeps_the_old_runs(training, tmp_path):
    demo.run_demo('demo')
    (tmp_path / 'demo/classification/iter_1.pth').write_bytes(b'other weights')
    demo.run_demo('demo')
    assert training.trained[3:] == ['detection', 'segmentation']
    assert len(list((tmp_path / 'demo').glob('detection.*-*'))) == 1


def test_from_scratch_trains_no_classifier(training):
    summary = demo.run_demo('scratch', from_scratch=True)
    assert training.trained == ['detection', 'segmentation'] and 'classification' not in summary
    assert all('model.backbone.init_cfg=None' in command for command in training.commands)
