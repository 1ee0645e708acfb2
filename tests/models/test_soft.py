"""The backbone's options, shapes, errors and loading."""

import functools

import pytest
import torch
from authors import REDUCED_ARCH, official_models
from mmengine.config import ConfigDict

from soft_mm import SOFT, SoftmaxFreeAttention
from soft_mm.models import blocks
from soft_mm.models.blocks import MLP, DropPath
from soft_mm.models.soft import resize_pos_embed
from soft_mm.registry import MODELS

TINY_DIMS = (64, 128, 320, 512)
ATTENTIONS = {
    'default': {},
    'normalized': dict(normalized=True),
    'cholesky': dict(solver='cholesky'),
    'normalized-cholesky': dict(normalized=True, solver='cholesky'),
    'bounded': dict(max_landmarks=4),
    'normalized-bounded': dict(normalized=True, max_landmarks=4),
    'exact': dict(newton_backward='exact', newton_iterations=7),
}


def reduced(**kwargs):
    torch.manual_seed(0)
    return SOFT(REDUCED_ARCH, **kwargs)


def weighted_sum(maps):
    """A loss whose gradient does not vanish behind a LayerNorm, as that of a sum of squares does."""
    generator = torch.Generator().manual_seed(0)
    return sum((out * torch.randn(out.shape, generator=generator)).sum() for out in maps)


@pytest.mark.parametrize('arch', SOFT.arch_zoo)
def test_parameter_counts_equal_the_authors(arch):
    with torch.device('meta'):
        backbone = SOFT(arch)
    head = 1000 * (512 + 1)
    assert sum(p.numel() for p in backbone.parameters()) + head == official_models()[arch]['params']


