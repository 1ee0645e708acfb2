"""The Gaussian kernel between two sets of tokens."""

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .recording import is_compiling, needs_standard_operators

P = ParamSpec('P')
T = TypeVar('T')
_AUTOCAST_TAKES_DEVICE = tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 4)
# exp(-x^2 / 2) = 2^(-y^2 / 2) with y = _ROOT_OF_LOG2_E * x.
_ROOT_OF_LOG2_E = math.sqrt(1 / math.log(2))
# PyTorch 2.9 deprecates `allow_tf32` and refuses to read it after the new setting was used.
_HAS_PRECISION = hasattr(torch.backends.cuda.matmul, 'fp32_precision')


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which distances are computed.

    In half precision, cancellation in ``||a||^2 + ||b||^2 - 2 a.b`` can remove all correct digits.

    Args:
        tensor (Tensor): Input of the computation.

    Returns:
        torch.dtype: float64 for a float64 input, otherwise float32.
    """
    return torch.promote_types(tensor.dtype, torch.float32)


def _rounds_products(tensor: Tensor) -> bool:
    """Return whether PyTorch was told to round the operands of float32 products on the device of a tensor."""
    if tensor.is_cuda:
        matmul: Any = torch.backends.cuda.matmul
        return matmul.fp32_precision == 'tf32' if _HAS_PRECISION else matmul.allow_tf32
    # `torch.compile` cannot trace the question.
    if not tensor.is_cpu or is_compiling():
        return False
    if _HAS_PRECISION:
        return torch.backends.mkldnn.matmul.fp32_precision in ('bf16', 'tf32')  # type: ignore[attr-defined]
    return torch.get_float32_matmul_precision() != 'highest'


def product_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of the matrix products of distances and iterations, which lose their digits in TF32.

    Args:
        tensor (Tensor): Input of the computation.

    Returns:
        torch.dtype: :func:`compute_dtype`, or float64 if PyTorch was told to round the operands of float32 products,
        as by ``torch.set_float32_matmul_precision('high')`` on a GPU.
    """
    dtype = compute_dtype(tensor)
    return torch.float64 if dtype == torch.float32 and _rounds_products(tensor) else dtype


def is_autocast_enabled(device_type: str) -> bool:
    """Return whether autocast is enabled for a device type.

    Args:
        device_type (str): ``'cpu'`` or ``'cuda'``, or ``'meta'``, which has no autocast.

    Returns:
        bool: Whether it is.
    """
    if _AUTOCAST_TAKES_DEVICE:
        return device_type != 'meta' and torch.is_autocast_enabled(device_type)
    return torch.is_autocast_enabled() or torch.is_autocast_cpu_enabled()


def cpu_autocast_dtype() -> torch.dtype:
    """Return the dtype to which autocast converts on a CPU.

    Returns:
        torch.dtype: Half precision.
    """
    return torch.get_autocast_dtype('cpu') if _AUTOCAST_TAKES_DEVICE else torch.get_autocast_cpu_dtype()


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which autocast is disabled on the device of a tensor. The meta device has no autocast.

    Args:
        tensor (Tensor): Any tensor.

    Returns:
        AbstractContextManager: The context.
    """
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def without_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function to run with autocast disabled. The function casts its inputs itself.

    Args:
        function (Callable): Function whose first argument is a tensor. The device of the tensor selects the autocast.

    Returns:
        Callable: The decorated function.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with no_autocast(tensor):
            return function(*args, **kwargs)

    return run


@without_autocast
def gaussian_kernel(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``exp(-||a_i - b_j||^2 / 2)`` for all pairs with one batched matrix product (SOFT, section 3.1).

    Args:
        a (Tensor): Tokens ``(..., n, d)``.
        b (Tensor): Tokens ``(..., m, d)``.

    Returns:
        Tensor: ``(..., n, m)`` with entries in [0, 1], in float32 or wider, even inside autocast.
    """
    # On some processors, exp2 is several times faster than exp. ONNX does not have it.
    uses_exp2 = not needs_standard_operators()
    a, b = a.to(compute_dtype(a)), b.to(compute_dtype(b))
    if uses_exp2:
        a, b = a * _ROOT_OF_LOG2_E, b * _ROOT_OF_LOG2_E
    wide = product_dtype(a)
    exponent = torch.matmul(a.to(wide), b.to(wide).transpose(-2, -1)).to(a.dtype)
    exponent -= a.square().sum(-1, keepdim=True) / 2
    exponent -= b.square().sum(-1).unsqueeze(-2) / 2
    # Rounding can lift the exponent of two equal tokens above 0.
    exponent.clamp_(max=0)
    return exponent.exp2_() if uses_exp2 else exponent.exp_()
