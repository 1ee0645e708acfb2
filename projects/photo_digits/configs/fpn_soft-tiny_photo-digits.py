_base_ = [
    '../../../configs/_base_/models/fpn_soft-tiny.py',
    '../../../configs/_base_/default_runtime_mmseg.py',
    './_base_/photo_digits_semantic.py',
    '../../../configs/_base_/schedules/adamw_iters.py',
]
custom_imports = dict(imports=['projects.photo_digits'], allow_failed_imports=False)

# The backbone of mask-rcnn_soft-tiny_fpn_photo-digits.py, as trained by the demo.
pretrained = 'work_dirs/demo/detection/iter_280.pth'
max_iters = 260
channels = 128

model = dict(
    backbone=dict(
        img_size=64,
        # The bound keeps the cost linear in the number of tokens without loss of accuracy (docs/long_inputs.md).
        attention=dict(solver='cholesky', max_landmarks=49),
        init_cfg=dict(type='Pretrained', checkpoint=pretrained, prefix='backbone.'),
    ),
    neck=dict(out_channels=channels),
    # Most pixels are background: without class weights, the head predicts background everywhere.
    decode_head=dict(
        in_channels=[channels] * 4,
        channels=channels,
        dropout_ratio=0.0,
        num_classes=11,
        norm_cfg=dict(type='BN'),
        loss_decode=dict(class_weight=[0.3] + [2.0] * 10),
    ),
)
train_dataloader = dict(batch_size=8)
# Layers that are not pretrained need a higher learning rate.
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(decode_head=dict(lr_mult=3.0), neck=dict(lr_mult=3.0))),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.02, by_epoch=False, begin=0, end=60),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.02, by_epoch=False, begin=60, end=max_iters),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=100, max_keep_ckpts=2),
)
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
