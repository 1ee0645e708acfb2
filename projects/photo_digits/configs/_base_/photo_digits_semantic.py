# Scenes with semantic segmentation maps for mmsegmentation.
_base_ = ['./photo_digits_scenes.py']

classes = ('background', *_base_.digits)
palette = [(0, 0, 0), *_base_.palette]

train_dataloader = dict(
    batch_size=_base_.batch_size,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='PhotoDigitsScenes',
        annotations='semantic',
        length=_base_.num_train_scenes,
        generator=_base_.train_generator,
        pipeline=[dict(type='PackSegInputs')],
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='BaseSegDataset',
        data_root=_base_.data_root,
        data_prefix=dict(img_path='val/scenes/images', seg_map_path='val/scenes/semantic'),
        img_suffix='.png',
        metainfo=dict(classes=classes, palette=palette),
        reduce_zero_label=False,
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=_base_.scale),
            dict(type='LoadAnnotations'),
            dict(type='PackSegInputs'),
        ],
    ),
)
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_dataloader = val_dataloader
test_evaluator = val_evaluator
