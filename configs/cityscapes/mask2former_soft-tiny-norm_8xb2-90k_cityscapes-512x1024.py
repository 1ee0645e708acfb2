_base_ = [
    '../_base_/models/mask2former.py',
    '../_base_/models/soft_dense_backbone.py',
    '../_base_/datasets/cityscapes_1024x2048.py',
    '../_base_/default_runtime_mmseg.py',
]

# ImageNet weights: from the authors, converted by tools/convert_checkpoint.py, or trained with configs/imagenet.
pretrained = 'checkpoints/soft-tiny-norm_in1k.pth'

crop_size = (512, 1024)
model = dict(
    backbone=dict(
        **_base_.soft_backbone,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained, prefix='backbone.'),
    ),
    data_preprocessor=dict(size=crop_size),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(
        type='RandomChoiceResize',
        scales=list(range(512, 2049, 102)),
        resize_type='ResizeShortestEdge',
        max_size=4096,
    ),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=train_pipeline))

# Optimizer as in mmsegmentation's Mask2Former with Swin backbones. mmengine applies only the longest key that matches a
# parameter. Without their own keys, the norms of the backbone would match `backbone` and get weight decay.
# 49 is the largest number of blocks in a stage of any arch.
no_decay = dict(decay_mult=0.0)
slow_no_decay = dict(lr_mult=0.1, decay_mult=0.0)
custom_keys = {f'backbone.stages.{i}.blocks.{j}.norm': slow_no_decay for i in range(4) for j in range(49)}
custom_keys.update({f'backbone.stages.0.patch_embed.{layer}.': slow_no_decay for layer in (1, 4, 7)})
custom_keys.update({f'backbone.stages.{i}.patch_embed.1.': slow_no_decay for i in (1, 2, 3)})
custom_keys.update(
    {
        'backbone': dict(lr_mult=0.1),
        'landmark_norm': slow_no_decay,
        'stages.3.norm': slow_no_decay,
        'pos_embed': slow_no_decay,
        'cls_token': slow_no_decay,
        'query_embed': no_decay,
        'query_feat': no_decay,
        'level_embed': no_decay,
    }
)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05, eps=1e-8, betas=(0.9, 0.999)),
    clip_grad=dict(max_norm=0.01, norm_type=2),
    paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys=custom_keys),
)
max_iters = 90000
param_scheduler = [dict(type='PolyLR', eta_min=0, power=0.9, begin=0, end=max_iters, by_epoch=False)]
default_hooks = dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=5000, max_keep_ckpts=2))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=5000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
auto_scale_lr = dict(base_batch_size=16)
