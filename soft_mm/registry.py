"""The plugin's registries, children of mmengine's.

mmengine imports this module by itself when a config names ``soft_mm.<Type>``, and then the ``locations``.
"""

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

MODELS = Registry('model', parent=MMENGINE_MODELS, scope='soft_mm', locations=['soft_mm.models'])
DATASETS = Registry('dataset', parent=MMENGINE_DATASETS, scope='soft_mm', locations=['soft_mm.datasets'])
