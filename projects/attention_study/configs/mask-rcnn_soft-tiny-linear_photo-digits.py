# The demo's detector with softmax-free attention in stage 4 too. The demo's classifier has softmax there, so this
# attention starts from its initial values.
_base_ = '../../photo_digits/configs/mask-rcnn_soft-tiny_fpn_photo-digits.py'

linear = dict(solver='cholesky', max_landmarks=49)
model = dict(
    backbone=dict(
        attention=[*[linear] * 3, dict(type='SoftmaxFreeAttention', **linear)],
        init_cfg=dict(fresh_attention=[3]),
    )
)
