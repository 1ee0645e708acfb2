_base_ = [
    '../_base_/models/fpn_soft-tiny.py',
    '../_base_/models/soft_dense_backbone.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/adamw_poly.py',
    '../_base_/default_runtime_mmseg.py',
]

# ImageNet weights: from the authors, converted by tools/convert_checkpoint.py, or trained with configs/imagenet.
pretrained = 'checkpoints/soft-tiny-norm_in1k.pth'

model = dict(
    backbone=dict(
        **_base_.soft_backbone,
        _delete_=True,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained, prefix='backbone.'),
    ),
    data_preprocessor=dict(size=(512, 512), size_divisor=None),
)
max_iters = 80000
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=0.9, by_epoch=False, begin=1500, end=max_iters),
]
default_hooks = dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=max_iters // 10, max_keep_ckpts=2))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters // 10)
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=1e-4))
auto_scale_lr = dict(base_batch_size=32)
