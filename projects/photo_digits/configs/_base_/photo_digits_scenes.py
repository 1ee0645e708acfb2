# Scenes of 192x192 pixels with large digits, which stand apart and contrast with the photograph. Training scenes are
# composed on the fly. Validation scenes are read from disk and written by the demo. Flips must not be added, because a
# mirrored digit has no class.
data_root = 'data/photo_digits_demo/'
batch_size = 4
scale = (192, 192)
num_train_scenes = 8000
scene_options = dict(size=192, digit_size=(36, 88), num_digits=(2, 5), max_angle=15, gap=4, min_contrast=110)
train_generator = dict(**scene_options, recolour=0.5)
digits = tuple(str(digit) for digit in range(10))
palette = [
    (230, 25, 75),
    (60, 180, 75),
    (255, 225, 25),
    (0, 130, 200),
    (245, 130, 48),
    (145, 30, 180),
    (70, 240, 240),
    (240, 50, 230),
    (210, 245, 60),
    (250, 190, 212),
]
