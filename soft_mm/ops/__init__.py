"""The attention mathematics as pure functions on tensors. Imports torch and nothing else.

:mod:`soft_mm.ops.reference` implements every formula of SOFT plainly. The tests compare the fast functions with it.
"""

from .attention import local_branch, middle_matrix, normalized_softmax_free_attention, softmax_free_attention
from .baseline_attention import (
    gaussian_attention,
    iterative_pinv,
    linformer_attention,
    nystrom_attention,
    orthogonal_features,
    performer_attention,
    resize_sequence_projection,
    softmax_attention,
)
from .blockwise import blockwise_attention, whole_attention
from .inverse import newton_inverse, newton_inverse_per_image, pseudo_inverse, ridge_matrix, safe_ridge
from .kernel import gaussian_kernel
from .landmarks import (
    activate_landmarks,
    conv_landmarks,
    mean_landmarks,
    mean_present_landmarks,
    pool_landmarks,
    pool_present_landmarks,
    pool_to_slots,
    pooled_grid,
    present_patches,
    project_patches,
    random_landmarks,
)
from .mlp import chunked_mlp

__all__ = [
    'activate_landmarks',
    'blockwise_attention',
    'chunked_mlp',
    'conv_landmarks',
    'gaussian_attention',
    'gaussian_kernel',
    'iterative_pinv',
    'linformer_attention',
    'local_branch',
    'mean_landmarks',
    'mean_present_landmarks',
    'middle_matrix',
    'newton_inverse',
    'newton_inverse_per_image',
    'normalized_softmax_free_attention',
    'nystrom_attention',
    'orthogonal_features',
    'performer_attention',
    'pool_landmarks',
    'pool_present_landmarks',
    'pool_to_slots',
    'pooled_grid',
    'present_patches',
    'project_patches',
    'pseudo_inverse',
    'random_landmarks',
    'resize_sequence_projection',
    'ridge_matrix',
    'safe_ridge',
    'softmax_attention',
    'softmax_free_attention',
    'whole_attention',
]
