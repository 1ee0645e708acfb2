"""One measurement of a token sweep, in a process of its own: reads a request from standard input, prints the answer.

``python -m soft_mm.analysis.measure``; see :mod:`soft_mm.analysis.sweep`, which starts it.
"""

import ctypes
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from .complexity import count_multiply_adds
from .contenders import Contender, build_step

# Loads the libraries and their workspaces, which belong to no input.
_WARM_SIZE = (64, 64)
# mallopt(3): allocations from so many bytes up are given back to the system as soon as they are freed.
_M_MMAP_THRESHOLD, _MMAP_BYTES = -3, 2**20


def measure(request):
    """Carry out one request.

    Args:
        request (dict): ``what`` (``'time'`` or ``'memory'``), ``contender`` and, for time,
            ``peer`` (fields of a :class:`Contender`, or None), ``size``, ``batch_size``, ``train``, ``device``,
            ``heads``, ``head_dims``, ``repeats``, ``seconds`` (the repeats end after so many, three at least) and
            ``max_bytes`` (a bound on the memory of a process on the CPU, or None).

    Returns:
        dict: ``seconds`` and, with a peer, ``peer_seconds``, one entry a repeat, taken in turns; or ``bytes``, the
            highest use during a step beyond what was held before it. With the times come the ``multiply_adds`` of a
            forward, or None where they cannot be counted.
    """
    contenders = [Contender(**spec) for spec in (request['contender'], request.get('peer')) if spec]
    settings = {key: request[key] for key in ('batch_size', 'train', 'device', 'heads', 'head_dims')}

    def build(contender, size=tuple(request['size'])):
        return build_step(contender, size, **settings)

    device = torch.device(request['device'])
    if request['max_bytes'] and device.type == 'cpu':
        _limit_memory(request['max_bytes'])
    if request['what'] == 'memory':
        return dict(bytes=_peak_memory(build, contenders[0], request['size'], device))
    steps = [build(contender) for contender in contenders]
    times = _times(steps, request['repeats'], request['seconds'], device)
    del steps
    forward = build_step(contenders[0], tuple(request['size']), **dict(settings, train=False, device='cpu'))
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return dict(times, multiply_adds=count_multiply_adds(forward))
    except (RuntimeError, NotImplementedError):
        # An operator of a library that computes on real tensors only.
        return dict(times, multiply_adds=None)


def _synchronize(device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def _times(steps, repeats, seconds, device):
    times = [[] for _ in steps]
    for step in steps:
        step()
    start = time.perf_counter()
    while len(times[0]) < repeats and (len(times[0]) < 3 or time.perf_counter() - start < seconds):
        for step, record in zip(steps, times):
            _synchronize(device)
            begin = time.perf_counter()
            step()
            _synchronize(device)
            record.append(time.perf_counter() - begin)
    return dict(zip(('seconds', 'peer_seconds'), times))


def _peak_memory(build, contender, size, device):
    if device.type == 'cpu':
        # What is resident is then what the tensors need, and not what the allocator happens to keep of freed ones.
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
    build(contender, (1, min(size[1], _WARM_SIZE[1])) if contender.is_sequence else _WARM_SIZE)()
    step = build(contender)
    if device.type == 'cuda':
        _synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    # What the first step freed would otherwise be used again unseen.
    ctypes.CDLL(None).malloc_trim(0)
    _reset_peak()
    before = _status('VmRSS')
    step()
    return max(_status('VmHWM') - before, 0)


def _reset_peak():
    # Documented in proc_pid_clear_refs(5): 5 sets the peak to the present size.
    Path('/proc/self/clear_refs').write_text('5')


def _status(key):
    """A size of this process in bytes."""
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(f'{key}:'):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f'/proc/self/status has no {key}: peak memory on a CPU is measured on Linux only')


def _limit_memory(max_bytes):
    # So that what does not fit raises an error here, instead of making the kernel choose a process to end.
    limit = _status('VmData') + max_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def is_out_of_memory(error):
    """Whether an exception says that memory ran out, on the CPU or on an accelerator."""
    # oneDNN says no more than that it could not create something.
    texts = ("can't allocate memory", 'bad_alloc', 'could not create a')
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


def summarise(seconds):
    """Median, and the quartiles as the spread, of times in seconds."""
    quartiles = statistics.quantiles(seconds, n=4, method='inclusive')
    return dict(median=statistics.median(seconds), low=quartiles[0], high=quartiles[2])


def main():
    request = json.load(sys.stdin)
    try:
        answer = dict(measure(request), status='ok')
    except Exception as error:
        if is_out_of_memory(error):
            answer = dict(status='out of memory')
        elif isinstance(error, ValueError):
            answer = dict(status='error', message=str(error))
        else:
            raise
    print(json.dumps(answer))


if __name__ == '__main__':
    main()
