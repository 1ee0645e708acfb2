_base_ = './soft-small_8xb128_in1k.py'

model = dict(backbone=dict(attention=dict(normalized=True)))
