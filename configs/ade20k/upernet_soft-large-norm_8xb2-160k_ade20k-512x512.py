_base_ = './upernet_soft-tiny-norm_8xb2-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(arch='large', init_cfg=dict(checkpoint='checkpoints/soft-large-norm_in1k.pth')),
)
