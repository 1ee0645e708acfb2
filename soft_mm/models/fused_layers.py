"""Which layers may be computed together on a CPU: linear with GELU, and convolution with BatchNorm and ReLU."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils.fusion import fuse_conv_bn_weights

from soft_mm.ops.kernel import cpu_autocast_dtype, is_autocast_enabled
from soft_mm.ops.linear import has_fused_linear, linear
from soft_mm.ops.recording import is_recorded

# Attributes of a layer, and of `torch.nn.modules.module` with the prefix `_global`, that hold hooks.
_HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')


def can_fuse(x: Tensor, layers: Iterable[nn.Module], kinds: Sequence[type]) -> bool:
    """Return whether the weights of layers may be read without calling the layers.

    Args:
        x (Tensor): Input of the first layer.
        layers (Iterable[nn.Module]): Layers.
        kinds (Sequence[type]): Classes that the layers must have, in this order.

    Returns:
        bool: True in eager mode on a CPU. False if a layer was quantised, pruned, adapted, hooked, replaced or
        wrapped, if dropout is active, if BatchNorm is in training mode, or if something records the computation.
    """
    if is_recorded() or type(x) not in (Tensor, nn.Parameter):
        return False
    if any(getattr(torch_module, f'_global{hooks}', None) for hooks in _HOOKS):
        return False
    layers = list(layers)
    same = [type(layer) for layer in layers] == list(kinds)
    return same and x.is_cpu and x.numel() > 0 and all(_is_plain(layer) for layer in layers)


def _is_plain(layer: Any) -> bool:
    # Libraries replace the class, the method `forward` of the instance, or the tensor of the weight.
    if 'forward' in vars(layer) or any(getattr(layer, hooks, None) for hooks in _HOOKS):
        return False
    if isinstance(layer, nn.Dropout) and layer.training and layer.p > 0:
        return False
    if isinstance(layer, nn.BatchNorm2d) and (layer.training or layer.running_mean is None):
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
    """Return the dtype in which :func:`soft_mm.ops.chunked_mlp` can compute an MLP.

    Args:
        x (Tensor): Input of the MLP.
        mlp (nn.Sequential): Linear layer, GELU, dropout, linear layer, dropout.

    Returns:
        torch.dtype | None: The dtype in which PyTorch would compute the layers: float32, or without gradients bfloat16
        if the processor supports it. None: call the layers.
    """
    if not can_fuse(x, mlp, (nn.Linear, nn.GELU, nn.Dropout, nn.Linear, nn.Dropout)):
        return None
    autocast = is_autocast_enabled('cpu')
    dtype = cpu_autocast_dtype() if autocast else x.dtype
    if not has_fused_linear(dtype) or (torch.is_grad_enabled() and dtype != torch.float32):
        return None
    parameters = [getattr(mlp[index], name) for index in (0, 3) for name in ('weight', 'bias')]
    if any(parameter is None for parameter in parameters) or x.shape[-1] != mlp[0].in_features:
        return None
    fits = {x.dtype, *(parameter.dtype for parameter in parameters)} <= {dtype, torch.float32 if autocast else dtype}
    return dtype if fits else None


def call_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Call a linear layer, by :func:`soft_mm.ops.linear.linear` if it was not replaced, wrapped, adapted or hooked.

    Args:
        layer (nn.Module): Layer.
        x (Tensor): Tokens ``(..., C)``.

    Returns:
        Tensor: ``(..., H)``.
    """
    return linear(x, layer.weight, layer.bias) if can_fuse(x, [layer], [nn.Linear]) else layer(x)  # type: ignore[arg-type]


def fused_conv(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """Compute ``relu(norm(conv(x)))`` with the BatchNorm folded into the filters.

    Args:
        x (Tensor): Map ``(B, C_in, H, W)``, for which :func:`can_fuse` is True, without gradients.
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
