"""Token sweeps: measurements in processes of their own, rows for what fails, reports."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.report import growth_exponents, print_report, sweep_report
from benchmarks.sweep import SweepOptions, run_sweep
from benchmarks.targets import Target, parse_target

QUICK = SweepOptions(repeats=2, seconds=5, max_memory=4)


@pytest.mark.long
def test_backbones_of_the_toolboxes_are_swept():
    targets = [parse_target(text) for text in ('swin-tiny', 'pvt-tiny', 'twins-svt-small')]
    rows = run_sweep(targets, [(64, 96)], SweepOptions(repeats=2, memory=False))
    assert all(row['status'] == 'ok' and row['multiply_adds'] > 1e8 for row in rows), rows


def test_a_peer_that_fails_costs_only_the_ratio():
    target, peer = (parse_target(text) for text in ('attn-soft', 'attn-softmax-plain'))
    options = SweepOptions(repeats=2, seconds=1, max_memory=1, memory=False)
    (row,) = run_sweep([target], [(1024, 1024)], options, peer)
    assert row['status'] == 'ok' and 'ratio' not in row


def test_sweep_measures():
    targets = [parse_target(text) for text in ('attn-soft', 'attn-softmax-plain')]
    rows = run_sweep(targets, [(256, 128), (64, 64)], QUICK, peer=targets[1])
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
    # The scores and their product with the values, for two heads of 32 channels.
    assert rows[3]['multiply_adds'] == 2 * 2 * 2048**2 * 32
    # The scores of 2048 tokens and their softmax need 32 MiB each. The landmarks need less than a tenth of that.
    assert 60 * 2**20 < rows[3]['bytes'] and rows[1]['bytes'] < rows[3]['bytes'] / 4


def test_what_fails_is_a_row_and_the_sweep_goes_on():
    targets = [parse_target(text) for text in ('attn-softmax-plain', 'attn-soft')]
    options = SweepOptions(repeats=2, seconds=1, max_memory=1, memory=False)
    rows = run_sweep(targets, [(64, 64), (1024, 1024), (2048, 2048)], options)
    assert [row['status'] for row in rows] == ['ok', 'out of memory', 'not tried', 'ok', 'ok', 'ok']
    slow = run_sweep(targets[1:], [(64, 64)], SweepOptions(time_limit=0.01, memory=False))
    assert [row['status'] for row in slow] == ['over the time limit']
    wrong = run_sweep([parse_target('mmdet.ResNext')], [(64, 64)], options)
    assert wrong[0]['status'] == 'error' and 'mmdet.ResNext is not in the registry' in wrong[0]['message']
    small = run_sweep([parse_target('soft-tiny')], [(16, 16), (64, 64)], options)
    assert [row['status'] for row in small] == ['error', 'ok']


def test_worker_runs_from_any_directory_and_imports_what_a_target_needs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Hides the package if the worker were started here.
    Path('benchmarks').mkdir()
    Path('benchmarks/__init__.py').write_text('')
    Path('my_backbone.py').write_text(
        'import torch.nn as nn\n'
        'from mmengine.registry import MODELS\n'
        '@MODELS.register_module()\n'
        'class MyBackbone(nn.Conv2d):\n'
        '    def __init__(self):\n'
        '        super().__init__(3, 8, 3)\n'
    )
    target = Target('mine', 'backbone', dict(type='MyBackbone'), imports=('my_backbone',))
    (row,) = run_sweep([target], [(34, 34)], SweepOptions(repeats=2, memory=False))
    assert row['status'] == 'ok', row
    assert row['multiply_adds'] == 32 * 32 * 3 * 3 * 3 * 8


def test_ablations_are_measured():
    target, peer = (parse_target(f'soft-tiny@{ablation}') for ablation in ('held-kernel', 'layers-apart'))
    (row,) = run_sweep([target], [(64, 64)], SweepOptions(repeats=2, memory=False), peer)
    assert row['status'] == 'ok' and 'ratio' in row, row


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
    with pytest.raises(ValueError, match=f"device.*'{device}'"):
        run_sweep([], [], SweepOptions(device=device))


def test_report_says_what_failed():
    rows = [dict(name='a', size=[64, 64], tokens=256, status='out of memory')]
    report = sweep_report(rows, SweepOptions())
    assert report['exponents'] == {'a': dict(seconds=None, bytes=None, multiply_adds=None)}
    assert report['machine']['threads'] > 0


def test_status_has_a_column_of_its_own():
    seconds = dict(median=0.002, low=0.001, high=0.003)
    ok = dict(status='ok', seconds=seconds, bytes=3 * 2**20, multiply_adds=5e9, ratio=seconds, memory_ratio=0.5)
    # The last one was measured before its memory was.
    changes = (ok, dict(status='out of memory'), dict(status='error', message='a reason', seconds=seconds))
    rows = [dict(name='a', size=[64, 64], tokens=256, **change) for change in changes]
    console = Console(record=True, width=200, file=io.StringIO())
    print_report(sweep_report(rows, SweepOptions()), console)
    text = console.export_text()
    cells = [[cell.strip() for cell in line.split('│')[1:-1]] for line in text.splitlines() if line.startswith('│ a ')]
    assert cells[0] == ['a', '64x64', '256', '2.0', '1.0-3.0', '3', '5.00', '0.002 (0.001-0.003)', '0.500', 'ok']
    assert cells[1] == ['a', '64x64', '256', *[''] * 6, 'out of memory']
    assert cells[2] == ['a', '64x64', '256', '2.0', '1.0-3.0', *[''] * 4, 'error']
    assert 'a at 64x64: a reason' in text
