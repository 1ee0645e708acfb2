"""Linear layers by oneDNN on an x86 CPU, forward and backward."""

import platform
from typing import Any

import torch
from torch import Tensor, nn

from .kernel import is_autocast_enabled, no_autocast
from .recording import is_batch_of_gradients, is_recorded

# oneDNN's product, with an activation on each block of the result, which `torch.compile` uses for frozen weights.
# PyTorch uses MKL for products, which takes twice the time on processors of AMD. In PyTorch, GELU with tanh is several
# times slower than GELU with erf. Only x86 was measured.
_ON_X86 = torch.backends.mkldnn.is_available() and platform.machine().lower() in ('x86_64', 'amd64')
_FUSED: Any = getattr(torch.ops.mkldnn, '_linear_pointwise', None) if _ON_X86 else None
_supports_bfloat16 = getattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: False)


def has_fused_linear(dtype: torch.dtype) -> bool:
    """Return whether this PyTorch can compute a linear layer with its GELU in one pass on this processor.

    Args:
        dtype (torch.dtype): Dtype of the tokens and of the weights.

    Returns:
        bool: True on x86 for float32, and for bfloat16 if the processor supports it.
    """
    if _FUSED is None or not getattr(torch.backends.mkldnn, 'enabled', True):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(_supports_bfloat16()))


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor, gelu: str | None = None) -> Tensor:
    """Compute ``x W^T + b`` and its GELU by oneDNN, without a gradient, where :func:`has_fused_linear` is True.

    Args:
        x (Tensor): ``(n, C)`` on a CPU.
        weight (Tensor): ``(H, C)``.
        bias (Tensor): ``(H,)``.
        gelu (str | None): Form of the GELU, see ``torch.nn.GELU``. Defaults to None: no GELU.

    Returns:
        Tensor: ``(n, H)``.
    """
    # The operator ignores the stride of the bias.
    bias = bias.contiguous()
    return _FUSED(x, weight, bias, 'none' if gelu is None else 'gelu', [], gelu or '')


def outer_product(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``a b^T``, by oneDNN where that is possible, without a gradient.

    Args:
        a (Tensor): ``(n, k)``. It is copied if its rows are not dense.
        b (Tensor): ``(m, k)``. The product is slow if neither its rows nor its columns are dense.

    Returns:
        Tensor: ``(n, m)``.
    """
    if a.is_cpu and has_fused_linear(a.dtype):
        return _FUSED(a, b, None, 'none', [], '')
    return a @ b.t()


class _Linear(torch.autograd.Function):
    """``x W^T + b`` of tokens ``(n, C)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        for_x, for_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None)
        return fused_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        with no_autocast(grad):
            if torch.is_grad_enabled() or is_batch_of_gradients(grad):
                # PyTorch cannot differentiate the operator of oneDNN, or apply it to a batch of gradients.
                grad_x, grad_weight = grad @ weight if for_x else None, grad.t() @ x if for_weight else None
            else:
                grad = grad.contiguous()
                grad_x = outer_product(grad, weight.t()) if for_x else None
                grad_weight = outer_product(grad.t(), x.t()) if for_weight else None
        return grad_x, grad_weight, grad.sum(0) if for_bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute ``x W^T + b`` as ``torch.nn.functional.linear`` does, in float32 on an x86 CPU by oneDNN.

    Args:
        x (Tensor): ``(..., C)``.
        weight (Tensor): ``(H, C)``.
        bias (Tensor): ``(H,)``.

    Returns:
        Tensor: ``(..., H)``, with derivatives of every order.
    """
    if is_recorded() or is_autocast_enabled('cpu') or not has_fused_linear(torch.float32):
        return nn.functional.linear(x, weight, bias)
    # PyTorch computes with other kinds of tensors, and has the error messages for shapes that do not fit.
    plain = all(
        type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.dtype == torch.float32 and t.layout == torch.strided
        for t in (x, weight, bias)
    )
    fits = (
        plain and x.ndim > 1 and weight.ndim == 2 and x.shape[-1] == weight.shape[1] and bias.shape == weight.shape[:1]
    )
    if not fits or x.numel() == 0:
        return nn.functional.linear(x, weight, bias)
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    return _Linear.apply(tokens, weight.contiguous(), bias).view(*x.shape[:-1], len(weight))
