"""Layer-wise learning rates for the models of all toolboxes."""

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from soft_mm.registry import OPTIM_WRAPPER_CONSTRUCTORS


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
