"""Fusing BatchNorm for prediction, and checks of whole models."""

import pytest
import torch
from authors import REDUCED_ARCH

from soft_mm import SOFT
from soft_mm.inference import fuse_conv_bn


def trained(**options):
    """A backbone whose BatchNorms have statistics and weights of a training."""
    torch.manual_seed(0)
    model = SOFT(REDUCED_ARCH, **options).double()
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            for value in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
                value.uniform_(0.5, 2)
    return model


def test_a_fused_model_computes_the_same():
    model, x = trained().eval(), torch.randn(2, 3, 69, 98, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        assert fuse_conv_bn(model) is model
        assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
        # A second call finds nothing to fuse.
        torch.testing.assert_close(fuse_conv_bn(model)(x), expected, rtol=1e-9, atol=1e-9)


def test_a_model_in_training_is_not_fused():
    model = trained().train()
    with pytest.raises(ValueError, match='in training mode: call eval'):
        fuse_conv_bn(model)
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
