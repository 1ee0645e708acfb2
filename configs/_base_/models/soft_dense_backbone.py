# Backbone of all detectors and segmentors. docs/long_tokens.md explains why landmarks are bounded and the solver is
# Cholesky.
soft_backbone = dict(
    type='soft_mm.SOFT',
    arch='tiny',
    attention=dict(normalized=True, solver='cholesky', max_landmarks=49),
    drop_path_rate=0.1,
)
