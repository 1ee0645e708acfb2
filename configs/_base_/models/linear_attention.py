# Softmax-free attention in all four stages, for detectors and segmentors.
_attention = dict(type='SoftmaxFreeAttention', normalized=True, solver='cholesky', max_landmarks=49)
linear_attention = [_attention] * 4
