"""Attention modules under one contract: softmax-free attention and the baselines of the papers."""

from .base import BaseAttention, build_attention
from .baselines import (
    GaussianKernelAttention,
    LinformerAttention,
    NystromAttention,
    PerformerAttention,
    SoftmaxAttention,
    SpatialReductionAttention,
)
from .softmax_free import SoftmaxFreeAttention, SoftmaxFreeCrossAttention

__all__ = [
    'BaseAttention',
    'GaussianKernelAttention',
    'LinformerAttention',
    'NystromAttention',
    'PerformerAttention',
    'SoftmaxAttention',
    'SoftmaxFreeAttention',
    'SoftmaxFreeCrossAttention',
    'SpatialReductionAttention',
    'build_attention',
]
