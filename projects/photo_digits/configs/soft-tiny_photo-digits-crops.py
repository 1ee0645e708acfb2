_base_ = [
    'mmpretrain::_base_/default_runtime.py',
    './_base_/photo_digits_crops.py',
    '../../../configs/_base_/schedules/adamw_iters.py',
]
custom_imports = dict(imports=['projects.photo_digits'], allow_failed_imports=False)

max_iters = _base_.small_iters + _base_.full_iters

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='soft_mm.SOFT',
        arch='tiny',
        img_size=64,
        out_indices=(3,),
        out_type='cls_token',
        attention=dict(solver='cholesky'),
    ),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=512,
        loss=dict(type='CrossEntropyLoss'),
        topk=(1,),
    ),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.02, by_epoch=False, begin=0, end=60),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.02, by_epoch=False, begin=400, end=max_iters),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters)
optim_wrapper = dict(optimizer=dict(lr=4e-4))
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=100, max_keep_ckpts=2),
)
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
