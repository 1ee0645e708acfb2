"""The registry of the plugin, a child of mmengine's registry.

When a config names ``soft_mm.<Type>``, mmengine imports this module and then the ``locations`` of its registry.
"""

from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

MODELS = Registry('model', parent=MMENGINE_MODELS, scope='soft_mm', locations=['soft_mm.models'])
