"""The SOFT backbone and its parts as modules; needs torch and mmengine."""

from .attention import SoftmaxFreeAttention
from .soft import SOFT

__all__ = ['SOFT', 'SoftmaxFreeAttention']
