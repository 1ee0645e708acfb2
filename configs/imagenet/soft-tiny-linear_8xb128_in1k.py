_base_ = './soft-tiny-norm_8xb128_in1k.py'

# Softmax-free attention in all four stages. Stage 4 then has no class token, so the mean of its tokens is classified.
model = dict(
    backbone=dict(
        attention=[
            *[dict(normalized=True)] * 3,
            dict(type='SoftmaxFreeAttention', normalized=True, solver='cholesky', max_landmarks=49),
        ],
        out_type='featmap',
    ),
    neck=dict(type='GlobalAveragePooling'),
)
