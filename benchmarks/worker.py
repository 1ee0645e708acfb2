"""One measurement of a token sweep, in a process of its own.

``python -m benchmarks.worker`` reads a request as JSON from standard input and prints the answer as JSON.
:mod:`benchmarks.sweep` starts it. Memory on the CPU is limited and measured through interfaces of Linux, which only
this module uses.
"""

import ctypes
import json
import resource
import sys
import time
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from soft_mm.complexity import count_multiply_adds

from .targets import Target, build_step

# A step at this size loads the libraries and their workspaces, which do not depend on the input.
_WARM_SIZE = (64, 64)
# mallopt(3): larger allocations go back to the system as soon as they are freed.
_M_MMAP_THRESHOLD, _MMAP_BYTES = -3, 2**20
# Part of the available memory that a measurement may use by default.
_MEMORY_SHARE = 0.75


def measure(request):
    """Carry out one request.

    Args:
        request (dict): ``what`` (``'time'`` or ``'memory'``), ``target`` and, for time, ``peer`` (fields of a
            :class:`~benchmarks.targets.Target`, or None), ``size``, ``batch_size``, ``train``, ``device``, ``heads``,
            ``head_dims``, ``repeats``, ``seconds`` (time in seconds after which no repeat begins, after at least
            three) and ``max_memory`` (limit in GiB for a measurement on the CPU, or None for three quarters of the
            available memory).

    Returns:
        dict: For time, ``seconds`` and with a peer ``peer_seconds``, each a list with one entry per repeat, measured in
            turns, and ``multiply_adds`` of a forward, or None where they cannot be counted. For memory, ``bytes``: the
            peak during a step minus the memory in use before it.
    """
    targets = [Target(**fields) for fields in (request['target'], request.get('peer')) if fields]
    size, device = tuple(request['size']), torch.device(request['device'])
    settings = {key: request[key] for key in ('batch_size', 'train', 'device', 'heads', 'head_dims')}
    if device.type == 'cpu':
        _limit_memory(request['max_memory'])
    if request['what'] == 'memory':
        return dict(bytes=_peak_memory(targets[0], size, settings, device))
    steps = [build_step(target, size, **settings) for target in targets]
    times = _measure_times(steps, request['repeats'], request['seconds'], device)
    del steps
    forward = build_step(targets[0], size, **dict(settings, train=False, device='cpu'))
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return dict(times, multiply_adds=count_multiply_adds(forward))
    except (RuntimeError, NotImplementedError):
        # Operators of some libraries compute on real tensors only.
        return dict(times, multiply_adds=None)


def _synchronize(device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def _measure_times(steps, repeats, seconds, device):
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


def _peak_memory(target, size, settings, device):
    if device.type == 'cpu':
        # Resident memory is then the memory of live tensors, without freed blocks that the allocator keeps.
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
    warm_size = (1, min(size[1], _WARM_SIZE[1])) if target.is_sequence else _WARM_SIZE
    build_step(target, warm_size, **settings)()
    step = build_step(target, size, **settings)
    if device.type == 'cuda':
        _synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    # The step could otherwise reuse memory that the first one freed, and the peak would not show it.
    ctypes.CDLL(None).malloc_trim(0)
    _reset_peak()
    before = _status_bytes('VmRSS')
    step()
    return max(_status_bytes('VmHWM') - before, 0)


def _reset_peak():
    # proc_pid_clear_refs(5): writing 5 sets the peak to the present size.
    Path('/proc/self/clear_refs').write_text('5')


def _status_bytes(key):
    """Read a size of this process in bytes."""
    return _read_kib('/proc/self/status', key) * 1024


def _read_kib(file, key):
    for line in Path(file).read_text().splitlines():
        if line.startswith(f'{key}:'):
            return int(line.split()[1])
    raise RuntimeError(f'{file} has no {key}: a CPU can be measured on Linux only')


def _limit_memory(max_memory):
    """Limit the data of this process in GiB, so that too large a measurement raises an error here.

    Without a limit, the kernel would choose a process to end.
    """
    gib = max_memory or _MEMORY_SHARE * _read_kib('/proc/meminfo', 'MemAvailable') / 2**20
    limit = _status_bytes('VmData') + int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def is_out_of_memory(error):
    """Check whether an exception says that memory ran out, on the CPU or on an accelerator."""
    # oneDNN only says that it could not create something.
    texts = ("can't allocate memory", 'bad_alloc', 'could not create a')
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


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
