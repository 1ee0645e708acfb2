"""The demo as a process, with trainings that take seconds: signals, a second demo, changed data."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from projects.common.locks import folder_lock

STEPS, INTERVAL = 24, 4
TASKS = ('classification', 'detection', 'segmentation')
# The trainings are replaced by small ones, and the drawing of predictions by a pause. All else is the demo's.
PROGRAM = """
import sys
import time
from pathlib import Path

from projects.common.training import Task
from projects.photo_digits import demo


def draw(config, checkpoint, file):
    time.sleep(0.5)
    Path(file).write_bytes(b'')
    return []


def no_picture(*arguments):
    return None


if __name__ == '__main__':
    demo.NUM_VAL = dict(num_crops=int(sys.argv.pop()), num_scenes=2)
    names = 'classification', 'detection', 'segmentation'
    demo.TASKS = tuple(Task(name, Path(f'{name}.py').resolve(), {'score': ('score', 1)}) for name in names)
    demo.draw_predictions = draw
    demo.draw_attention_rows = no_picture
    demo._export = demo._versions = lambda *_: {}
    demo.main()
"""
MODULE = """
import os
import time

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS


@DATASETS.register_module()
class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        # More than a pipe holds, as the masks of a scene may be, so a data process waits until a sample is taken.
        return dict(inputs=torch.linspace(index, 1, 4), filler=np.zeros(100_000))


@MODELS.register_module()
class SlowModel(BaseModel):
    def __init__(self, name, backbone=None):
        super().__init__()
        self.name, self.layer, self.count = name, torch.nn.Linear(4, 1), 0

    def forward(self, inputs, filler, mode='tensor'):
        inputs = torch.stack(inputs)
        if mode != 'loss':
            return [self.layer(inputs)]
        time.sleep(0.05)
        with open('steps.txt', 'a') as file:
            file.write(f'{self.name}\\n')
        self.count += 1
        # A test lets a training wait at a step of this process.
        while os.path.isfile('hold') and open('hold').read() == f'{self.name} {self.count}':
            time.sleep(0.05)
        return dict(loss=self.layer(inputs).square().mean())


