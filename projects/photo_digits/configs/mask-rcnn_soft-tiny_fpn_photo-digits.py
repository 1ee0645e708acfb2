_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/default_runtime.py',
    './_base_/photo_digits_instances.py',
    '../../../configs/_base_/schedules/adamw_iters.py',
]
custom_imports = dict(imports=['projects.photo_digits'], allow_failed_imports=False)

# The classifier of soft-tiny_photo-digits-crops.py, as trained by the demo.
pretrained = 'work_dirs/demo/classification/iter_950.pth'
max_iters = 280
channels = 128

model = dict(
    backbone=dict(
        _delete_=True,
        type='soft_mm.SOFT',
        arch='tiny',
        img_size=64,
        # The bound keeps the cost linear in the number of tokens without loss of accuracy (docs/long_inputs.md).
        attention=dict(solver='cholesky', max_landmarks=49),
        init_cfg=dict(type='Pretrained', checkpoint=pretrained, prefix='backbone.'),
    ),
    neck=dict(in_channels=[64, 128, 320, 512], out_channels=channels, num_outs=4),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(scales=[4], strides=[4, 8, 16, 32]),
    ),
    # Class-agnostic boxes and masks and narrow heads are enough: digits are small and have similar outlines.
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels, roi_layer=dict(sampling_ratio=2)),
        bbox_head=dict(in_channels=channels, fc_out_channels=512, num_classes=10, reg_class_agnostic=True),
        mask_roi_extractor=dict(out_channels=channels, roi_layer=dict(sampling_ratio=2)),
        mask_head=dict(num_convs=2, in_channels=channels, conv_out_channels=96, num_classes=10, class_agnostic=True),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=300),
        rcnn=dict(sampler=dict(num=40, pos_fraction=0.4)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=300)),
)
# Layers that are not pretrained need a higher learning rate.
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(neck=dict(lr_mult=3.0), rpn_head=dict(lr_mult=3.0), roi_head=dict(lr_mult=3.0)))
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
