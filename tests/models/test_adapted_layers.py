"""What other libraries do to layers of a backbone: pruning, adapters, hooks, sharding and deterministic operators."""

import copy
import math
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from soft_mm import SOFT, ops
from soft_mm.models.attention import SoftmaxFreeCrossAttention

ARCH = dict(embed_dims=(8, 8, 16, 16), num_heads=(1, 1, 2, 2), depths=(1, 1, 1, 1))
BOUNDED = dict(solver='cholesky', max_landmarks=3)
ATTENTIONS = {
    'default': None,
    'bounded cholesky': BOUNDED,
    'softmax-free stage 4': [{}, {}, {}, dict(BOUNDED, type='SoftmaxFreeAttention')],
}
FORMS = pytest.mark.parametrize('form', ATTENTIONS)


def build(form='default', **options):
    torch.manual_seed(0)
    return SOFT(ARCH, attention=ATTENTIONS[form], **options)


def images(size=(64, 96)):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def loss(maps):
    generator = torch.Generator().manual_seed(2)
    return sum((out * torch.randn(out.shape[1:], generator=generator)).mean() for out in maps)


def train_step(model):
    """Take one step of SGD on the parameters that learn."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    value = loss(model.train()(images()))
    value.backward()
    optimizer.step()
    optimizer.zero_grad()
    return value


@torch.no_grad()
def evaluate(model):
    return model.eval()(images())


def difference(found, wanted):
    """Largest norm of the difference of two tensors, relative to the norm of the second. NaN if one is NaN."""
    errors = [(one - other).norm() / other.norm() for one, other in zip(found, wanted, strict=True)]
    return torch.stack(errors).max().item()


def filters(model):
    """Names of the layers that sample landmarks and convolve values."""
    return [name for name, _ in model.named_modules() if name.endswith(('attn.landmark', 'attn.local'))]


def test_layers_with_filters():
    assert len(filters(build())) == 6 and len(filters(build('softmax-free stage 4'))) == 8


@FORMS
def test_pruned_filters_are_in_use_and_stay_zero(form):
    """Against a model whose filters are masked by hand after every step."""
    pruned, masked, whole = build(form), build(form), build(form)
    masks = {}
    for name in filters(pruned):
        layer = pruned.get_submodule(name)
        prune.l1_unstructured(layer, 'weight', 0.5)
        masks[name] = layer.weight_mask

    @torch.no_grad()
    def mask():
        for name, value in masks.items():
            masked.get_submodule(name).weight.mul_(value)

    mask()
    assert difference(evaluate(pruned), evaluate(whole)) > 0.01
    for _ in range(2):
        assert difference(evaluate(pruned), evaluate(masked)) < 1e-5
        before = [layer.clone() for layer in map(pruned.get_parameter, (f'{name}.weight_orig' for name in masks))]
        torch.testing.assert_close(train_step(pruned), train_step(masked))
        mask()
        for name, old in zip(masks, before):
            assert not torch.equal(pruned.get_parameter(f'{name}.weight_orig'), old)
    assert difference(evaluate(pruned), evaluate(masked)) < 1e-5
    for name, value in masks.items():
        weight = pruned.get_submodule(name).weight
        assert not weight[value == 0].any()
        torch.testing.assert_close(weight, masked.get_parameter(f'{name}.weight'))


class LowRank(nn.Module):
    """Add a low-rank term to the output of a layer, in the manner of ``peft``."""

    def __init__(self, base_layer, rank=2):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        if isinstance(base_layer, nn.Conv2d):
            sides = dict(kernel_size=base_layer.kernel_size, stride=base_layer.stride, padding=base_layer.padding)
            self.down = nn.Conv2d(base_layer.in_channels, rank, bias=False, **sides)
            self.up = nn.Conv2d(rank, base_layer.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(base_layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, base_layer.out_features, bias=False)

    def forward(self, x, *args, **kwargs):
        return self.base_layer(x, *args, **kwargs) + self.up(self.down(x))

    @torch.no_grad()
    def merged(self):
        """Return the layer with the term in its weight."""
        layer = copy.deepcopy(self.base_layer)
        layer.weight += (self.up.weight.flatten(1) @ self.down.weight.flatten(1)).view_as(layer.weight)
        return layer


def replace(model, name, layer):
    parent, _, child = name.rpartition('.')
    setattr(model.get_submodule(parent), child, layer)


ADAPTED = [
    'stages.0.patch_embed.3',
    'stages.2.patch_embed.0',
    'stages.0.blocks.0.attn.qv',
    'stages.2.blocks.0.attn.qv',
    'stages.0.blocks.0.attn.proj',
    'stages.0.blocks.0.mlp.fc1',
    'stages.2.blocks.0.mlp.fc2',
    'stages.3.blocks.0.attn.qkv',
    'stages.3.blocks.0.attn.proj',
]


@pytest.mark.parametrize('name', ADAPTED)
def test_low_rank_adapters_take_effect(name):
    """Against the model with merged weights, in training and in evaluation, before and after a step."""
    plain, model = build().requires_grad_(False), build().requires_grad_(False)
    adapter = LowRank(model.get_submodule(name))
    replace(model, name, adapter)
    nn.init.zeros_(adapter.up.weight)
    assert difference(evaluate(model), evaluate(plain)) < 1e-5
    nn.init.normal_(adapter.up.weight)
    for _ in range(2):
        before = [parameter.clone() for parameter in adapter.parameters()]
        merged = copy.deepcopy(model)
        replace(merged, name, adapter.merged())
        assert (
            difference(evaluate(model), evaluate(merged)) < 1e-3 < 0.01 < difference(evaluate(model), evaluate(plain))
        )
        with torch.no_grad():
            wanted = merged.train()(images())
        assert difference(copy.deepcopy(model).train()(images()), wanted) < 1e-3
        train_step(model)
        moved = [not torch.equal(*pair) for pair in zip(before, adapter.parameters())]
        # The base layer is frozen.
        assert moved == [parameter.requires_grad for parameter in adapter.parameters()] and sum(moved) == 2


@pytest.mark.parametrize('name', ['q', 'kv', 'proj'])
def test_low_rank_adapters_of_cross_attention(name):
    torch.manual_seed(0)
    adapted = SoftmaxFreeCrossAttention(8, 2, kv_dims=12).double()
    adapter = LowRank(adapted.get_submodule(name)).double()
    merged = copy.deepcopy(adapted)
    setattr(adapted, name, adapter)
    setattr(merged, name, adapter.merged())
    query, key_value = torch.randn(2, 5, 8).double(), torch.randn(2, 15, 12).double()
    assert difference([adapted(query, key_value, (3, 5))], [merged(query, key_value, (3, 5))]) < 1e-10


@pytest.mark.parametrize('training', [True, False])
@FORMS
def test_forward_hooks_fire_once_and_may_change_the_output(form, training):
    x = images()
    with torch.no_grad():
        plain = build(form).train(training)(x)
    for name in filters(build(form)):
        hooked, silent, calls = build(form).train(training), build(form).train(training), []

        def silence(layer, inputs, output, calls=calls):
            calls.append(1)
            return (output[0] * 0, output[1]) if isinstance(output, tuple) else output * 0

        hooked.get_submodule(name).register_forward_hook(silence)
        nn.init.zeros_(silent.get_submodule(name).weight)
        with torch.set_grad_enabled(training):
            found = hooked(x)
            assert len(calls) == 1, name
            assert difference(found, silent(x)) < 1e-5 and difference(found, plain) > 1e-3, name


SHARDED = """
import copy
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from models.test_adapted_layers import build, difference, evaluate, images, loss

