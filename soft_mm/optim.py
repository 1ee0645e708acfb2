"""Layer-wise learning rates and mixed precision on the CPU, for the models of all toolboxes."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from torch import nn

from soft_mm.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Lower the learning rate of each layer of a backbone, the more the closer the layer is to the image.

    The learning rate of a parameter of depth ``k`` of ``n`` is multiplied by ``layer_decay_rate ** (n - 1 - k)``
    (BEiT, arXiv:2106.08254, appendix). The backbone's method ``get_layer_depth`` gives ``k`` and ``n``. The backbone
    may be nested in any model: classifiers, detectors, segmentors, and models that wrap these. Parameters outside it
    keep their learning rate.

    Args:
        optim_wrapper_cfg (dict): See mmengine's ``DefaultOptimWrapperConstructor``. The optimiser must have ``lr``.
        paramwise_cfg (dict): ``layer_decay_rate``, above 0 and at most 1, and the options of mmengine's constructor.

    Raises:
        ValueError: If ``layer_decay_rate`` is missing or out of its range, or the optimiser has no ``lr``.

    Examples:
        >>> optim_wrapper = dict(
        ...     type='OptimWrapper',
        ...     optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
        ...     constructor='soft_mm.LayerDecayOptimWrapperConstructor',
        ...     paramwise_cfg=dict(layer_decay_rate=0.8, norm_decay_mult=0.0))
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        rate = self.paramwise_cfg.get('layer_decay_rate')
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise ValueError(f'layer_decay_rate={rate!r} in paramwise_cfg: expected a number above 0 and at most 1')
        if self.base_lr is None:
            raise ValueError('layer-wise learning rates need the learning rate of the optimiser: set optimizer.lr')

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, prefix: str = '', **kwargs: Any) -> None:
        """Add the parameters of a module to the parameter groups, one group per parameter.

        Args:
            params (list[dict]): Parameter groups, extended in place.
            module (nn.Module): The module.
            prefix (str): Name of the module in the model. Defaults to '': the model.
            **kwargs: See mmengine's constructor.

        Raises:
            ValueError: If the model has no backbone with ``get_layer_depth``.
        """
        super().add_params(params, module, prefix, **kwargs)
        if prefix:
            # mmengine calls this method for each child. The model itself comes last.
            return
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        backbones = _innermost(
            {name: part for name, part in module.named_modules() if hasattr(part, 'get_layer_depth')}
        )
        if not backbones:
            raise ValueError(f'{type(module).__name__} has no backbone with the method get_layer_depth, such as SOFT')
        for group in params:
            name = names[id(group['params'][0])]
            for backbone, part in backbones.items():
                if name.startswith(backbone):
                    depth, count = part.get_layer_depth(name, prefix=backbone)
                    group['lr'] = group.get('lr', self.base_lr) * self.paramwise_cfg['layer_decay_rate'] ** (
                        count - 1 - depth
                    )


def _innermost(modules: dict[str, Any]) -> dict[str, Any]:
    """Keep the modules that contain no other one, with their prefixes. A classifier of mmpretrain asks its backbone."""
    prefixes = {f'{name}.' if name else '': part for name, part in modules.items()}
    return {
        name: part
        for name, part in prefixes.items()
        if not any(other != name and other.startswith(name) for other in prefixes)
    }


def has_bfloat16(cpuinfo: str | Path = '/proc/cpuinfo') -> bool | None:
    """Say whether the processor has instructions for bfloat16. Without them, bfloat16 is slower than float32.

    Args:
        cpuinfo (str | Path): File in which Linux lists the features of the processor.

    Returns:
        bool | None: True or False, or None if the system does not say.
    """
    try:
        text = Path(cpuinfo).read_text(encoding='utf-8')
    except OSError:
        return None
    # The line is `flags` on x86 and `Features` on ARM.
    lines = [line for line in text.splitlines() if line.partition(':')[0].strip() in ('flags', 'Features')]
    if not lines:
        return None
    return bool({'avx512_bf16', 'amx_bf16', 'bf16'}.intersection(lines[0].split()))


def _to_float32(value: Any) -> Any:
    """Convert the bfloat16 tensors in tuples, lists and dicts to float32."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype == torch.bfloat16 else value
    if isinstance(value, dict):
        return {key: _to_float32(part) for key, part in value.items()}
    return type(value)(map(_to_float32, value)) if type(value) in (tuple, list) else value


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Train on the CPU in mixed precision, by ``torch.autocast`` in bfloat16.

    mmengine's ``AmpOptimWrapper`` needs a GPU. The loss is not scaled, because bfloat16 has the range of float32.
    The evaluation stays in float32. ``tools/train.py --amp`` uses this wrapper if PyTorch finds no GPU.

    Args:
        dtype (str | torch.dtype): ``'bfloat16'``. On the CPU, float16 would need a scaled loss. Defaults to
            ``'bfloat16'``.
        modules (Sequence[str] | None): Submodules of the model that compute in bfloat16 and return float32, such as
            ``('backbone', 'neck')``. Defaults to None: the whole model, but in a detector with a ``roi_head`` its
            ``backbone`` and ``neck``, because mmcv's RoIAlign and NMS take no bfloat16 on the CPU.
        **kwargs: See mmengine's ``OptimWrapper``: ``optimizer``, ``accumulative_counts``, ``clip_grad``.

    Raises:
        ValueError: If ``dtype`` is not bfloat16, or a parameter is not on the CPU.

    Examples:
        >>> optim_wrapper = dict(
        ...     type='soft_mm.CPUAmpOptimWrapper',
        ...     optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05))
    """

    def __init__(
        self, dtype: str | torch.dtype = 'bfloat16', modules: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if dtype not in ('bfloat16', torch.bfloat16):
            raise ValueError(f'dtype={dtype!r}: expected bfloat16, the only type for mixed precision on the CPU')
        if isinstance(modules, str):
            raise ValueError(f'modules={modules!r}: expected a list of names, such as [{modules!r}], or None')
        devices = {p.device.type for group in self.optimizer.param_groups for p in group['params']} - {'cpu'}
        if devices:
            raise ValueError(
                f'CPUAmpOptimWrapper trains on the CPU, but the model is on {", ".join(sorted(devices))}: use '
                'AmpOptimWrapper'
            )
        self.modules = modules
        if has_bfloat16() is False:
            print_log(
                'This processor has no instructions for bfloat16: mixed precision is slower than float32, leave it out',
                'current',
                logging.WARNING,
            )

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Compute the forward pass in mixed precision. See mmengine's ``OptimWrapper.optim_context``.

        Args:
            model (nn.Module): The model, which may be wrapped for several processes.

        Raises:
            ValueError: If the model lacks one of ``modules``.
        """
        with super().optim_context(model):
            while is_model_wrapper(model):
                model = model.get_submodule('module')
            names = _bodies_of_detectors(model) if self.modules is None else self.modules
            with torch.autocast('cpu', torch.bfloat16) if names is None else _autocast_in(model, names):
                yield


def _bodies_of_detectors(model: nn.Module) -> list[str] | None:
    """Return the names of the backbones and necks of two-stage detectors in a model, None if there are none."""
    names = [
        f'{prefix}.{part}'.lstrip('.')
        for prefix, module in model.named_modules()
        if hasattr(module, 'roi_head')
        for part in ('backbone', 'neck')
        if isinstance(getattr(module, part, None), nn.Module)
    ]
    return names or None


@contextlib.contextmanager
def _autocast_in(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Let submodules of a model compute in bfloat16 and return float32."""

    def forward(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        with torch.autocast('cpu', torch.bfloat16):
            return _to_float32(original(*args, **options))

    known = dict(model.named_modules())
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f'modules={list(names)}: {type(model).__name__} has no {", ".join(unknown)}')
    with contextlib.ExitStack() as stack:
        for module in (known[name] for name in dict.fromkeys(names)):
            # A hook of another library may have set a forward on the module itself.
            if 'forward' in vars(module):
                stack.callback(setattr, module, 'forward', module.forward)
            else:
                stack.callback(delattr, module, 'forward')
            module.forward = functools.partial(forward, module.forward)
        yield
