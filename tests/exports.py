"""Small backbones with every attention, and comparisons of their outputs, for the tests of exports."""

import pytest
import torch
from authors import REDUCED_ARCH

from soft_mm import SOFT

_BOUNDED = dict(solver='cholesky', normalized=True, max_landmarks=7)
ATTENTIONS = {
    'newton': {},
    'newton exact': dict(newton_backward='exact'),
    'newton bounded': dict(max_landmarks=7),
    'newton normalized': dict(normalized=True),
    'newton normalized bounded': dict(normalized=True, max_landmarks=7),
    'cholesky': dict(solver='cholesky', max_landmarks=7),
    'cholesky normalized': _BOUNDED,
    'newton in four stages': [{}, {}, {}, dict(type='SoftmaxFreeAttention', max_landmarks=3)],
    'cholesky in four stages': [dict(_BOUNDED, type='SoftmaxFreeAttention')] * 4,
    'svd': dict(solver='svd'),
    'mean': dict(sampler='mean', max_landmarks=7),
    **{
        name: dict(type=f'{name}Attention')
        for name in ('Softmax', 'Linformer', 'Performer', 'Nystrom', 'SpatialReduction', 'GaussianKernel')
    },
}
# The others can be exported for one image size only.
EVERY_SIZE = [name for name in ATTENTIONS if name.startswith(('newton', 'cholesky', 'Softmax'))]
SIZE = (96, 128)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.long)


def build(attention, **options):
    """A small backbone in float64, with weights far from their initial values, so that an omitted part is noticed."""
    torch.manual_seed(0)
    model = SOFT(REDUCED_ARCH, attention=attention, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double()


def image(batch=2, size=SIZE):
    torch.manual_seed(1)
    return torch.rand(batch, 3, *size, dtype=torch.float64)


@torch.no_grad()
def largest_error(function, model, x):
    """Largest difference relative to the largest entry of an output."""
    pairs = list(zip(function(x), model(x), strict=True))
    return max(((got - expected).abs().max() / expected.abs().max()).item() for got, expected in pairs)
