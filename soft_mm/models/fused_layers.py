"""Layers in one pass, for inference on a CPU: linear with GELU, and convolution with BatchNorm and ReLU."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils.fusion import fuse_conv_bn_weights

from soft_mm.ops.kernel import cpu_autocast_dtype, is_autocast_enabled
from soft_mm.ops.recording import is_recorded

# oneDNN's product with the activation on each block of the result, which `torch.compile` uses for frozen weights.
# PyTorch's own GELU with tanh is several times slower than its GELU with erf.
_FUSED: Any = getattr(torch.ops.mkldnn, '_linear_pointwise', None) if torch.backends.mkldnn.is_available() else None
_supports_bfloat16 = getattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: False)


def can_fuse(x: Tensor, layers: Iterable[nn.Module], kinds: Sequence[type]) -> bool:
    """Return whether the weights of layers may be read without calling the layers.

    Args:
        x (Tensor): Input of the first layer.
        layers (Iterable[nn.Module]): Layers.
        kinds (Sequence[type]): Classes that the layers must have, in this order.

    Returns:
        bool: True in eager inference on a CPU. False if a layer was quantised, pruned, adapted, hooked, replaced or
        wrapped, if dropout or BatchNorm is in training mode, or if something records the computation.
    """
    if torch.is_grad_enabled() or is_recorded() or type(x) not in (Tensor, nn.Parameter):
        return False
    if getattr(torch_module, '_global_forward_hooks', None) or getattr(torch_module, '_global_forward_pre_hooks', None):
        return False
    layers = list(layers)
    same = [type(layer) for layer in layers] == list(kinds)
    return same and x.is_cpu and x.numel() > 0 and all(_is_plain(layer) for layer in layers)


def _is_plain(layer: Any) -> bool:
    # Libraries replace the class, the method `forward` of the instance, or the tensor of the weight.
    if 'forward' in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    if isinstance(layer, (nn.Dropout, nn.BatchNorm2d)) and layer.training:
        return False
    if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is None:
        return False
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != 'zeros':
        return False
    parameters = [getattr(layer, name, None) for name in ('weight', 'bias')]
    return all(
        type(parameter) is nn.Parameter and parameter.is_cpu and parameter.layout == torch.strided
        for parameter in parameters
        if parameter is not None
    )


def fused_dtype(x: Tensor, mlp: nn.Sequential) -> torch.dtype | None:
    """Return the dtype in which :func:`fused_linear` can compute an MLP.

    Args:
        x (Tensor): Input of the MLP.
        mlp (nn.Sequential): Linear layer, GELU, dropout, linear layer, dropout.

    Returns:
        torch.dtype | None: The dtype in which PyTorch would compute the layers: float32, or bfloat16 if the processor
        supports it. None: call the layers.
    """
    if _FUSED is None or not getattr(torch.backends.mkldnn, 'enabled', True):
        return None
    if not can_fuse(x, mlp, (nn.Linear, nn.GELU, nn.Dropout, nn.Linear, nn.Dropout)):
        return None
    autocast = is_autocast_enabled('cpu')
    dtype = cpu_autocast_dtype() if autocast else x.dtype
    if dtype != torch.float32 and not (dtype == torch.bfloat16 and _supports_bfloat16()):
        return None
    dtypes = {x.dtype, *(parameter.dtype for parameter in mlp.parameters())}
    fits = dtypes <= {dtype, torch.float32 if autocast else dtype}
    return dtype if fits and x.shape[-1] == mlp[0].in_features else None


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