@pytest.mark.parametrize('attention', ATTENTIONS.values(), ids=ATTENTIONS)
@pytest.mark.parametrize('size', [(32, 32), (33, 95), (57, 200), (128, 64), (32, 321)], ids='{0[0]}x{0[1]}'.format)
def test_any_size_gives_finite_maps_and_gradients(size, attention):
    model = reduced(attention=attention).train()
    maps = model(torch.randn(2, 3, *size))
    for stride, dims, out in zip((4, 8, 16, 32), REDUCED_ARCH['embed_dims'], maps):
        assert out.shape == (2, dims, -(-size[0] // stride), -(-size[1] // stride))
        assert out.is_contiguous() and torch.isfinite(out).all()
    sum(out.square().mean() for out in maps).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_grid_smaller_than_the_ratio_has_one_landmark():
    model = SOFT(dict(REDUCED_ARCH, ratios=(16, 8, 4, 1))).eval()
    assert torch.isfinite(model(torch.randn(1, 3, 32, 48))[-1]).all()


@pytest.mark.parametrize('arch', ['tiny', 'medium'])
def test_outputs_of_the_published_archs(arch):
    with torch.no_grad():
        maps = SOFT(arch).eval()(torch.randn(1, 3, 64, 96))
    assert [tuple(out.shape) for out in maps] == [
        (1, dims, 64 // stride, 96 // stride) for dims, stride in zip(SOFT.arch_zoo[arch]['embed_dims'], (4, 8, 16, 32))
    ]


@pytest.mark.parametrize('out_indices', [(0,), (3,), (1, 2), (0, 3), (0, 1, 2, 3)])
def test_out_indices_select_and_build_no_more(out_indices):
    torch.manual_seed(0)
    whole = reduced().eval()
    part = reduced(out_indices=out_indices).eval()
    part.load_state_dict({k: v for k, v in whole.state_dict().items() if int(k.split('.')[1]) <= out_indices[-1]})
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted, found = whole(x), part(x)
    assert len(found) == len(out_indices)
    for i, out in zip(out_indices, found):
        torch.testing.assert_close(out, wanted[i])
    assert len(part.stages) == out_indices[-1] + 1


def test_cls_token_is_last_and_maps_precede_it():
    outputs = reduced(out_type='cls_token', out_indices=(1, 3)).eval()(torch.randn(2, 3, 64, 96))
    assert [tuple(out.shape) for out in outputs] == [(2, 64, 8, 12), (2, 128)]


@pytest.mark.parametrize(
    ('attention', 'dtype', 'tolerance'),
    # In float32, the inverse of Newton amplifies rounding, which differs between batch sizes and machines.
    [(attention, torch.float64, 1e-8) for attention in ATTENTIONS.values()]
    + [
        (dict(solver='cholesky', ridge=0.1, normalized=normalized), torch.float32, 1e-5) for normalized in (False, True)
    ],
    ids=str,
)
def test_an_image_does_not_depend_on_its_batch(attention, dtype, tolerance):
    model = reduced(attention=attention).eval().to(dtype)
    x = torch.randn(2, 3, 96, 160, dtype=dtype)
    x[1] = 0.01 * x[1] + 3
    with torch.no_grad():
        for alone, together in zip(model(x[:1]), model(x)):
            torch.testing.assert_close(together[:1], alone, rtol=0, atol=tolerance)


@pytest.mark.parametrize('in_channels', [1, 4])
def test_in_channels(in_channels):
    model = reduced(in_channels=in_channels).eval()
    assert model(torch.randn(1, in_channels, 32, 32))[0].shape == (1, 32, 8, 8)


def test_attention_of_each_stage():
    model = reduced(attention=[dict(normalized=True), dict(max_landmarks=9), dict(solver='cholesky')])
    settings = [
        (s.blocks[0].attn.normalized, s.blocks[0].attn.max_landmarks, s.blocks[0].attn.solver) for s in model.stages[:3]
    ]
    assert settings == [(True, None, 'newton'), (False, 9, 'newton'), (False, None, 'cholesky')]


def test_attention_keys_left_out_take_the_default():
    attn = reduced(attention=ConfigDict(max_landmarks=5)).stages[0].blocks[0].attn
    assert isinstance(attn, SoftmaxFreeAttention)
    kept = (attn.normalized, attn.solver, attn.newton_iterations, attn.newton_backward, attn.max_landmarks)
    assert kept == (False, 'newton', 20, 'one_step', 5)


@pytest.mark.parametrize('attention', [{}, dict(solver='cholesky', max_landmarks=4), dict(normalized=True)], ids=str)
def test_shapes_on_the_meta_device(attention):
    """Shapes without computing, as estimates of memory use them, with and without gradients."""
    model = reduced(attention=attention)
    x = torch.rand(2, 3, 64, 96)
    shapes = [out.shape for out in model(x)]
    outputs = model.to('meta')(x.to('meta'))
    assert [out.shape for out in outputs] == shapes
    sum(out.sum() for out in outputs).backward()


def test_attention_of_a_user():
    @MODELS.register_module(name='IdentityAttention')
    class IdentityAttention(torch.nn.Module):
        def __init__(self, embed_dims, num_heads, ratio, conv_size, gain=1):
            super().__init__()
            self.gain = gain

        def forward(self, x, grid):
            return self.gain * x

    try:
        attn = reduced(attention=dict(type='IdentityAttention', gain=2)).stages[2].blocks[1].attn
        assert attn.gain == 2
        with pytest.raises(
            TypeError, match=r"\['gian'\] are unknown to IdentityAttention; allowed are \['type', 'gain'\]"
        ):
            reduced(attention=dict(type='IdentityAttention', gian=2))
    finally:
        MODELS.module_dict.pop('IdentityAttention')


@pytest.mark.parametrize(
    ('shape', 'message'),
    [
        ((65, 2, 4, 3), 'embed_dims=65: expected a multiple of num_heads=2'),
        ((64, 2, 0, 3), 'ratio=0: expected an integer >= 1'),
        ((64, 2, 4, 4), 'conv_size=4: expected an odd integer'),
    ],
)
def test_attention_alone_checks_its_shape(shape, message):
    with pytest.raises(ValueError, match=message):
        SoftmaxFreeAttention(*shape)


@pytest.mark.parametrize(
    ('options', 'name'),
    [
        (dict(solver='cholesky', newton_backward='exact'), 'newton_backward'),
        (dict(solver='cholesky', newton_iterations=5), 'newton_iterations'),
        (dict(solver='svd', ridge=0.1), 'ridge'),
        (dict(solver='svd', newton_iterations=5), 'newton_iterations'),
        (dict(normalized=True, ridge=0.1), 'ridge'),
        (dict(normalized=True, newton_backward='exact'), 'newton_backward'),
        (dict(seed=3), 'seed'),
    ],
)
def test_options_without_effect_are_errors(options, name):
    with pytest.raises(ValueError, match=f'{name}=.* has no effect with'):
        reduced(attention=options)


def test_defaults_without_effect_are_allowed():
    """A config may spell out every default and override one key."""
    defaults = dict(normalized=False, newton_iterations=20, newton_backward='one_step', max_landmarks=None, ridge=0.01)
    for changes in (dict(solver='cholesky'), dict(solver='svd'), dict(solver='newton', normalized=True)):
        reduced(attention={**defaults, **changes})


def test_max_landmarks_that_do_not_bind_change_nothing():
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        free, bounded = reduced().eval()(x), reduced(attention=dict(max_landmarks=6)).eval()(x)
    for one, other in zip(free, bounded):
        assert torch.equal(one, other)


def test_initialisation_is_the_authors():
    model = SOFT('tiny')
    attn = model.stages[2].blocks[0].attn
    for weight in (
        attn.qv.weight,
        attn.proj.weight,
        model.stages[3].pos_embed,
        model.stages[3].blocks[0].mlp.fc1.weight,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.stages[3].cls_token.abs().max() > 0
    for bias in (attn.qv.bias, attn.proj.bias, model.stages[3].norm.bias):
        assert not bias.any()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.init_weights()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    x = torch.ones(4000, 3, 5)
    out = drop(x)
    kept = out[:, 0, 0] > 0
    assert torch.equal(out, kept[:, None, None] * x / 0.75)
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)
    assert torch.equal(drop.eval()(x), x)


def test_drop_path_rate_rises_over_the_blocks():
    rates = [block.drop_path.drop_prob for stage in SOFT('tiny', drop_path_rate=0.7).stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


def test_drop_rate_reaches_positions_and_stage_4():
    model = reduced(drop_rate=0.3)
    rates = {name: m.p for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert {name for name, p in rates.items() if p == 0.3} == {
        *(f'stages.{i}.pos_drop' for i in range(4)),
        *(f'stages.3.blocks.0.{part}' for part in ('attn_drop', 'mlp.drop1', 'mlp.drop2')),
    }


@pytest.mark.parametrize('frozen', [-1, 0, 1, 3, 4])
def test_frozen_stages(frozen):
    model = reduced(frozen_stages=frozen, drop_rate=0.1).train()
    for name, parameter in model.named_parameters():
        stage, part = int(name.split('.')[1]), name.split('.')[2]
        is_frozen = stage < frozen or (frozen == 0 and stage == 0 and part in ('patch_embed', 'pos_embed'))
        assert parameter.requires_grad != is_frozen, name
    for i, stage in enumerate(model.stages):
        assert stage.training == (i >= frozen)
        assert stage.patch_embed.training == (i >= max(frozen, 1) if frozen >= 0 else True)
    if frozen < 4:
        sum(out.mean() for out in model(torch.randn(2, 3, 32, 32))).backward()


@pytest.mark.parametrize('norm_eval', [False, True])
def test_norm_eval(norm_eval):
    model = reduced(norm_eval=norm_eval).train()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 6 and all(norm.training != norm_eval for norm in norms)
    assert model.stages[0].blocks[0].training
    model.eval()
    assert not any(norm.training for norm in norms)


@pytest.mark.parametrize('name', ['default', 'normalized', 'normalized-cholesky', 'exact'])
def test_with_cp_computes_the_same(name):
    x = torch.randn(2, 3, 64, 64)
    results = []
    for with_cp in (False, True):
        model = reduced(with_cp=with_cp, attention=ATTENTIONS[name], drop_path_rate=0.3).train()
        torch.manual_seed(1)
        out = model(x)
        weighted_sum(out).backward()
        results.append([*out, *(p.grad for p in model.parameters())])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other)


def test_mlp_in_chunks(monkeypatch):
    mlp, x = MLP(8, 'tanh').double(), torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    monkeypatch.setitem(blocks._CHUNK_ENTRIES, 'cpu', 100)
    wanted = torch.nn.Sequential.forward(mlp, x)
    inputs = [x, *mlp.parameters()]
    for training in (True, False):
        found = mlp.train(training)(x)
        torch.testing.assert_close(found, wanted)
        grads = [torch.autograd.grad(out.square().sum(), inputs, retain_graph=True) for out in (found, wanted)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize('drop_rate', [0.0, 0.3])
def test_mlp_computes_its_gelu_again(drop_rate):
    """The same outputs and gradients, with one tensor of the hidden width fewer held."""
    mlp, x = MLP(8, 'tanh', drop_rate), torch.randn(2, 5, 8, requires_grad=True)
    # Layers with hooks are called one by one.
    mlp.act.register_forward_hook(lambda module, args, out: None)
    results, kept = [], []

    def pack(tensor):
        kept[-1] += tensor.numel() == 2 * 5 * 32
        return tensor

    for forward in (mlp.forward, functools.partial(torch.nn.Sequential.forward, mlp)):
        torch.manual_seed(0)
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = forward(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *mlp.parameters()])])
    for one, other in zip(*results):
        assert torch.equal(one, other)
    assert kept[0] < kept[1]


def test_position_embeddings_are_resized_in_float32():
    embedding = torch.randn(1, 8, 7, 5).bfloat16()
    wanted = torch.nn.functional.interpolate(embedding.float(), (11, 4), mode='bilinear').bfloat16()
    assert torch.equal(resize_pos_embed(embedding, (11, 4)), wanted)
    model = reduced().eval().to(torch.bfloat16)
    assert model(torch.randn(1, 3, 96, 64, dtype=torch.bfloat16))[0].dtype == torch.bfloat16


@pytest.mark.parametrize('img_size', [64, (96, 160)])
def test_position_embeddings_are_resized_at_load(img_size):
    source, target = reduced().eval(), reduced(img_size=img_size).eval()
    target.load_state_dict(source.state_dict())
    x = torch.randn(1, 3, *target.img_size)
    with torch.no_grad():
        for one, other in zip(source(x), target(x)):
            torch.testing.assert_close(one, other)


def test_weights_written_through_data_are_used():
    """Weight averaging and quantisation write through ``.data``, which autograd and version counters do not see."""
    model, x = reduced(out_indices=(0,)).eval(), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        first = model(x)[0]
        model.stages[0].pos_embed.data.add_(1)
        model.stages[0].patch_embed[1].running_mean.data.add_(0.5)
        second = model(x)[0]
        fresh = reduced(out_indices=(0,)).eval()
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(second, fresh(x)[0]) and not torch.allclose(second, first, atol=1e-2)


def test_a_forward_leaves_no_state():
    """No cache: attributes of all modules are the same objects before and after forwards of two sizes."""
    model = reduced().eval()

    def attributes():
        return [
            {key: id(value) for key, value in vars(module).items() if key != 'training'} for module in model.modules()
        ]

    before = attributes()
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 96)), model(torch.randn(1, 3, 96, 64))
    assert attributes() == before


