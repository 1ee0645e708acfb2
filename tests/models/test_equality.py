"""The whole backbone against the authors' models: logits, tokens of every stage, gradients."""

from functools import partial

import pytest
import torch
from authors import CORE, VARIANTS, core_weights, gradient_norms, image, record, reduced_model

from soft_mm import SoftmaxFreeAttention, ops
from soft_mm.checkpoints import to_official

SIZES = [(224, 224), (160, 256), (200, 232), (448, 448)]


@pytest.mark.parametrize('size', SIZES, ids='{0[0]}x{0[1]}'.format)
@pytest.mark.parametrize(('kind', 'regime'), VARIANTS)
def test_logits(kind, regime, size):
    with torch.no_grad():
        logits = reduced_model(kind, regime)(image(*size))
    wanted = record(f'reduced_{kind}_{regime}')['logits_{}x{}'.format(*size)]
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize('size', SIZES, ids='{0[0]}x{0[1]}'.format)
@pytest.mark.parametrize(('kind', 'regime'), VARIANTS)
def test_logits_in_float64(kind, regime, size):
    with torch.no_grad():
        logits = reduced_model(kind, regime, torch.float64)(image(*size).double())
    wanted = record(f'reduced_{kind}_{regime}')['logits_{}x{}_float64'.format(*size)]
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-11)


def keep_output(recorded, module, inputs, output):
    recorded.append(output)


@pytest.mark.parametrize(('kind', 'regime'), VARIANTS)
def test_tokens_of_every_stage(kind, regime):
    backbone, wanted = reduced_model(kind, regime).backbone, record(f'reduced_{kind}_{regime}')
    x = image(160, 256)
    with torch.no_grad():
        for i, stage in enumerate(backbone.stages):
            # The record is of the tokens before the final norm.
            recorded = []
            handle = stage.blocks[-1].register_forward_hook(partial(keep_output, recorded))
            _, grid = stage(x)
            handle.remove()
            (tokens,) = recorded
            target = wanted[f'stage{i + 1}_160x256']
            scale = target.abs().max()
            torch.testing.assert_close(tokens / scale, target / scale, rtol=0, atol=1e-4)
            x = tokens.transpose(1, 2).reshape(1, -1, *grid) if i < 3 else None


@pytest.mark.parametrize(('kind', 'regime'), VARIANTS[:3])
def test_gradient_norms(kind, regime):
    """Of every parameter; the authors differentiate `norm, flat` through a truncated loop, which is no target."""
    model = reduced_model(kind, regime)
    (model(image(160, 256))[0] * torch.arange(10)).sum().backward()
    gradients = to_official({name: parameter.grad for name, parameter in model.named_parameters()})
    wanted = gradient_norms(kind, regime)
    assert gradients.keys() == wanted.keys()
    for name, norm in wanted.items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize(('kind', 'regime'), VARIANTS)
def test_attention_core_with_gradients(kind, regime):
    fixture = record(f'attention_{kind}_{regime}')
    module = SoftmaxFreeAttention(normalized=kind == 'norm', **CORE['module']).double()
    with torch.no_grad():
        parameters = (
            module.landmark.weight,
            module.landmark_norm.weight,
            module.landmark_norm.bias,
            module.local.weight,
        )
        for parameter, value in zip(parameters, core_weights(regime)):
            parameter.copy_(value)
    q, v = (fixture[key].double().requires_grad_() for key in ('q', 'v'))
    out = module.attend(q * 32**-0.25, v, grid=CORE['grid'])
    # The local branch reads tokens, the heads side by side.
    tokens = v.transpose(1, 2).reshape(1, -1, 64)
    out = out + ops.local_branch(tokens, CORE['grid'], module.local.weight).reshape(1, -1, 2, 32).transpose(1, 2)
    out.backward(fixture['grad_out'].double())
    for name, value in dict(out=out.detach(), grad_q=q.grad, grad_v=v.grad).items():
        scale = fixture[name].abs().max()
        torch.testing.assert_close(value.float() / scale, fixture[name] / scale, rtol=0, atol=1e-4)
