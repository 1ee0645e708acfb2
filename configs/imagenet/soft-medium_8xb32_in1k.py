_base_ = [
    'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py',
    'mmpretrain::_base_/default_runtime.py',
    '../_base_/models/soft_classifier.py',
    '../_base_/schedules/imagenet_adamw_300e.py',
]

lr = 3.5e-4 * 8 * 32 / 1024

model = dict(backbone=dict(arch='medium'))
train_dataloader = dict(batch_size=32)
optim_wrapper = dict(optimizer=dict(lr=lr))
# Warm-up starts at 1e-6.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6 / lr, by_epoch=True, begin=0, end=10, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=5e-5, by_epoch=True, begin=10, end=300),
]
auto_scale_lr = dict(base_batch_size=256)
