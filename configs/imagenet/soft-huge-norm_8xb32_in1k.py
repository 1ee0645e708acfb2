_base_ = './soft-huge_8xb32_in1k.py'

model = dict(backbone=dict(attention=dict(normalized=True)))
