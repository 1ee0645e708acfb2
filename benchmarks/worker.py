"""One measurement of a token sweep, in a separate process that :mod:`benchmarks.sweep` starts.

``python -m benchmarks.worker`` reads a request as JSON from standard input and prints the answer as JSON. It limits and
measures memory on the CPU through interfaces of Linux, which only this module uses.
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

# A first step at this size loads libraries and allocates their workspaces, so that these do not count as memory.
_WARM_SIZE = (64, 64)
# mallopt(3): allocations above this threshold return to the system when they are freed.
MMAP_THRESHOLD = -3, 2**20
# mallopt(3): the values up to which glibc raises its thresholds itself, so that freed blocks are used again.
REUSE_FREED = (-3, 2**25), (-1, 2**26)
# Default limit of a measurement, as a fraction of the available memory.
_MEMORY_SHARE = 0.75


def measure(request):
    """Measure the time or the memory of a target.

    Args:
        request (dict): ``what`` (``'time'`` or ``'memory'``), ``target`` (fields of a
            :class:`~benchmarks.targets.Target`), ``peer`` (fields of a second target for time, or None), ``size``, and
            the fields of :class:`~benchmarks.sweep.SweepOptions`.

    Returns:
        dict: For time: ``seconds`` and, with a peer, ``peer_seconds``, each a list with one entry per repeat. Target
            and peer are measured alternately. Also ``multiply_adds`` of one forward pass, or None if they cannot be
            counted. For memory: ``bytes``, the peak during a step minus the memory in use before it.
    """
    targets = [Target(**fields) for fields in (request['target'], request.get('peer')) if fields]
    size, device = tuple(request['size']), torch.device(request['device'])
    settings = {key: request[key] for key in ('batch_size', 'train', 'device', 'heads', 'head_dims')}
    if device.type == 'cpu':
        _limit_memory(request['max_memory'])
    if request['what'] == 'memory':
        return dict(bytes=_peak_memory(targets[0], size, settings, device))
    steps = [build_step(target, size, **settings) for target in targets]
    times = measure_times(steps, request['repeats'], request['seconds'], device)
    del steps
    forward = build_step(targets[0], size, **dict(settings, train=False, device='cpu'))
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return dict(times, multiply_adds=count_multiply_adds(forward))
    except (RuntimeError, NotImplementedError):
        # Some operators need tensors with data.
        return dict(times, multiply_adds=None)


def _synchronize(device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def measure_times(steps, repeats, seconds, device):
    """Measure one or two functions alternately.

    Args:
        steps (list[Callable[[], None]]): Functions to measure.
        repeats (int): Largest number of measurements of each.
        seconds (float): Time in seconds after which no further measurement starts. There are at least three.
        device (torch.device): Device to wait for.

    Returns:
        dict[str, list[float]]: ``seconds`` and, with two functions, ``peer_seconds``.
    """
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
        # Then the allocator keeps no large freed blocks, and resident memory is the memory of live tensors.
        ctypes.CDLL(None).mallopt(*MMAP_THRESHOLD)
    warm_size = (1, min(size[1], _WARM_SIZE[1])) if target.is_sequence else _WARM_SIZE
    build_step(target, warm_size, **settings)()
    step = build_step(target, size, **settings)
    if device.type == 'cuda':
        _synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    # Otherwise the step could reuse memory that the first step freed, and the peak would not show it.
    ctypes.CDLL(None).malloc_trim(0)
    reset_peak()
    before = status_bytes('VmRSS')
    step()
    return max(status_bytes('VmHWM') - before, 0)


def reset_peak():
    """Set the peak memory of this process to its current memory."""
    # proc_pid_clear_refs(5): writing 5 resets the peak to the current resident size.
    Path('/proc/self/clear_refs').write_text('5')


def status_bytes(key):
    """Return a size in the status of this process, in bytes."""
    return _read_kib('/proc/self/status', key) * 1024


def _read_kib(file, key):
    for line in Path(file).read_text().splitlines():
        if line.startswith(f'{key}:'):
            return int(line.split()[1])
    raise RuntimeError(f'{file} has no {key}: memory on a CPU can be measured on Linux only; measure with --no-memory')


def _limit_memory(max_memory):
    """Limit the memory of this process to ``max_memory`` GiB, so that a measurement above the limit raises an error.

    Without a limit, the kernel could kill any other process instead.
    """
    gib = max_memory or _MEMORY_SHARE * _read_kib('/proc/meminfo', 'MemAvailable') / 2**20
    limit = status_bytes('VmData') + int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def is_out_of_memory(error):
    """Return whether an exception means that memory ran out.

    Args:
        error (Exception): Exception of a step, on the CPU or on an accelerator.

    Returns:
        bool: True if memory ran out.
    """
    # oneDNN reports a failed allocation only as 'could not create a primitive' or similar.
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
