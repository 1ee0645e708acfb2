"""Whether the computation runs now, or is recorded: compiled, exported, traced or transformed."""

from collections.abc import Callable, Sequence

import torch

_compiler = getattr(torch, 'compiler', None)
# PyTorch before 2.3 has no `is_compiling`, before 2.7 no `is_exporting`.
is_compiling: Callable[[], bool] = getattr(_compiler, 'is_compiling', lambda: False)
_is_dynamo_compiling: Callable[[], bool] = getattr(_compiler, 'is_dynamo_compiling', lambda: False)
CAN_EXPORT = hasattr(_compiler, 'is_exporting')
# torch.jit does not declare it as public.
is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]
_count_dispatch_modes: Callable[[], int] = getattr(torch._C, '_len_torch_dispatch_stack', lambda: 0)
_is_transformed: Callable[[], bool] = getattr(torch._C, '_are_functorch_transforms_active', lambda: False)


#: Whether a tensor stands for a batch of gradients, as in ``torch.autograd.grad(..., is_grads_batched=True)``.
is_batch_of_gradients: Callable[[torch.Tensor], bool] = getattr(
    getattr(torch._C, '_functorch', None), 'is_legacy_batchedtensor', lambda tensor: False
)


def is_exporting() -> bool:
    """Return whether ``torch.export`` records the computation, strictly or not.

    ``torch.compiler.is_exporting`` is also True inside ``torch.compile``, so its flag is read. If a later PyTorch has
    no flag, compiled code uses standard operators: slower, with the same numbers.

    Returns:
        bool: True inside an export.
    """
    if not CAN_EXPORT:
        return False
    return getattr(torch.compiler, '_is_exporting_flag', True) and torch.compiler.is_exporting()


def needs_standard_operators() -> bool:
    """Return whether only standard operators may be used, because the computation is recorded or transformed.

    This is so in ``torch.export``, in both exporters of ``torch.onnx``, in ``torch.jit.trace``, and in the transforms
    of ``torch.func``. Eager code and ``torch.compile`` use custom autograd functions and loops over chunks instead.

    Returns:
        bool: True inside an export, a trace or a transform.
    """
    if is_exporting() or is_tracing():
        return True
    # `torch.compile` cannot trace the next two.
    return not is_compiling() and (torch.onnx.is_in_onnx_export() or _is_transformed())


def is_recorded() -> bool:
    """Return whether the operators are recorded, counted or transformed, so that standard operators must be used.

    Returns:
        bool: True inside a compilation, an export, a trace, a transform, forward-mode differentiation, or a dispatch
        mode such as PyTorch's counter of multiply-adds.
    """
    if is_compiling() or needs_standard_operators():
        return True
    return _count_dispatch_modes() > 0 or getattr(torch.autograd.forward_ad, '_current_level', -1) >= 0


def has_dynamic_side(sides: Sequence[int]) -> bool:
    """Return whether sides of a grid may be variables of ``torch.export`` instead of numbers.

    Args:
        sides (tuple[int, ...]): Sides.

    Returns:
        bool: True if a side is a variable, and in a strict export, where variables cannot be told from numbers.
    """
    return is_exporting() and (_is_dynamo_compiling() or has_variable(sides))


def has_variable(sides: Sequence[int]) -> bool:
    """Return whether a side of a grid is a variable of ``torch.export``. In a strict export this is not known.

    Args:
        sides (tuple[int, ...]): Sides.

    Returns:
        bool: True if a side is a variable.
    """
    return not _is_dynamo_compiling() and any(isinstance(side, torch.SymInt) for side in sides)
