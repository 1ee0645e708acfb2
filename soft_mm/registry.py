"""The registry of the plugin, a child of mmengine's.

mmengine imports this module by itself when a config names ``soft_mm.<Type>``, then imports its ``locations``.
"""

from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

MODELS = Registry('model', parent=MMENGINE_MODELS, scope='soft_mm', locations=['soft_mm.models'])
