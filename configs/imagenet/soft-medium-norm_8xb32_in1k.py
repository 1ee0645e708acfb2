_base_ = './soft-medium_8xb32_in1k.py'

lr = 4e-4 * 8 * 32 / 1024

model = dict(backbone=dict(attention=dict(normalized=True)))
optim_wrapper = dict(optimizer=dict(lr=lr))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6 / lr, by_epoch=True, begin=0, end=10, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=5e-5, by_epoch=True, begin=10, end=300),
]
