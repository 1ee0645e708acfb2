# AdamW with gradient clipping. Norms, biases, position embeddings and the class token have no weight decay.
# On a CPU, fused=True needs PyTorch 2.4 or newer.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=3e-4, weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys=dict(pos_embed=dict(decay_mult=0.0), cls_token=dict(decay_mult=0.0)),
    ),
)
val_cfg = dict()
test_cfg = dict()
