"""The attention mathematics as pure functions on tensors; needs torch and nothing else.

:mod:`soft_mm.ops.reference` holds the same formulae plainly, as the oracle of the tests.
"""

from .attention import local_branch, normalized_softmax_free_attention, softmax_free_attention
from .blockwise import blockwise_attention
from .inverse import newton_inverse, newton_inverse_per_image, ridge_matrix, safe_ridge
from .kernel import gaussian_kernel
from .landmarks import conv_landmarks, pool_landmarks, pooled_grid

__all__ = [
    'blockwise_attention',
    'conv_landmarks',
    'gaussian_kernel',
    'local_branch',
    'newton_inverse',
    'newton_inverse_per_image',
    'normalized_softmax_free_attention',
    'pool_landmarks',
    'pooled_grid',
    'ridge_matrix',
    'safe_ridge',
    'softmax_free_attention',
]
