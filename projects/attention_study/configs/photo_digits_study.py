# Small classifier with which `python -m projects.attention_study photo-digits` compares attentions. The program sets
# the attention and the data files.
_base_ = '../../photo_digits/configs/soft-tiny_photo-digits-crops.py'

batch_size = 32
small_iters = 280
full_iters = 120
max_iters = small_iters + full_iters

model = dict(
    backbone=dict(
        img_size=48,
        arch=dict(
            _delete_=True,
            embed_dims=(32, 64, 96, 128),
            num_heads=(1, 2, 3, 4),
            depths=(1, 1, 2, 1),
            ratios=(2, 1, 1, 1),
        ),
        attention=dict(_delete_=True),
    ),
    head=dict(in_channels=128),
)
train_pipeline = [dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        _delete_=True,
        type='ConcatDataset',
        datasets=[
            dict(type='PackedCrops', ann_file='', pipeline=train_pipeline),
            dict(type='PackedCrops', ann_file='', pipeline=train_pipeline),
        ],
    ),
)
val_dataloader = dict(num_workers=0)
test_dataloader = dict(num_workers=0)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.02, by_epoch=False, begin=0, end=30),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.02, by_epoch=False, begin=30, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
# This rate is too high for the demo's classifier, which is wider and solves the full task.
optim_wrapper = dict(optimizer=dict(lr=1e-3))
default_hooks = dict(checkpoint=dict(interval=200, max_keep_ckpts=1))
