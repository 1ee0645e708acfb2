_base_ = './retinanet_soft-tiny-norm_fpn_1x_coco.py'

model = dict(
    backbone=dict(arch='large', init_cfg=dict(checkpoint='checkpoints/soft-large-norm_in1k.pth')),
)
