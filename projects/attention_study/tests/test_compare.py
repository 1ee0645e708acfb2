"""Tests of the comparison of attentions: trainings, costs, resuming, and the tables."""

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from projects.attention_study import compare, costs
from projects.attention_study.compare import compare_attention
from projects.attention_study.studies import QUICK, STUDIES, case_config
from projects.attention_study.study_report import markdown
from projects.photo_digits.demo import DETECTION
from soft_mm.utils import build_model, read_config

ROOT = Path(__file__).resolve().parents[3]
FILES = ('comparison.json', 'comparison.md', 'comparison.png')


def build_case(study, name, measured=False):
    return build_model(case_config(study, study.cases[name], measured), backbone_only=True)


@pytest.mark.parametrize('study', STUDIES.values(), ids=STUDIES)
def test_every_case_is_a_different_model(study):
    assert {name for group in study.groups.values() for name in group} == set(study.cases)
    configs = [case_config(study, case).model.backbone for case in study.cases.values()]
    assert all(config not in configs[:place] for place, config in enumerate(configs))
    for name in study.cases:
        build_case(study, name)


def test_only_stage_4_differs_from_the_detector_of_the_demo():
    cfg = read_config(ROOT / 'projects/attention_study/configs/mask-rcnn_soft-tiny-linear_photo-digits.py')
    softmax, linear = (build_model(config, backbone_only=True) for config in (read_config(DETECTION.config_file), cfg))
    kinds = [[type(stage.blocks[0].attn).__name__ for stage in model.stages] for model in (softmax, linear)]
    assert kinds == [['SoftmaxFreeAttention'] * 3 + ['SoftmaxAttention'], ['SoftmaxFreeAttention'] * 4]
    assert {stage.blocks[0].attn.max_landmarks for stage in linear.stages} == {49}
    assert cfg.model.backbone.init_cfg.fresh_attention == [3]


@pytest.mark.parametrize('study', STUDIES.values(), ids=STUDIES)
def test_quick_form_shortens_the_schedule_of_the_config(study):
    cfg = read_config(study.task.config_file)
    longest = cfg.train_cfg.max_iters
    assert max(scheduler.end for scheduler in cfg.param_scheduler) == longest
    cfg.merge_from_dict(QUICK)
    assert [scheduler.end for scheduler in cfg.param_scheduler] == [2, 8] and cfg.train_cfg.max_iters == 8 < longest


@pytest.mark.parametrize(('side', 'budgets'), [(32, [16, 16, 4]), (48, [16, 16, 9])])
def test_budgets_are_equal(side, budgets):
    """For both sizes of the crops SOFT has 16 landmarks, or all tokens of a stage. The baselines get 16 as well."""
    study = STUDIES['photo-digits']
    backbone = build_case(study, 'SOFT').eval()
    counts = []
    for stage in backbone.stages[:3]:
        stage.blocks[0].attn.register_forward_pre_hook(
            lambda module, inputs: counts.append(module.landmarks(torch.zeros(1, 1, inputs[0].shape[1], 32), inputs[1]))
        )
    backbone(torch.zeros(1, 3, side, side))
    assert [landmarks.shape[2] for landmarks, *_ in counts] == budgets
    options = ('proj_tokens', 'num_features', 'num_landmarks')
    given = [value for case in study.cases.values() for key, value in case.items() if key.split('.')[1] in options]
    assert given == [16, 16, 16]


@pytest.mark.parametrize('study', STUDIES.values(), ids=STUDIES)
def test_interrupted_training_is_evaluated_on_the_same_samples(study):
    cfg = read_config(study.task.config_file)
    assert cfg.test_dataloader == cfg.val_dataloader


