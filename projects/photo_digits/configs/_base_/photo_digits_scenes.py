# Scenes of 256x256 pixels. Training scenes are composed on the fly. Validation scenes are read from disk and written by
# `python -m projects.photo_digits.make_dataset`. Flips must not be added, because a mirrored digit has no class.
# Training scenes are smaller than validation scenes, with digits of the same size: they cost less, and digits cover a
# larger part of them.
data_root = 'data/photo_digits_demo/'
batch_size = 4
scale = (256, 256)
num_train_scenes = 8000
train_generator = dict(size=192, digit_size=(20, 100), num_digits=(2, 6), recolour=0.5)
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
