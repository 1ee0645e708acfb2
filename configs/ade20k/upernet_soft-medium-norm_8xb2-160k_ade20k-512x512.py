_base_ = './upernet_soft-tiny-norm_8xb2-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(arch='medium', init_cfg=dict(checkpoint='checkpoints/soft-medium-norm_in1k.pth')),
    decode_head=dict(in_channels=[64, 128, 288, 512]),
    auxiliary_head=dict(in_channels=288),
)
