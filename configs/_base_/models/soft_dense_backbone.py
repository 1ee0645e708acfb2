# Backbone of all detectors and segmentors. docs/long_inputs.md gives the reasons for max_landmarks and the solver.
soft_backbone = dict(
    type='soft_mm.SOFT',
    arch='tiny',
    attention=dict(normalized=True, solver='cholesky', max_landmarks=49),
    drop_path_rate=0.1,
)
