"""Tests of the sequence encoder with every attention, and of the preprocessor that builds its batches."""

import pytest
import torch
from mmengine.registry import MODELS

from projects.listops import SequenceEncoder, SequencePreprocessor

SHAPE = dict(vocab_size=16, length=40, embed_dims=16, ratio=4, conv_size=3)
ATTENTIONS = [
    dict(),
    dict(normalized=True),
    dict(solver='cholesky', max_landmarks=4),
    dict(normalized=True, solver='cholesky', max_landmarks=4, sampler='mean'),
    dict(sampler='random'),
    dict(type='SoftmaxAttention'),
    dict(type='LinformerAttention', grid=(40,), proj_tokens=8),
    dict(type='PerformerAttention', num_features=8),
    dict(type='NystromAttention', num_landmarks=8),
    dict(type='SpatialReductionAttention'),
    dict(type='GaussianKernelAttention', grid_dims=1),
]


def encoder(**options):
    torch.manual_seed(0)
    return SequenceEncoder(**(SHAPE | options))


def tokens_of(batch, n):
    return torch.randint(1, 16, (batch, n), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('attention', ATTENTIONS, ids=str)
def test_every_attention_encodes_and_every_parameter_gets_a_gradient(attention):
    module = encoder(attention=attention)
    assert len(module.blocks) == 2
    (out,) = module(tokens_of(3, 40))
    assert out.shape == (3, 16) and torch.isfinite(out).all()
    out.square().mul(torch.arange(16)).sum().backward()
    without_gradient = {name for name, parameter in module.named_parameters() if not parameter.grad.abs().sum() > 0}
    assert not without_gradient
    # The embedding of padding is not trained.
    assert not module.token_embed.weight.grad[0].any() and module.token_embed.weight.grad[1:].any(1).all()
    for n in (1, 7, 33):
        assert module(tokens_of(2, n))[0].shape == (2, 16)


@pytest.mark.parametrize('attention', ATTENTIONS, ids=str)
def test_sequence_does_not_depend_on_its_batch(attention):
    module, tokens = encoder(attention=attention).double().eval(), tokens_of(3, 40)
    assert torch.allclose(module(tokens)[0][1:2], module(tokens[1:2])[0], atol=1e-10)


def test_order_matters():
    module, tokens = encoder().double().eval(), tokens_of(1, 40)
    assert not torch.allclose(module(tokens)[0], module(tokens.flip(1))[0], atol=1e-6)


def test_padding_does_not_enter_the_mean():
    module, tokens = encoder(depth=1).double().eval(), tokens_of(2, 40)
    tokens[0, 25:] = 0
    outputs = []
    module.blocks[-1].register_forward_hook(lambda block, inputs, output: outputs.append(output))
    (out,) = module(tokens)
    expected = torch.stack([outputs[0][0, :25].mean(0), outputs[0][1].mean(0)])
    assert torch.allclose(out, expected, atol=1e-12)
    assert not module.token_embed.weight[0].any()
    assert torch.equal(module(torch.zeros(1, 40, dtype=torch.long))[0], torch.zeros(1, 16).double())


@pytest.mark.parametrize('attention', ATTENTIONS, ids=str)
def test_padding_takes_no_part(attention):
    """Whatever its embedding, bit for bit; and no gradient reaches it."""
    module, tokens = encoder(attention=attention).double().eval(), tokens_of(2, 40)
    tokens[0, 21:] = tokens[1, 33:] = 0
    (out,) = module(tokens)
    out.square().mul(torch.arange(16)).sum().backward()
    assert module.pos_embed.grad[0, :33].any(1).all() and not module.pos_embed.grad[0, 33:].any()
    with torch.no_grad():
        module.pos_embed[:, 33:] = 100
        module.token_embed.weight[0] = -7
    assert torch.equal(module(tokens)[0], out)


@pytest.mark.parametrize(
    'attention',
    [
        dict(),
        dict(normalized=True),
        dict(normalized=True, solver='cholesky'),
        dict(sampler='mean', solver='cholesky'),
        *(dict(type=f'{name}Attention') for name in ('Softmax', 'Performer', 'SpatialReduction', 'GaussianKernel')),
    ],
    ids=str,
)
def test_amount_of_padding_changes_nothing(attention):
    """If the last patch of the tokens is complete: 21 tokens and patches of 4 need 24 places."""
    module, tokens = encoder(attention=attention).double().eval(), tokens_of(2, 40)
    tokens[:, 21:] = 0
    (out,) = module(tokens)
    for n in (24, 27, 32):
        # Patches of the mean end where the length, not the ratio, lets them.
        if n % 4 == 0 or attention.get('sampler') != 'mean':
            assert torch.allclose(module(tokens[:, :n])[0], out, atol=1e-10), n


def test_weights_are_initialised_as_in_the_backbone():
    module = encoder(embed_dims=64, attention=dict(normalized=True))
    module.init_weights()
    for name in ('token_embed.weight', 'pos_embed', 'blocks.0.attn.qv.weight', 'blocks.1.mlp.fc2.weight'):
        weight = module.get_parameter(name).detach()
        assert weight[weight != 0].std() == pytest.approx(0.02, rel=0.1), name
    assert not module.blocks[0].attn.qv.bias.any()


def test_attention_works_on_a_one_dimensional_grid():
    module = encoder(depth=3, attention=dict(max_landmarks=5))
    assert [(block.attn.grid_dims, block.attn.max_landmarks) for block in module.blocks] == [(1, 5)] * 3
    assert MODELS.build(dict(type='SequenceEncoder', **SHAPE)).blocks[0].attn.normalized is False


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(attention=dict(grid_dims=2)), ValueError, 'grid_dims=2: expected 1 for sequences'),
        (dict(attention=[dict()]), ValueError, 'expected None or one dict'),
        (dict(attention=dict(landmarks=4)), TypeError, r"keys \['landmarks'\] are unknown to SoftmaxFreeAttention"),
        (dict(attention=dict(type='Attention')), ValueError, "type 'Attention' is unknown; choose one of"),
        (dict(num_heads=3), ValueError, 'num_heads=3'),
        (dict(length=0), ValueError, 'length=0: expected an integer >= 1'),
        (dict(vocab_size=1.5), ValueError, 'vocab_size=1.5'),
        (dict(depth=True), ValueError, 'depth=True'),
        (dict(dropout=0.1), TypeError, 'dropout'),
    ],
)
def test_invalid_options_are_reported(options, error, message):
    with pytest.raises(error, match=message):
        encoder(**options)


