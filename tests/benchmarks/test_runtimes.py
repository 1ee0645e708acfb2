"""``python -m benchmarks.runtimes``: rows for backbones and trained models, and what it refuses."""

import json
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
from authors import REDUCED_ARCH
from digits_workspace import CLASSIFIER
from rich.console import Console

from benchmarks.runtime_worker import to_onnx
from benchmarks.runtimes import measure_runtime, runtime_tables
from benchmarks.targets import Target
from soft_mm import SOFT
from soft_mm.onnx_model import attention_nodes

SETTINGS = dict(images=None, calibration=2, repeats=2, seconds=1)
REDUCED = Target('reduced', 'backbone', dict(type='soft_mm.SOFT', arch=REDUCED_ARCH))


def measure(runtime):
    return measure_runtime('reduced', dict(SETTINGS, target=asdict(REDUCED), runtime=runtime, shape=(1, 64, 64)))


@pytest.fixture
def run_program(environment, workspace):
    def run(*arguments):
        command = [sys.executable, '-m', 'benchmarks.runtimes', *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=workspace)

    return run


def check_row(row, difference, has_file):
    assert 0 < row['ratio']['low'] <= row['ratio']['median'] <= row['ratio']['high'], row
    assert difference[0] <= row['difference'] <= difference[1], row
    assert bool(row['file_bytes']) == has_file and row['bytes'] >= 0 and row['metric'] is None, row


@pytest.mark.parametrize(
    ('runtime', 'difference'),
    [
        ('eager', (0, 0)),
        ('dynamic-int8', (1e-3, 0.5)),
        ('bfloat16', (1e-4, 0.2)),
        pytest.param('compile', (0, 1e-4), marks=pytest.mark.long),
    ],
)
def test_runtimes_of_pytorch(runtime, difference):
    check_row(measure(runtime), difference, has_file=False)


@pytest.mark.parametrize(('runtime', 'difference'), [('onnxruntime', (0, 1e-4)), ('onnxruntime-int8', (1e-4, 0.5))])
def test_runtimes_of_a_file(runtime, difference):
    pytest.importorskip('onnxruntime', reason='requirements/openmmlab.txt has no onnxruntime')
    check_row(measure(runtime), difference, has_file=True)


@pytest.mark.parametrize('attention', ['SoftmaxFreeAttention', 'SoftmaxAttention'])
def test_products_of_the_attention_are_found(tmp_path, attention):
    """The products of softmax-free attention stay out of int8. MLPs and last projections do not."""
    onnx = pytest.importorskip('onnx', reason='requirements/openmmlab.txt has no onnx')
    model = SOFT(REDUCED_ARCH, attention=dict(type=attention), out_indices=(0,)).eval()
    file = to_onnx(model, np.zeros((1, 3, 64, 64), np.float32), tmp_path)
    found = attention_nodes(file)
    products = [node for node in onnx.load(file).graph.node if node.op_type == 'MatMul']
    inside = [node for node in products if node.name in found]
    # Twenty iterations of two products, in each block of stage 1.
    count = REDUCED_ARCH['depths'][0]
    assert len(inside) > 40 * count if attention == 'SoftmaxFreeAttention' else not found
    # The last projection and two layers of the MLP.
    assert len(products) - len(inside) == 3 * count or attention == 'SoftmaxAttention'


def test_file_without_names_of_modules_is_refused(tmp_path):
    onnx = pytest.importorskip('onnx', reason='requirements/openmmlab.txt has no onnx')
    value = onnx.helper.make_tensor_value_info('x', onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node('Relu', ['x'], ['y'])], 'g', [value], [value])
    onnx.save(onnx.helper.make_model(graph), tmp_path / 'plain.onnx')
    with pytest.raises(ValueError, match=r'plain.onnx does not name the modules of its nodes: export it with'):
        attention_nodes(tmp_path / 'plain.onnx')


def test_failures_have_their_own_table():
    rows = [measure('eager'), dict(target='reduced', runtime='openvino', shape=[1, 64, 64], error='No module [x]')]
    for table in runtime_tables(rows):
        Console(width=150).print(table)
    assert [table.row_count for table in runtime_tables(rows)] == [1, 1]
    assert [column.header for column in runtime_tables(rows[1:])[0].columns] == ['target', 'input', 'runtime', 'error']


def test_trained_model_is_evaluated(run_program, workspace, classifier):
    pytest.importorskip('onnxruntime', reason='requirements/openmmlab.txt has no onnxruntime')
    done = run_program(
        *(
            '--model',
            CLASSIFIER,
            classifier,
            '--metric',
            'accuracy/top1',
            '--images',
            'data/photo_digits_demo/val/crops/0',
        ),
        *('--inputs', '1x64x64', '--runtimes', 'eager', 'onnxruntime', '--repeats', 3, '--json', 'rows.json'),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    eager, onnx = json.loads((workspace / 'rows.json').read_text())['rows']
    assert eager['metric'] == onnx['metric'] and onnx['difference'] < 1e-4
    assert CLASSIFIER.stem in done.stdout and f'{onnx["metric"]:.4f}' in done.stdout


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--inputs', '1x64x64'], 'expected backbones, or --model CONFIG CHECKPOINT'),
        (['soft-tiny', '--model', 'a.py', 'a.pth', '--inputs', '1x64x64'], 'expected backbones, or --model'),
        (['soft-tiny', '--metric', 'mIoU', '--inputs', '1x64x64'], '--metric needs --model'),
        (['soft-tony', '--inputs', '1x64x64'], "'soft-tony': unknown target"),
        (['soft-tiny', '--inputs', '64x64'], "'64x64': expected IMAGESxHEIGHTxWIDTH"),
        (['soft-tiny', '--inputs', '1x64x64', '--runtimes', 'tvm'], "invalid choice: 'tvm'"),
    ],
)
def test_what_the_program_refuses(run_program, arguments, message):
    done = run_program(*arguments)
    assert done.returncode == 2 and message in done.stderr and 'Traceback' not in done.stderr