def test_layer_depth():
    model = SOFT('tiny')
    depth = {name: model.get_layer_depth(f'backbone.{name}', 'backbone.') for name, _ in model.named_parameters()}
    assert {total for _, total in depth.values()} == {10}
    assert depth['stages.0.patch_embed.0.weight'][0] == depth['stages.0.pos_embed'][0] == 0
    assert depth['stages.0.blocks.0.norm1.weight'][0] == 1
    assert depth['stages.1.patch_embed.0.weight'][0] == depth['stages.1.blocks.0.attn.qv.weight'][0] == 2
    assert depth['stages.3.cls_token'][0] == 7 and depth['stages.3.blocks.1.norm2.bias'][0] == 8
    assert depth['stages.3.norm.weight'][0] == 9
    assert model.get_layer_depth('head.fc.weight', 'backbone.') == (9, 10)


BAD_OPTIONS = [
    (
        dict(arch='nano'),
        ValueError,
        r"arch='nano' is unknown; choose one of \['tiny', 'small', 'medium', 'large', 'huge'\]",
    ),
    (dict(arch=3), ValueError, 'arch=3: expected one of'),
    (dict(arch=dict(embed_dims=(32, 64, 96, 128))), ValueError, r"missing keys \['num_heads', 'depths'\]"),
    (dict(arch=dict(REDUCED_ARCH, widths=3)), ValueError, r"unknown keys \['widths'\]"),
    (dict(arch=dict(REDUCED_ARCH, num_heads=(1, 2, 5, 4))), ValueError, 'but 96 is no multiple of 5'),
    (dict(arch=dict(REDUCED_ARCH, depths=(1, 1, 2))), ValueError, r'depths=\(1, 1, 2\): expected 4 integers'),
    (dict(arch=dict(REDUCED_ARCH, depths=(1, 1, 0, 1))), ValueError, 'depths=0: expected an integer >= 1'),
    (dict(arch=dict(REDUCED_ARCH, ratios=(8, 4, 2, 2))), ValueError, 'expected 1 as the last'),
    (dict(arch=dict(REDUCED_ARCH, conv_sizes=(9, 4, 3))), ValueError, 'expected odd integers'),
    (
        dict(attention=dict(type='FlashAttention9')),
        ValueError,
        r"'FlashAttention9' is unknown; choose one of \[.*'GaussianKernelAttention', .*'SoftmaxFreeAttention', ",
    ),
    (dict(attention=dict(type='soft_mm.SOFT')), ValueError, "'soft_mm.SOFT' does not take .*; choose one of"),
    (
        dict(attention=dict(normalised=True)),
        TypeError,
        r"\['normalised'\] are unknown to SoftmaxFreeAttention; allowed are",
    ),
    (dict(attention=dict(embed_dims=3)), TypeError, r"\['embed_dims'\] are unknown"),
    (dict(attention=dict(solver='lu')), ValueError, "solver='lu' is unknown; choose one of"),
    (dict(attention=dict(newton_backward='none')), ValueError, "newton_backward='none' is unknown"),
    (dict(attention=dict(newton_iterations=2.5)), ValueError, 'newton_iterations=2.5: expected an integer'),
    (dict(attention=dict(max_landmarks=0)), ValueError, 'max_landmarks=0: expected None or an integer >= 1'),
    (dict(attention=dict(normalized='yes')), ValueError, "normalized='yes': expected"),
    (dict(attention=dict(grid_dims=1)), ValueError, 'expected grid_dims=2'),
    (dict(attention=[{}, {}]), ValueError, 'a list of three dicts for stages 1 to 3, or a list of four dicts'),
    (dict(attention='SoftmaxFreeAttention'), ValueError, 'expected None, a dict'),
    (dict(out_type='avg'), ValueError, "out_type='avg' is unknown; choose one of \\('featmap', 'cls_token'\\)"),
    (dict(out_type='cls_token', out_indices=(0, 1)), ValueError, 'needs index 3'),
    (dict(out_indices=(0, 4)), ValueError, r'out_indices=\(0, 4\): expected indices from 0 to 3'),
    (dict(out_indices=None), ValueError, 'out_indices=None'),
    (dict(out_indices=()), ValueError, r'out_indices=\(\)'),
    (dict(out_indices=(2, 1)), ValueError, 'in ascending order'),
    (dict(in_channels=0), ValueError, 'in_channels=0: expected an integer >= 1'),
    (dict(img_size=2.5), ValueError, 'img_size=2.5'),
    (dict(norm_eval='no'), ValueError, "norm_eval='no': expected True or False"),
    (dict(img_size=16), ValueError, 'img_size=16'),
    (dict(drop_rate=1.0), ValueError, 'drop_rate=1.0'),
    (dict(drop_path_rate=-0.1), ValueError, 'drop_path_rate=-0.1'),
    (dict(frozen_stages=5), ValueError, 'frozen_stages=5'),
    (dict(frozen_stages=3, out_indices=(0, 1)), ValueError, 'frozen_stages=3'),
    (dict(pretrained='x.pth'), TypeError, r"take the keywords \['pretrained'\]; allowed are \['arch', 'attention'"),
]


