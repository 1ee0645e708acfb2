"""One measurement of :mod:`benchmarks.runtimes`, in a separate process.

Reads a request as JSON from standard input and prints the answer as JSON.
"""

import ctypes
import functools
import json
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch

from soft_mm.export import export_onnx, photographs, quiet
from soft_mm.image_models import image_model
from soft_mm.inference import find_images, load_model
from soft_mm.onnx_model import attention_nodes
from soft_mm.utils import read_config

from .targets import Target, build_backbone
from .worker import MMAP_THRESHOLD, REUSE_FREED, measure_times, reset_peak, status_bytes

_MEAN = np.array([123.675, 116.28, 103.53], np.float32).reshape(3, 1, 1)
_STD = np.array([58.395, 57.12, 57.375], np.float32).reshape(3, 1, 1)


def eager(model, x, calibration, folder):
    """Eager PyTorch in float32."""
    return lambda images: model(torch.from_numpy(images)), None


def compiled(model, x, calibration, folder):
    """``torch.compile`` with its defaults."""
    return eager(torch.compile(model, fullgraph=True), x, calibration, folder)


def bfloat16(model, x, calibration, folder):
    """Autocast to bfloat16."""

    def run(images):
        with torch.autocast('cpu', torch.bfloat16):
            return model(torch.from_numpy(images))

    return run, None


def dynamic_int8(model, x, calibration, folder):
    """Linear layers in int8, with scales computed in each pass."""
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    return eager(quantized, x, calibration, folder)


def to_onnx(model, x, folder):
    """Export a model of one input by PyTorch's exporter.

    Args:
        model (nn.Module): The model.
        x (np.ndarray): Example of the input.
        folder (str | Path): Folder of the file.

    Returns:
        Path: The file.
    """
    file = Path(folder, 'model.onnx')
    with quiet():
        program = torch.onnx.export(model, (torch.from_numpy(x),), dynamo=True, input_names=['image'])
    program.save(file, external_data=False)
    return file


def _session(file):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would otherwise wait actively for some time after a step, and slow eager down.
    options.add_session_config_entry('session.force_spinning_stop', '1')
    session = onnxruntime.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])
    return lambda images: session.run(None, {'image': images})


def onnxruntime_float32(model, x, calibration, folder):
    """Float32 in onnxruntime."""
    file = to_onnx(model, x, folder)
    return _session(file), file