torch.set_num_threads(1)
distributed.init_process_group('gloo')
mesh, rank = init_device_mesh('cpu', (2,)), distributed.get_rank()
for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
    torch.set_default_dtype(dtype)
    for form in ('default', 'softmax-free stage 4'):
        # BatchNorm that is trained would see other images in each process.
        whole = build(form, norm_eval=True)
        sharded = copy.deepcopy(whole)
        for part in (*sharded.stages, sharded):
            fully_shard(part, mesh=mesh)
            # Gloo would not average gradients in float32 (pytorch issue 162338).
            part.set_force_sum_reduction_for_comms(True)
        assert difference(evaluate(sharded), evaluate(whole)) < tolerance
        for model, batch in ((sharded, images()[rank : rank + 1]), (whole, images())):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            loss(model.train()(batch)).backward()
            optimizer.step()
        gradients = [parameter.grad.full_tensor() for parameter in sharded.parameters()]
        assert difference(gradients, [parameter.grad for parameter in whole.parameters()]) < tolerance
        assert difference(evaluate(sharded), evaluate(whole)) < tolerance
        assert all(parameter.placements[0].is_shard() for parameter in sharded.parameters())
print('equal')
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='starts two processes')
def test_stages_sharded_over_two_processes_equal_one_model(tmp_path, environment):
    """``fully_shard`` (FSDP2) on each stage: gradients of a joint batch, evaluations before and after the step."""
    fsdp = pytest.importorskip('torch.distributed.fsdp')
    if not hasattr(getattr(fsdp, 'FSDPModule', None), 'set_force_sum_reduction_for_comms'):
        pytest.skip('this PyTorch has no fully_shard, or none that can average with Gloo')
    # Here, because it needs packages that the other tests do not need.
    from test_processes import run_program

    assert run_program(SHARDED, tmp_path, environment=environment, processes=2).count('equal') == 2


