"""The SOFT backbone and its parts as modules; needs torch and mmengine."""

from .attention import SoftmaxFreeAttention
from .rivals import (
    GaussianKernelAttention,
    LinformerAttention,
    NystromAttention,
    PerformerAttention,
    SoftmaxAttention,
    SpatialReductionAttention,
)
from .sequence import SequenceEncoder, SequencePreprocessor
from .soft import SOFT

__all__ = [
    'SOFT',
    'GaussianKernelAttention',
    'LinformerAttention',
    'NystromAttention',
    'PerformerAttention',
    'SequenceEncoder',
    'SequencePreprocessor',
    'SoftmaxAttention',
    'SoftmaxFreeAttention',
    'SpatialReductionAttention',
]
