_base_ = './soft-large_8xb32_in1k.py'

model = dict(backbone=dict(attention=dict(normalized=True)))
