"""Token sweeps: names of contenders, measurements in their own processes, rows that say what failed, reports."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from soft_mm.analysis import contenders, sweep
from soft_mm.analysis.complexity import count_multiply_adds
from soft_mm.analysis.contenders import BACKBONES, build_step, parse_contender
from soft_mm.analysis.sweep import SweepOptions, growth_exponents, run_sweep

ROOT = Path(__file__).resolve().parents[2]
QUICK = SweepOptions(repeats=2, seconds=5, max_memory=4)


def test_contenders_are_read():
    contender = parse_contender('soft-tiny:arch=small,attention.max_landmarks=196')
    assert contender.kind == 'backbone'
    assert contender.config['arch'] == 'small'
    assert contender.config['attention'] == dict(solver='cholesky', max_landmarks=196)
    assert BACKBONES['soft-tiny']['arch'] == 'tiny'
    operator = parse_contender('attn-soft:max_landmarks=16')
    assert operator.kind == 'operator' and operator.config == dict(solver='cholesky', max_landmarks=16)
    registered = parse_contender('mmdet.ResNet:depth=18,out_indices=(2, 3)')
    assert registered.config == dict(type='mmdet.ResNet', depth=18, out_indices=(2, 3))
    config = parse_contender(str(ROOT / 'configs/photo_digits/mask-rcnn_soft-tiny_fpn_photo-digits.py'))
    assert config.config['type'] == 'soft_mm.SOFT'


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('swin', "'swin' is unknown; choose of the operators .*attn-soft.* the backbones .*swin-tiny"),
        ('nowhere.py', "'nowhere.py' is unknown"),
        ('soft-tiny:arch', "option 'arch' must have the form key=value"),
        ('attn-softmax-fused:heads=3', 'takes no options'),
        ('attn-soft:landmarks=3', r"'attn-soft:landmarks=3': attention keys \['landmarks'\] are unknown"),
        ('attn-nystrom:num_features=3', r"keys \['num_features'\] are unknown to NystromAttention"),
        ('attn-nystrom@held-kernel', 'attn-nystrom has no variants'),
        ('attn-soft:solver=qr', "'attn-soft:solver=qr': solver='qr' is unknown"),
        ('attn-softmax-fused@held-kernel', 'attn-softmax-fused has no variants'),
        ('swin-tiny@held-kernel', 'mmdet.SwinTransformer has no variants'),
        ('attn-soft@faster', "variant 'faster' is unknown; choose one of .*held-kernel"),
    ],
)
def test_unknown_contenders_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_contender(text)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('mmdet.ResNext', 'mmdet.ResNext is not in the registry of mmdet'),
        ('nowhere.ResNet', 'needs nowhere, which is not installed'),
    ],
)
def test_contenders_that_cannot_be_built_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        build_step(parse_contender(text), (64, 64), 1, False, 'cpu')


@pytest.mark.parametrize('train', [False, True])
def test_encoder_of_sequences_takes_a_step(train):
    config = dict(type='soft_mm.SequenceEncoder', vocab_size=16, length=80, embed_dims=16)
    contender = contenders.Contender('encoder', 'encoder', 'backbone', config)
    assert contender.tokens((1, 80)) == 80 and parse_contender('attn-soft').tokens((52, 78)) == 13 * 20
    shorter, longer = (count_multiply_adds(build_step(contender, (1, n), 1, train, 'cpu')) for n in (40, 80))
    assert 0 < shorter < longer
    with pytest.raises(ValueError, match="'encoder' encodes sequences: size 40x40 must be 1xN"):
        build_step(contender, (40, 40), 1, train, 'cpu')


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('name', [name for name, config in contenders.OPERATORS.items() if 'type' in (config or {})])
def test_rivals_take_a_step(name, train):
    step = build_step(parse_contender(name), (52, 80), 1, train, 'cpu', head_dims=8)
    assert count_multiply_adds(step) > 0


def test_plain_formulae_compute_what_the_operator_computes():
    outputs = []
    for name in ('attn-soft-authors', 'attn-soft-reference'):
        torch.manual_seed(0)
        function, inputs, _ = contenders._build_operator(parse_contender(name), (96, 80), 1, 'cpu', 2, 8, False)
        with torch.no_grad():
            outputs.append(function(*inputs))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-3 * outputs[0].abs().max().item())


@pytest.mark.parametrize('train', [False, True])
def test_every_backbone_takes_a_step(train):
    for name in BACKBONES:
        build_step(parse_contender(name), (64, 96), 1, train, 'cpu')()


@pytest.fixture(autouse=True)
def workers_find_the_package(monkeypatch):
    monkeypatch.setenv('PYTHONPATH', str(ROOT))


@pytest.mark.long
def test_backbones_of_the_toolboxes_are_swept():
    contenders = [parse_contender(text) for text in ('swin-tiny', 'pvt-tiny', 'twins-svt-small')]
    rows = run_sweep(contenders, [(64, 96)], SweepOptions(repeats=2, memory=False))
    assert all(row['status'] == 'ok' and row['multiply_adds'] > 1e8 for row in rows), rows


def test_a_peer_that_fails_costs_the_ratio_alone():
    contender, peer = (parse_contender(text) for text in ('attn-soft', 'attn-softmax-plain'))
    options = SweepOptions(repeats=2, seconds=1, max_memory=1, memory=False)
    (row,) = run_sweep([contender], [(1024, 1024)], options, peer)
    assert row['status'] == 'ok' and 'ratio' not in row


def test_sweep_measures():
    contenders = [parse_contender(text) for text in ('attn-soft', 'attn-softmax-plain')]
    rows = run_sweep(contenders, [(256, 128), (64, 64)], QUICK, peer=contenders[1])
    assert [(row['name'], row['tokens']) for row in rows] == [
        ('attn-soft', 256),
        ('attn-soft', 2048),
        ('attn-softmax-plain', 256),
        ('attn-softmax-plain', 2048),
    ]
    for row in rows:
        assert row['status'] == 'ok' and row['bytes'] >= 0
        assert 0 < row['seconds']['low'] <= row['seconds']['median'] <= row['seconds']['high']
        assert ('ratio' in row) == (row['name'] == 'attn-soft')
    # Scores and their product with the values, of two heads of 32.
    assert rows[3]['multiply_adds'] == 2 * 2 * 2048**2 * 32
    # The scores of 2048 tokens are 32 MiB, and so is their softmax; ours need less than one tenth of that.
    assert 60 * 2**20 < rows[3]['bytes'] and rows[1]['bytes'] < rows[3]['bytes'] / 4


def test_what_fails_is_a_row_and_the_sweep_goes_on():
    contenders = [parse_contender(text) for text in ('attn-softmax-plain', 'attn-soft')]
    options = SweepOptions(repeats=2, seconds=1, max_memory=1, memory=False)
    rows = run_sweep(contenders, [(64, 64), (1024, 1024), (2048, 2048)], options)
    assert [row['status'] for row in rows] == ['ok', 'out of memory', 'not tried', 'ok', 'ok', 'ok']
    slow = run_sweep(contenders[1:], [(64, 64)], SweepOptions(time_limit=0.01, memory=False))
    assert [row['status'] for row in slow] == ['over the time limit']
    wrong = run_sweep([parse_contender('mmdet.ResNext')], [(64, 64)], options)
    assert wrong[0]['status'] == 'error' and 'mmdet.ResNext is not in the registry' in wrong[0]['message']
    small = run_sweep([parse_contender('soft-tiny')], [(16, 16), (64, 64)], options)
    assert [row['status'] for row in small] == ['error', 'ok']


def test_growth_exponents():
    rows = [
        dict(name='a', status='ok', tokens=n, seconds=dict(median=3e-6 * n**1.5), bytes=7 * n, multiply_adds=n * n)
        for n in (64, 256, 4096)
    ]
    rows += [dict(name='b', status='ok', tokens=64, seconds=dict(median=1.0)), dict(name='b', status='not tried')]
    slopes = growth_exponents(rows)
    assert slopes['a'] == dict(seconds=pytest.approx(1.5), bytes=pytest.approx(1), multiply_adds=pytest.approx(2))
    assert slopes['b'] == dict(seconds=None, bytes=None, multiply_adds=None)


@pytest.mark.parametrize('device', ['cuda:99', 'tpu', 'meta'])
def test_devices_that_do_not_exist_are_named(device):
    with pytest.raises(ValueError, match=f"device '{device}'"):
        run_sweep([], [], SweepOptions(device=device))


def test_tool_writes_its_files(tmp_path, environment):
    files = {kind: tmp_path / f'sweep.{kind}' for kind in ('json', 'csv', 'png')}
    command = [
        sys.executable,
        str(ROOT / 'tools/benchmark_tokens.py'),
        'attn-soft',
        'soft-tiny',
        '--sizes',
        '64',
        '64x128',
    ]
    command += ['--repeats', '2', '--train', '--no-memory', '--peer', 'attn-softmax-fused']
    for kind, path in files.items():
        command += [f'--{kind}', str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert 'growth exponents' in done.stdout
    report = json.loads(files['json'].read_text())
    assert [row['status'] for row in report['rows']] == ['ok'] * 4
    assert report['machine']['torch'] == torch.__version__
    rows = list(csv.DictReader(files['csv'].open()))
    assert [(row['height'], row['width']) for row in rows] == [('64', '64'), ('64', '128')] * 2
    assert all(float(row['ratio_low']) <= float(row['ratio']) <= float(row['ratio_high']) for row in rows)
    assert files['png'].read_bytes().startswith(b'\x89PNG')


def test_tool_that_measures_nothing_fails(environment):
    command = [sys.executable, str(ROOT / 'tools/benchmark_tokens.py'), 'soft-tiny', '--sizes', '16']
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and 'growth exponents' in done.stdout


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['soft-tiny', '--sizes', '64', '--device', 'cuda:99'], "device 'cuda:99': PyTorch sees"),
        (['soft-tony', '--sizes', '64'], "'soft-tony' is unknown"),
        (['soft-tiny', '--sizes', '64by64'], "'64by64': give a size as HxW"),
        (['soft-tiny', '--sizes', '64', '--repeats', '1'], '--repeats at least 2'),
    ],
)
def test_tool_names_bad_input(arguments, message, environment):
    done = subprocess.run(
        [sys.executable, str(ROOT / 'tools/benchmark_tokens.py'), *arguments],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 2 and message in ' '.join(done.stderr.split())


def test_report_says_what_failed():
    rows = [dict(name='a', size=[64, 64], tokens=256, status='out of memory')]
    report = sweep.sweep_report(rows, SweepOptions())
    assert report['exponents'] == {'a': dict(seconds=None, bytes=None, multiply_adds=None)}
    assert report['machine']['threads'] > 0
