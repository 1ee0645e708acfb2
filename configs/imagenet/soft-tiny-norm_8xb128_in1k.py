_base_ = './soft-tiny_8xb128_in1k.py'

model = dict(backbone=dict(attention=dict(normalized=True)))
