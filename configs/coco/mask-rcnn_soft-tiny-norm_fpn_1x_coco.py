_base_ = [
    'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
    '../_base_/models/soft_dense_backbone.py',
    '../_base_/tta/detection.py',
]

# ImageNet weights: from the authors, converted by tools/convert_checkpoint.py, or trained with configs/imagenet.
pretrained = 'checkpoints/soft-tiny-norm_in1k.pth'

model = dict(
    backbone=dict(
        **_base_.soft_backbone,
        _delete_=True,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained, prefix='backbone.'),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        custom_keys=dict(pos_embed=dict(decay_mult=0.0), cls_token=dict(decay_mult=0.0)),
    ),
)
