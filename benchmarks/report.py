"""Reports of a token sweep: tables, CSV files and figures."""

import csv
import math
import statistics
from dataclasses import asdict

from rich.markup import escape
from rich.table import Table

from soft_mm.utils import make_figure

from .sweep import machine

_CSV_KEYS = (
    'name',
    'height',
    'width',
    'tokens',
    'status',
    'seconds',
    'seconds_low',
    'seconds_high',
    'bytes',
    'multiply_adds',
    'images_per_second',
    'tokens_per_second',
    'ratio',
    'ratio_low',
    'ratio_high',
    'memory_ratio',
    'message',
)


def growth_exponents(rows):
    """Fit time, memory and multiply-adds as powers of the number of tokens.

    Args:
        rows (list[dict]): Rows of :func:`~benchmarks.sweep.run_sweep`.

    Returns:
        dict[str, dict]: For each target, the exponents of ``seconds``, ``bytes`` and ``multiply_adds``. An exponent is
            the slope of a least-squares fit on logarithmic axes, or None if there are fewer than two points.
    """
    result = {}
    for name in dict.fromkeys(row['name'] for row in rows):
        measured = [row for row in rows if row['name'] == name and row['status'] == 'ok']
        times = [(row['tokens'], row['seconds']['median']) for row in measured]
        sizes = [(row['tokens'], row['bytes']) for row in measured if row.get('bytes')]
        counts = [(row['tokens'], row['multiply_adds']) for row in measured if row.get('multiply_adds')]
        result[name] = dict(seconds=_slope(times), bytes=_slope(sizes), multiply_adds=_slope(counts))
    return result


def _slope(points):
    if len({tokens for tokens, _ in points}) < 2:
        return None
    return statistics.linear_regression(*([math.log(value) for value in axis] for axis in zip(*points))).slope


def sweep_report(rows, options, peer=None):
    """Collect the results and settings of a sweep in one dict.

    Args:
        rows (list[dict]): Rows of :func:`~benchmarks.sweep.run_sweep`.
        options (SweepOptions): Settings of the sweep.
        peer (Target | None): Target with which the others were compared. Defaults to None.

    Returns:
        dict: ``machine``, ``options``, ``peer`` (its name), ``rows`` and ``exponents``.
    """
    return dict(
        machine=machine(options.device),
        options=asdict(options),
        peer=peer and peer.name,
        rows=rows,
        exponents=growth_exponents(rows),
    )


def print_report(report, console):
    """Print the rows and the growth exponents of a report as tables.

    A separate column shows the status of a point, such as ``'out of memory'``. Error messages follow the table.

    Args:
        report (dict): Output of :func:`sweep_report`.
        console (rich.console.Console): Console to print to.
    """
    mode = 'forward and backward' if report['options']['train'] else 'forward'
    table = Table(title=f'{mode}, batch {report["options"]["batch_size"]}, {report["options"]["device"]}')
    figures = ('tokens', 'ms', 'quartiles', 'MiB', 'G multiply-adds', 'time ratio', 'memory ratio')
    for header in ('', 'pixels', *figures, 'status'):
        table.add_column(header, justify='right' if header in figures else 'left')
    for row in report['rows']:
        seconds, ratio = row.get('seconds'), row.get('ratio')
        table.add_row(
            escape(row['name']),
            '{}x{}'.format(*row['size']),
            str(row['tokens']),
            f'{1e3 * seconds["median"]:.1f}' if seconds else '',
            f'{1e3 * seconds["low"]:.1f}-{1e3 * seconds["high"]:.1f}' if seconds else '',
            f'{row["bytes"] / 2**20:.0f}' if 'bytes' in row else '',
            f'{row["multiply_adds"] / 1e9:.2f}' if row.get('multiply_adds') else '',
            '{median:.4g} ({low:.4g}-{high:.4g})'.format(**ratio) if ratio else '',
            f'{row["memory_ratio"]:.3f}' if 'memory_ratio' in row else '',
            row['status'],
        )
    console.print(table)
    for row in report['rows']:
        if 'message' in row:
            console.print(escape(f'{row["name"]} at {"{}x{}".format(*row["size"])}: {row["message"]}'), soft_wrap=True)
    if report['peer']:
        console.print(f'ratios: relative to {report["peer"]}; both times were measured alternately')
    table = Table('', 'time', 'memory', 'multiply-adds', title='growth exponents in the number of tokens')
    for name, slopes in report['exponents'].items():
        table.add_row(escape(name), *('' if slope is None else f'{slope:.3f}' for slope in slopes.values()))
    console.print(table)


def write_csv(report, path):
    """Write the rows of a report as a CSV file.

    Args:
        report (dict): Output of :func:`sweep_report`.
        path (str | Path): File to write.
    """
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, _CSV_KEYS)
        writer.writeheader()
        for row in report['rows']:
            height, width = row['size']
            flat = {key: value for key, value in row.items() if key in _CSV_KEYS} | dict(height=height, width=width)
            for key in ('seconds', 'ratio'):
                if key in row:
                    flat |= {key: row[key]['median'], f'{key}_low': row[key]['low'], f'{key}_high': row[key]['high']}
            writer.writerow(flat)


def draw_report(report, path):
    """Draw time and memory against tokens on logarithmic axes, with the growth exponents in the legend.

    Args:
        report (dict): Output of :func:`sweep_report`.
        path (str | Path): Picture to write.
    """
    panels = [('seconds', 'time (s)', 1)] + [('bytes', 'peak memory (MiB)', 2**20)] * report['options']['memory']
    figure, axes = make_figure(1, len(panels), (6 * len(panels), 4.5))
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
