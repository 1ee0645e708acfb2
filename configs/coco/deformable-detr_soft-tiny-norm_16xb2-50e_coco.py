_base_ = [
    'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
    '../_base_/models/soft_dense_backbone.py',
    '../_base_/tta/detection.py',
]

# ImageNet weights: from the authors, converted by tools/convert_checkpoint.py, or trained with configs/imagenet.
pretrained = 'checkpoints/soft-tiny-norm_in1k.pth'

model = dict(
    backbone=dict(
        **_base_.soft_backbone,
        _delete_=True,
        out_indices=(1, 2, 3),
        init_cfg=dict(type='Pretrained', checkpoint=pretrained, prefix='backbone.'),
    ),
    neck=dict(in_channels=[128, 320, 512]),
)
