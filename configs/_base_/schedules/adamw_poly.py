# Learning rate and weight decay as in mmsegmentation's Swin configs, for a batch size of 16.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        custom_keys=dict(pos_embed=dict(decay_mult=0.0), cls_token=dict(decay_mult=0.0)),
    ),
)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
