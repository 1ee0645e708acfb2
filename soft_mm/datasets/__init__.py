"""The data sets that need no download: photo-digits, its generators and registered data sets; and ListOps."""

from .listops import ListOps
from .mm_datasets import PhotoDigitsCrops, PhotoDigitsScenes
from .packed import PackedCrops
from .photo_digits import CLASSES, PALETTE, CropGenerator, Scene, SceneGenerator

__all__ = [
    'CLASSES',
    'PALETTE',
    'CropGenerator',
    'ListOps',
    'PackedCrops',
    'PhotoDigitsCrops',
    'PhotoDigitsScenes',
    'Scene',
    'SceneGenerator',
]
