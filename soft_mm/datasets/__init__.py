"""The embedded data set, photo-digits: its generators and registered data sets."""

from .mm_datasets import PhotoDigitsCrops, PhotoDigitsScenes
from .photo_digits import CLASSES, PALETTE, CropGenerator, Scene, SceneGenerator

__all__ = [
    'CLASSES',
    'PALETTE',
    'CropGenerator',
    'PhotoDigitsCrops',
    'PhotoDigitsScenes',
    'Scene',
    'SceneGenerator',
]
