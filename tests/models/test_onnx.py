"""ONNX files of the backbone, written by somebody who knows only ``torch.onnx``: right, or an error."""

import io

import pytest
import torch
from exports import ATTENTIONS, EVERY_SIZE, SIZE, build, image, largest_error, slow

from soft_mm import ops
from soft_mm.export import quiet
from soft_mm.models.attention import build_attention
from soft_mm.ops.inverse import converged_newton_inverse, scales_to_converge

onnxruntime = pytest.importorskip('onnxruntime', reason='requirements/openmmlab.txt has no onnxruntime')
pytestmark = pytest.mark.skipif(
    not hasattr(torch.compiler, 'is_exporting'), reason='PyTorch before 2.7 does not tell an export from a compilation'
)


def session(model):
    """Return the ONNX model as a function from a tensor to tensors."""
    runtime = onnxruntime.InferenceSession(model, providers=['CPUExecutionProvider'])
    (given,) = runtime.get_inputs()
    return lambda x: [torch.from_numpy(output) for output in runtime.run(None, {given.name: x.numpy()})]


def check(function, model, x):
    """Compare float32 of onnxruntime and of PyTorch with float64, because some attentions are ill-conditioned."""
    exact = model.double()
    with torch.no_grad():
        expected = exact(x.double())
    rounding = largest_error(lambda x: model.float()(x), lambda _: expected, x)
    assert largest_error(function, lambda _: expected, x) < max(1e-4, 3 * rounding)


@pytest.mark.parametrize('name', ATTENTIONS)
def test_exporter_of_today(name):
    model, x = build(ATTENTIONS[name]).float(), image().float()
    with quiet(), torch.no_grad():
        if name == 'svd':
            with pytest.raises(torch.onnx.errors.OnnxExporterError):
                torch.onnx.export(model, (x,), dynamo=True)
            return
        program = torch.onnx.export(model, (x,), dynamo=True)
    check(session(program.model_proto.SerializeToString()), model, x)


@pytest.mark.parametrize('name', ATTENTIONS)
def test_exporter_of_torchscript(name):
    model, x, file = build(ATTENTIONS[name]).float(), image().float(), io.BytesIO()
    with quiet(), torch.no_grad():
        try:
            torch.onnx.export(model, (x,), file, dynamo=False)
        except torch.onnx.errors.OnnxExporterError:
            assert name in ('svd', 'Linformer')
            return
    check(session(file.getvalue()), model, x)


UNBOUNDED = dict(solver='cholesky')
OTHERS = ['random', *(name for name in ATTENTIONS if name not in (*EVERY_SIZE, 'Nystrom', 'Linformer'))]


@pytest.mark.parametrize('name', ['Nystrom', 'Linformer', *map(slow, OTHERS)])
def test_variable_sizes_of_other_attentions_are_right_or_refused(name):
    """torch.onnx ignores broken guards of an export, so nothing else would stop a wrong file."""
    model = build(ATTENTIONS.get(name, dict(sampler='random'))).float()
    dims = {0: 'batch', 2: 'height', 3: 'width'}
    with quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(model, (image().float(),), dynamo=True, dynamic_shapes=(dims,))
        except (torch.onnx.errors.OnnxExporterError, NotImplementedError):
            assert name != 'Softmax'
            return
    function = session(program.model_proto.SerializeToString())
    for batch, size in ((1, (64, 64)), (2, (65, 160)), (1, (200, 40))):
        check(function, model, image(batch, size).float())


@pytest.mark.parametrize(
    'name',
    [
        'newton',
        *map(slow, ('newton normalized', 'cholesky', 'newton normalized bounded', 'unbounded cholesky')),
        'cholesky normalized',
    ],
)
def test_every_batch_and_size(name):
    model, x = build(ATTENTIONS.get(name, UNBOUNDED)).float(), image().float()
    dims = {0: 'batch', 2: 'height', 3: 'width'}
    with quiet(), torch.no_grad():
        program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=(dims,))
    function = session(program.model_proto.SerializeToString())
    for batch, size in ((2, SIZE), (1, (32, 32)), (3, (160, 96)), (1, (65, 401)), (1, (401, 32)), (1, (33, 47))):
        check(function, model, image(batch, size).float())


@pytest.mark.parametrize('count', [1, 4, 9, 49, 196])
@pytest.mark.parametrize('spread', [0.01, 0.1, 0.3, 0.4, 1.0, 5.0])
def test_iterations_converge_to_the_inverse(count, spread):
    """On flat landmarks, whose kernel is almost all ones, and on sharp ones, whose kernel is almost the identity."""
    torch.manual_seed(0)
    landmarks = spread * torch.randn(200 if count < 100 else 10, count, 32)
    landmarks -= landmarks.mean(-2, keepdim=True)
    kernel = ops.gaussian_kernel(landmarks, landmarks)
    for ridge in (0.001, 0.01, 1.0, float(count), 100.0, 1000.0):
        matrix = kernel + ridge * torch.eye(count)
        exact = torch.linalg.inv(matrix.double())
        # The second is for variable sizes without a bound.
        for scales in (scales_to_converge(count, ridge), [1.0] * 34):
            inverse = converged_newton_inverse(matrix, ridge, scales)
            error = (inverse - exact).abs().amax((-2, -1)) / exact.abs().amax((-2, -1))
            # The condition number is count / ridge.
            assert error.max() < max(1e-4, 1e-7 * count / ridge)
    assert len(scales_to_converge(49, 0.01)) == 12


class Masked(torch.nn.Module):
    """An attention with a mask, on one grid."""

    def __init__(self, options):
        super().__init__()
        torch.manual_seed(0)
        self.attention = build_attention(options, embed_dims=16, num_heads=2, ratio=2, conv_size=3)

    def forward(self, x, mask):
        return self.attention(x, (6, 8), mask)


# The exporter of TorchScript has no antialiased resizing, which Linformer needs.
@pytest.mark.parametrize('dynamo', [True, False])
@pytest.mark.parametrize(
    'name',
    [
        name
        for name, options in ATTENTIONS.items()
        if isinstance(options, dict) and name not in ('svd', 'Linformer', 'newton exact')
    ],
)
def test_masks(name, dynamo):
    model, file = Masked(ATTENTIONS[name]).eval(), io.BytesIO()
    x, mask = torch.randn(3, 48, 16), torch.rand(3, 48) < 0.4
    with quiet(), torch.no_grad():
        if dynamo:
            data = torch.onnx.export(model, (x, mask), dynamo=True).model_proto.SerializeToString()
        else:
            torch.onnx.export(model, (x, mask), file, dynamo=False)
            data = file.getvalue()
        runtime = onnxruntime.InferenceSession(data, providers=['CPUExecutionProvider'])
        names = [given.name for given in runtime.get_inputs()]
        for part in (mask, mask.flip(0), torch.zeros_like(mask), torch.ones_like(mask)):
            (found,) = runtime.run(None, dict(zip(names, (x.numpy(), part.numpy()))))
            expected = model(x, part)
            torch.testing.assert_close(
                torch.from_numpy(found), expected, rtol=0, atol=1e-4 * expected.abs().max().item()
            )
