"""What only a CUDA GPU can show. ``make test-gpu`` runs this with torch, timm and mmengine alone."""

import contextlib
import os

import pytest
import torch
from authors import REDUCED_ARCH
from exports import ATTENTIONS

from soft_mm import SOFT
from soft_mm.ops import chunked_mlp, reference

pytestmark = pytest.mark.gpu
# Deterministic products need this setting of cuBLAS. PyTorch reads it once, at the first product.
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
DEFAULT = dict(solver='cholesky', max_landmarks=7)
HALVES = [torch.bfloat16, torch.float16]


def build(attention=DEFAULT, train=False):
    torch.manual_seed(0)
    return SOFT(REDUCED_ARCH, attention=attention, drop_path_rate=0.0).train(train).cuda()


def image(batch=2, size=(96, 160)):
    torch.manual_seed(1)
    return torch.rand(batch, 3, *size, device='cuda')


def loss(outputs):
    return sum(output.float().square().mean() for output in outputs)


def gradients(model, x, autocast=contextlib.nullcontext):
    with autocast():
        value = loss(model(x))
    value.backward()
    found = {key: p.grad.double().cpu() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return value.item(), found


def largest(found, expected):
    return max(
        ((a.double().cpu() - b.double().cpu()).abs().max() / b.abs().max().cpu()).item()
        for a, b in zip(found, expected)
    )


def gradient_error(found, expected):
    """Norm of the difference of all gradients, relative to the norm of those expected."""
    error = sum((found[key] - gradient).square().sum() for key, gradient in expected.items()).sqrt()
    return (error / sum(gradient.square().sum() for gradient in expected.values()).sqrt()).item()


@contextlib.contextmanager
def without_synchronisation():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode('default')


@pytest.fixture(autouse=True)
def full_float32():
    """TF32 has only ten bits of mantissa, so a comparison would measure it instead of the kernels."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize('name', ATTENTIONS)
def test_kernels_agree_with_the_cpu(name):
    model, x = build(ATTENTIONS[name]), image()
    value, found = gradients(model, x)
    outputs = model(x)
    exact = model.double().cpu()
    value_exact, expected = gradients(exact, x.double().cpu())
    assert largest(outputs, exact(x.double().cpu())) < 1e-3
    assert value == pytest.approx(value_exact, rel=1e-4)
    # The exact pseudo-inverse divides by differences of singular values.
    if name != 'svd':
        assert gradient_error(found, expected) < 1e-2


@pytest.mark.parametrize('name', ['newton', 'cholesky', 'cholesky normalized'])
def test_kernel_and_inverse_keep_their_digits_with_tf32(name):
    """Both in TF32 change an output by up to a fifth. What remains is the rounding of the other products."""
    model, x = build(ATTENTIONS[name]), image()
    torch.backends.cuda.matmul.allow_tf32 = True
    outputs = model(x)
    assert largest(outputs, model.double().cpu()(x.double().cpu())) < 3e-2


def test_mlp_in_chunks():
    torch.manual_seed(0)
    inputs = [torch.randn(*shape, device='cuda') for shape in ((700, 8), (32, 8), (32,), (5, 32), (5,))]
    wanted = reference.mlp(*(tensor.double() for tensor in inputs), 'tanh')
    assert largest([chunked_mlp(*inputs, 'tanh')], [wanted]) < 1e-5


@pytest.mark.parametrize('dtype', HALVES)
@pytest.mark.parametrize('name', ['newton', 'newton normalized', 'cholesky', 'cholesky normalized'])
def test_autocast_in_half_precision(name, dtype):
    model, x = build(ATTENTIONS[name]), image()
    value, expected = gradients(model, x)
    half, found = gradients(model, x, lambda: torch.autocast('cuda', dtype))
    assert half == pytest.approx(value, rel=0.05)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert found.keys() == expected.keys()


@pytest.mark.parametrize('dtype', HALVES)
def test_models_in_half_precision(dtype):
    model, x = build(), image()
    with torch.no_grad():
        expected = model(x)
        found = model.to(dtype)(x.to(dtype))
    assert all(output.dtype == dtype for output in found)
    assert largest(found, expected) < 0.1


def test_channels_last():
    model, x = build(), image()
    value, expected = gradients(model, x)
    last, found = gradients(model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last))
    assert last == pytest.approx(value, rel=1e-4)
    assert gradient_error(found, expected) < 1e-3


@pytest.mark.parametrize('name', ['newton', 'newton normalized', 'cholesky', 'cholesky normalized'])
def test_nothing_waits_for_the_gpu(name):
    model, x = build(ATTENTIONS[name], train=True), image()
    gradients(model, x)
    with without_synchronisation():
        loss(model(x)).backward()
        with torch.no_grad():
            model.eval()(x)


@pytest.mark.parametrize('options', [{}, dict(normalized=True), dict(solver='newton')], ids=str)
def test_deterministic_gradients_of_bounded_landmarks(options):
    """PyTorch refuses an operator without a deterministic gradient."""
    model, x = build(dict(DEFAULT, **options), train=True), image()
    _, expected = gradients(model, x)
    torch.use_deterministic_algorithms(True)
    try:
        found, again = (gradients(model, x)[1] for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert found.keys() == again.keys() == expected.keys()
    assert all(torch.equal(gradient, again[key]) for key, gradient in found.items())
    assert gradient_error(found, expected) < 1e-2


@pytest.mark.parametrize('name', ['newton', 'newton normalized', 'cholesky', 'cholesky normalized'])
def test_cuda_graph_of_inference(name):
    model, x = build(ATTENTIONS[name]), image()
    with torch.no_grad():
        captured = torch.cuda.make_graphed_callables(model, (image(),))
        for seed in range(3):
            torch.manual_seed(seed)
            x = torch.rand_like(x)
            assert largest(captured(x), build(ATTENTIONS[name])(x)) < 1e-5


@pytest.mark.parametrize('name', ['newton', 'newton normalized', 'cholesky', 'cholesky normalized'])
def test_cuda_graph_of_a_training_step(name):
    """Forward, backward and the step of the optimiser are captured once and replayed."""
    losses = []
    for captured in (False, True):
        model = build(dict(ATTENTIONS[name]), train=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, capturable=True)
        x = image()

        def step(model=model, optimizer=optimizer, x=x):
            optimizer.zero_grad(set_to_none=False)
            value = loss(model(x))
            value.backward()
            optimizer.step()
            return value

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                value = step()
            replayed = []
            for _ in range(3):
                graph.replay()
                replayed.append(value.item())
            losses.append(replayed)
        else:
            losses.append([step().item() for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_compiled_with_cuda_graphs():
    model, x = build(), image()
    value, expected = gradients(model, x)
    compiled = torch.compile(model, mode='reduce-overhead')
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        found = loss(compiled(x))
        found.backward()
        got = {key: p.grad.double().cpu() for key, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        assert found.item() == pytest.approx(value, rel=1e-4)
        assert gradient_error(got, expected) < 1e-2
    with torch.no_grad():
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            assert largest(compiled(x), model(x)) < 1e-4


def test_memory_grows_with_the_tokens():
    """From 512x512 to 1024x1024 a training step holds at most four times as much."""
    model = SOFT('tiny', attention=dict(solver='cholesky', max_landmarks=49)).train().cuda()
    peaks = []
    for side in (512, 1024):
        x = image(1, (side, side))
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss(model(x)).backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        model.zero_grad()
    assert peaks[1] < 4.2 * peaks[0]
