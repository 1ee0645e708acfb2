# Crops with one digit, for mmpretrain. Training crops are composed on the fly. Validation crops are read from disk and
# written by the demo. Training crops all differ. They are not shuffled, because easy crops come first: small crops with
# a background that fades in, then crops of the validation size.
data_root = 'data/photo_digits_demo/'
batch_size = 64
small_iters = 600
full_iters = 350
crop_options = dict(digit_size=(0.65, 0.9), max_angle=15, min_contrast=110)
train_pipeline = [dict(type='PackInputs')]

data_preprocessor = dict(num_classes=10, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=0,  # a crop takes half a millisecond to compose, and more to send to another process
    sampler=dict(type='InfiniteSampler', shuffle=False),
    dataset=dict(
        type='ConcatDataset',
        datasets=[
            dict(
                type='PhotoDigitsCrops',
                seed=0,
                length=batch_size * small_iters,
                generator=dict(**crop_options, size=32, background=(0.0, 1.0), recolour=0.8),
                pipeline=train_pipeline,
            ),
            dict(
                type='PhotoDigitsCrops',
                seed=1,
                length=batch_size * full_iters,
                generator=dict(**crop_options, recolour=0.8),
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
