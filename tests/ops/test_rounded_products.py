"""Where PyTorch rounds the operands of products, as TF32 does on a GPU, the kernel and the inverse are exact."""

import pytest
import torch

from soft_mm import ops
from soft_mm.ops import kernel, reference

# Unit roundoff of TF32, which has ten bits of mantissa.
ROUNDOFF = 2**-11


def rounded(tensor):
    """Round float32 to TF32, half up."""
    if tensor.dtype != torch.float32:
        return tensor
    return ((tensor.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def tf32(monkeypatch):
    """A CPU whose float32 products of batches round their operands to TF32."""
    matmul, bmm, baddbmm = torch.matmul, torch.bmm, torch.baddbmm
    monkeypatch.setattr(torch, 'matmul', lambda a, b: matmul(rounded(a), rounded(b)))
    monkeypatch.setattr(torch, 'bmm', lambda a, b: bmm(rounded(a), rounded(b)))
    monkeypatch.setattr(torch, 'baddbmm', lambda c, a, b, **scales: baddbmm(c, rounded(a), rounded(b), **scales))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('high')
    yield
    torch.set_float32_matmul_precision(before)


def make_tokens(spread, offset):
    generator = torch.Generator().manual_seed(0)
    q = spread * torch.randn(1, 2, 299, 32, generator=generator) + offset
    return q, q[:, :, ::23].contiguous(), torch.randn(1, 2, 299, 32, generator=generator)


@pytest.mark.parametrize(('spread', 'offset'), [(1.5, 0.0), (0.5, 1.0), (0.05, 3.0), (5.0, 0.0)])
@pytest.mark.usefixtures('tf32')
def test_kernel_keeps_its_digits(spread, offset):
    q, landmarks, _ = make_tokens(spread, offset)
    wanted = reference.gaussian_kernel(q.double(), landmarks.double())
    torch.testing.assert_close(ops.gaussian_kernel(q, landmarks).double(), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ('spread', 'offset', 'solver', 'invert', 'normalized'),
    [
        (spread, offset, *inverse)
        for spread, offset in [(1.5, 0.0), (0.5, 1.0), (5.0, 0.0)]
        for inverse in [
            ('newton', reference.newton_inverse, False),
            ('newton', reference.newton_inverse_per_image, True),
            ('cholesky', reference.ridge_inverse, False),
            ('cholesky', reference.ridge_inverse, True),
        ]
        # Where the landmarks are far apart, A is I up to rounding, and normalised Newton amplifies the rounding.
        if spread < 1 or inverse[1] is not reference.newton_inverse_per_image
    ],
)
@pytest.mark.usefixtures('tf32')
def test_attention_has_only_the_rounding_of_its_values(spread, offset, solver, invert, normalized):
    q, landmarks, v = make_tokens(spread, offset)
    attend = ops.normalized_softmax_free_attention if normalized else ops.softmax_free_attention
    wide = [tensor.double() for tensor in (q, landmarks, v)]
    wanted = reference.softmax_free_attention(*wide, invert, normalized)
    error = (attend(q, landmarks, v, solver=solver) - wanted).abs().max() / wanted.abs().max()
    assert error < 4 * ROUNDOFF


def test_setting_of_pytorch_selects_the_dtype():
    tokens = torch.rand(2, 3)
    before = torch.get_float32_matmul_precision()
    found = {}
    try:
        for precision in ('highest', 'high', 'medium'):
            torch.set_float32_matmul_precision(precision)
            found[precision] = kernel.product_dtype(tokens), kernel.product_dtype(tokens.half())
        assert kernel.product_dtype(tokens.double()) == torch.float64
    finally:
        torch.set_float32_matmul_precision(before)
    assert found == dict(
        highest=(torch.float32,) * 2,
        high=(torch.float64,) * 2,
        medium=(torch.float64,) * 2,
    )
