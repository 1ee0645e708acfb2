_base_ = './soft-medium_8xb32_in1k.py'

lr = 4e-4 * 8 * 32 / 1024

model = dict(backbone=dict(attention=dict(normalized=True)))
optim_wrapper = dict(optimizer=dict(lr=lr))
