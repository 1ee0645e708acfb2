_base_ = ['./mask-rcnn_soft-tiny-norm_fpn_1x_coco.py', '../_base_/models/linear_attention.py']

# The checkpoint has no softmax-free attention for stage 4, which therefore starts from its initial values.
model = dict(backbone=dict(attention=_base_.linear_attention, init_cfg=dict(fresh_attention=[3])))
