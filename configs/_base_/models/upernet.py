# UperNet (https://arxiv.org/abs/1807.10221) with SOFT's channel numbers. The inheriting config sets the backbone.
_base_ = './segmentor.py'

norm_cfg = dict(type='SyncBN', requires_grad=True)
head_cfg = dict(norm_cfg=norm_cfg, dropout_ratio=0.1, num_classes=150, align_corners=False)
model = dict(
    decode_head=dict(
        **head_cfg,
        type='UPerHead',
        in_channels=[64, 128, 320, 512],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=512,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=dict(
        **head_cfg,
        type='FCNHead',
        in_channels=320,
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4),
    ),
)
