# The classifier, with smaller digits of less contrast that turn further: the defaults of CropGenerator.
_base_ = ['../soft-tiny_photo-digits-crops.py']

data_root = 'data/photo_digits_hard/'
crop_options = dict(digit_size=(0.5, 0.9), max_angle=30, min_contrast=60)
small, full = _base_.train_dataloader.dataset.datasets
train_dataloader = dict(
    dataset=dict(
        datasets=[
            dict(small, generator=dict(small.generator, **crop_options)),
            dict(full, generator=dict(full.generator, **crop_options)),
        ]
    )
)
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
