"""Runtimes of a backbone: PyTorch eager, compiled, in bfloat16 and int8, onnxruntime and OpenVINO.

``python -m benchmarks.runtimes`` measures each runtime and eager alternately, in a separate process per runtime. It
prints time, peak memory, file size and the largest difference to eager.
"""

import argparse
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .sweep import ROOT, machine, summarise
from .targets import BACKBONES, parse_target

#: Runtimes, in the order of the table. Each is a function of :mod:`benchmarks.runtime_worker`.
RUNTIMES = (
    'eager',
    'compile',
    'bfloat16',
    'dynamic-int8',
    'onnxruntime',
    'onnxruntime-int8',
    'openvino',
    'openvino-bfloat16',
    'openvino-int8',
)


def measure_runtime(target, runtime, shape, repeats, seconds):
    """Measure a runtime and eager alternately, in a new process.

    Args:
        target (Target): Backbone.
        runtime (str): One of :data:`RUNTIMES`.
        shape (tuple[int, int, int]): Number of images, height and width.
        repeats (int): Largest number of measurements.
        seconds (float): Time in seconds after which no further measurement starts.

    Returns:
        dict: ``target``, ``runtime``, ``shape``, and either ``error`` or ``seconds``, ``eager_seconds`` and ``ratio``
        (each with ``median``, ``low`` and ``high``), ``bytes``, ``file_bytes`` and ``difference``.
    """
    request = dict(target=asdict(target), runtime=runtime, shape=shape, repeats=repeats, seconds=seconds)
    done = subprocess.run(
        [sys.executable, '-m', 'benchmarks.runtime_worker'],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    row = dict(target=target.name, runtime=runtime, shape=list(shape))
    if done.returncode:
        return row | dict(error=(done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1])
    answer = json.loads(done.stdout.splitlines()[-1])
    if 'error' in answer:
        return row | answer
    own, eager = answer.pop('seconds'), answer.pop('eager_seconds')
    row |= dict(seconds=summarise(own), eager_seconds=summarise(eager))
    return row | answer | dict(ratio=summarise([a / b for a, b in zip(own, eager)]))


def runtime_table(rows):
    """Arrange rows as a table.

    Args:
        rows (list[dict]): Rows of :func:`measure_runtime`.

    Returns:
        Table: One line per row.
    """
    table = Table('target', 'input', 'runtime', 'ms', 'to eager', 'quartiles', 'MiB', 'file MiB', 'difference')
    for row in rows:
        head = (escape(row['target']), 'x'.join(map(str, row['shape'])), row['runtime'])
        if 'error' in row:
            table.add_row(*head, escape(row['error']))
            continue
        ratio, size = row['ratio'], row['file_bytes']
        table.add_row(
            *head,
            f'{row["seconds"]["median"] * 1e3:.1f}',
            f'{ratio["median"]:.3f}',
            f'{ratio["low"]:.3f}-{ratio["high"]:.3f}',
            f'{row["bytes"] / 2**20:.0f}',
            f'{size / 2**20:.1f}' if size else '',
            f'{row["difference"]:.1e}',
        )
    return table


def _shape(text):
    match = re.fullmatch(r'(\d+)x(\d+)x(\d+)', text)
    if not match or min(map(int, match.groups())) < 1:
        raise argparse.ArgumentTypeError(f'{text!r}: expected IMAGESxHEIGHTxWIDTH, such as 8x224x224')
    return tuple(map(int, match.groups()))


def main():
    parser = argparse.ArgumentParser(prog='python -m benchmarks.runtimes', description=__doc__.split('\n')[0])
    parser.add_argument('targets', nargs='+', metavar='TARGET', help=f'backbone, such as {", ".join(BACKBONES)}')
    parser.add_argument(
        '--inputs', type=_shape, nargs='+', required=True, metavar='NxHxW', help='images, height and width in pixels'
    )
    parser.add_argument('--runtimes', nargs='+', choices=RUNTIMES, default=RUNTIMES, metavar='RUNTIME')
    parser.add_argument('--repeats', type=int, default=15, help='measurements of each runtime (default: %(default)s)')
    parser.add_argument(
        '--seconds', type=float, default=20.0, help='start no measurement after this time (default: %(default)s)'
    )
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the rows as JSON')
    args = parser.parse_args()
    try:
        targets = [parse_target(name) for name in args.targets]
    except ValueError as error:
        parser.error(str(error))
    rows = []
    for shape in args.inputs:
        for target in targets:
            for runtime in args.runtimes:
                rows.append(measure_runtime(target, runtime, shape, args.repeats, args.seconds))
                print(f'{target.name} {shape} {runtime}: {rows[-1].get("error", "done")}', file=sys.stderr)
    Console(width=None if sys.stdout.isatty() else 150).print(runtime_table(rows))
    if args.json:
        args.json.write_text(json.dumps(dict(machine=machine('cpu'), rows=rows), indent=2) + '\n')


if __name__ == '__main__':
    main()
