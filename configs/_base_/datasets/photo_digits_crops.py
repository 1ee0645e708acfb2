# Single-digit crops for mmpretrain: composed on the fly for training, read from disk for validation
# (tools/make_photo_digits.py writes them there). No two training samples are alike, so their order needs no shuffling,
# and the easy ones come first: small crops whose background fades in, then crops of the size of validation.
data_root = 'data/photo_digits_demo/'
batch_size = 64
small_iters = 600
full_iters = 800
train_pipeline = [dict(type='PackInputs')]

data_preprocessor = dict(num_classes=10, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=False),
    dataset=dict(
        type='ConcatDataset',
        datasets=[
            dict(
                type='soft_mm.PhotoDigitsCrops',
                seed=0,
                length=batch_size * small_iters,
                generator=dict(size=32, background=(0.0, 1.0), recolour=0.8),
                pipeline=train_pipeline,
            ),
            dict(
                type='soft_mm.PhotoDigitsCrops',
                seed=1,
                length=batch_size * full_iters,
                generator=dict(recolour=0.8),
                pipeline=train_pipeline,
            ),
        ],
    ),
)
val_dataloader = dict(
    batch_size=100,
    num_workers=1,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CustomDataset',
        data_root=data_root,
        data_prefix='val/crops',
        classes=[str(digit) for digit in range(10)],
        pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
    ),
)
val_evaluator = dict(type='Accuracy', topk=(1,))
test_dataloader = val_dataloader
test_evaluator = val_evaluator
