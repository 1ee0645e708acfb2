_base_ = './soft-medium_8xb32_in1k.py'

# For this arch, the authors use a higher learning rate if the attention is normalised.
lr = 4e-4 * 8 * 32 / 1024

model = dict(backbone=dict(attention=dict(normalized=True)))
optim_wrapper = dict(optimizer=dict(lr=lr))
# start_factor is relative to lr. The authors' warm-up always starts at 1e-6.
param_scheduler = [dict(_base_.param_scheduler[0], start_factor=1e-6 / lr), _base_.param_scheduler[1]]