@pytest.fixture
def deterministic():
    """Set what mmengine sets with ``randomness=dict(deterministic=True)``."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def no_adaptive_pooling(monkeypatch):
    """Refuse adaptive pooling, as CUDA does for its gradient."""

    def refuse(*args):
        raise RuntimeError('adaptive_avg_pool2d has no deterministic gradient')

    pool = F.adaptive_avg_pool2d
    monkeypatch.setattr(F, 'adaptive_avg_pool2d', refuse)
    return pool


GRIDS = [((7, 5), (3, 2)), ((9, 13), (4, 5)), ((1, 11), (1, 4)), ((6, 7), (6, 3))]


def tokens(grid, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, math.prod(grid), 4, generator=generator, dtype=torch.float64, requires_grad=True)


def assert_equal_with_gradients(found, wanted, x):
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(3), dtype=wanted.dtype)
    grads = [torch.autograd.grad((out * weights).sum(), x)[0] for out in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


@pytest.mark.parametrize(('grid', 'out_grid'), GRIDS, ids=str)
def test_deterministic_pooling_equals_adaptive_pooling(grid, out_grid, deterministic, no_adaptive_pooling):
    x = tokens(grid)
    maps = x.unflatten(2, grid).permute(0, 1, 4, 2, 3).flatten(0, 1)
    wanted = no_adaptive_pooling(maps, out_grid).unflatten(0, x.shape[:2]).flatten(3).transpose(2, 3)
    assert_equal_with_gradients(ops.mean_landmarks(x, grid, out_grid), wanted, x)


@pytest.mark.parametrize(('grid', 'out_grid'), GRIDS, ids=str)
def test_deterministic_masked_pooling_equals_means_of_the_present(grid, out_grid, deterministic, no_adaptive_pooling):
    x = tokens(grid)
    present = torch.rand(2, *grid, generator=torch.Generator().manual_seed(4)) < 0.6
    # A cell without a token.
    present[0, : -(-grid[0] // out_grid[0]), : -(-grid[1] // out_grid[1])] = False
    found, cells = ops.mean_present_landmarks(x, present.flatten(1).unsqueeze(1).double(), grid, out_grid)
    maps, means, filled = x.unflatten(2, grid), [], []
    for row in range(out_grid[0]):
        for column in range(out_grid[1]):
            cell = [slice(i * n // m, -(-(i + 1) * n // m)) for i, n, m in zip((row, column), grid, out_grid)]
            inside = present[:, cell[0], cell[1]]
            count = inside.sum((1, 2))
            total = (maps[:, :, cell[0], cell[1]] * inside[:, None, :, :, None]).sum((2, 3))
            means.append(total / count.clamp(min=1)[:, None, None])
            filled.append(count > 0)
    assert torch.equal(cells, torch.stack(filled, 1).unsqueeze(1).double())
    assert not cells[0, 0, 0] and cells.any()
    assert_equal_with_gradients(found, torch.stack(means, 2), x)


@pytest.mark.parametrize('options', [{}, dict(normalized=True), dict(sampler='mean'), dict(solver='newton')], ids=str)
def test_deterministic_training_equals_the_other(options, float64, request):
    """The gradients of a step. The cells of the pooled grids overlap."""
    torch.manual_seed(0)
    attention = dict(dict(BOUNDED, max_landmarks=7), **options)
    # Without the mean of a batch, the biases before a BatchNorm have a gradient.
    model = SOFT(ARCH, [attention] * 3 + [dict(attention, type='SoftmaxFreeAttention')], norm_eval=True)

    def gradients():
        model.zero_grad()
        loss(model.train()(images((96, 160)))).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    wanted = gradients()
    for fixture in ('deterministic', 'no_adaptive_pooling'):
        request.getfixturevalue(fixture)
    found = gradients()
    assert difference(found, wanted) < 1e-9
    assert all(torch.equal(one, other) for one, other in zip(found, gradients()))