@pytest.mark.parametrize(('options', 'error', 'message'), BAD_OPTIONS)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        SOFT(**options)


@pytest.mark.parametrize(
    ('shape', 'message'),
    [
        ((1, 4, 64, 64), r'shape \(1, 4, 64, 64\): expected \(B, 3, H, W\)'),
        ((3, 64, 64), 'expected'),
        ((1, 3, 31, 64), '31x64 pixels: expected both sides >= 32'),
    ],
)
def test_bad_input_is_named(shape, message):
    with pytest.raises(ValueError, match=message):
        reduced()(torch.zeros(shape))


@pytest.mark.parametrize('normalized', [False, True], ids=['plain', 'normalized'])
def test_bounding_repeated_patches_of_tokens_changes_nothing(normalized):
    """Every patch four times: a bound that pools them back acts as none does with four times the ridge."""
    torch.manual_seed(0)
    few = torch.randn(2, 2, 2, 3, 2, 8, dtype=torch.float64)
    tokens = few.repeat_interleave(2, dim=1).repeat_interleave(2, dim=3).reshape(2, 8 * 12, 8)
    bounded, unbounded = (
        SoftmaxFreeAttention(8, 2, 2, 3, normalized, 'cholesky', max_landmarks=bound, ridge=ridge).double()
        for bound, ridge in ((6, 0.01), (None, 0.04))
    )
    unbounded.load_state_dict(bounded.state_dict())
    torch.testing.assert_close(bounded(tokens, (8, 12)), unbounded(tokens, (8, 12)), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda x: x.to(torch.uint8), 'input of torch.uint8: expected floating-point numbers; normalise images'),
        (lambda x: x.to('meta'), 'input on meta, but the backbone is on cpu: move one of them'),
        (lambda x: x[..., :31], 'or pad it by the data_preprocessor: pad_size_divisor=32 in mmdet and mmpretrain'),
    ],
)
def test_wrong_inputs_are_named(change, message):
    model = SOFT(REDUCED_ARCH).eval()
    with pytest.raises(ValueError) as error:
        model(change(torch.rand(1, 3, 40, 48)))
    assert message in str(error.value)