@METRICS.register_module()
class Score(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(float(data_samples[0].mean()))

    def compute_metrics(self, results):
        return dict(score=sum(results) / len(results))
"""
CONFIG = """
custom_imports = dict(imports=['slow_model'])
data_root = 'data/photo_digits_demo/'
crop_options = dict(size=32)
scene_options = dict(size=64)
loader = dict(
    dataset=dict(type='Numbers'),
    batch_size=2,
    num_workers=1,
    collate_fn=dict(type='pseudo_collate'),
)
model = dict(type='SlowModel', name={name!r}, backbone=dict())
train_dataloader = dict(loader, sampler=dict(type='InfiniteSampler', shuffle=False))
val_dataloader = test_dataloader = dict(loader, sampler=dict(type='DefaultSampler', shuffle=False))
val_evaluator = test_evaluator = dict(type='Score')
train_cfg = dict(type='IterBasedTrainLoop', max_iters={steps}, val_interval={steps})
val_cfg, test_cfg = dict(), dict()
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.001, momentum=0.9))
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval={interval}, max_keep_ckpts=2),
)
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
"""


@pytest.fixture
def start(tmp_path, environment):
    """Start the small demo in a folder. A process that is left at the end of a test is killed."""
    started = []

    def run(folder='one', crops=4, hold=''):
        folder = tmp_path / folder
        folder.mkdir(exist_ok=True)
        (folder / 'hold').write_text(hold)
        (folder / 'program.py').write_text(PROGRAM)
        (folder / 'slow_model.py').write_text(MODULE)
        for name in TASKS:
            (folder / f'{name}.py').write_text(CONFIG.format(name=name, steps=STEPS, interval=INTERVAL))
        with open(folder / 'output.txt', 'w') as output:
            command = [sys.executable, 'program.py', str(crops)]
            started.append(
                subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
            )
        return folder, started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, 'it did not happen in time'
        time.sleep(0.05)


def steps(folder):
    file = folder / 'steps.txt'
    return file.read_text().split() if file.is_file() else []


def output(folder):
    return (folder / 'output.txt').read_text()


def processes_in(folder):
    """Return the ids of the processes whose current folder is ``folder``."""
    found = []
    for path in Path('/proc').glob('[0-9]*'):
        try:
            if os.readlink(path / 'cwd') == str(folder) and (path / 'cmdline').read_bytes():
                found.append(int(path.name))
        except OSError:
            # The process has ended, or belongs to someone else.
            continue
    return found


def wait_until_ended(folder):
    """Wait for the data processes of a training that was killed, which end soon after it."""
    wait_for(lambda: not processes_in(folder), 20)


def assert_interrupted(folder, process):
    assert process.wait(timeout=60) == 1
    assert output(folder).splitlines()[-1].startswith('interrupted; run the same command again to resume')
    wait_until_ended(folder)


def weights(folder):
    files = [folder / f'work_dirs/demo/{task}/iter_{STEPS}.pth' for task in TASKS]
    return [torch.load(file, weights_only=False)['state_dict'] for file in files]


def assert_finished(folder, process, interruptions):
    """Check that a demo ended, and repeated only the steps since the last checkpoint before each interruption."""
    assert process.wait(timeout=300) == 0, output(folder)
    assert (folder / 'work_dirs/demo/summary.json').is_file()
    # The step that is being taken may be written down twice.
    assert len(TASKS) * STEPS <= len(steps(folder)) <= len(TASKS) * STEPS + interruptions * (INTERVAL + 1)


def assert_same_weights(found, expected):
    for one, other in zip(weights(found), weights(expected), strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.long
def test_signals_and_a_second_demo(start, environment):
    """SIGTERM in the first training, SIGINT in the second. A second demo is refused while the first trains."""
    held = INTERVAL + 3
    folder, demo = start(hold=f'classification {held}')
    wait_for(lambda: len(steps(folder)) == held)
    command = [sys.executable, 'program.py', '4']
    second = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert second.returncode == 1 and second.stdout == ''
    assert second.stderr == (
        f'process {demo.pid} already works in work_dirs/demo: wait until it has ended, or end it\n'
    )
    demo.send_signal(signal.SIGTERM)
    assert_interrupted(folder, demo)
    assert len(steps(folder)) == held
    _, demo = start(hold=f'detection {held}')
    wait_for(lambda: steps(folder).count('detection') == held)
    demo.send_signal(signal.SIGINT)
    assert_interrupted(folder, demo)
    _, demo = start()
    assert_finished(folder, demo, interruptions=2)
    assert 'classification: already finished' in output(folder)
    # Each training went on from the checkpoint before its interruption.
    repeated = held - INTERVAL
    assert [steps(folder).count(task) for task in TASKS] == [STEPS + repeated, STEPS + repeated, STEPS]


def test_killed_demo_leaves_no_lock_but_its_training_does(start):
    folder, demo = start(hold='classification 3')
    wait_for(lambda: len(steps(folder)) == 3)
    demo.kill()
    demo.wait()
    (training,) = [pid for pid in processes_in(folder) if b'train.py' in Path(f'/proc/{pid}/cmdline').read_bytes()][:1]
    with pytest.raises(RuntimeError, match='a process that an earlier job started still works in'):
        with folder_lock(folder / 'work_dirs/demo', patience=0):
            pass
    os.kill(training, signal.SIGKILL)
    wait_until_ended(folder)
    with folder_lock(folder / 'work_dirs/demo', patience=60):
        pass


@pytest.mark.long
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signals_at_random_moments(start, number):
    """Interrupted at any moment, the demo ends with the weights of one that was not interrupted."""
    begin = time.monotonic()
    whole, demo = start('whole')
    assert_finished(whole, demo, interruptions=0)
    duration, draw, interruptions = time.monotonic() - begin, random.Random(number), 6
    for _ in range(interruptions):
        folder, demo = start('parts')
        try:
            demo.wait(timeout=draw.uniform(0.05, 0.7) * duration)
        except subprocess.TimeoutExpired:
            demo.send_signal(number)
            # Before the demo has set its own handlers, it ends as any program.
            assert demo.wait(timeout=60) in (1, -number)
            wait_until_ended(folder)
    folder, demo = start('parts')
    assert_finished(folder, demo, interruptions)
    assert_same_weights(folder, whole)


@pytest.mark.long
def test_changed_data_and_config_start_again(start):
    folder, demo = start()
    assert_finished(folder, demo, interruptions=0)
    _, demo = start(crops=6)
    wait_for(lambda: 'the training starts again' in ' '.join(output(folder).split()).lower())
    text = ' '.join(output(folder).split())
    assert 'was incomplete or had other options, so it has been written again' in text
    assert 'classification: config, weights or data have changed' in text
    demo.send_signal(signal.SIGTERM)
    assert_interrupted(folder, demo)
    assert (folder / f'work_dirs/demo/detection/iter_{STEPS}.pth').is_file()
