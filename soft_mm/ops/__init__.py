"""The attention mathematics as pure functions on tensors; needs torch and nothing else.

:mod:`soft_mm.ops.reference` holds those of SOFT plainly, as the oracle of the tests.
"""

from .attention import local_branch, normalized_softmax_free_attention, softmax_free_attention
from .blockwise import blockwise_attention
from .inverse import newton_inverse, newton_inverse_per_image, pseudo_inverse, ridge_matrix, safe_ridge
from .kernel import gaussian_kernel
from .landmarks import conv_landmarks, mean_landmarks, pool_landmarks, pooled_grid, random_landmarks
from .rivals import (
    gaussian_attention,
    iterative_pinv,
    linformer_attention,
    nystrom_attention,
    orthogonal_features,
    performer_attention,
    resize_sequence_projection,
)

__all__ = [
    'blockwise_attention',
    'conv_landmarks',
    'gaussian_attention',
    'gaussian_kernel',
    'iterative_pinv',
    'linformer_attention',
    'local_branch',
    'mean_landmarks',
    'newton_inverse',
    'newton_inverse_per_image',
    'normalized_softmax_free_attention',
    'nystrom_attention',
    'orthogonal_features',
    'performer_attention',
    'pool_landmarks',
    'pooled_grid',
    'pseudo_inverse',
    'random_landmarks',
    'resize_sequence_projection',
    'ridge_matrix',
    'safe_ridge',
    'softmax_free_attention',
]
