"""The registries of the plugin, children of mmengine's registries.

When a config names ``soft_mm.<Type>``, mmengine imports this module and then the ``locations`` of the registry.
"""

from typing import Any

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import Registry

MODELS = Registry('model', parent=MMENGINE_MODELS, scope='soft_mm', locations=['soft_mm.models'])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='soft_mm', locations=['soft_mm.hooks'])
OPTIM_WRAPPERS = Registry(
    'optimizer wrapper', parent=MMENGINE_OPTIM_WRAPPERS, scope='soft_mm', locations=['soft_mm.optim']
)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='soft_mm',
    locations=['soft_mm.optim'],
)


def find_registered(registry: Registry, kind: Any) -> Any:
    """Find the object that the ``type`` of a config names.

    Args:
        registry (Registry): Registry of the names. It also imports paths such as ``'package.name'``, so the result can
            be any object.
        kind (Any): Name, or an object.

    Returns:
        Any: The object of the name, or None if the name is unknown. ``kind`` itself if it is not a string.
    """
    if not isinstance(kind, str):
        return kind
    # mmengine fails with an empty name, and with a leading dot, which is a relative import.
    return registry.get(kind) if kind and not kind.startswith('.') else None
