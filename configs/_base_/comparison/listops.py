# The small encoder on which tools/compare_attention.py compares attentions, on short sequences. The tool gives the
# attention and the folder of the data, in which no sample repeats.
_base_ = '../../listops/soft_listops.py'

lengths = (8, 64)  # more and fewer tokens than these
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
# An interrupted training is evaluated by tools/test.py.
test_dataloader = dict(batch_size=100, num_workers=0, dataset=dict(ann_file='basic_val.tsv'))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.02, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.02, by_epoch=False, begin=100, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