def test_batchnorm_of_a_single_value():
    model = SOFT(REDUCED_ARCH).train()
    with pytest.raises(ValueError, match='cannot be trained on one image of 32x32 pixels.* or norm_eval=True'):
        model(torch.rand(1, 3, 32, 32))
    model(torch.rand(2, 3, 32, 32))
    model(torch.rand(1, 3, 32, 33))
    model.eval()(torch.rand(1, 3, 32, 32))
    SOFT(REDUCED_ARCH, norm_eval=True).train()(torch.rand(1, 3, 32, 32))
    # Stage 3 of this image has four values.
    SOFT(REDUCED_ARCH, out_indices=(0, 2)).train()(torch.rand(1, 3, 32, 32))


def test_batch_of_no_images():
    for options in ({}, dict(attention=dict(solver='cholesky', normalized=True, max_landmarks=5))):
        outputs = SOFT(REDUCED_ARCH, **options).eval()(torch.rand(0, 3, 64, 96))
        assert [tuple(out.shape) for out in outputs] == [(0, 32, 16, 24), (0, 64, 8, 12), (0, 96, 4, 6), (0, 128, 2, 3)]


@pytest.mark.parametrize(
    ('keyword', 'message'),
    [('pretrained', 'set model.pretrained=None and _delete_=True'), ('norm_cfg', "set sync_bn='torch' in the config")],
)
def test_keywords_of_other_backbones_are_explained(keyword, message):
    with pytest.raises(TypeError, match='SOFT does not take the keywords') as error:
        SOFT(**{keyword: 'torchvision://resnet50'})
    assert message in str(error.value)
