"""One measurement of :mod:`benchmarks.runtimes`, in a separate process.

Reads a request as JSON from standard input and prints the answer as JSON.
"""

import ctypes
import functools
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from soft_mm.export import photographs

from .targets import Target, build_backbone
from .worker import MMAP_THRESHOLD, measure_times, reset_peak, status_bytes

_MEAN = np.array([123.675, 116.28, 103.53], np.float32).reshape(3, 1, 1)
_STD = np.array([58.395, 57.12, 57.375], np.float32).reshape(3, 1, 1)
_CALIBRATION_IMAGES = 8


def normalized_photographs(count, size):
    """Return photographs ``(count, 3, H, W)`` of the size ``(H, W)``, normalised as for ImageNet."""
    return ((photographs((), count, size) - _MEAN) / _STD).astype(np.float32)


def eager(model, x, folder):
    """PyTorch without compilation, in float32."""
    return functools.partial(model, torch.from_numpy(x)), None


def compiled(model, x, folder):
    """``torch.compile`` with its defaults."""
    return functools.partial(torch.compile(model, fullgraph=True), torch.from_numpy(x)), None


def bfloat16(model, x, folder):
    """Autocast to bfloat16."""
    image = torch.from_numpy(x)

    def step():
        with torch.autocast('cpu', torch.bfloat16):
            return model(image)

    return step, None


def dynamic_int8(model, x, folder):
    """Linear layers in int8, with scales computed in each pass."""
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    return functools.partial(quantized, torch.from_numpy(x)), None


def _to_onnx(model, x, folder):
    from soft_mm.export import quiet

    file = Path(folder, 'model.onnx')
    with quiet():
        program = torch.onnx.export(model, (torch.from_numpy(x),), dynamo=True, input_names=['image'])
    program.save(file, external_data=False)
    return file


def _session(file, x):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])
    return functools.partial(session.run, None, {'image': x})


def onnxruntime_float32(model, x, folder):
    """Float32 in onnxruntime."""
    file = _to_onnx(model, x, folder)
    return _session(file, x), file


def onnxruntime_int8(model, x, folder):
    """Static int8 of onnxruntime, calibrated on photographs."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.images = iter(_calibration(x.shape))

        def get_next(self):
            image = next(self.images, None)
            return None if image is None else {'image': image}

    source, prepared, file = _to_onnx(model, x, folder), Path(folder, 'prepared.onnx'), Path(folder, 'int8.onnx')
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    quantize_static(prepared, file, Reader(), op_types_to_quantize=['Conv', 'Gemm', 'MatMul'], per_channel=True)
    return _session(file, x), file


def _calibration(shape):
    images = normalized_photographs(shape[0] * max(_CALIBRATION_IMAGES // shape[0], 1), shape[2:])
    return np.split(images, len(images) // shape[0])


def _openvino(model, x, folder, precision, convert=lambda converted: converted):
    import openvino

    core = openvino.Core()
    if precision == 'bf16' and 'BF16' not in core.get_property('CPU', 'OPTIMIZATION_CAPABILITIES'):
        raise ValueError('this processor has no bfloat16')
    converted, file = convert(core.read_model(_to_onnx(model, x, folder))), Path(folder, 'openvino.xml')
    openvino.save_model(converted, file, compress_to_fp16=False)
    settings = dict(INFERENCE_PRECISION_HINT=precision, INFERENCE_NUM_THREADS=torch.get_num_threads())
    request = core.compile_model(core.read_model(file), 'CPU', settings).create_infer_request()
    return lambda: list(request.infer([x], share_inputs=True).values()), file.with_suffix('.bin')


def openvino_float32(model, x, folder):
    """Float32 in OpenVINO."""
    return _openvino(model, x, folder, 'f32')


def openvino_bfloat16(model, x, folder):
    """Bfloat16 in OpenVINO."""
    return _openvino(model, x, folder, 'bf16')


def openvino_int8(model, x, folder):
    """Int8 in OpenVINO, quantised by NNCF on photographs."""
    import nncf

    def quantize(converted):
        return nncf.quantize(converted, nncf.Dataset(_calibration(x.shape)), model_type=nncf.ModelType.TRANSFORMER)

    return _openvino(model, x, folder, 'f32', quantize)


BUILDERS = {
    'eager': eager,
    'compile': compiled,
    'bfloat16': bfloat16,
    'dynamic-int8': dynamic_int8,
    'onnxruntime': onnxruntime_float32,
    'onnxruntime-int8': onnxruntime_int8,
    'openvino': openvino_float32,
    'openvino-bfloat16': openvino_bfloat16,
    'openvino-int8': openvino_int8,
}


@torch.no_grad()
def measure(request):
    """Measure a runtime and eager alternately.

    Args:
        request (dict): See :func:`benchmarks.runtimes.measure_runtime`.

    Returns:
        dict: ``seconds`` and ``eager_seconds``, one entry per repeat; ``bytes``, the peak of a step minus the memory
        before it; ``file_bytes``, or None; ``difference``, the largest of an output, relative to its largest entry.
    """
    torch.manual_seed(0)
    batch, *size = request['shape']
    model, _, _ = build_backbone(Target(**request['target']), size, batch, train=False, device='cpu')
    x = normalized_photographs(batch, size)
    # Then the allocators keep no large freed blocks, and resident memory is the memory in use.
    ctypes.CDLL(None).mallopt(*MMAP_THRESHOLD)
    with tempfile.TemporaryDirectory() as folder:
        step, file = BUILDERS[request['runtime']](model, x, folder)
        size = file.stat().st_size if file else None
        difference = largest_difference(step(), model(torch.from_numpy(x)))
        ctypes.CDLL(None).malloc_trim(0)
        reset_peak()
        before = status_bytes('VmRSS')
        step()
        peak = max(status_bytes('VmHWM') - before, 0)
        reference, _ = eager(model, x, folder)
        times = measure_times([step, reference], request['repeats'], request['seconds'], torch.device('cpu'))
    return dict(
        seconds=times['seconds'],
        eager_seconds=times['peer_seconds'],
        bytes=peak,
        file_bytes=size,
        difference=difference,
    )


def largest_difference(found, expected):
    """Return the largest difference of an output, relative to its largest entry.

    Args:
        found (Sequence): Outputs of a runtime, arrays or tensors.
        expected (Sequence[Tensor]): Outputs of eager.

    Returns:
        float: The difference.
    """
    pairs = zip((torch.as_tensor(output).float() for output in found), expected, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def main():
    request = json.load(sys.stdin)
    # Libraries print their progress to standard output.
    answer_file, sys.stdout = sys.stdout, sys.stderr
    try:
        answer = measure(request)
    except (ModuleNotFoundError, ValueError) as error:
        answer = dict(error=str(error).splitlines()[0])
    print(json.dumps(answer), file=answer_file)


if __name__ == '__main__':
    main()
