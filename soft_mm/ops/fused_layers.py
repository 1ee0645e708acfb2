"""Layers in one pass, for inference on a CPU: linear with GELU, and convolution with BatchNorm and ReLU."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .kernel import cpu_autocast_dtype, is_autocast_enabled
from .recording import is_recorded

# oneDNN's product with the activation on each block of the result, which `torch.compile` uses, too. PyTorch's own GELU
# with tanh is several times slower than its GELU with erf.
_FUSED: Any = getattr(torch.ops.mkldnn, '_linear_pointwise', None) if torch.backends.mkldnn.is_available() else None
_PLAIN = (nn.Linear, nn.GELU, nn.Dropout, nn.Conv2d, nn.BatchNorm2d, nn.ReLU)
_TAKES_BFLOAT16 = getattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: False)


def can_fuse(x: Tensor, *layers: nn.Module) -> bool:
    """Return whether the weights of layers may be read without calling the layers.

    Args:
        x (Tensor): Input of the first layer.
        *layers (nn.Module): Layers of PyTorch.

    Returns:
        bool: True in eager inference on a CPU. False if a layer was quantised, pruned, adapted, hooked or wrapped, if
        dropout or BatchNorm is in training mode, or if something records the computation.
    """
    if torch.is_grad_enabled() or is_recorded() or type(x) not in (Tensor, nn.Parameter):
        return False
    return x.is_cpu and x.numel() > 0 and all(_is_plain(layer) for layer in layers)


def _is_plain(layer: nn.Module) -> bool:
    # Libraries replace the class, the method `forward` of the instance, or the tensor of the weight.
    if type(layer) not in _PLAIN or 'forward' in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    if isinstance(layer, (nn.Dropout, nn.BatchNorm2d)) and layer.training:
        return False
    if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is None:
        return False
    return all(type(parameter) is nn.Parameter and parameter.is_cpu for parameter in layer.parameters())


def fused_dtype(x: Tensor, *layers: nn.Module) -> torch.dtype | None:
    """Return the dtype in which :func:`fused_linear` can compute layers.

    Args:
        x (Tensor): Input of the first layer.
        *layers (nn.Module): Linear layers, GELU and dropout.

    Returns:
        torch.dtype | None: The dtype in which PyTorch would compute the layers: float32, or on a processor with
        bfloat16 that dtype. None: call the layers.
    """
    if _FUSED is None or not can_fuse(x, *layers):
        return None
    autocast = is_autocast_enabled('cpu')
    dtype = cpu_autocast_dtype() if autocast else x.dtype
    if dtype != torch.float32 and not (dtype == torch.bfloat16 and _TAKES_BFLOAT16()):
        return None
    weights = {parameter.dtype for layer in layers for parameter in layer.parameters()}
    return dtype if {x.dtype, *weights} <= {dtype, torch.float32 if autocast else dtype} else None


def fused_linear(x: Tensor, layer: nn.Linear, activation: nn.GELU | None = None) -> Tensor:
    """Compute ``activation(layer(x))`` in one pass.

    Args:
        x (Tensor): ``(..., C_in)`` in the dtype of :func:`fused_dtype`.
        layer (nn.Linear): Linear layer. Its parameters are converted to the dtype of ``x``.
        activation (nn.GELU | None): Activation. Defaults to None: none.

    Returns:
        Tensor: ``(..., C_out)`` in the dtype of ``x``.
    """
    kind, form = ('none', '') if activation is None else ('gelu', activation.approximate)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return _FUSED(x, layer.weight.to(x.dtype), bias, kind, [], form)


def fused_conv(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """Compute ``relu(norm(conv(x)))`` with the BatchNorm folded into the filters.

    Args:
        x (Tensor): Map ``(B, C_in, H, W)``, for which :func:`can_fuse` is True.
        conv (nn.Conv2d): Convolution padded with zeros.
        norm (nn.BatchNorm2d): BatchNorm in evaluation mode.

    Returns:
        Tensor: ``(B, C_out, H', W')``.
    """
    mean: Any = norm.running_mean
    variance: Any = norm.running_var
    weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, mean, variance, norm.eps, norm.weight, norm.bias)
    out = nn.functional.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return out.relu_()
