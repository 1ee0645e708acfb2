# The segmentor, with small, overlapping digits of less contrast: the defaults of SceneGenerator at 192 pixels.
_base_ = ['../fpn_soft-tiny_photo-digits.py']

data_root = 'data/photo_digits_hard/'
pretrained = 'work_dirs/demo-hard/detection/iter_280.pth'
model = dict(backbone=dict(init_cfg=dict(checkpoint=pretrained)))
scene_options = dict(digit_size=(20, 76), num_digits=(2, 6), max_angle=30, gap=None, min_contrast=60)
train_dataloader = dict(dataset=dict(generator=scene_options))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
