"""Trainings in two processes, compiled trainings, and memory of long ones. ``make test-long`` runs them."""

import json
import statistics
import subprocess
import sys

import pytest
import torch
import torch._dynamo
from digits_workspace import DETECTOR, ROOT, SEGMENTOR
from programs import run_in_processes, tool
from test_training_faults import FROZEN_BATCHNORM, SGD, relative_difference, toy_runner, train, weights

from soft_mm.inference import read_whole_model

pytestmark = pytest.mark.long


def run_program(program, folder, *arguments, environment, processes=None):
    """Run a Python program that imports the tests' modules, in one or several processes."""
    file = folder / 'program.py'
    file.write_text(f'import sys\nsys.path[:0] = {[str(ROOT), str(ROOT / "tests")]!r}\n{program}')
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}'] if processes else []
    command = [sys.executable, *launcher, str(file), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def last_metrics(folder):
    """Read the metrics of the last evaluation of a training."""
    log = max(folder.glob('*/vis_data/scalars.json')).read_text().splitlines()
    return json.loads(log[-1])


PROCESS = """
import json
import torch
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
from test_training_faults import toy_runner
toy_runner(sys.argv[1], 1, launcher='pytorch', **json.loads(sys.argv[2])).train()
"""


@pytest.mark.parametrize(
    'changes',
    [
        {},
        {'model.with_cp': True},
        {'model.with_cp': True, 'model_wrapper_cfg.static_graph': True},
        *({'model.out_indices': [index]} for index in range(4)),
        {'model.out_indices': [1, 2], 'model.frozen_stages': 1},
        {'model.attention': dict(normalized=True, solver='cholesky', max_landmarks=4)},
        {'model.attention': dict(type='PerformerAttention', redraw_interval=1)},
    ],
    ids=str,
)
def test_two_processes_equal_one_on_the_joint_batch(tmp_path, environment, float64, changes):
    """The weights after four steps, and an evaluation of seven images, which two processes do not divide."""
    changes = {'optim_wrapper.optimizer': SGD, 'val_dataloader.dataset.length': 7, **FROZEN_BATCHNORM, **changes}
    one = {key: value for key, value in changes.items() if not key.startswith('model_wrapper_cfg')}
    start = train(tmp_path / 'one', 1, **one)
    changes['train_dataloader.batch_size'] = 1
    run_program(PROCESS, tmp_path, tmp_path / 'two', json.dumps(changes), environment=environment, processes=2)
    difference = relative_difference(tmp_path / 'two/epoch_1.pth', tmp_path / 'one/epoch_1.pth', start)
    assert difference <= 1e-10
    one, two = (last_metrics(tmp_path / name) for name in ('one', 'two'))
    assert one['images'] == two['images'] == 7
    assert two['score'] == pytest.approx(one['score'], rel=1e-9)


SHARDED = """
import torch
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
from test_training_faults import FROZEN_BATCHNORM, SGD, toy_runner

# Without a GPU, weights that are moved to the CPU would be those in use.
full = {part: dict(type=kind, offload_to_cpu=False) for part, kind in (
    ('state_dict_config', 'FullStateDictConfig'), ('optim_state_dict_config', 'FullOptimStateDictConfig'))}
# Small parts, so that convolutions within a block have weights of their own to gather.
policy = dict(type='torch.distributed.fsdp.wrap.size_based_auto_wrap_policy', min_num_params=200)
strategy = dict(
    type='FSDPStrategy',
    state_dict_cfg=dict(state_dict_type='FULL_STATE_DICT', **full),
    model_wrapper=dict(use_orig_params=True, device_id=torch.device('cpu'), auto_wrap_policy=policy),
)
options = {'train_dataloader.batch_size': 1, 'optim_wrapper.type': 'OptimWrapper', 'optim_wrapper.optimizer': SGD}
runner = toy_runner(
    sys.argv[1], 1, launcher='pytorch', runner_type='FlexibleRunner', strategy=strategy,
    env_cfg=dict(dist_cfg=dict(backend='gloo')), **options, **FROZEN_BATCHNORM)
runner.train()
parts = [name for name, _ in runner.model.named_modules() if name.endswith('landmark._fsdp_wrapped_module')]
print('sharded', len(parts), flush=True)
"""


def test_sharded_training_equals_one_process(tmp_path, environment, float64):
    """FSDP by mmengine's ``FlexibleRunner``: its weights, its evaluation, and its checkpoint in an ordinary runner."""
    one = tmp_path / 'one'
    start = train(one, 1, **{'optim_wrapper.optimizer': SGD}, **FROZEN_BATCHNORM)
    output = run_program(SHARDED, tmp_path, tmp_path / 'two', environment=environment, processes=2)
    assert 'sharded 2' in output
    checkpoint = tmp_path / 'two/epoch_1.pth'
    assert relative_difference(checkpoint, one / 'epoch_1.pth', start) <= 1e-10
    assert last_metrics(tmp_path / 'two')['score'] == pytest.approx(last_metrics(one)['score'], rel=1e-9)
    path, _ = read_whole_model(str(checkpoint))
    runner = toy_runner(tmp_path / 'three', 1, load_from=path)
    assert runner.val()['score'] == pytest.approx(last_metrics(one)['score'], rel=1e-9)


# Nothing random, and no BatchNorm that is trained: it would see other images in each process.
SAME_STEPS = {
    SEGMENTOR: "decode_head=dict(norm_cfg=dict(_delete_=True, type='GN', num_groups=8))",
    # Samplers that take every proposal.
    DETECTOR: 'train_cfg=dict(rpn=dict(sampler=dict(num=10**6)), rcnn=dict(sampler=dict(num=10**6)))',
}


def same_steps(config, batch_size, iterations, accumulated=1):
    """Write a config whose steps do not depend on the number of processes."""
    return f"""
_base_ = {str(config)!r}
model = dict(backbone=dict(norm_eval=True, drop_path_rate=0.0, init_cfg=None), {SAME_STEPS[config]})
train_dataloader = dict(
    batch_size={batch_size}, num_workers=0, persistent_workers=False, sampler=dict(shuffle=False)
)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='SGD', lr=0.01, weight_decay=0.05), accumulative_counts={accumulated}
)
param_scheduler = []
train_cfg = dict(max_iters={iterations}, val_interval={iterations})
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=-1))
val_dataloader = dict(num_workers=0)
test_dataloader = dict(num_workers=0)
"""


@pytest.mark.parametrize('config', SAME_STEPS, ids=lambda path: path.stem)
def test_dense_models_train_in_two_processes_as_in_one(workspace, tmp_path, config):
    """Against one process that accumulates the gradients of single images, and one with the joint batch.

    The losses of mmdet divide by numbers of boxes, which differ between a joint batch and single images.
    """
    iterations = 4
    runs = dict(two=(1, iterations, 1), joint=(2, iterations, 1), accumulated=(1, 2 * iterations, 2))
    for name, (batch_size, count, accumulated) in runs.items():
        file = tmp_path / f'{name}.py'
        file.write_text(same_steps(config, batch_size, count, accumulated))
        arguments = ('--work-dir', tmp_path / name)
        if name == 'two':
            done = run_in_processes('dist_train.sh', file, 2, *arguments, cwd=workspace)
        else:
            done = tool('train.py', file, *arguments, cwd=workspace)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    found, start = tmp_path / f'two/iter_{iterations}.pth', weights(tmp_path / 'two/iter_1.pth')
    for name, tolerance in (('accumulated', 1e-6), ('joint', 0.1)):
        difference = relative_difference(tmp_path / name / f'iter_{runs[name][1]}.pth', found, start)
        assert difference <= tolerance
    if config == DETECTOR:
        # Its average precision is 0 after four steps, in any number of processes.
        return
    # Three images, which two processes do not divide.
    done = run_in_processes(
        'dist_test.sh', tmp_path / 'two.py', found, 2, '--json', tmp_path / 'two.json', cwd=workspace
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    done = tool('test.py', tmp_path / 'two.py', found, '--json', tmp_path / 'one.json', cwd=workspace)
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = (json.loads((tmp_path / f'{name}.json').read_text()) for name in ('one', 'two'))
    assert one == two and one['aAcc'] > 0


def test_compiled_training_equals_eager(tmp_path):
    """``compile=True`` in a config. In double precision, PyTorch 2.8 cannot compile stage 4's attention."""
    torch._dynamo.utils.counters.clear()
    for name, changes in (('eager', {}), ('compiled', dict(compile=True))):
        options = {'optim_wrapper.optimizer': SGD, **FROZEN_BATCHNORM, **changes}
        start = train(tmp_path / name, 1, **options)
    difference = relative_difference(tmp_path / 'compiled/epoch_1.pth', tmp_path / 'eager/epoch_1.pth', start)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] > 0
    assert difference <= 1e-4


MEMORY = """
import torch
torch.set_num_threads(1)
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from pathlib import Path
from test_training_faults import toy_runner

@HOOKS.register_module()
class Resident(Hook):
    def after_train_iter(self, runner, *args, **kwargs):
        if runner.iter % 50 == 49:
            pages = int(Path('/proc/self/statm').read_text().split()[1])
            print('resident', runner.iter + 1, pages * 4096, flush=True)

options = {'train_dataloader.dataset.length': 2000, 'val_dataloader.dataset.length': 3}
toy_runner(sys.argv[1], 1, custom_hooks=[dict(type='Resident')], **options).train()
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_is_flat_over_a_thousand_iterations(tmp_path, environment):
    """The resident memory grows by less than 2 kB per iteration: a kept output of the backbone would be more."""
    output = run_program(MEMORY, tmp_path, tmp_path / 'run', environment=environment)
    lines = [line.split() for line in output.splitlines() if line.startswith('resident ')]
    points = [(int(iteration), int(size)) for _, iteration, size in lines if int(iteration) > 200]
    assert points[-1][0] == 1000
    slope = statistics.linear_regression(*zip(*points)).slope
    print(f'{slope:.0f} bytes per iteration')
    assert slope < 2000
