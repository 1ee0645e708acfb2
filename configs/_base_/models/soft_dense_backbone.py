# The backbone of every detector and segmentor. Why these landmarks and this solver: docs/long_tokens.md.
soft_backbone = dict(
    type='soft_mm.SOFT',
    arch='tiny',
    attention=dict(normalized=True, solver='cholesky', max_landmarks=49),
    drop_path_rate=0.1,
)
