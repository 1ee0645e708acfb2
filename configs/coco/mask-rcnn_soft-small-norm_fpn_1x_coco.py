_base_ = './mask-rcnn_soft-tiny-norm_fpn_1x_coco.py'

model = dict(
    backbone=dict(arch='small', init_cfg=dict(checkpoint='checkpoints/soft-small-norm_in1k.pth')),
)
