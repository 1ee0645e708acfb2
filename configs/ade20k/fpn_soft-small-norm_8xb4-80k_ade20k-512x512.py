_base_ = './fpn_soft-tiny-norm_8xb4-80k_ade20k-512x512.py'

model = dict(
    backbone=dict(arch='small', init_cfg=dict(checkpoint='checkpoints/soft-small-norm_in1k.pth')),
)
