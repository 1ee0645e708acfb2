"""Variants of the engine: each computes what the engine computes, outputs and gradients, and by another way."""

import pytest
import torch

from soft_mm.analysis.contenders import parse_contender
from soft_mm.analysis.variants import VARIANTS, apply_variant
from soft_mm.models import SOFT
from soft_mm.ops import blockwise

ATTENTIONS = (
    dict(solver='cholesky', max_landmarks=4),
    dict(solver='cholesky', max_landmarks=4, normalized=True),
    dict(newton_backward='exact'),
)


def run(model, image, variant, train):
    """Outputs and, in training, gradients, beside the operations that made them."""
    model.train(train).zero_grad()
    with apply_variant(variant), torch.autograd.set_grad_enabled(train), torch.profiler.profile() as profile:
        outputs = model(image)
        if train:
            sum(output.square().mean() for output in outputs).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    operations = [(event.name, event.input_shapes) for event in profile.events()]
    return [*outputs, *gradients], operations


@pytest.mark.parametrize('attention', ATTENTIONS)
@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('variant', VARIANTS)
def test_variant_computes_the_same_otherwise(variant, train, attention, monkeypatch):
    monkeypatch.setitem(blockwise._BLOCK_ENTRIES, 'cpu', 2**9)
    torch.manual_seed(0)
    arch = dict(embed_dims=(8, 16, 24, 32), num_heads=(2, 2, 3, 4), depths=(1, 1, 1, 1))
    model = SOFT(arch, attention=attention, img_size=64, norm_eval=True).double()
    image = torch.rand(2, 3, 72, 104, dtype=torch.float64)
    # In training with their statistics, BatchNorms are folded too, and nothing but rounding differs.
    expected, ways = run(model, image, None, train)
    actual, other_ways = run(model, image, variant, train)
    assert len(actual) == len(expected) > 3
    for one, other in zip(actual, expected):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * other.abs().max().item())
    # Positions are not kept in training, so that there is no other way.
    if not (train and variant == 'positions-each-time'):
        assert other_ways != ways


def test_variant_is_gone_after_its_step():
    contender = parse_contender('soft-tiny:arch=small@channels-first')
    assert contender.variant == 'channels-first' and contender.config['arch'] == 'small'
    before = blockwise.blockwise_attention, SOFT.forward
    with apply_variant('held-kernel'):
        from soft_mm.ops import attention

        assert attention.blockwise_attention is not before[0]
    assert attention.blockwise_attention is before[0]
