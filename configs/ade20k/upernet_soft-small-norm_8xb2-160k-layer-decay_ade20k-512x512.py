# Lower learning rates for the layers closer to the image.
_base_ = './upernet_soft-small-norm_8xb2-160k_ade20k-512x512.py'

optim_wrapper = dict(
    optimizer=dict(lr=1e-4),
    constructor='soft_mm.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=0.9),
)
