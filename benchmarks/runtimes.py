"""Runtimes: PyTorch eager, compiled, in bfloat16 and int8, onnxruntime and OpenVINO, for backbones or a trained model.

``python -m benchmarks.runtimes`` measures each runtime and eager alternately, in a separate process per runtime. It
prints time, peak memory, file size, the largest difference to eager and, for a trained model, its metric.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .runtime_worker import BUILDERS
from .sweep import ROOT, machine, summarise
from .targets import BACKBONES, parse_target

#: Runtimes, in the order of the table.
RUNTIMES = tuple(BUILDERS)


def measure_runtime(name, request):
    """Measure a runtime and eager alternately, in a new process.

    Args:
        name (str): Name of the target for the table.
        request (dict): ``target`` (fields of a :class:`~benchmarks.targets.Target`), or ``config``, ``checkpoint`` and
            ``metric`` (a key of the config's metrics, or None); ``runtime``, one of :data:`RUNTIMES`; ``shape``: number
            of images, height and width; ``images``: file or folder of images, or None for a photograph of matplotlib;
            ``calibration``: number of images to calibrate int8; ``repeats`` and ``seconds``: limits of the time.

    Returns:
        dict: ``target``, ``runtime``, ``shape``, and either ``error`` or ``seconds``, ``eager_seconds`` and ``ratio``
        (each with ``median``, ``low`` and ``high``), ``bytes``, ``file_bytes``, ``difference`` and ``metric``.
    """
    done = subprocess.run(
        [sys.executable, '-m', 'benchmarks.runtime_worker'],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        # Relative paths of a config and its data belong to the current folder.
        env=dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])),
    )
    row = dict(target=name, runtime=request['runtime'], shape=list(request['shape']))
    if done.returncode:
        return row | dict(error=(done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1])
    answer = json.loads(done.stdout.splitlines()[-1])
    if 'error' in answer:
        return row | answer
    own, eager = answer.pop('seconds'), answer.pop('eager_seconds')
    row |= dict(seconds=summarise(own), eager_seconds=summarise(eager))
    return row | answer | dict(ratio=summarise([a / b for a, b in zip(own, eager)]))


def runtime_tables(rows):
    """Arrange rows as a table, and those that failed as another.

    Args:
        rows (list[dict]): Rows of :func:`measure_runtime`.

    Returns:
        list[Table]: The tables that have a row.
    """
    heads = ('target', 'input', 'runtime')
    table = Table(*heads, 'ms', 'to eager', 'quartiles', 'MiB', 'file MiB', 'difference', 'metric')
    failed = Table(*heads, 'error')
    for row in rows:
        head = (escape(row['target']), 'x'.join(map(str, row['shape'])), row['runtime'])
        if 'error' in row:
            failed.add_row(*head, escape(row['error']))
            continue
        ratio, size, metric = row['ratio'], row['file_bytes'], row['metric']
        table.add_row(
            *head,
            f'{row["seconds"]["median"] * 1e3:.1f}',
            f'{ratio["median"]:.3f}',
            f'{ratio["low"]:.3f}-{ratio["high"]:.3f}',
            f'{row["bytes"] / 2**20:.0f}',
            f'{size / 2**20:.1f}' if size else '',
            f'{row["difference"]:.1e}',
            '' if metric is None else f'{metric:.4f}',
        )
    return [part for part in (table, failed) if part.row_count]


def _shape(text):
    match = re.fullmatch(r'(\d+)x(\d+)x(\d+)', text)
    if not match or min(map(int, match.groups())) < 1:
        raise argparse.ArgumentTypeError(f'{text!r}: expected IMAGESxHEIGHTxWIDTH, such as 8x224x224')
    return tuple(map(int, match.groups()))


def _requests(parser, args):
    """Yield the name of each target and its part of the request."""
    if bool(args.targets) == bool(args.model):
        parser.error('expected backbones, or --model CONFIG CHECKPOINT')
    if args.metric and not args.model:
        parser.error('--metric needs --model CONFIG CHECKPOINT')
    if args.model:
        config, checkpoint = args.model
        yield Path(config).stem, dict(config=config, checkpoint=checkpoint, metric=args.metric)
    for name in args.targets:
        try:
            yield name, dict(target=asdict(parse_target(name)))
        except ValueError as error:
            parser.error(str(error))


def main():
    parser = argparse.ArgumentParser(prog='python -m benchmarks.runtimes', description=__doc__.split('\n')[0])
    parser.add_argument('targets', nargs='*', metavar='TARGET', help=f'backbone, such as {", ".join(BACKBONES)}')
    parser.add_argument('--model', nargs=2, metavar=('CONFIG', 'CHECKPOINT'), help='a trained model, from images')
    parser.add_argument('--metric', metavar='KEY', help='metric of the config to compute, such as accuracy/top1')
    parser.add_argument(
        '--inputs', type=_shape, nargs='+', required=True, metavar='NxHxW', help='images, height and width in pixels'
    )
    parser.add_argument(
        '--runtimes',
        nargs='+',
        choices=RUNTIMES,
        default=RUNTIMES,
        metavar='RUNTIME',
        help=f'of {", ".join(RUNTIMES)} (default: all)',
    )
    parser.add_argument(
        '--images', metavar='FOLDER', help='images to measure and calibrate with (default: one photograph)'
    )
    parser.add_argument('--calibration', type=int, default=8, help='images to calibrate int8 (default: %(default)s)')
    parser.add_argument('--repeats', type=int, default=15, help='measurements of each runtime (default: %(default)s)')
    parser.add_argument(
        '--seconds', type=float, default=20.0, help='start no measurement after this time (default: %(default)s)'
    )
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the rows as JSON')
    args = parser.parse_args()
    targets, rows = list(_requests(parser, args)), []
    settings = {key: getattr(args, key) for key in ('images', 'calibration', 'repeats', 'seconds')}
    for shape in args.inputs:
        for name, target in targets:
            for runtime in args.runtimes:
                rows.append(measure_runtime(name, dict(settings, **target, runtime=runtime, shape=shape)))
                print(f'{name} {shape} {runtime}: {rows[-1].get("error", "done")}', file=sys.stderr)
    for table in runtime_tables(rows):
        Console(width=None if sys.stdout.isatty() else 150).print(table)
    if args.json:
        args.json.write_text(json.dumps(dict(machine=machine('cpu'), rows=rows), indent=2) + '\n')


if __name__ == '__main__':
    main()
