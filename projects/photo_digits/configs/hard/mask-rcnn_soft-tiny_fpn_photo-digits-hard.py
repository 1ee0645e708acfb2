# The detector, with small, overlapping digits of less contrast: the defaults of SceneGenerator at 192 pixels.
_base_ = ['../mask-rcnn_soft-tiny_fpn_photo-digits.py']

data_root = 'data/photo_digits_hard/'
pretrained = 'work_dirs/demo-hard/classification/iter_950.pth'
model = dict(backbone=dict(init_cfg=dict(checkpoint=pretrained)))
scene_options = dict(digit_size=(20, 76), num_digits=(2, 6), max_angle=30, gap=None, min_contrast=60)
train_dataloader = dict(dataset=dict(generator=scene_options))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=f'{data_root}annotations/instances_val.json')
test_evaluator = val_evaluator
