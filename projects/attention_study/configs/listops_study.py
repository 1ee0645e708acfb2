# Small encoder for short sequences, with which `python -m projects.attention_study listops` compares attentions. The
# program sets the attention and the data folder. No training sample is repeated.
_base_ = '../../listops/configs/soft_listops.py'

# Sequences have more than min_length and fewer than max_length tokens.
min_length = 8
max_length = 64
length = 64
batch_size = 32
max_iters = 3000

model = dict(
    data_preprocessor=dict(length=length),
    backbone=dict(length=length, ratio=2, attention=dict(_delete_=True)),
)
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(shuffle=False),
)
val_dataloader = dict(batch_size=100, num_workers=0)
# Tests use the validation set, because tools/test.py evaluates a training that was interrupted before its evaluation.
test_dataloader = dict(batch_size=100, num_workers=0, dataset=dict(ann_file='basic_val.tsv'))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.02, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.02, by_epoch=False, begin=100, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
