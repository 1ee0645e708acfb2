"""Token sweeps: time, peak memory and multiply-adds of targets against the input size."""

import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from soft_mm.utils import check_device

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class SweepOptions:
    """Settings of a sweep. A point is one target at one size.

    Attributes:
        train: Whether to run forward and backward, instead of forward only.
        batch_size: Number of images or sequences.
        device: ``'cpu'``, ``'cuda'`` or ``'cuda:i'``.
        repeats: Number of measurements of a point.
        seconds: Time in seconds after which no further repeat of a point starts. At least three repeats are made.
        time_limit: Time in seconds after which the measurement of a point is stopped.
        max_memory: Memory limit of a measurement on the CPU in GiB. None means three quarters of the available memory.
        memory: Whether to measure peak memory.
        heads: Number of heads of an operator.
        head_dims: Channels per head of an operator.
    """

    train: bool = False
    batch_size: int = 1
    device: str = 'cpu'
    repeats: int = 7
    seconds: float = 30.0
    time_limit: float = 300.0
    max_memory: float | None = None
    memory: bool = True
    heads: int = 2
    head_dims: int = 32


def run_sweep(targets, sizes, options, peer=None, console=None):
    """Measure every target at every size, each in a separate process.

    The status of a row says whether its measurement failed, ran out of memory or exceeded the time limit. If memory or
    time is exceeded, larger sizes of the same target are not tried. If only the peer fails, the row has no ratio.

    Args:
        targets (list[Target]): Targets to measure.
        sizes (list[tuple[int, int]]): Heights and widths in pixels, or ``(1, n)`` for sequences. They are measured from
            small to large.
        options (SweepOptions): Settings.
        peer (Target | None): Target with which the others are compared. Each target and the peer are measured
            alternately in one process. Defaults to None.
        console (Console | None): Console for the progress bar. Defaults to a new one.

    Returns:
        list[dict]: One row per target and size: ``name``, ``size``, ``tokens`` (of stage 1, or of the sequence),
            ``status`` (``'ok'``, ``'out of memory'``, ``'over the time limit'``, ``'not tried'``, or ``'error'`` with a
            ``message``), and where known ``seconds`` and ``ratio`` (each a dict with ``median`` and the quartiles
            ``low`` and ``high``), ``bytes``, ``memory_ratio``, ``multiply_adds``, ``images_per_second`` and
            ``tokens_per_second``.

    Raises:
        ValueError: If the device does not exist.
    """
    check_device(options.device)
    sizes = sorted(sizes, key=math.prod)
    rows = []
    columns = (TextColumn('{task.description}'), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console or Console()) as progress:
        task = progress.add_task('', total=len(targets) * len(sizes))
        for target in targets:
            given_up = False
            for size in sizes:
                progress.update(task, description=escape(f'{target.name} {size[0]}x{size[1]}'))
                row = dict(name=target.name, size=list(size), tokens=target.tokens(size))
                row |= dict(status='not tried') if given_up else _measure_point(target, size, options, peer)
                # After an error, larger sizes are still tried, because the size may only have been too small.
                given_up = row['status'] not in ('ok', 'error')
                rows.append(row)
                progress.advance(task)
    return rows


def _measure_point(target, size, options, peer):
    compared = peer if peer != target else None
    row, deadline = {}, time.monotonic() + options.time_limit

    def ask(what, target=target, peer=None):
        request = dict(asdict(options), what=what, size=size, target=asdict(target), peer=peer and asdict(peer))
        return _ask_worker(request, deadline)

    for what in ['time'] + ['memory'] * options.memory:
        answer = ask(what, peer=compared if what == 'time' else None)
        if compared and what == 'time' and answer['status'] != 'ok':
            # The peer alone may have failed, so the target is measured without it.
            answer = ask(what)
        if answer['status'] != 'ok':
            return row | answer
        row |= answer
        if what == 'time':
            seconds, peer_seconds = row.pop('seconds'), row.pop('peer_seconds', None)
            row['seconds'] = summarise(seconds)
            row['images_per_second'] = options.batch_size / row['seconds']['median']
            row['tokens_per_second'] = row['images_per_second'] * target.tokens(size)
            if peer_seconds:
                row['ratio'] = summarise([own / other for own, other in zip(seconds, peer_seconds)])
        elif compared:
            other = ask(what, target=compared)
            if other['status'] == 'ok' and other['bytes']:
                row['memory_ratio'] = row['bytes'] / other['bytes']
    return row


def _ask_worker(request, deadline):
    """Send a request to a worker process and return its answer."""
    # The worker runs in the repository root, but must still import modules of the current directory.
    paths = [os.getcwd(), *filter(None, [os.environ.get('PYTHONPATH')])]
    try:
        done = subprocess.run(
            [sys.executable, '-m', 'benchmarks.worker'],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=dict(os.environ, PYTHONPATH=os.pathsep.join(paths)),
            timeout=max(deadline - time.monotonic(), 0),
        )
    except subprocess.TimeoutExpired:
        return dict(status='over the time limit')
    if done.returncode == -signal.SIGKILL or (done.returncode and 'bad_alloc' in done.stderr):
        return dict(status='out of memory')
    if done.returncode:
        return dict(status='error', message=(done.stderr.strip().splitlines() or ['no message'])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def summarise(values):
    """Summarise repeated measurements.

    Args:
        values (list[float]): Two or more values.

    Returns:
        dict[str, float]: ``median``, and the quartiles ``low`` and ``high``.
    """
    quartiles = statistics.quantiles(values, n=4, method='inclusive')
    return dict(median=statistics.median(values), low=quartiles[0], high=quartiles[2])


def machine(device):
    """Describe the machine of a measurement.

    Args:
        device (str): Name of the device, such as ``'cpu'``.

    Returns:
        dict: Versions ``python`` and ``torch``, the number of ``threads``, and the name of the ``device``.
    """
    device = torch.device(device)
    return dict(
        python=platform.python_version(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.machine(),
    )
