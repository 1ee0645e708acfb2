# SOFT with a linear head on the class token. Label smoothing, mixup and cutmix are the authors' settings.
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='soft_mm.SOFT',
        arch='tiny',
        attention=dict(normalized=False),
        out_indices=(3,),
        out_type='cls_token',
        drop_path_rate=0.1,
    ),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=512,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        topk=(1, 5),
    ),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)
