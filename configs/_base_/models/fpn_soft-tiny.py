# Semantic FPN (https://arxiv.org/abs/1901.02446) with SOFT-Tiny.
_base_ = './segmentor.py'

model = dict(
    data_preprocessor=dict(size_divisor=32),
    backbone=dict(type='soft_mm.SOFT', arch='tiny'),
    neck=dict(type='FPN', in_channels=[64, 128, 320, 512], out_channels=256, num_outs=4),
    decode_head=dict(
        type='FPNHead',
        in_channels=[256, 256, 256, 256],
        in_index=[0, 1, 2, 3],
        feature_strides=[4, 8, 16, 32],
        channels=128,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
)
