"""The Gaussian kernel between two sets of tokens."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec('P')
T = TypeVar('T')
_AUTOCAST_TAKES_DEVICE = tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 4)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which distances are computed.

    In half precision, cancellation in ``||a||^2 + ||b||^2 - 2 a.b`` can remove all correct digits.

    Args:
        tensor (Tensor): Input of the computation.

    Returns:
        torch.dtype: float64 for a float64 input, otherwise float32.
    """
    return torch.promote_types(tensor.dtype, torch.float32)


def is_autocast_enabled(device_type: str) -> bool:
    """Return whether autocast is enabled for a device type.

    Args:
        device_type (str): ``'cpu'`` or ``'cuda'``.

    Returns:
        bool: Whether it is.
    """
    if _AUTOCAST_TAKES_DEVICE:
        return torch.is_autocast_enabled(device_type)
    return torch.is_autocast_enabled() or torch.is_autocast_cpu_enabled()


def cpu_autocast_dtype() -> torch.dtype:
    """Return the dtype to which autocast converts on a CPU.

    Returns:
        torch.dtype: Half precision.
    """
    return torch.get_autocast_dtype('cpu') if _AUTOCAST_TAKES_DEVICE else torch.get_autocast_cpu_dtype()


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
        with torch.autocast(tensor.device.type, enabled=False):
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
    a, b = a.to(compute_dtype(a)), b.to(compute_dtype(b))
    exponent = torch.matmul(a, b.transpose(-2, -1))
    exponent -= a.square().sum(-1, keepdim=True) / 2
    exponent -= b.square().sum(-1).unsqueeze(-2) / 2
    # Rounding can lift the exponent of two equal tokens above 0.
    return exponent.clamp_(max=0).exp_()
