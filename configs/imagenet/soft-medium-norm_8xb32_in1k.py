_base_ = './soft-medium_8xb32_in1k.py'

# The authors use a higher rate for the normalised form of this arch.
lr = 4e-4 * 8 * 32 / 1024

model = dict(backbone=dict(attention=dict(normalized=True)))
optim_wrapper = dict(optimizer=dict(lr=lr))
# The warm-up starts at a rate of 1e-6.
param_scheduler = [dict(_base_.param_scheduler[0], start_factor=1e-6 / lr), _base_.param_scheduler[1]]