@pytest.fixture
def faked(monkeypatch, tmp_path):
    """Replace measurements and trainings by fakes that record their arguments."""
    asked = dict(measured=[], trained={}, folders=set(), fail=None, hold=threading.Event())

    def run_sweep(targets, sizes, options, peer, console):
        asked['measured'].append((targets[0].name, options.train))
        seconds = dict(median=options.batch_size / 8, low=options.batch_size / 10, high=options.batch_size / 5)
        row = dict(status='ok', seconds=seconds, multiply_adds=options.batch_size * 10**6)
        if options.memory:
            row['bytes'] = 3 * 2**20
        if peer != targets[0]:
            row['ratio'] = dict(median=1.5, low=1.4, high=1.6)
        return [row]

    def train_task(run, folder, manifest, console, options, threads):
        if run.name == asked['fail']:
            threading.Timer(1.0, asked['hold'].set).start()
            raise RuntimeError(f'{run.name} failed')
        if asked['fail']:
            asked['hold'].wait(20)
        assert threads == max(torch.get_num_threads() // 2, 1) and manifest == 'manifest'
        asked['trained'][run.name] = options
        asked['folders'].add(folder)
        return dict(top1=0.5 + 0.1 * options['randomness.seed'], seconds=1.0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(costs, 'run_sweep', run_sweep)
    monkeypatch.setattr(compare, 'train_task', train_task)
    for name, study in list(STUDIES.items()):
        fake = replace(study, prepare=lambda seed, quick: ({'data': seed}, 'manifest'))
        monkeypatch.setitem(STUDIES, name, fake)
    return asked


def test_report_holds_every_case_and_seed_of_the_requested_groups(faked, tmp_path):
    report = compare_attention('photo-digits', ['sampler', 'normalisation'], seeds=(0, 1, 3), jobs=2)
    names = ['SOFT', 'sampler mean', 'sampler random', 'SOFT, normalised', 'Cholesky', 'Cholesky, normalised']
    assert list(report['cases']) == names and list(report['groups']) == ['sampler', 'normalisation']
    assert set(faked['trained']) == {f'{name}, seed {seed}' for name in names for seed in (0, 1, 3)}
    assert len(faked['folders']) == 18
    random_options = {f'model.backbone.attention.{key}': value for key, value in dict(sampler='random', seed=3).items()}
    assert faked['trained']['sampler random, seed 3'] == {
        'model.backbone.attention.max_landmarks': 16,
        'randomness.seed': 3,
        'data': 3,
        **random_options,
    }
    folder = tmp_path / 'work_dirs/attention/photo-digits'
    assert json.loads((folder / FILES[0]).read_text()) == report
    assert all((folder / name).stat().st_size > 500 for name in FILES)
    assert report['cases']['SOFT']['top1'] == pytest.approx(dict(mean=0.5 + 0.4 / 3, low=0.5, high=0.8))


def test_costs_are_kept_and_compared_with_the_first_case(faked, monkeypatch):
    report = compare_attention('photo-digits', ['sampler'], jobs=2)
    assert faked['measured'] == [(name, train) for name in report['cases'] for train in (True, False)]
    assert report['cases']['SOFT']['training_time_ratio'] == dict(median=1.0, low=1.0, high=1.0)
    assert report['cases']['sampler mean']['inference_time_ratio']['median'] == 1.5
    # The sweep counts a forward of the whole batch, the report one sample.
    assert report['cases']['SOFT']['multiply_adds'] == 1_000_000
    compare_attention('photo-digits', ['sampler', 'inverse'], jobs=2)
    assert len(faked['measured']) == 2 * (3 + 2)
    # Costs measured on another machine or with another batch size are not used.
    monkeypatch.setattr(costs, 'machine', lambda device: dict(threads=64))
    compare_attention('photo-digits', ['sampler'], jobs=2)
    assert len(faked['measured']) == 2 * (3 + 2 + 3)
    monkeypatch.setitem(STUDIES, 'photo-digits', replace(STUDIES['photo-digits'], batch_size=3))
    compare_attention('photo-digits', ['sampler'], jobs=2)
    assert len(faked['measured']) == 2 * (3 + 2 + 3 + 3)


def test_parameters_are_counted_in_the_trained_model(faked):
    """Costs of sequences are measured at a larger length, with more position embeddings."""
    study = STUDIES['listops']
    trained = build_case(study, 'Linformer')
    measured = build_case(study, 'Linformer', measured=True)
    assert trained.blocks[0].attn.key_weight.shape == (32, 1, 64)
    assert measured.blocks[0].attn.key_weight.shape == (32, 1, 2048)
    report = compare_attention('listops', jobs=2)
    assert report['cases']['Linformer']['parameters'] == sum(parameter.numel() for parameter in trained.parameters())


def test_failed_training_ends_the_study_and_is_named(faked):
    faked['fail'] = 'SOFT, seed 0'
    with pytest.raises(RuntimeError, match='SOFT, seed 0 failed'):
        compare_attention('photo-digits', ['landmarks'], jobs=2)
    # Trainings that had begun are finished, no other training begins.
    assert 1 <= len(faked['trained']) <= 2


def test_interrupted_study_leaves_the_complete_seeds(faked, tmp_path):
    faked['fail'] = 'SOFT, seed 1'
    faked['hold'].set()
    with pytest.raises(RuntimeError, match='SOFT, seed 1 failed'):
        compare_attention('photo-digits', ['sampler'], jobs=2)
    report = json.loads((tmp_path / 'work_dirs/attention/photo-digits/comparison.json').read_text())
    assert [[run['seed'] for run in case['runs']] for case in report['cases'].values()] == [[0], [0], [0]]


@pytest.mark.parametrize(
    ('row', 'message'),
    [
        (dict(status='error', message='no such thing'), 'SOFT could not be measured: no such thing'),
        (dict(status='ok', multiply_adds=None), 'SOFT could not be measured'),
        # The peer failed, so the second case has no ratio.
        (
            dict(status='ok', multiply_adds=1, bytes=1, seconds=dict(median=1, low=1, high=1)),
            'sampler mean could not be measured',
        ),
    ],
)
def test_failed_measurement_gives_the_reason(faked, monkeypatch, row, message):
    monkeypatch.setattr(costs, 'run_sweep', lambda *args: [row])
    with pytest.raises(RuntimeError, match=message):
        compare_attention('photo-digits', ['sampler'], jobs=2)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('digits',), "study='digits': expected one of .*photo-digits"),
        (('photo-digits', ['samplers']), r"groups=\['samplers'\]: expected None, or one or more of .*'sampler'"),
        (('photo-digits', []), r'groups=\[\]: expected None, or one or more'),
        (('photo-digits', None, ()), r'seeds=\[\]: expected one or more different seeds'),
        (('photo-digits', None, (1, 1)), r'seeds=\[1, 1\]'),
        (('photo-digits', None, (1,), False, 0), 'jobs=0: expected an integer >= 1'),
    ],
)
def test_invalid_arguments_are_reported(faked, arguments, message):
    with pytest.raises(ValueError, match=message):
        compare_attention(*arguments)
    assert not faked['trained']


