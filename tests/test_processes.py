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
from test_training_faults import ARCH, FROZEN_BATCHNORM, SGD, relative_difference, toy_runner, train, weights

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


def test_batchnorm_is_not_synchronised_without_gpus(tmp_path, environment):
    """``sync_bn`` of a config, with a BatchNorm that is trained."""
    run_program(PROCESS, tmp_path, tmp_path, json.dumps(dict(sync_bn='torch')), environment=environment, processes=2)
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert "sync_bn='torch' is left out" in log
    assert (tmp_path / 'epoch_1.pth').is_file()


UPERNET = f"""
_base_ = {str(SEGMENTOR)!r}
norm_cfg = dict(type='SyncBN', requires_grad=True)
head = dict(num_classes=11, channels=8, norm_cfg=norm_cfg, loss_decode=dict(type='CrossEntropyLoss'))
dims = {list(ARCH['embed_dims'])}
model = dict(
    backbone=dict(arch=dict({ARCH}, _delete_=True), init_cfg=None),
    neck=None,
    decode_head=dict(head, _delete_=True, type='UPerHead', in_channels=dims, in_index=[0, 1, 2, 3]),
    auxiliary_head=dict(head, type='FCNHead', in_channels=dims[2], in_index=2),
)
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0)
param_scheduler = []
train_cfg = dict(max_iters=1, val_interval=1)
"""


def test_upernet_trains_in_two_processes_without_gpus(workspace, tmp_path):
    """Its heads have ``SyncBN``."""
    (tmp_path / 'upernet.py').write_text(UPERNET)
    done = run_in_processes('dist_train.sh', tmp_path / 'upernet.py', 2, '--work-dir', tmp_path / 'run', cwd=workspace)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert (tmp_path / 'run/iter_1.pth').is_file()


DOUBLE = """
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)


@HOOKS.register_module()
class CountParts(Hook):
    def after_train(self, runner):
        parts = [name for name, _ in runner.model.named_modules() if name.endswith('landmark._fsdp_wrapped_module')]
        print('sharded', len(parts), flush=True)
"""
SHARDED = """
_base_ = 'one.py'
runner_type = 'FlexibleRunner'
env_cfg = dict(dist_cfg=dict(backend='nccl'))
strategy = dict(
    type='FSDPStrategy',
    # Without a GPU, weights that are moved to the CPU would be those in use.
    state_dict_cfg=dict(
        state_dict_type='FULL_STATE_DICT',
        state_dict_config=dict(type='FullStateDictConfig', offload_to_cpu=False),
        optim_state_dict_config=dict(type='FullOptimStateDictConfig', offload_to_cpu=False),
    ),
    model_wrapper=dict(
        use_orig_params=True,
        device_id='cpu',
        # Small parts, so that convolutions within a block have weights of their own to gather.
        auto_wrap_policy=dict(type='torch.distributed.fsdp.wrap.size_based_auto_wrap_policy', min_num_params=200),
    ),
)
train_dataloader = dict(batch_size=1)
custom_hooks = [dict(type='CountParts')]
load_from = 'start.pth'
"""


def test_sharded_training_equals_one_process(tmp_path, float64):
    """FSDP by mmengine's ``FlexibleRunner`` and the tools: its weights, and evaluations with and without it."""
    one = tmp_path / 'one'
    options = {'optim_wrapper.type': 'OptimWrapper', 'optim_wrapper.optimizer': SGD, **FROZEN_BATCHNORM}
    cfg = toy_runner(one, 1, **options).cfg
    start = train(one, 1, **options)
    torch.save(dict(meta={}, state_dict=start), tmp_path / 'start.pth')
    for part in ('dataloader', 'cfg', 'evaluator'):
        cfg[f'test_{part}'] = cfg[f'val_{part}']
    cfg.custom_imports = dict(imports=['double', 'test_training_faults'], allow_failed_imports=False)
    cfg.dump(tmp_path / 'one.py')
    (tmp_path / 'double.py').write_text(DOUBLE)
    (tmp_path / 'two.py').write_text(SHARDED)
    done = run_in_processes('dist_train.sh', 'two.py', 2, '--work-dir', 'two', cwd=tmp_path)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    assert 'Load checkpoint from start.pth' in output and 'sharded 2' in output
    assert 'got no gradient' not in output
    found = tmp_path / 'two/epoch_1.pth'
    assert relative_difference(found, one / 'epoch_1.pth', start) <= 1e-10
    done = tool('test.py', 'one.py', found, '--json', 'one.json', cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    done = run_in_processes('dist_test.sh', 'two.py', found, 2, '--json', 'two.json', cwd=tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    scores = [json.loads((tmp_path / name).read_text())['score'] for name in ('one.json', 'two.json')]
    assert scores == pytest.approx([last_metrics(one)['score']] * 2, rel=1e-9)


# Nothing random, and no BatchNorm that is trained: it would see other images in each process.
SAME_STEPS = {
    # With class weights, mmsegmentation divides a loss by their sum over the pixels of the batch.
    SEGMENTOR: "decode_head=dict(norm_cfg=dict(_delete_=True, type='GN', num_groups=8), "
    'loss_decode=dict(class_weight=None))',
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
    for name, tolerance in (('accumulated', 1e-6), ('joint', 0.1 if config == DETECTOR else 5e-6)):
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
