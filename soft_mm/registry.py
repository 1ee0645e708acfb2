"""The registries of the plugin, children of mmengine's registries.

When a config names ``soft_mm.<Type>``, mmengine imports this module and then the ``locations`` of the registry.
"""

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import Registry

MODELS = Registry('model', parent=MMENGINE_MODELS, scope='soft_mm', locations=['soft_mm.models'])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='soft_mm', locations=['soft_mm.hooks'])
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='soft_mm',
    locations=['soft_mm.optim'],
)
