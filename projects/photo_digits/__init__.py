"""photo-digits: a data set that needs no download, and a demo that trains on it.

Importing this package registers the data sets in mmengine's ``DATASETS``.
"""

from .generators import CropGenerator, SceneGenerator
from .mm_datasets import PhotoDigitsCrops, PhotoDigitsScenes
from .packed import PackedCrops
from .rendering import Scene
from .sources import CLASSES, PALETTE

__all__ = [
    'CLASSES',
    'PALETTE',
    'CropGenerator',
    'PackedCrops',
    'PhotoDigitsCrops',
    'PhotoDigitsScenes',
    'Scene',
    'SceneGenerator',
]
