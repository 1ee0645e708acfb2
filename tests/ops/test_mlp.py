"""The MLP in chunks against the plain formula: outputs, every gradient, second derivatives, float64 and float32."""

import pytest
import torch

from soft_mm.ops import chunked_mlp, mlp, reference

APPROXIMATE = ('none', 'tanh')


def make_inputs(dtype=torch.float64, tokens=11, channels=(5, 13, 4)):
    generator = torch.Generator().manual_seed(0)
    first, hidden, last = channels
    shapes = (tokens, first), (hidden, first), (hidden,), (last, hidden), (last,)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.fixture(params=[(10**9, 10**9), (40, 3), (1, 1)], ids=['whole', 'chunks', 'single tokens'])
def chunks(request, monkeypatch):
    monkeypatch.setattr(mlp, 'FORWARD_ENTRIES', request.param[0])
    monkeypatch.setattr(mlp, '_BACKWARD_TOKENS', request.param[1])


@pytest.mark.parametrize('approximate', APPROXIMATE)
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_mlp_against_the_formula(dtype, tolerance, approximate, chunks):
    inputs = make_inputs(dtype)
    weight = torch.linspace(-1, 2, 44, dtype=dtype).view(11, 4)
    found, exact = [], [tensor.detach().double().requires_grad_() for tensor in inputs]
    for function, values in ((chunked_mlp, inputs), (reference.mlp, exact)):
        out = function(*values, approximate)
        found.append([out, *torch.autograd.grad((out * weight).sum(), values)])
    for one, other in zip(*found):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance * other.abs().max().item())


@pytest.mark.parametrize('approximate', APPROXIMATE)
def test_gradcheck(approximate, chunks):
    inputs = make_inputs(tokens=4, channels=(2, 3, 2))
    assert torch.autograd.gradcheck(lambda *values: chunked_mlp(*values, approximate), inputs)


@pytest.mark.parametrize('approximate', APPROXIMATE)
def test_second_derivatives(approximate):
    """Also if the gradient of the output is a constant, which is where they could be lost without an error."""
    inputs = make_inputs(tokens=4, channels=(2, 3, 2))
    assert torch.autograd.gradgradcheck(lambda *values: chunked_mlp(*values, approximate), inputs)
    found = []
    for function in (chunked_mlp, reference.mlp):
        first = torch.autograd.grad(function(*inputs, approximate).sum(), inputs[:4], create_graph=True)
        found.append(torch.autograd.grad(sum(grad.square().sum() for grad in first), inputs[:4]))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize('learned', range(5))
def test_only_what_learns_gets_a_gradient(learned, chunks):
    inputs = make_inputs()
    wanted = torch.autograd.grad(reference.mlp(*inputs, 'tanh').square().sum(), inputs)[learned]
    for index, tensor in enumerate(inputs):
        tensor.requires_grad_(index == learned)
    chunked_mlp(*inputs, 'tanh').square().sum().backward()
    assert [tensor.grad is not None for tensor in inputs] == [index == learned for index in range(5)]
    torch.testing.assert_close(inputs[learned].grad, wanted)


@pytest.mark.parametrize('create_graph', [False, True])
def test_batches_of_gradients(create_graph):
    inputs = make_inputs(tokens=3)
    out = chunked_mlp(*inputs, 'tanh')
    batch = torch.randn(4, *out.shape, dtype=out.dtype)
    options = dict(retain_graph=True, create_graph=create_graph)
    found = torch.autograd.grad(out, inputs, batch, is_grads_batched=True, **options)
    wanted = zip(*(torch.autograd.grad(out, inputs, grad, **options) for grad in batch))
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, torch.stack(other))


def test_transforms():
    """Gradients for each token by ``torch.func``, which custom autograd functions do not support."""
    inputs = make_inputs(tokens=3)
    per_token = torch.func.vmap(torch.func.grad(lambda x: chunked_mlp(x[None], *inputs[1:], 'tanh').sum()))(inputs[0])
    (wanted,) = torch.autograd.grad(chunked_mlp(*inputs, 'tanh').sum(), inputs[:1])
    torch.testing.assert_close(per_token, wanted)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_odd_layouts(chunks, dtype):
    """Transposed tokens and weights, biases with a stride, and a gradient that is one number."""
    inputs = make_inputs(dtype)
    odd = [tensor.detach().t().contiguous().t() if tensor.ndim == 2 else tensor.detach() for tensor in inputs]
    odd = [(t if t.ndim == 2 else t.repeat_interleave(2)[::2]).requires_grad_() for t in odd]
    wanted = torch.autograd.grad(reference.mlp(*inputs, 'tanh').sum(), inputs)
    for one, other in zip(torch.autograd.grad(chunked_mlp(*odd, 'tanh').sum(), odd), wanted):
        torch.testing.assert_close(one, other)


def test_no_tokens():
    inputs = make_inputs(tokens=0)
    out = chunked_mlp(*inputs)
    assert out.shape == (0, 4)
    grads = torch.autograd.grad(out.sum(), inputs)
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in inputs] and not grads[1].any()


@pytest.mark.parametrize('approximate', APPROXIMATE)
def test_tails_of_the_gelu(approximate):
    """Large and small inputs, where the GELU with tanh is computed by a sigmoid."""
    x = torch.tensor([-1e4, -50, -9, -6, -5.5, -3, -0.75, -1e-3, -1e-30, 0, 1e-30, 1e-3, 0.5, 3, 5.5, 9, 50, 1e4])
    out, gradient = mlp._gelu_and_gradient(x, torch.ones_like(x), approximate)
    wide = x.double().requires_grad_()
    exact = torch.nn.functional.gelu(wide, approximate=approximate)
    (exact_gradient,) = torch.autograd.grad(exact.sum(), wide)
    torch.testing.assert_close(out.double(), exact.detach(), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=0, atol=5e-6)


@pytest.mark.parametrize('learns', [False, True])
def test_half_precision_has_no_gradients(learns):
    inputs = [tensor.detach().bfloat16().requires_grad_(learns) for tensor in make_inputs()]
    if learns:
        with pytest.raises(ValueError, match='x of torch.bfloat16 with gradients: expected torch.float32 or'):
            chunked_mlp(*inputs)
    else:
        exact = reference.mlp(*(tensor.double() for tensor in inputs))
        # A relative error of 2^-9 per rounding, over a sum of 13 products.
        assert (chunked_mlp(*inputs).double() - exact).norm() < 0.02 * exact.norm()
