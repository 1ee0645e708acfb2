"""Whether the computation runs now, or is recorded: compiled, exported, traced or transformed."""

from collections.abc import Callable, Sequence

import torch

_compiler = getattr(torch, 'compiler', None)
# PyTorch before 2.3 has no `is_compiling`, before 2.7 no `is_exporting`.
is_compiling: Callable[[], bool] = getattr(_compiler, 'is_compiling', lambda: False)
_is_exporting: Callable[[], bool] = getattr(_compiler, 'is_exporting', lambda: False)
# torch.jit does not declare it as public.
is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]


def needs_standard_operators() -> bool:
    """Return whether only standard operators may be used, because the computation is recorded or transformed.

    This is so in ``torch.export``, in both exporters of ``torch.onnx``, in ``torch.jit.trace``, and in the transforms
    of ``torch.func``. Eager code and ``torch.compile`` use custom autograd functions and loops over chunks instead.

    Returns:
        bool: True inside an export, a trace or a transform.
    """
    if _is_exporting() or is_tracing():
        return True
    # `torch.compile` cannot trace the next two.
    return not is_compiling() and (torch.onnx.is_in_onnx_export() or torch._C._are_functorch_transforms_active())


def has_dynamic_side(sides: Sequence[int]) -> bool:
    """Return whether sides of a grid are variables of ``torch.export`` instead of numbers.

    Args:
        sides (tuple[int, ...]): Sides.

    Returns:
        bool: True if a side may be a variable. In a strict export, variables cannot be told from numbers.
    """
    if not _is_exporting():
        return False
    return torch.compiler.is_dynamo_compiling() or any(isinstance(side, torch.SymInt) for side in sides)
