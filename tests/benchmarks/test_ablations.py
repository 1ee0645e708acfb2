"""Ablations of the engine: each computes the same outputs and gradients, with other operations."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.ablations import (
    ABLATIONS,
    ATTENTIONS,
    OPERATOR_ABLATIONS,
    REPLACEMENTS,
    ablate_attention,
)
from benchmarks.targets import build_operator, parse_target
from soft_mm.models import SOFT, blocks, soft
from soft_mm.ops import blockwise

CONFIGS = (
    dict(solver='cholesky', max_landmarks=4),
    dict(solver='cholesky', max_landmarks=4, normalized=True),
    dict(newton_backward='exact'),
)


class Recorder(TorchDispatchMode):
    """Records the names of the operations and the shapes of their inputs."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations.append((str(func), [tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor)]))
        return func(*args, **(kwargs or {}))


def build(attention, ablation, train):
    """Build a small backbone in float64, with weights that do not depend on the ablation."""
    if ablation in ATTENTIONS:
        attention = ablate_attention(attention, ablation)
    torch.manual_seed(0)
    arch = dict(embed_dims=(8, 16, 24, 32), num_heads=(2, 2, 3, 4), depths=(1, 1, 1, 1))
    model = SOFT(arch, attention=attention, img_size=64, norm_eval=True).double()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                torch.nn.init.uniform_(tensor, 0.5, 1.5)
    model.train(train)
    if ablation in REPLACEMENTS:
        REPLACEMENTS[ablation](model)
    return model


def run(model, image, train):
    """Return outputs, the gradients of training, and the operations."""
    with torch.set_grad_enabled(train), Recorder() as recorder:
        outputs = model(image)
        if train:
            sum(output.square().mean() for output in outputs).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return outputs, gradients, recorder.operations


@pytest.mark.parametrize('attention', CONFIGS)
# Layers are never fused in float64 and inside a dispatch mode, so `layers-apart` has its own test.
@pytest.mark.parametrize('ablation', [name for name in ABLATIONS if name != 'layers-apart'])
@pytest.mark.parametrize('train', [False, True])
def test_ablation_computes_the_same_otherwise(ablation, train, attention, monkeypatch):
    monkeypatch.setitem(blockwise._CHUNK_ENTRIES, 'cpu', 2**11)
    image = torch.rand(2, 3, 72, 104, dtype=torch.float64)
    expected, expected_gradients, operations = run(build(attention, None, train), image, train)
    actual, gradients, other_operations = run(build(attention, ablation, train), image, train)
    assert len(actual) == len(expected) > 3
    assert gradients.keys() == expected_gradients.keys() and bool(gradients) == train
    pairs = [*zip(actual, expected), *((gradients[name], expected_gradients[name]) for name in gradients)]
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * other.abs().max().item())
    assert other_operations != operations


@pytest.mark.parametrize('train', [False, True])
def test_layers_apart_computes_the_same_layer_by_layer(train, monkeypatch):
    calls = []
    for module, name in ((blocks, 'chunked_mlp'), (soft, 'fused_conv')):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, function=function: calls.append(function) or function(*args))
    image, results = torch.rand(2, 3, 72, 104), []
    for ablation in (None, 'layers-apart'):
        model = build(CONFIGS[0], ablation, train).float()
        with torch.set_grad_enabled(train):
            outputs = model(image)
        # The mean of squares would have no gradient, because the maps end with a LayerNorm.
        weights = [torch.linspace(-1, 2, out.numel()).view(out.shape) for out in outputs]
        loss = sum((out * weight).sum() for out, weight in zip(outputs, weights))
        gradients = torch.autograd.grad(loss, model.parameters()) if train else ()
        results.append([*outputs, *gradients])
        # Four blocks have an MLP each, and the patch embeddings six convolutions.
        assert len(calls) == (4 if train else 10)
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * other.abs().max().item())


@pytest.mark.parametrize('attention', CONFIGS)
@pytest.mark.parametrize('ablation', OPERATOR_ABLATIONS)
def test_operator_computes_the_same_otherwise(ablation, attention):
    options = ','.join(f'{key}={value}' for key, value in attention.items())
    results = []
    for name in (f'attn-soft-authors:{options}', f'attn-soft-authors:{options}@{ablation}'):
        torch.manual_seed(0)
        function, inputs, _ = build_operator(parse_target(name), (64, 96), 2, True, 'cpu', 2, 8)
        inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
        function.func.__self__.double()
        output = function(*inputs)
        output.square().sum().backward()
        results.append([output, *(tensor.grad for tensor in inputs)])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * other.abs().max().item())


def test_engine_is_unchanged_by_an_ablated_model():
    engine = build(CONFIGS[0], None, False)
    for ablation in ABLATIONS:
        build(CONFIGS[0], ablation, False)
    image = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    again = build(CONFIGS[0], None, False)
    assert [type(module) for module in again.modules()] == [type(module) for module in engine.modules()]
    with torch.no_grad():
        assert all(torch.equal(*pair) for pair in zip(engine(image), again(image)))
