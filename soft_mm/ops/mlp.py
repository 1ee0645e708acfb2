"""Linear layer, GELU and linear layer in chunks of tokens on a CPU, forward and backward."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .kernel import no_autocast
from .linear import fused_linear, has_fused_linear, outer_product
from .recording import is_batch_of_gradients, needs_standard_operators

# Entries of the hidden layer per chunk of the forward pass, and tokens per chunk of the backward pass. The backward
# pass holds six chunks at a time, which should fit in the cache.
FORWARD_ENTRIES = 2**20
_BACKWARD_TOKENS = 256

# The GELU with tanh is x * sigmoid(x * (_SLOPE + _CUBIC * x^2)).
_SLOPE = math.sqrt(8 / math.pi)
_CUBIC = 0.044715 * _SLOPE


def _mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor | None, approximate: str) -> Tensor:
    hidden = nn.functional.gelu(nn.functional.linear(x, weight1, bias1), approximate=approximate)
    return nn.functional.linear(hidden, weight2, bias2)


def _gelu_and_gradient(hidden: Tensor, grad: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """Return the GELU of ``hidden``, and the gradient of ``hidden`` for the gradient ``grad`` of the GELU."""
    if approximate == 'none':
        return nn.functional.gelu(hidden), torch.ops.aten.gelu_backward(grad, hidden)
    slope = hidden.new_tensor(_SLOPE)
    gate = torch.addcmul(slope, hidden, hidden, value=_CUBIC).mul_(hidden).sigmoid_()
    out = hidden * gate
    # d(x s(y))/dx = s(y) + x s(y) (1 - s(y)) dy/dx, with y = x * (_SLOPE + _CUBIC * x^2).
    derivative = torch.addcmul(slope, hidden, hidden, value=3 * _CUBIC)
    derivative.mul_(torch.addcmul(out, out, gate, value=-1)).add_(gate)
    return out, derivative.mul_(grad)


class _ChunkedMLP(torch.autograd.Function):
    """Two linear layers with a GELU between them. The backward pass computes the hidden layer from the tokens again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, approximate: str
    ) -> Tensor:
        ctx.save_for_backward(x, weight1, bias1, weight2)
        ctx.approximate = approximate
        fused, outputs = x.is_cpu and has_fused_linear(x.dtype), []
        for chunk in x.split(max(FORWARD_ENTRIES // max(len(weight1), 1), 1)):
            if fused:
                hidden = fused_linear(chunk, weight1, bias1, approximate)
                outputs.append(fused_linear(hidden, weight2, bias2))
            else:
                outputs.append(_mlp(chunk, weight1, bias1, weight2, bias2, approximate))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        with no_autocast(grad):
            # Chunks written in place have no second derivatives, and take one gradient at a time.
            whole = torch.is_grad_enabled() or is_batch_of_gradients(grad)
            grads = (_whole_backward if whole else _chunked_backward)(ctx, grad, *saved)
            return (*grads, grad.sum(0) if ctx.needs_input_grad[4] else None, None)


def _whole_backward(
    ctx: Any, grad: Tensor, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the tokens, ``W1``, ``b1`` and ``W2`` by PyTorch's layers, with their derivatives."""
    create_graph, needed = torch.is_grad_enabled(), ctx.needs_input_grad[:4]
    inputs = [tensor for tensor, need in zip((x, weight1, bias1, weight2), needed) if need]
    grads: Iterator[Tensor] = iter(())
    if inputs:
        with torch.enable_grad():
            out = _mlp(x, weight1, bias1, weight2, None, ctx.approximate)
        grads = iter(torch.autograd.grad(out, inputs, grad, create_graph=create_graph))
    return tuple(next(grads) if need else None for need in needed)


def _chunked_backward(
    ctx: Any, grad: Tensor, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the tokens, ``W1``, ``b1`` and ``W2``."""
    for_x, for_weight1, for_bias1, for_weight2, *_ = ctx.needs_input_grad
    x, grad, weight1, weight2 = (tensor.contiguous() for tensor in (x, grad, weight1, weight2))
    grad_x = torch.empty_like(x) if for_x else None
    grad_weight1 = torch.zeros_like(weight1) if for_weight1 else None
    grad_bias1 = torch.zeros_like(bias1) if for_bias1 else None
    grad_weight2 = torch.zeros_like(weight2) if for_weight2 else None
    for start in range(0, len(x), _BACKWARD_TOKENS):
        chunk = slice(start, start + _BACKWARD_TOKENS)
        hidden = outer_product(x[chunk], weight1).add_(bias1)
        grad_activated = outer_product(grad[chunk], weight2.t())
        activated, grad_hidden = _gelu_and_gradient(hidden, grad_activated, ctx.approximate)
        if grad_weight2 is not None:
            grad_weight2 += outer_product(grad[chunk].t(), activated.t())
        if grad_weight1 is not None:
            grad_weight1 += outer_product(grad_hidden.t(), x[chunk].t())
        if grad_bias1 is not None:
            grad_bias1 += grad_hidden.sum(0)
        if grad_x is not None:
            grad_x[chunk] = outer_product(grad_hidden, weight1.t())
    return grad_x, grad_weight1, grad_bias1, grad_weight2


def chunked_mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, approximate: str = 'none'
) -> Tensor:
    """Compute ``W2 gelu(W1 x + b1) + b2`` for each token, without holding the whole hidden layer.

    The forward pass holds one chunk of the hidden layer, the backward pass six smaller ones. Only the tokens are saved
    for the backward pass, which computes the hidden layer again. It is fast where :func:`has_fused_linear` is True.

    Args:
        x (Tensor): Tokens ``(n, C)`` in the dtype of the weights.
        weight1 (Tensor): ``(H, C)``.
        bias1 (Tensor): ``(H,)``.
        weight2 (Tensor): ``(C', H)``.
        bias2 (Tensor): ``(C',)``.
        approximate (str): Form of the GELU, see ``torch.nn.GELU``. Defaults to ``'none'``.

    Returns:
        Tensor: ``(n, C')``.

    Raises:
        ValueError: If gradients are needed in half precision, in which sums over many chunks would lose their digits.
    """
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight1, bias1, weight2, bias2))
    if learns and x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f'x of {x.dtype} with gradients: expected torch.float32 or torch.float64')
    if needs_standard_operators():
        return _mlp(x, weight1, bias1, weight2, bias2, approximate)
    return _ChunkedMLP.apply(x, weight1, bias1, weight2, bias2, approximate)
