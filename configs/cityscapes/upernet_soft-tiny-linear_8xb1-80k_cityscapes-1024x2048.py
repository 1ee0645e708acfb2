_base_ = ['./upernet_soft-small-norm_8xb1-80k_cityscapes-1024x2048.py', '../_base_/models/linear_attention.py']

# The checkpoint has no softmax-free attention for stage 4, which therefore starts from its initial values.
init_cfg = dict(checkpoint='checkpoints/soft-tiny-norm_in1k.pth', fresh_attention=[3])
model = dict(backbone=dict(arch='tiny', attention=_base_.linear_attention, init_cfg=init_cfg))
