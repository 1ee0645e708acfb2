"""Fused layers against the layers that they stand for."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

from soft_mm.models import blocks, fused_layers, soft
from soft_mm.models.blocks import MLP
from soft_mm.models.soft import PatchEmbed
from soft_mm.ops import linear as linear_ops
from soft_mm.ops import mlp as mlp_ops

needs_fused = pytest.mark.skipif(not linear_ops.has_fused_linear(torch.float32), reason='oneDNN on x86 fuses MLPs')


def make_mlp(approximate='tanh', drop_rate=0.0):
    torch.manual_seed(0)
    return MLP(12, approximate, drop_rate).eval()


def make_embed():
    torch.manual_seed(0)
    embed = PatchEmbed(3, 10, stem=True).eval()
    for layer in embed:
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight.data, layer.running_var):
                tensor.uniform_(0.5, 2)
            for tensor in (layer.bias.data, layer.running_mean):
                tensor.normal_()
    return embed


def layer_by_layer(layers, x):
    for layer in layers:
        x = layer(x)
    return x


@pytest.fixture
def fused_calls(monkeypatch):
    """Count the calls of the fused layers."""
    calls = []
    for module, name in ((blocks, 'chunked_mlp'), (soft, 'fused_conv')):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, function=function, **k: calls.append(1) or function(*a, **k))
    return calls


@needs_fused
@pytest.mark.parametrize('approximate', ['tanh', 'none'])
@pytest.mark.parametrize('entries', [100, 2**20])
def test_fused_mlp_against_float64(approximate, entries, monkeypatch, fused_calls):
    monkeypatch.setattr(mlp_ops, 'FORWARD_ENTRIES', entries)
    mlp, x = make_mlp(approximate), 3 * torch.randn(2, 7, 12)
    with torch.no_grad():
        found = mlp(x)
    assert fused_calls and found.shape == x.shape
    torch.testing.assert_close(found.double(), layer_by_layer(mlp.double(), x.double()), rtol=0, atol=1e-5)


def test_fused_patch_embedding_against_float64(fused_calls):
    embed, x = make_embed(), torch.randn(2, 3, 19, 34)
    with torch.no_grad():
        found = embed(x)
    assert len(fused_calls) == 3
    torch.testing.assert_close(found.double(), layer_by_layer(embed.double(), x.double()), rtol=0, atol=1e-5)


@pytest.mark.parametrize('half_model', [False, True])
def test_fused_mlp_in_bfloat16(half_model):
    """Rounding to bfloat16 has a relative error of 2^-9 per result."""
    mlp, x = make_mlp(), torch.randn(2, 7, 12)
    wanted = layer_by_layer(mlp, x).detach()
    if half_model:
        mlp, x = mlp.bfloat16(), x.bfloat16()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=not half_model):
        found = mlp(x)
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).norm() < 0.01 * wanted.norm()


def test_changed_weights_are_seen():
    mlp, embed = make_mlp(), make_embed()
    x, image = torch.randn(1, 5, 12), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        before = mlp(x), embed(image)
        mlp.fc1.weight.mul_(2)
        embed[1].running_mean.add_(1)
        embed[3].weight.data = embed[3].weight.data * 2
        after = mlp(x), embed(image)
        for old, new, layers, value in zip(before, after, (mlp, embed), (x, image)):
            assert not torch.allclose(old, new)
            torch.testing.assert_close(new, layer_by_layer(layers, value), rtol=1e-4, atol=1e-5)


def replace_forward(layer):
    layer.forward = lambda x, plain=layer.forward: plain(x) + 1


CHANGES = {
    'hook': lambda layer: layer.register_forward_hook(lambda module, args, out: out + 1),
    'pre-hook': lambda layer: layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    'forward of the instance': replace_forward,
}


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('name', ['fc1', 'act', 'fc2', 'drop1'])
def test_changed_layers_of_an_mlp_are_called(change, name, fused_calls):
    mlp, x = make_mlp(), torch.randn(2, 7, 12)
    CHANGES[change](mlp.get_submodule(name))
    with torch.no_grad():
        assert torch.equal(mlp(x), layer_by_layer(mlp, x))
    assert not fused_calls


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('index', [0, 4, 8])
def test_changed_layers_of_a_patch_embedding_are_called(change, index, fused_calls):
    embed, x = make_embed(), torch.randn(2, 3, 19, 34)
    CHANGES[change](embed[index])
    with torch.no_grad():
        assert torch.equal(embed(x), layer_by_layer(embed, x))
    assert not fused_calls


def test_pruned_and_parametrised_layers_are_called(fused_calls):
    x = torch.randn(2, 7, 12)
    for change in (lambda fc: prune.l1_unstructured(fc, 'weight', 0.5), weight_norm):
        mlp = make_mlp()
        change(mlp.fc1)
        with torch.no_grad():
            assert torch.equal(mlp(x), layer_by_layer(mlp, x))
    assert not fused_calls


@pytest.mark.parametrize(
    ('name', 'layer'),
    [('act', nn.ReLU()), ('drop1', nn.ReLU()), ('fc1', nn.Identity()), ('drop2', nn.Sequential(nn.Dropout()))],
)
def test_replaced_layers_of_an_mlp_are_called(name, layer, fused_calls):
    mlp, x = make_mlp(), torch.randn(2, 7, 48 if name == 'fc1' else 12)
    setattr(mlp, name, layer.eval())
    with torch.no_grad():
        assert torch.equal(mlp.after_fc1(mlp.fc1(x)), layer_by_layer(mlp, x))
        if name != 'fc1':
            assert torch.equal(mlp(x), layer_by_layer(mlp, x))
    assert not fused_calls


@pytest.mark.parametrize(
    'change',
    [
        lambda embed: embed.__setitem__(2, nn.GELU()),
        lambda embed: embed.__setitem__(0, nn.Conv2d(3, 32, 3, 2, padding=1, padding_mode='reflect')),
        lambda embed: embed.append(nn.Sigmoid()),
        lambda embed: embed.insert(0, nn.ReLU()),
        lambda embed: embed.__setitem__(1, nn.BatchNorm2d(32, track_running_stats=False)),
    ],
    ids=['activation', 'padding', 'appended', 'inserted', 'no statistics'],
)
def test_replaced_layers_of_a_patch_embedding_are_called(change, fused_calls):
    embed, x = make_embed(), torch.randn(2, 3, 19, 34)
    change(embed)
    with torch.no_grad():
        assert torch.equal(embed(x), layer_by_layer(embed, x))
    assert not fused_calls


def test_global_hooks_are_called(fused_calls):
    mlp, x = make_mlp(), torch.randn(2, 7, 12)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: out + 1 if isinstance(module, nn.Linear) else None
    )
    try:
        with torch.no_grad():
            assert torch.equal(mlp(x), layer_by_layer(mlp, x))
    finally:
        handle.remove()
    assert not fused_calls


@pytest.mark.parametrize('kind', ['register_module_full_backward_hook', 'register_module_full_backward_pre_hook'])
def test_global_backward_hooks_are_called(kind, fused_calls):
    mlp, x, calls = make_mlp(), torch.randn(2, 7, 12, requires_grad=True), []
    handle = getattr(nn.modules.module, kind)(lambda module, *grads: calls.append(type(module)))
    try:
        mlp(x).sum().backward()
    finally:
        handle.remove()
    assert calls.count(nn.Linear) == 2 and not fused_calls


def test_tangents_pass(fused_calls):
    mlp, x, tangent = make_mlp(), torch.randn(2, 7, 12), torch.randn(2, 7, 12)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        out = mlp(torch.autograd.forward_ad.make_dual(x, tangent))
        found = torch.autograd.forward_ad.unpack_dual(out).tangent
    wanted = torch.func.jvp(lambda value: layer_by_layer(mlp, value), (x,), (tangent,))[1]
    torch.testing.assert_close(found, wanted)
    assert not fused_calls


def test_a_user_can_switch_onednn_off(fused_calls):
    mlp, x = make_mlp(), torch.randn(2, 7, 12)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(mlp(x), layer_by_layer(mlp, x))
    assert not fused_calls


def test_wrong_channels_are_refused_as_by_the_layers():
    with torch.no_grad(), pytest.raises(RuntimeError, match='shapes cannot be multiplied'):
        make_mlp()(torch.randn(2, 7, 11))


def test_dropout_and_batch_statistics_stay_active(fused_calls):
    mlp, embed = make_mlp(drop_rate=0.5).train(), make_embed().train()
    before = embed[1].running_mean.clone()
    with torch.no_grad():
        assert (mlp(torch.randn(2, 7, 12)) == 0).any()
        embed(torch.randn(2, 3, 19, 34))
    assert not fused_calls and not torch.equal(embed[1].running_mean, before)


def gradients(out, inputs):
    return torch.autograd.grad((out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum(), inputs)


@needs_fused
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('approximate', ['tanh', 'none'])
@pytest.mark.parametrize(('entries', 'tokens'), [(100, 3), (2**20, 256)])
def test_gradients_of_a_fused_mlp_against_float64(approximate, training, entries, tokens, monkeypatch, fused_calls):
    monkeypatch.setattr(mlp_ops, 'FORWARD_ENTRIES', entries)
    monkeypatch.setattr(mlp_ops, '_BACKWARD_TOKENS', tokens)
    mlp, x = make_mlp(approximate).train(training), (3 * torch.randn(2, 7, 12)).requires_grad_()
    found = gradients(mlp(x), [x, *mlp.parameters()])
    assert fused_calls
    wide = x.detach().double().requires_grad_()
    wanted = gradients(layer_by_layer(mlp.double(), wide), [wide, *mlp.parameters()])
    for one, exact in zip(found, wanted):
        assert (one - exact).abs().max() < 2e-6 * exact.abs().max()


@needs_fused
def test_frozen_parts_of_a_fused_mlp_get_no_gradient(fused_calls):
    x = torch.randn(2, 7, 12)
    for learned in ('fc1.weight', 'fc1.bias', 'fc2.weight', 'fc2.bias', 'x'):
        mlp, value = make_mlp(), x.clone().requires_grad_(learned == 'x')
        parameters = dict(mlp.named_parameters(), x=value)
        wanted = gradients(layer_by_layer(mlp, value), [parameters[learned]])
        for name, tensor in parameters.items():
            tensor.requires_grad_(name == learned)
        out = mlp(value)
        (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
        assert [name for name, tensor in parameters.items() if tensor.grad is not None] == [learned]
        torch.testing.assert_close(parameters[learned].grad, *wanted)
    assert len(fused_calls) == 5


@needs_fused
def test_a_fused_mlp_saves_only_its_tokens(fused_calls):
    mlp, x, saved = make_mlp().train(), torch.randn(2, 7, 12, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        mlp(x)
    assert fused_calls
    parameters = {tensor.data_ptr() for tensor in mlp.parameters()}
    assert [tensor.numel() for tensor in saved if tensor.data_ptr() not in parameters] == [x.numel()]


def test_a_backward_pass_inside_autocast_stays_in_float32():
    mlp, x = make_mlp(), torch.randn(2, 7, 12, requires_grad=True)
    wanted = gradients(mlp(x), [x, *mlp.parameters()])
    out = mlp(x)
    with torch.autocast('cpu', torch.bfloat16):
        found = gradients(out, [x, *mlp.parameters()])
    for one, other in zip(found, wanted):
        assert torch.equal(one, other)


@pytest.mark.parametrize('kind', ['hook', 'pre-hook'])
def test_backward_hooks_are_called(kind, fused_calls):
    mlp, x, calls = make_mlp(), torch.randn(2, 7, 12, requires_grad=True), []
    if kind == 'hook':
        mlp.fc1.register_full_backward_hook(lambda *args: calls.append(1))
    else:
        mlp.fc1.register_full_backward_pre_hook(lambda *args: calls.append(1))
    mlp(x).sum().backward()
    assert calls and not fused_calls


def test_half_precision_trains_by_the_layers(fused_calls):
    mlp, x = make_mlp().train(), torch.randn(2, 7, 12, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16):
        mlp(x).sum().backward()
    assert mlp.fc1.weight.grad is not None and not fused_calls


def test_layers_without_a_bias_are_called(fused_calls):
    mlp, x = make_mlp(), torch.randn(2, 7, 12)
    mlp.fc1 = nn.Linear(12, 48, bias=False)
    with torch.no_grad():
        assert torch.equal(mlp(x), layer_by_layer(mlp, x))
    assert not fused_calls


def test_other_dtypes_use_the_layers(fused_calls):
    mlp, x = make_mlp(), torch.randn(2, 7, 12)
    with torch.no_grad():
        assert mlp.double()(x.double()).dtype == torch.float64
    assert not fused_calls
    with torch.no_grad(), pytest.raises(RuntimeError, match='dtype'):
        mlp(x)


def test_multiply_adds_are_counted(fused_calls):
    mlp, embed = make_mlp(), make_embed()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        mlp(torch.randn(2, 7, 12))
        embed(torch.randn(1, 3, 16, 16))
    products = 2 * 14 * 12 * 48 + 64 * 27 * embed[0].out_channels + 64 * 9 * embed[0].out_channels ** 2
    assert counter.get_total_flops() == 2 * (products + 16 * 9 * embed[0].out_channels * 10)
    assert not fused_calls


def test_without_the_fused_operator(monkeypatch):
    mlp, x = make_mlp(), torch.randn(2, 7, 12)
    with torch.no_grad():
        found = mlp(x)
        monkeypatch.setattr(linear_ops, '_FUSED', None)
        assert fused_layers.fused_dtype(x, mlp) is None
        torch.testing.assert_close(found, mlp(x), rtol=0, atol=1e-6)


def test_maps_of_inference_are_contiguous_and_the_same():
    torch.manual_seed(0)
    model = soft.SOFT(dict(embed_dims=[8] * 4, num_heads=[2] * 4, depths=[1] * 4)).eval()
    # The map of stage 1 is large enough for the copy image by image.
    x = torch.randn(3, 3, 250, 278)
    assert 63 * 70 >= soft._LARGE_MAP
    with torch.no_grad():
        found = model(x)
        wanted = model.double()(x.double())
    for new, exact in zip(found, wanted):
        assert new.is_contiguous() and exact.is_contiguous()
        assert (new - exact).norm() < 1e-4 * exact.norm()