def onnxruntime_int8(model, x, calibration, folder):
    """Static int8 of onnxruntime for convolutions and products with weights, calibrated on images."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.images = iter(calibration)

        def get_next(self):
            image = next(self.images, None)
            return None if image is None else {'image': image}

    source, prepared, file = to_onnx(model, x, folder), Path(folder, 'prepared.onnx'), Path(folder, 'int8.onnx')
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    # A product of two activations, such as one with the kernel matrix, stays in float32.
    quantize_static(
        prepared,
        file,
        Reader(),
        op_types_to_quantize=['Conv', 'Gemm', 'MatMul'],
        nodes_to_exclude=attention_nodes(source),
        per_channel=True,
        extra_options=dict(MatMulConstBOnly=True),
    )
    return _session(file), file


def _openvino(model, x, folder, precision, convert=lambda converted, source: converted):
    import openvino

    core = openvino.Core()
    if precision == 'bf16' and 'BF16' not in core.get_property('CPU', 'OPTIMIZATION_CAPABILITIES'):
        raise ValueError('this processor has no bfloat16')
    source, file = to_onnx(model, x, folder), Path(folder, 'openvino.xml')
    converted = convert(core.read_model(source), source)
    openvino.save_model(converted, file, compress_to_fp16=False)
    settings = dict(INFERENCE_PRECISION_HINT=precision, INFERENCE_NUM_THREADS=torch.get_num_threads())
    request = core.compile_model(core.read_model(file), 'CPU', settings).create_infer_request()
    return lambda images: list(request.infer([images], share_inputs=True).values()), file.with_suffix('.bin')


def openvino_float32(model, x, calibration, folder):
    """Float32 in OpenVINO."""
    return _openvino(model, x, folder, 'f32')


def openvino_bfloat16(model, x, calibration, folder):
    """Bfloat16 in OpenVINO."""
    return _openvino(model, x, folder, 'bf16')


def openvino_int8(model, x, calibration, folder):
    """Int8 in OpenVINO, quantised by NNCF on images."""
    import nncf

    def quantize(converted, source):
        # NNCF joins nodes, so not every name is there.
        ignored = nncf.IgnoredScope(names=attention_nodes(source), validate=False)
        data = nncf.Dataset(calibration)
        return nncf.quantize(converted, data, model_type=nncf.ModelType.TRANSFORMER, ignored_scope=ignored)

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


def _model_and_images(request):
    """Return the model, and images in the form that it takes: those for calibration, then one batch."""
    batch, *size = request['shape']
    if request.get('metric') and batch != 1:
        raise ValueError(f'a metric is computed with one image per batch: give 1x{size[0]}x{size[1]}')
    files = find_images(request['images']) if request['images'] else ()
    # The last batch is for the measurement.
    images = photographs(files, batch * (max(request['calibration'] // batch, 1) + 1), size)
    if 'config' in request:
        model = image_model(load_model(request['config'], request['checkpoint'])).eval()
        return model, images.astype(np.float32)
    model, _, _ = build_backbone(Target(**request['target']), size, batch, train=False, device='cpu')
    return model, ((images - _MEAN) / _STD).astype(np.float32)


@torch.no_grad()
def measure(request):
    """Measure a runtime and eager alternately.

    Args:
        request (dict): See :func:`benchmarks.runtimes.measure_runtime`.

    Returns:
        dict: ``seconds`` and ``eager_seconds``, one entry per repeat; ``bytes``, the peak of a step minus the memory
        before it; ``file_bytes``, or None; ``difference``, the largest of an output, relative to its largest entry; and
        with ``metric`` in the request its value on the test data.
    """
    torch.manual_seed(0)
    model, images = _model_and_images(request)
    *calibration, x = np.split(images, len(images) // request['shape'][0])
    # Then the allocators keep no large freed blocks, and resident memory is the memory in use.
    ctypes.CDLL(None).mallopt(*MMAP_THRESHOLD)
    with tempfile.TemporaryDirectory() as folder:
        run, file = BUILDERS[request['runtime']](model, x, calibration, folder)
        size = file.stat().st_size if file else None
        if not file:
            # The first step of PyTorch loads libraries or compiles. The other runtimes do this when they load the file,
            # and keep the memory of a step, so for them only the first step shows it.
            run(x)
        ctypes.CDLL(None).malloc_trim(0)
        reset_peak()
        before = status_bytes('VmRSS')
        found = run(x)
        peak = max(status_bytes('VmHWM') - before, 0)
        reference, _ = eager(model, x, calibration, folder)
        difference = largest_difference(found, reference(x))
        for setting in REUSE_FREED:
            ctypes.CDLL(None).mallopt(*setting)
        steps = [functools.partial(function, x) for function in (run, reference)]
        times = measure_times(steps, request['repeats'], request['seconds'], torch.device('cpu'))
        metric = evaluate(request, run, folder) if request.get('metric') else None
    return dict(
        seconds=times['seconds'],
        eager_seconds=times['peer_seconds'],
        bytes=peak,
        file_bytes=size,
        difference=difference,
        metric=metric,
    )


def evaluate(request, run, folder):
    """Evaluate a runtime on the test data of a config.

    Args:
        request (dict): See :func:`benchmarks.runtimes.measure_runtime`.
        run (Callable): Function from images to outputs.
        folder (str): Folder for the files of the runner.

    Returns:
        float: The metric.

    Raises:
        ValueError: If the config has no metric of this name.
    """
    from mmengine.runner import Runner

    cfg, file = read_config(request['config']), Path(folder, 'metadata.onnx')
    export_onnx(request['config'], request['checkpoint'], file, request['shape'][1:], check=False)
    cfg.merge_from_dict(dict(model=dict(_delete_=True, type='OnnxTestModel', file=str(file)), work_dir=folder))
    cfg.load_from, cfg.log_level = None, 'ERROR'
    runner = Runner.from_cfg(cfg)
    # The file gives the classes and the form of the outputs. The runtime computes them.
    runner.model.onnx.session = types.SimpleNamespace(run=lambda _, inputs: _arrays(run(inputs['image'])))
    metrics = runner.test()
    if request['metric'] not in metrics:
        raise ValueError(f'metric {request["metric"]!r}: the config computes {", ".join(metrics)}')
    return float(metrics[request['metric']])


def _arrays(outputs):
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    # NumPy has no bfloat16.
    tensors = [torch.as_tensor(output) for output in outputs]
    return [(tensor.float() if tensor.is_floating_point() else tensor).numpy() for tensor in tensors]


def largest_difference(found, expected):
    """Return the largest difference of an output, relative to its largest entry.

    Args:
        found (Sequence): Outputs of a runtime, arrays or tensors.
        expected (Sequence): Outputs of eager.

    Returns:
        float: The difference.
    """
    pairs = zip(_arrays(found), _arrays(expected), strict=True)
    return max(float(np.abs(a.astype(np.float64) - b).max() / np.abs(b).max()) for a, b in pairs)


def main():
    request = json.load(sys.stdin)
    # Libraries print their progress to standard output.
    answer_file, sys.stdout = sys.stdout, sys.stderr
    try:
        answer = measure(request)
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
        answer = dict(error=str(error).splitlines()[0])
    print(json.dumps(answer), file=answer_file)


if __name__ == '__main__':
    main()
