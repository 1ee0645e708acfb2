# Scenes with boxes and masks for mmdet.
_base_ = ['./photo_digits_scenes.py']

classes = _base_.digits
palette = _base_.palette

train_dataloader = dict(
    batch_size=_base_.batch_size,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='PhotoDigitsScenes',
        length=_base_.num_train_scenes,
        generator=_base_.train_generator,
        pipeline=[
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='PackDetInputs'),
        ],
    ),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=1,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CocoDataset',
        data_root=_base_.data_root,
        ann_file='annotations/instances_val.json',
        data_prefix=dict(img='val/scenes/images/'),
        metainfo=dict(classes=classes, palette=palette),
        test_mode=True,
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=_base_.scale),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(
                type='PackDetInputs',
                meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
            ),
        ],
    ),
)
val_evaluator = dict(
    type='CocoMetric',
    ann_file=f'{_base_.data_root}annotations/instances_val.json',
    metric=['bbox', 'segm'],
)
test_dataloader = val_dataloader
test_evaluator = val_evaluator
