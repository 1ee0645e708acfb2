# Scenes of 256x256 with semantic maps for mmsegmentation: composed on the fly for training, read from disk for
# validation (tools/make_photo_digits.py writes them there). Digits must not be flipped.
data_root = 'data/photo_digits_demo/'
batch_size = 4
scale = (192, 192)
num_train_scenes = 8000
classes = ('background', *(str(digit) for digit in range(10)))
palette = [
    (0, 0, 0),
    (230, 25, 75),
    (60, 180, 75),
    (255, 225, 25),
    (0, 130, 200),
    (245, 130, 48),
    (145, 30, 180),
    (70, 240, 240),
    (240, 50, 230),
    (210, 245, 60),
    (250, 190, 212),
]

train_dataloader = dict(
    batch_size=batch_size,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='soft_mm.PhotoDigitsScenes',
        annotations='semantic',
        length=num_train_scenes,
        generator=dict(recolour=0.5),
        pipeline=[dict(type='Resize', scale=scale), dict(type='PackSegInputs')],
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='BaseSegDataset',
        data_root=data_root,
        data_prefix=dict(img_path='val/scenes/images', seg_map_path='val/scenes/semantic'),
        img_suffix='.png',
        metainfo=dict(classes=classes, palette=palette),
        reduce_zero_label=False,
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=scale),
            dict(type='LoadAnnotations'),
            dict(type='PackSegInputs'),
        ],
    ),
)
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_dataloader = val_dataloader
test_evaluator = val_evaluator