def test_markdown_has_a_row_per_case_and_warns_about_the_quick_form(faked):
    assert 'over 1 seed,' in markdown(compare_attention('photo-digits', ['sampler'], quick=True, jobs=2))
    text = markdown(compare_attention('photo-digits', ['sampler'], quick=True, seeds=(0, 1), jobs=2))
    assert 'these accuracies are meaningless' in text
    lines = [line.split(' | ') for line in text.splitlines() if line.startswith('| ')]
    assert len({len(line) for line in lines}) == 1
    assert [line[0] for line in lines] == ['| sampler', '| SOFT', '| sampler mean', '| sampler random']
    assert lines[1][2:5] == ['1.0 M', '3 MiB', '8 (5-10)'] and lines[2][5] == '1.50 (1.40-1.60)'
    assert lines[1][-1] == '0.550 (0.500-0.600) |'


def run_program(folder, environment, *arguments):
    # Without OMP_NUM_THREADS, because the program divides the threads among its trainings.
    environment = {key: value for key, value in environment.items() if key != 'OMP_NUM_THREADS'}
    command = [sys.executable, '-m', 'projects.attention_study', *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=3000)


def check_program(folder, environment, *arguments):
    """Run the program twice. The second run must not train or measure anything."""
    done = run_program(folder, environment, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    (out,) = (folder / 'work_dirs/attention').iterdir()
    first = {name: (out / name).read_bytes() for name in FILES[:2]}
    logs = {file: file.read_bytes() for file in out.rglob('output.log')}
    again = run_program(folder, environment, *arguments)
    assert again.returncode == 0 and again.stdout.count('already finished') == len(logs) > 0
    assert all((out / name).read_bytes() == content for name, content in first.items())
    assert all(file.read_bytes() == content for file, content in logs.items())
    return json.loads(first['comparison.json'])


def test_program_trains_measures_and_resumes(tmp_path, environment):
    report = check_program(tmp_path, environment, 'photo-digits', '--quick', '--groups', 'sampler')
    for case in report['cases'].values():
        assert 0 <= case['top1']['mean'] <= 1 and case['training_bytes'] > 2**20 and case['parameters'] > 4e5
    done = run_program(tmp_path, environment, 'photo-digits', '--groups', 'nothing')
    assert done.returncode == 2 and "groups=['nothing']: expected None, or one or more" in done.stderr


@pytest.mark.long
@pytest.mark.parametrize('study', STUDIES)
def test_quick_form_of_everything(tmp_path, environment, study):
    report = check_program(tmp_path, environment, study, '--quick')
    assert set(report['cases']) == set(STUDIES[study].cases)
    assert all(len(case['runs']) == 1 for case in report['cases'].values())
