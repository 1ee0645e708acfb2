# The classifier of photo_digits_study.py without class token: `python -m projects.attention_study stage-4` changes the
# attention of stage 4, and softmax-free attention there needs a grid.
_base_ = './photo_digits_study.py'

model = dict(
    backbone=dict(
        attention=[*[dict(max_landmarks=16)] * 3, dict(type='SoftmaxAttention')],
        out_type='featmap',
    ),
    neck=dict(type='GlobalAveragePooling'),
)