@pytest.mark.parametrize('shape', [(2, 41), (2, 0), (40,), (2, 3, 40)])
def test_invalid_inputs_are_reported(shape):
    with pytest.raises(ValueError, match=r'expected ids \(B, n\) of 1 to 40 tokens'):
        encoder()(torch.ones(shape, dtype=torch.long))


def test_preprocessor_pads_to_its_length():
    preprocessor = MODELS.build(dict(type='SequencePreprocessor', length=6))
    sequences = [torch.tensor([3, 1]), torch.tensor([2, 4, 5, 6, 7, 8])]
    data = preprocessor(dict(inputs=sequences, data_samples=['a', 'b']), training=True)
    assert data['inputs'].tolist() == [[3, 1, 0, 0, 0, 0], [2, 4, 5, 6, 7, 8]] and data['inputs'].dtype == torch.int64
    assert data['data_samples'] == ['a', 'b'] and len(sequences[0]) == 2
    # The batch can be stacked already.
    assert preprocessor(dict(inputs=torch.ones(2, 5, dtype=torch.long)))['inputs'].shape == (2, 6)


def test_preprocessor_moves_the_batch_to_its_device():
    from mmengine.structures import BaseDataElement

    preprocessor = SequencePreprocessor(6).to('meta')
    sample = BaseDataElement(label=torch.ones(1))
    data = preprocessor(dict(inputs=[torch.tensor([3, 1])], data_samples=[sample]))
    assert data['inputs'].device.type == data['data_samples'][0].label.device.type == 'meta'


def test_preprocessor_refuses_invalid_inputs():
    with pytest.raises(ValueError, match=r'shapes \[\(7,\)\]: expected sequences \(n,\) of at most 6 tokens'):
        SequencePreprocessor(6)(dict(inputs=[torch.ones(3), torch.ones(7)]))
    with pytest.raises(ValueError, match=r'shapes \[\(2, 3\)\]'):
        SequencePreprocessor(6)(dict(inputs=[torch.ones(2, 3)]))
    for length in (0, 2.5):
        with pytest.raises(ValueError, match=f'length={length}: expected an integer >= 1'):
            SequencePreprocessor(length)
    with pytest.raises(ValueError, match='token ids cannot be mixed'):
        SequencePreprocessor(6, batch_augments=dict(augments=dict(type='Mixup', alpha=0.8)))
