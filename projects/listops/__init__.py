"""ListOps: sequences instead of images. Importing this package registers its data set and models in mmengine."""

from .encoder import SequenceEncoder, SequencePreprocessor
from .listops_data import ListOps

__all__ = ['ListOps', 'SequenceEncoder', 'SequencePreprocessor']
