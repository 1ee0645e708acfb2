# ListOps of Long Range Arena for mmpretrain, as written by `python -m projects.listops.make_listops data/listops`.
# Sequences have fewer than 2000 tokens. Every batch is padded to `length`.
data_root = 'data/listops/'
length = 2048
batch_size = 32
pipeline = [dict(type='PackInputs', input_key='tokens')]

train_dataloader = dict(
    batch_size=batch_size,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(type='ListOps', data_root=data_root, ann_file='basic_train.tsv', pipeline=pipeline),
)
val_dataloader = dict(
    batch_size=batch_size,
    num_workers=1,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='ListOps', data_root=data_root, ann_file='basic_val.tsv', pipeline=pipeline),
)
val_evaluator = dict(type='Accuracy', topk=(1,))
test_dataloader = dict(
    batch_size=batch_size,
    num_workers=1,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='ListOps', data_root=data_root, ann_file='basic_test.tsv', pipeline=pipeline),
)
test_evaluator = val_evaluator
