_base_ = './retinanet_soft-tiny-norm_fpn_1x_coco.py'

model = dict(
    backbone=dict(arch='medium', init_cfg=dict(checkpoint='checkpoints/soft-medium-norm_in1k.pth')),
    neck=dict(in_channels=[64, 128, 288, 512]),
)
