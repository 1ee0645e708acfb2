# Scenes of 256x256 with boxes and masks for mmdet: composed on the fly for training, read from disk for validation
# (tools/make_photo_digits.py writes them there). Digits must not be flipped.
data_root = 'data/photo_digits_demo/'
batch_size = 4
scale = (192, 192)
num_train_scenes = 8000
classes = tuple(str(digit) for digit in range(10))
palette = [
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
        length=num_train_scenes,
        generator=dict(recolour=0.5),
        pipeline=[
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='Resize', scale=scale),
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
        data_root=data_root,
        ann_file='annotations/instances_val.json',
        data_prefix=dict(img='val/scenes/images/'),
        metainfo=dict(classes=classes, palette=palette),
        test_mode=True,
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=scale),
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
    ann_file=f'{data_root}annotations/instances_val.json',
    metric=['bbox', 'segm'],
)
test_dataloader = val_dataloader
test_evaluator = val_evaluator
