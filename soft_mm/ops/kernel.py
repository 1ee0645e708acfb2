"""The Gaussian kernel between sets of tokens."""

import functools

import torch

# Not there before PyTorch 2.3.
is_compiling = getattr(getattr(torch, 'compiler', None), 'is_compiling', lambda: False)


def compute_dtype(tensor):
    """The dtype in which distances may be taken: float32, or float64 for a float64 input.

    In half precision ``||a||^2 + ||b||^2 - 2 a.b`` cancels to nothing.
    """
    return torch.promote_types(tensor.dtype, torch.float32)


def without_autocast(function):
    """Run ``function``, whose first argument is a tensor, with autocast off: it casts what it needs by itself."""

    @functools.wraps(function)
    def run(tensor, *args, **kwargs):
        with torch.autocast(tensor.device.type, enabled=False):
            return function(tensor, *args, **kwargs)

    return run


@without_autocast
def gaussian_kernel(a, b):
    """``exp(-||a_i - b_j||^2 / 2)`` for all pairs, through one batched matrix product (SOFT, section 3.1).

    Args:
        a (Tensor): tokens ``(..., n, d)``.
        b (Tensor): tokens ``(..., m, d)``.

    Returns:
        Tensor: ``(..., n, m)`` with entries in [0, 1], in float32, or float64 where the inputs are; autocast does
            not reach inside.
    """
    a, b = a.to(compute_dtype(a)), b.to(compute_dtype(b))
    exponent = torch.matmul(a, b.transpose(-2, -1))
    exponent -= a.square().sum(-1, keepdim=True) / 2
    exponent -= b.square().sum(-1).unsqueeze(-2) / 2
    # Rounding can lift the exponent of a token against itself above zero.
    return exponent.clamp_(max=0).exp_()
