"""Generators: determinism, disjoint splits, consistent annotations, options."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from projects.photo_digits import CLASSES, PALETTE, CropGenerator, SceneGenerator, generators
from projects.photo_digits.rendering import MIN_VISIBLE
from projects.photo_digits.sources import PHOTOGRAPHS, SPLITS, load_photographs, load_scans

SCENE_OPTIONS = [
    dict(),
    dict(size=(96, 160), num_digits=(1, 3)),
    dict(size=128, num_digits=(8, 12), digit_size=(12, 60), max_angle=180),
    dict(size=64, num_digits=(3, 3), digit_size=(8, 64)),
    dict(size=16, num_digits=(1, 2)),
    dict(size=64, num_digits=(1, 2), digit_size=(60, 64)),
]


def digest(split='train', seed=0, indices=range(4), **options):
    """Hash the contents of the scenes and crops with these indices, in the order of the indices."""
    scenes = SceneGenerator(split, seed, **options)
    crops = CropGenerator(split, seed)
    parts = {}
    for index in indices:
        scene, (image, label) = scenes.generate(index), crops.generate(index)
        arrays = [*vars(scene).values(), image, np.array(label)]
        content = b''.join(np.ascontiguousarray(array).tobytes() for array in arrays)
        parts[index] = hashlib.sha256(content).hexdigest()
    return [parts[index] for index in sorted(parts)]


def tight_box(mask):
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@pytest.mark.parametrize('split', SPLITS)
def test_samples_repeat_in_any_order(split):
    first = digest(split)
    assert digest(split) == first
    assert digest(split, indices=[3, 1, 0, 2]) == first
    assert len(set(first)) == 4


def test_samples_depend_on_seed_and_split_only_where_they_should():
    assert set(digest(seed=0)).isdisjoint(digest(seed=1))
    assert set(digest('train')).isdisjoint(digest('val'))
    assert digest(length=4) == digest()


def test_samples_repeat_in_another_process(root, environment):
    code = 'from test_generators import digest; print(*digest())'
    environment = dict(environment, PYTHONPATH=f'{root}:{root}/projects/photo_digits/tests')
    result = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == digest()


def test_scans_and_photographs_are_disjoint_and_complete():
    (train, train_labels), (val, val_labels) = load_scans('train'), load_scans('val')
    assert (len(train), len(val)) == (1400, 397)
    assert {scan.tobytes() for scan in train}.isdisjoint(scan.tobytes() for scan in val)
    for labels in (train_labels, val_labels):
        counts = np.bincount(labels, minlength=10)
        assert counts.max() - counts.min() <= 0.1 * counts.max()

    names = {split: {p.file for p in PHOTOGRAPHS if p.split == split} for split in SPLITS}
    assert (len(names['train']), len(names['val'])) == (11, 4)
    assert names['train'].isdisjoint(names['val'])
    assert all(photograph.licence and photograph.credit for photograph in PHOTOGRAPHS)
    for split in SPLITS:
        for image in load_photographs(split):
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


@pytest.mark.parametrize('split', SPLITS)
@pytest.mark.parametrize('options', SCENE_OPTIONS)
def test_annotations_agree(split, options):
    generator = SceneGenerator(split, **options)
    (fewest, most), (smallest, largest) = generator.num_digits, generator.digit_size
    occluded = 0
    for index in range(30):
        scene = generator.generate(index)
        count = len(scene.labels)
        height, width = generator.size
        assert fewest <= count <= most
        assert scene.image.shape == (height, width, 3) and scene.image.dtype == np.uint8
        assert scene.image.flags.c_contiguous
        assert scene.masks.shape == (count, height, width) and scene.masks.dtype == bool
        assert scene.boxes.shape == (count, 4) and scene.boxes.dtype == np.float32
        assert scene.semantic.shape == (height, width) and scene.semantic.dtype == np.uint8
        assert scene.labels.dtype == np.int64 and set(scene.labels) <= set(range(10))

        assert scene.masks.sum(axis=0).max() == 1  # no pixel belongs to two digits
        np.testing.assert_array_equal(scene.areas, scene.masks.sum(axis=(1, 2)))
        np.testing.assert_array_equal(scene.boxes, [tight_box(mask) for mask in scene.masks])
        semantic = (scene.masks * (scene.labels + 1)[:, None, None]).sum(axis=0)
        np.testing.assert_array_equal(scene.semantic, semantic)

        assert (scene.areas >= MIN_VISIBLE * scene.full_areas).all()
        assert scene.areas[-1] == scene.full_areas[-1]  # nothing lies on top of the last digit
        occluded += (scene.areas < scene.full_areas).sum()
        sides = (scene.full_boxes[:, 2:] - scene.full_boxes[:, :2]).max(axis=1)
        assert smallest <= sides.min() and sides.max() <= largest
        assert (scene.full_boxes[:, :2] >= 0).all()
        assert (scene.full_boxes[:, 2:] <= (width, height)).all()
        assert (scene.boxes[:, :2] >= scene.full_boxes[:, :2]).all()
        assert (scene.boxes[:, 2:] <= scene.full_boxes[:, 2:]).all()
    if options.get('num_digits', (2, 6))[0] > 1:
        assert occluded > 0


@pytest.mark.parametrize('gap', [0, 9])
def test_digits_keep_their_distance(gap):
    generator = SceneGenerator(size=192, digit_size=(30, 80), num_digits=(2, 5), gap=gap)
    closest = []
    for index in range(60):
        scene = generator.generate(index)
        np.testing.assert_array_equal(scene.areas, scene.full_areas)
        for i, one in enumerate(scene.full_boxes):
            for other in scene.full_boxes[:i]:
                closest.append(np.maximum(one[:2] - other[2:], other[:2] - one[2:]).max())
    assert gap <= min(closest) <= gap + 5


@pytest.mark.parametrize('contrast', [20, 100, 127])
def test_least_contrast(contrast):
    """Without a photograph, a digit differs from the one colour below it by the contrast at least."""
    options = dict(background=0.0, min_contrast=contrast)
    scenes, crops = SceneGenerator(num_digits=(1, 1), **options), CropGenerator(**options)
    luma = np.array([0.114, 0.587, 0.299])
    for index in range(20):
        for scene in (scenes.generate(index), crops.generate_scene(index)):
            values, mask = scene.image @ luma, scene.masks[0]
            below = np.median(values[~mask])
            # Inside the strokes, away from their soft edge, a digit has one colour, which is the farthest from `below`.
            assert np.abs(values[mask] - below).max() >= contrast - 1


def test_digits_stand_out():
    """In its box, a digit differs in luma from the picture around it."""
    generator = SceneGenerator('val', num_digits=(1, 1))
    luma = np.array([0.114, 0.587, 0.299])
    contrasts = []
    for index in range(100):
        scene = generator.generate(index)
        x1, y1, x2, y2 = scene.boxes[0].astype(int)
        values, mask = (scene.image @ luma)[y1:y2, x1:x2], scene.masks[0][y1:y2, x1:x2]
        contrasts.append(abs(np.median(values[mask]) - np.median(values[~mask])))
    assert np.mean(np.array(contrasts) > 30) > 0.95


@pytest.mark.parametrize('options', [dict(), dict(size=(48, 80)), dict(size=32)])
def test_crops_hold_one_whole_digit(options):
    generator = CropGenerator('train', **options)
    height, width = generator.size
    labels = set()
    for index in range(200):
        image, label = generator.generate(index)
        assert image.shape == (height, width, 3) and image.dtype == np.uint8
        assert isinstance(label, int)
        labels.add(label)
        scene = generator.generate_scene(index)
        np.testing.assert_array_equal(scene.image, image)
        assert scene.labels.tolist() == [label]
        np.testing.assert_array_equal(scene.areas, scene.full_areas)
        x1, y1, x2, y2 = scene.full_boxes[0]
        assert 0 <= x1 and 0 <= y1 and x2 <= width and y2 <= height
        assert 0.5 * min(generator.size) <= max(x2 - x1, y2 - y1) <= 0.9 * min(generator.size)
    assert labels == set(range(10))


def background_deviation(strength, index, **options):
    scene = SceneGenerator('val', background=strength, **options).generate(index)
    return scene.image[scene.semantic == 0].std(axis=0).mean()


def test_background_strength():
    flat, half, full = (background_deviation(strength, 5) for strength in (0.0, 0.5, 1.0))
    assert flat < half < full
    generator = CropGenerator('val', background=0, size=32, length=1)
    scene = generator.generate_scene(0)
    colours, counts = np.unique(scene.image.reshape(-1, 3), axis=0, return_counts=True)
    assert counts.max() > 0.3 * 32 * 32

    first, last = (SceneGenerator('val', background=(0, 1), length=10).generate(index).image for index in (0, 9))
    np.testing.assert_array_equal(first, SceneGenerator('val', background=0).generate(0).image)
    np.testing.assert_array_equal(last, SceneGenerator('val').generate(9).image)


def test_classes_and_palette():
    assert CLASSES == tuple('0123456789')
    assert len(set(PALETTE)) == 10


def test_recolouring_gives_a_grey_photograph_colour_and_is_repeatable(monkeypatch):
    grey = np.random.default_rng(0).integers(0, 256, (300, 300, 1), np.uint8).repeat(3, axis=2)
    monkeypatch.setattr(generators, 'load_photographs', lambda split: [grey])

    def colourfulness(recolour, index):
        scene = SceneGenerator('train', recolour=recolour).generate(index)
        np.testing.assert_array_equal(scene.image, SceneGenerator('train', recolour=recolour).generate(index).image)
        return np.ptp(scene.image[scene.semantic == 0].astype(int), axis=1).mean()

    assert max(colourfulness(0, index) for index in range(4)) < 5  # not 0, because of the soft edges of the digits
    assert max(colourfulness(0.8, index) for index in range(4)) > 20


@pytest.mark.parametrize('generator', [SceneGenerator, CropGenerator])
@pytest.mark.parametrize(
    'options, message',
    [
        (dict(split='test'), "split='test' .*'train', 'val'"),
        (dict(seed=-1), 'seed=-1: expected an integer >= 0'),
        (dict(seed=0.5), 'seed=0.5: '),
        (dict(size=15), 'size=15: expected an integer >= 16, or a pair'),
        (dict(size=(64, 8)), r'size=\(64, 8\): '),
        (dict(size=(64, 64, 3)), r'size=\(64, 64, 3\): expected an integer >= 16, or a pair'),
        (dict(size='64'), "size='64': "),
        (dict(size=True), 'size=True: '),
        (dict(background=1.1), r'background=1.1: expected a number in \[0, 1\], or a pair'),
        (dict(recolour=1.1), r'recolour=1.1: expected a number in \[0, 1\]'),
        (dict(recolour=-0.1), 'recolour=-0.1: '),
        (dict(background=float('nan')), 'background=nan: '),
        (dict(background=(0, 2), length=5), r'background=\(0, 2\): '),
        (dict(background=(0, 1)), r'background=\(0, 1\): a pair .* length=None; set length'),
        (dict(max_angle=-1), 'max_angle=-1: '),
        (dict(min_contrast=128), r'min_contrast=128: expected a number in \[0, 127.0\]'),
        (dict(length=0), 'length=0: expected an integer >= 1'),
        (dict(digit_size=20), 'digit_size=20: expected a pair'),
    ],
)
def test_bad_options(generator, options, message):
    with pytest.raises(ValueError, match=message):
        generator(**options)


@pytest.mark.parametrize(
    'generator, options, message',
    [
        (SceneGenerator, dict(num_digits=(0, 2)), r'num_digits=\(0, 2\): .* 1 <= smallest <= largest <= 100'),
        (SceneGenerator, dict(num_digits=(3, 2)), r'num_digits=\(3, 2\): '),
        (SceneGenerator, dict(num_digits=(1, 1.5)), r'num_digits=\(1, 1.5\): '),
        (SceneGenerator, dict(digit_size=(20, 300)), r'digit_size=\(20, 300\): .*256'),
        (SceneGenerator, dict(digit_size=(4, 30)), r'digit_size=\(4, 30\): '),
        (SceneGenerator, dict(size=64, num_digits=(40, 50)), 'reduce num_digits'),
        (SceneGenerator, dict(gap=-1), 'gap=-1: expected an integer >= 0'),
        (
            SceneGenerator,
            dict(size=64, num_digits=(4, 5), gap=20),
            'gap=20 need .* reduce num_digits, digit_size or gap',
        ),
        (CropGenerator, dict(digit_size=(0.9, 0.5)), r'digit_size=\(0.9, 0.5\): .* 0 <= smallest <= largest <= 1'),
        (CropGenerator, dict(digit_size=(0.5, 1.2)), r'digit_size=\(0.5, 1.2\): '),
        (CropGenerator, dict(digit_size=(0.05, 0.9)), r'digit_size=\(0.05, 0.9\) is .*starts at 8 pixels or more'),
        (CropGenerator, dict(digit_size=(0.501, 0.502)), r'digit_size=\(0.501, 0.502\) is .*64 pixels'),
    ],
)
def test_bad_options_of_one_kind(generator, options, message):
    with pytest.raises(ValueError, match=message):
        generator(**options)


@pytest.mark.parametrize('generator', [SceneGenerator, CropGenerator])
def test_numpy_integers_are_accepted(generator):
    sample = generator(seed=np.int64(1), size=(np.int32(32), 48), length=np.int64(2)).options
    assert (sample['seed'], sample['size'], sample['length']) == (1, (32, 48), 2)
    assert {type(value) for value in (sample['seed'], *sample['size'], sample['length'])} == {int}


@pytest.mark.parametrize('generator', [SceneGenerator, CropGenerator])
def test_unknown_option_and_index_out_of_range(generator):
    with pytest.raises(TypeError, match='flip'):
        generator(flip=True)
    bounded = generator(length=3)
    for index in (-1, 3):
        with pytest.raises(IndexError, match=f'index={index}: expected an integer >= 0 and < 3'):
            bounded.generate(index)
    with pytest.raises(IndexError):
        generator().generate(-1)
    with pytest.raises(TypeError):
        bounded.generate(0.5)


def test_a_missing_source_names_the_extra(monkeypatch):
    load_photographs.cache_clear()
    monkeypatch.setitem(sys.modules, 'skimage', None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[photo-digits\]'"):
        SceneGenerator().generate(0)
