_base_ = [
    'mmpretrain::_base_/default_runtime.py',
    '_base_/listops_sequences.py',
    '../../../configs/_base_/schedules/adamw_iters.py',
]
custom_imports = dict(imports=['projects.listops'], allow_failed_imports=False)

max_iters = 5000

model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(type='SequencePreprocessor', length=_base_.length),
    backbone=dict(
        type='SequenceEncoder',
        vocab_size=16,
        length=_base_.length,
        embed_dims=64,
        num_heads=2,
        depth=2,
        ratio=16,
        attention=dict(normalized=True, solver='cholesky'),
    ),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=64,
        loss=dict(type='CrossEntropyLoss'),
        topk=(1,),
    ),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.02, by_epoch=False, begin=0, end=500),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.02, by_epoch=False, begin=500, end=max_iters),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=1000)
default_hooks = dict(
    logger=dict(interval=50),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1000, max_keep_ckpts=2),
)
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
