_base_ = [
    'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py',
    'mmpretrain::_base_/default_runtime.py',
    '../_base_/models/soft_classifier.py',
    '../_base_/tta/classification.py',
    '../_base_/schedules/imagenet_adamw_300e.py',
]

train_dataloader = dict(batch_size=128)
