"""Linear layers by oneDNN, against PyTorch's own in float64."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear as plain_linear

from soft_mm.ops import linear as module
from soft_mm.ops.linear import has_fused_linear, linear, outer_product

needs_onednn = pytest.mark.skipif(not has_fused_linear(torch.float32), reason='oneDNN has no such product here')
SHAPES = [(1, 1, 1), (7, 5, 3), (3, 17, 64), (300, 64, 129)]


def make_inputs(n=7, channels=5, hidden=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (n, channels), (hidden, channels), (hidden,)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def results(function, inputs):
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, weights)]


def assert_near(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize('shape', SHAPES)
def test_outputs_and_gradients(shape):
    inputs = make_inputs(*shape)
    assert_near(results(linear, inputs), results(plain_linear, [tensor.double() for tensor in inputs]))


@pytest.mark.parametrize('learned', range(3))
def test_only_what_learns_gets_a_gradient(learned):
    inputs = make_inputs()
    (wanted,) = results(plain_linear, inputs)[1 + learned : 2 + learned]
    inputs[learned].requires_grad_()
    out = linear(*inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    out.backward(weights)
    assert [tensor.grad is not None for tensor in inputs] == [index == learned for index in range(3)]
    torch.testing.assert_close(inputs[learned].grad, wanted)


def test_second_derivatives():
    """Gradients of a penalty on the gradients."""
    found = []
    for function, dtype in ((linear, torch.float32), (plain_linear, torch.float64)):
        inputs = [tensor.requires_grad_() for tensor in make_inputs(dtype=dtype)]
        grads = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs))
    assert_near(*found)


@pytest.mark.parametrize('create_graph', [False, True])
def test_batches_of_gradients(create_graph):
    inputs = [tensor.requires_grad_() for tensor in make_inputs()]
    out = linear(*inputs)
    batch = torch.randn(4, *out.shape, generator=torch.Generator().manual_seed(1))
    options = dict(retain_graph=True, create_graph=create_graph)
    found = torch.autograd.grad(out, inputs, batch, is_grads_batched=True, **options)
    wanted = zip(*(torch.autograd.grad(out, inputs, grad, **options) for grad in batch))
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, torch.stack(other))


@pytest.mark.parametrize(
    'change',
    [
        lambda x: x.repeat(1, 2)[:, ::2],
        lambda x: x.t().contiguous().t(),
        lambda x: x[:1].expand(7, -1),
        lambda x: x.view(1, 7, 1, 5),
        lambda x: x.view(7, 5)[3:],
    ],
)
def test_layouts(change):
    x, weight, bias = make_inputs()
    inputs = change(x), weight.t().contiguous().t(), bias.repeat(2)[::2]
    assert_near(results(linear, inputs), results(plain_linear, [tensor.double() for tensor in inputs]))


@pytest.mark.parametrize('shape', [(0, 5), (2, 0, 5), (5,)])
def test_no_tokens_and_a_single_one(shape):
    _, weight, bias = make_inputs()
    x = torch.ones(shape)
    torch.testing.assert_close(linear(x, weight, bias), plain_linear(x, weight, bias))


def test_what_pytorch_does_itself():
    x, weight, bias = make_inputs()
    torch.testing.assert_close(linear(x, weight, None), plain_linear(x, weight))
    assert linear(x.double(), weight.double(), bias.double()).dtype == torch.float64
    with torch.autocast('cpu', torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match='cannot be multiplied'):
        linear(x[:, :4], weight, bias)
    with pytest.raises(RuntimeError, match='dtype'):
        linear(x, weight.double(), bias.double())
    for other in (bias[:1], bias[0]):
        torch.testing.assert_close(linear(x, weight, other), plain_linear(x, weight, other))
    torch.testing.assert_close(linear(x, weight[0], None), plain_linear(x, weight[0]))
    torch.testing.assert_close(linear(x, weight.to_sparse_csr(), bias), plain_linear(x, weight, bias))


@pytest.mark.parametrize('learned', [0, 1])
def test_nothing_is_saved_for_a_gradient_that_is_not_needed(learned):
    inputs, saved = make_inputs(), []
    inputs[learned].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(*inputs)
    assert len(saved) == 1 and torch.equal(saved[0], inputs[1 - learned])


def test_backward_passes_do_not_follow_autocast():
    x, weight, bias = make_inputs()
    out = linear(x.requires_grad_(), weight, bias).sum()
    with torch.autocast('cpu', torch.bfloat16):
        (found,) = torch.autograd.grad(out, x, create_graph=True)
    torch.testing.assert_close(found, torch.ones(7, 3) @ weight)


def test_transforms_compilation_and_forward_mode():
    x, weight, bias = make_inputs()
    wanted = plain_linear(x, weight, bias)
    torch.testing.assert_close(torch.func.vmap(lambda row: linear(row, weight, bias))(x), wanted)
    torch.testing.assert_close(torch.compile(linear, fullgraph=True, backend='eager')(x, weight, bias), wanted)
    _, tangent = torch.func.jvp(lambda x: linear(x, weight, bias), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, torch.ones_like(x) @ weight.t())


@needs_onednn
def test_onednn_is_used_and_may_be_switched_off(monkeypatch):
    calls, product = [], module._FUSED
    monkeypatch.setattr(module, '_FUSED', lambda *args: calls.append(args) or product(*args))
    inputs = make_inputs()
    results(linear, inputs)
    # Output, gradient of the tokens and gradient of the weights.
    assert len(calls) == 3
    outer_product(inputs[0], inputs[0])
    with torch.backends.mkldnn.flags(enabled=False):
        assert not has_fused_linear(torch.float32)
        assert_near([linear(*inputs)], [plain_linear(*inputs).double()])
    assert len(calls) == 4


def test_weights_changed_before_the_backward_pass_are_an_error():
    x, weight, bias = (nn.Parameter(tensor) for tensor in make_inputs())
    out = linear(x, weight, bias)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        out.sum().backward()
