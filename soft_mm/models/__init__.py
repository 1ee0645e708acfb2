"""The SOFT backbone and its attention modules. Imports torch and mmengine only."""

from .attention import (
    GaussianKernelAttention,
    LinformerAttention,
    NystromAttention,
    PerformerAttention,
    SoftmaxAttention,
    SoftmaxFreeAttention,
    SoftmaxFreeCrossAttention,
    SpatialReductionAttention,
)
from .soft import SOFT

__all__ = [
    'GaussianKernelAttention',
    'LinformerAttention',
    'NystromAttention',
    'PerformerAttention',
    'SOFT',
    'SoftmaxAttention',
    'SoftmaxFreeAttention',
    'SoftmaxFreeCrossAttention',
    'SpatialReductionAttention',
]
