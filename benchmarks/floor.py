"""Floor of a backbone on a CPU: the time of its matrix products and convolutions alone.

``python -m benchmarks.floor`` records the products and convolutions of one step, computes each alone in several layouts
and by several kernels, and adds the shortest times: a lower bound for these kernels and shapes. The recorded step calls
the layers one by one, so products that a backward pass computes again are left out.
"""

import argparse
import math
import statistics
import sys
from collections import Counter

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from .__main__ import parse_size
from .sweep import machine
from .targets import build_step, parse_target
from .worker import measure_times

aten = torch.ops.aten


def _product(left, right):
    """Describe ``left @ right``."""
    batch = left.shape[:-2].numel()
    return ('product', batch, left.shape[-2], left.shape[-1], right.shape[-1])


def _convolution(x, weight, stride, padding, dilation, groups):
    options = (tuple(stride), tuple(padding), tuple(dilation), groups)
    return ('convolution', tuple(x.shape), tuple(weight.shape), *options)


class Recorder(TorchDispatchMode):
    """Count the products and convolutions that run inside it, by their shapes."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket
        if name in (aten.mm, aten.bmm):
            self.calls[_product(args[0], args[1])] += 1
        elif name in (aten.addmm, aten.addmm_, aten.baddbmm, aten.baddbmm_):
            self.calls[_product(args[1], args[2])] += 1
        elif name is aten.convolution:
            x, weight, _, stride, padding, dilation, _, _, groups = args
            self.calls[_convolution(x, weight, stride, padding, dilation, groups)] += 1
        elif name is aten.convolution_backward:
            _, x, weight, _, stride, padding, dilation, _, _, groups, needed = args
            what = _convolution(x, weight, stride, padding, dilation, groups)
            self.calls[('gradient', *what[1:], tuple(needed[:2]))] += 1
        elif name is aten._scaled_dot_product_flash_attention_for_cpu:
            query, key, value = args[:3]
            self.count_attention(query, key, value, 1, 1)
        elif name is aten._scaled_dot_product_flash_attention_for_cpu_backward:
            # The scores again, and the gradients of scores, queries, keys and values.
            query, key, value = args[1:4]
            self.count_attention(query, key, value, 2, 3)
        return func(*args, **(kwargs or {}))

    def count_attention(self, query, key, value, scores, others):
        batch, rows, columns = query.shape[:-2].numel(), query.shape[-2], key.shape[-2]
        self.calls[('product', batch, rows, query.shape[-1], columns)] += scores
        self.calls[('product', batch, rows, columns, value.shape[-1])] += others


def _product_forms(batch, rows, inner, columns):
    """Return functions that compute a product, with the right operand in both layouts."""
    left, out = torch.randn(batch, rows, inner), torch.empty(batch, rows, columns)
    right = torch.randn(batch, inner, columns)
    transposed = right.mT.contiguous().mT
    if batch > 1:
        return [lambda operand=operand: torch.bmm(left, operand, out=out) for operand in (right, transposed)]
    forms = [lambda operand=operand: torch.mm(left[0], operand[0], out=out[0]) for operand in (right, transposed)]
    fused = getattr(torch.ops.mkldnn, '_linear_pointwise', None)
    return forms + [lambda: fused(left[0], transposed[0].mT, None, 'none', [], '')] * (fused is not None)


def _maps(shape, weight_shape):
    """Return random maps and filters in both memory formats."""
    x, weight = torch.randn(shape), torch.randn(weight_shape)
    formats = (torch.contiguous_format, torch.channels_last)
    return [(x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)) for layout in formats]


def _convolution_forms(shape, weight_shape, stride, padding, dilation, groups):
    """Return functions that compute a convolution, also with filters in the blocks that oneDNN prefers."""
    maps = _maps(shape, weight_shape)
    forms = [lambda x=x, w=w: F.conv2d(x, w, None, stride, padding, dilation, groups) for x, w in maps]
    reorder = getattr(torch.ops.mkldnn, '_reorder_convolution_weight', None)
    if reorder is None:
        return forms
    for x, weight in maps:
        blocked = reorder(weight, padding, stride, dilation, groups, list(x.shape))
        forms.append(
            lambda x=x, w=blocked: torch.ops.mkldnn._convolution_pointwise(
                x, w, None, padding, stride, dilation, groups, 'none', [], ''
            )
        )
    return forms


def _gradient_forms(shape, weight_shape, stride, padding, dilation, groups, needed):
    """Return functions that compute the gradients of a convolution with respect to its map and its filters."""
    forms = []
    for x, weight in _maps(shape, weight_shape):
        grad = torch.randn_like(F.conv2d(x, weight, None, stride, padding, dilation, groups))
        forms.append(
            lambda x=x, w=weight, g=grad: aten.convolution_backward(
                g, x, w, None, stride, padding, dilation, False, [0, 0], groups, [*needed, False]
            )
        )
    return forms


FORMS = dict(product=_product_forms, convolution=_convolution_forms, gradient=_gradient_forms)


def _seconds(function, repeats):
    return statistics.median(measure_times([function], repeats, math.inf, torch.device('cpu'))['seconds'])


def measure_floor(step, repeats=5):
    """Measure a step, and its products and convolutions alone.

    Args:
        step (Callable[[], None]): Step, see :func:`~benchmarks.targets.build_step`.
        repeats (int): Number of measurements of each function, of which the median counts. Defaults to 5.

    Returns:
        dict: ``seconds`` of the step, and ``parts``: for ``'product'``, ``'convolution'`` and ``'gradient'`` (of
        convolutions), the number of ``calls`` and their ``seconds``.
    """
    with Recorder() as recorder:
        step()
    parts = {kind: dict(calls=0, seconds=0.0) for kind in FORMS}
    steps = [_seconds(step, repeats)]
    for (kind, *shapes), calls in recorder.calls.items():
        parts[kind]['calls'] += calls
        parts[kind]['seconds'] += calls * min(_seconds(form, repeats) for form in FORMS[kind](*shapes))
    steps.append(_seconds(step, repeats))
    return dict(seconds=statistics.mean(steps), parts={kind: part for kind, part in parts.items() if part['calls']})


def main():
    parser = argparse.ArgumentParser(prog='python -m benchmarks.floor', description=__doc__.split('\n\n')[1])
    parser.add_argument('targets', nargs='+', metavar='TARGET', help='backbone, see python -m benchmarks --help')
    parser.add_argument('--size', type=parse_size, required=True, metavar='HxW', help='size in pixels')
    parser.add_argument('--batch-size', type=int, default=1, help='number of images (default: %(default)s)')
    parser.add_argument('--train', action='store_true', help='forward and backward (default: forward)')
    args = parser.parse_args()
    if args.batch_size < 1:
        parser.error(f'--batch-size {args.batch_size}: expected an integer >= 1')
    console = Console(width=None if sys.stdout.isatty() else 140)
    described = ', '.join(f'{key} {value}' for key, value in machine('cpu').items())
    table = Table(title=f'{args.batch_size} x {args.size[0]}x{args.size[1]}, {described}')
    for column in ('target', 'step', *(f'{kind}s' for kind in FORMS), 'floor', 'floor / step'):
        table.add_column(column, justify='left' if column == 'target' else 'right')
    try:
        targets = [parse_target(text) for text in args.targets]
        for target in targets:
            found = measure_floor(build_step(target, args.size, args.batch_size, args.train, 'cpu'))
            floor = sum(part['seconds'] for part in found['parts'].values())
            cells = [found['parts'].get(kind) for kind in FORMS]
            table.add_row(
                target.name,
                f'{found["seconds"]:.3f} s',
                *('-' if part is None else f'{part["seconds"]:.3f} s ({part["calls"]} calls)' for part in cells),
                f'{floor:.3f} s',
                f'{floor / found["seconds"]:.2f}',
            )
    except ValueError as error:
        parser.error(str(error))
    console.print(table)


if __name__ == '__main__':
    main()
