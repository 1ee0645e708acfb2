"""Token sweeps: time, peak memory and multiply-adds of attention operators and backbones against the input size."""

import csv
import json
import math
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
from rich.table import Table

from .measure import summarise


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep measures.

    Attributes:
        train: forward and backward, instead of forward alone.
        batch_size: images.
        device: ``'cpu'``, ``'cuda'`` or ``'cuda:i'``.
        repeats: measurements of time at a point.
        seconds: the repeats at a point end after so many seconds; three are always made.
        time_limit: seconds after which a point is given up.
        max_memory: GiB that a measurement on the CPU may use, or None for three quarters of what is available.
        memory: whether peak memory is measured.
        heads: of an operator.
        head_dims: channels of each.
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


def check_device(name):
    """Raise a ``ValueError`` that says what there is, if a device does not exist."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ('cpu', 'cuda'):
        raise ValueError(f'device {name!r} is unknown; choose cpu, cuda or cuda:i')
    if device.type == 'cuda':
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(f'device {name!r}: PyTorch sees {count} CUDA devices here; choose another or cpu')


def run_sweep(contenders, sizes, options, peer=None, console=None):
    """Measure every contender at every size, each measurement in a process of its own.

    A point that fails, runs out of memory or of time is a row that says so; after the latter two, larger sizes of that
    contender are not tried. Where only the peer fails, the row has no ratio.

    Args:
        contenders (list[Contender]): what to measure.
        sizes (list[tuple[int, int]]): heights and widths in pixels, measured by rising number of pixels; 1 and the
            tokens for an encoder of sequences.
        options (SweepOptions): how.
        peer (Contender | None): what each contender's time is compared with, measured in turns with it in one process.
        console (Console | None): where progress is shown. Defaults to a new one.

    Returns:
        list[dict]: one row a contender and size: ``name``, ``size``, ``tokens`` (of stage 1, or of the
            sequence), ``status`` (``'ok'``, ``'out of memory'``, ``'over the time limit'``, ``'not tried'`` or
            ``'error'`` with its ``message``), and where known ``seconds`` and ``ratio`` (``median``, ``low`` and
            ``high`` quartiles each), ``bytes``, ``memory_ratio``, ``multiply_adds``, ``images_per_second``,
            ``tokens_per_second``.

    Raises:
        ValueError: for a device that does not exist.
    """
    check_device(options.device)
    sizes = sorted(sizes, key=math.prod)
    rows = []
    columns = (TextColumn('{task.description}'), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console or Console()) as progress:
        task = progress.add_task('', total=len(contenders) * len(sizes))
        for contender in contenders:
            given_up = False
            for size in sizes:
                progress.update(task, description=escape(f'{contender.name} {size[0]}x{size[1]}'))
                row = dict(name=contender.name, size=list(size), tokens=contender.tokens(size))
                row |= dict(status='not tried') if given_up else _measure_point(contender, size, options, peer)
                # An error may be that of a size too small.
                given_up = row['status'] not in ('ok', 'error')
                rows.append(row)
                progress.advance(task)
    return rows


def _measure_point(contender, size, options, peer):
    request = asdict(options) | dict(size=size)
    request['max_bytes'] = int((options.max_memory or _available_gib() * 0.75) * 2**30)
    row, deadline = {}, time.monotonic() + options.time_limit

    def ask(what, peer=None, contender=contender):
        return _ask(dict(request, what=what, contender=asdict(contender), peer=peer and asdict(peer)), deadline)

    for what in ['time'] + ['memory'] * options.memory:
        compared = peer if peer != contender else None
        answer = ask(what, compared if what == 'time' else None)
        if compared and what == 'time' and answer['status'] != 'ok':
            # It may be the peer that failed.
            answer = ask(what)
        if answer['status'] != 'ok':
            return row | answer
        row |= answer
        if what == 'time':
            seconds, peer_seconds = row.pop('seconds'), row.pop('peer_seconds', None)
            row['seconds'] = summarise(seconds)
            row['images_per_second'] = options.batch_size / row['seconds']['median']
            row['tokens_per_second'] = row['images_per_second'] * contender.tokens(size)
            if peer_seconds:
                row['ratio'] = summarise([mine / theirs for mine, theirs in zip(seconds, peer_seconds)])
        elif compared:
            other = ask(what, contender=compared)
            if other['status'] == 'ok' and other['bytes']:
                row['memory_ratio'] = row['bytes'] / other['bytes']
    return row


def _ask(request, deadline):
    """Send a request to a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, '-m', 'soft_mm.analysis.measure'],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=max(deadline - time.monotonic(), 0),
        )
    except subprocess.TimeoutExpired:
        return dict(status='over the time limit')
    if done.returncode == -signal.SIGKILL or (done.returncode and 'bad_alloc' in done.stderr):
        return dict(status='out of memory')
    if done.returncode:
        return dict(status='error', message=(done.stderr.strip().splitlines() or ['no message'])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def _available_gib():
    for line in Path('/proc/meminfo').read_text().splitlines():
        if line.startswith('MemAvailable:'):
            return int(line.split()[1]) / 2**20
    raise RuntimeError('/proc/meminfo has no MemAvailable; give max_memory')


def growth_exponents(rows):
    """Least-squares slopes of log time, log memory and log multiply-adds against log tokens.

    Args:
        rows (list[dict]): of :func:`run_sweep`.

    Returns:
        dict[str, dict]: per contender ``seconds``, ``bytes`` and ``multiply_adds``, each a slope, or None for fewer
            than two points.
    """
    result = {}
    for name in dict.fromkeys(row['name'] for row in rows):
        mine = [row for row in rows if row['name'] == name and row['status'] == 'ok']
        times = [(row['tokens'], row['seconds']['median']) for row in mine]
        sizes = [(row['tokens'], row['bytes']) for row in mine if row.get('bytes')]
        counts = [(row['tokens'], row['multiply_adds']) for row in mine if row.get('multiply_adds')]
        result[name] = dict(seconds=_slope(times), bytes=_slope(sizes), multiply_adds=_slope(counts))
    return result


def _slope(points):
    if len({tokens for tokens, _ in points}) < 2:
        return None
    return statistics.linear_regression(*([math.log(value) for value in axis] for axis in zip(*points))).slope


def machine(device):
    """What a measurement was made on: versions, threads and the device, a name such as ``'cpu'``."""
    device = torch.device(device)
    return dict(
        python=platform.python_version(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.machine(),
    )


def sweep_report(rows, options, peer=None):
    """A sweep as one dict: the machine, the options, the rows and the growth exponents."""
    peer = peer and peer.name
    return dict(
        machine=machine(options.device), options=asdict(options), peer=peer, rows=rows, exponents=growth_exponents(rows)
    )


def print_report(report, console):
    """Print the rows and the growth exponents as tables."""
    mode = 'forward and backward' if report['options']['train'] else 'forward'
    table = Table(title=f'{mode}, batch {report["options"]["batch_size"]}, {report["options"]["device"]}')
    for header in ('', 'pixels', 'tokens', 'ms', 'quartiles', 'MiB', 'G multiply-adds', 'time ratio', 'memory ratio'):
        table.add_column(header, justify='left' if header in ('', 'pixels') else 'right')
    for row in report['rows']:
        cells = [escape(row['name']), '{}x{}'.format(*row['size']), str(row['tokens'])]
        if 'seconds' in row:
            seconds = row['seconds']
            cells += [f'{1e3 * seconds["median"]:.1f}', f'{1e3 * seconds["low"]:.1f}-{1e3 * seconds["high"]:.1f}']
        if row['status'] != 'ok':
            table.add_row(*cells, escape(row.get('message', row['status'])))
            continue
        cells += [f'{row["bytes"] / 2**20:.0f}' if 'bytes' in row else '']
        cells += [f'{row["multiply_adds"] / 1e9:.2f}' if row['multiply_adds'] else '']
        ratio = row.get('ratio')
        cells += ['{median:.4g} ({low:.4g}-{high:.4g})'.format(**ratio) if ratio else '']
        cells += [f'{row["memory_ratio"]:.3f}' if 'memory_ratio' in row else '']
        table.add_row(*cells)
    console.print(table)
    if report['peer']:
        console.print(f'ratios: to {report["peer"]}, the time measured in turns with it')
    table = Table('', 'time', 'memory', 'multiply-adds', title='growth exponents against tokens')
    for name, slopes in report['exponents'].items():
        table.add_row(escape(name), *('' if slope is None else f'{slope:.3f}' for slope in slopes.values()))
    console.print(table)


def write_csv(report, path):
    """Write the rows of a report as a CSV file."""
    keys = ['name', 'height', 'width', 'tokens', 'status', 'seconds', 'seconds_low', 'seconds_high', 'bytes']
    keys += [
        'multiply_adds',
        'images_per_second',
        'tokens_per_second',
        'ratio',
        'ratio_low',
        'ratio_high',
        'memory_ratio',
    ]
    keys += ['message']
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        for row in report['rows']:
            height, width = row['size']
            flat = {key: value for key, value in row.items() if key in keys} | dict(height=height, width=width)
            for key in ('seconds', 'ratio'):
                if key in row:
                    flat |= {key: row[key]['median'], f'{key}_low': row[key]['low'], f'{key}_high': row[key]['high']}
            writer.writerow(flat)


def draw_report(report, path):
    """Draw time and memory against tokens, both axes logarithmic, the fitted slopes in the legend."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    panels = [('seconds', 'time (s)', 1)] + [('bytes', 'peak memory (MiB)', 2**20)] * report['options']['memory']
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False, layout='constrained')
    for axis, (key, label, unit) in zip(axes[0], panels):
        for name, slopes in report['exponents'].items():
            rows = [row for row in report['rows'] if row['name'] == name and row['status'] == 'ok' and row[key]]
            values = [(row[key]['median'] if key == 'seconds' else row[key]) / unit for row in rows]
            slope = '' if slopes[key] is None else f', slope {slopes[key]:.2f}'
            axis.plot([row['tokens'] for row in rows], values, marker='o', label=name + slope)
        axis.set(xscale='log', yscale='log', xlabel='tokens of stage 1', ylabel=label)
        axis.grid(alpha=0.3, which='both')
        axis.legend(fontsize='small')
    figure.savefig(path, dpi=120)
    plt.close(figure)
