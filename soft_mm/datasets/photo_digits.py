"""Photo-digits: handwritten digits on photographs, composed on the fly.

Real handwritten digits (the 8x8 scans of scikit-learn's ``load_digits``) are placed at random size,
angle, colour and position on photographs that scikit-image and scikit-learn ship inside their
packages, so nothing is downloaded. A sample depends on ``(seed, split, kind, index)`` and on the
generator's options alone, never on the order in which samples are made or on the process that makes
them. Digits and photographs of ``train`` and ``val`` are disjoint.

The pixels also depend on the installed OpenCV, whose interpolation may differ in the last bit
between releases.
"""

import math
import operator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np

CLASSES = ('0', '1', '2', '3', '4', '5', '6', '7', '8', '9')
#: RGB colour of each class, as the toolboxes' visualizers expect it.
PALETTE = (
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
)
SPLITS = ('train', 'val')
NUM_VAL_SCANS = 397
MIN_SIDE = 16  # smallest image side, pixels
MIN_DIGIT = 8  # a digit below the resolution of its own scan cannot be told from others
MIN_VISIBLE = 0.6  # part of a digit that later digits must leave visible
MIN_CONTRAST = 60.0  # between a digit's luma and the mean luma below it, in grey levels

_KINDS = ('scene', 'crop')
_OVERSAMPLE = 8
_POSITIONS = 20
_RESTARTS = 20


@dataclass(frozen=True)
class Photograph:
    """A picture inside an installed package, with the terms under which it may be used."""

    name: str
    split: str
    package: str
    file: str
    licence: str
    credit: str


def _skimage(name, split, file, licence, credit):
    return Photograph(name, split, 'skimage', f'data/{file}', licence, credit)


def _sklearn(name, split, file, licence, credit):
    return Photograph(name, split, 'sklearn', f'datasets/images/{file}', licence, credit)


#: Licences as stated by ``skimage.data``'s docstrings and by scikit-learn's
#: ``datasets/images/README.txt``. Pictures without a stated licence (moon, page, stereo_motorcycle)
#: are left out, and so is text, which shows handwriting.
PHOTOGRAPHS = (
    _skimage('astronaut', 'train', 'astronaut.png', 'public domain', 'NASA, https://flic.kr/p/r9qvLn'),
    _skimage('brick', 'train', 'brick.png', 'CC0', 'CC0Textures, Bricks25'),
    _skimage('camera', 'train', 'camera.png', 'CC0', 'Lav Varshney'),
    _skimage('chelsea', 'train', 'chelsea.png', 'CC0', 'Stefan van der Walt'),
    _sklearn(
        'china',
        'train',
        'china.jpg',
        'CC BY 2.0',
        'danielbuechele, https://www.flickr.com/photos/danielbuechele/6061409035',
    ),
    _skimage('clock', 'train', 'clock_motion.png', 'public domain', 'Stefan van der Walt'),
    _skimage(
        'coins',
        'train',
        'coins.png',
        'no known copyright restrictions',
        'Brooklyn Museum, https://www.brooklynmuseum.org/opencollection/archives/image/51611',
    ),
    _skimage(
        'grass',
        'train',
        'grass.png',
        'CC0',
        'linolafett, https://www.deviantart.com/linolafett/art/Grass-01-434853879',
    ),
    _skimage(
        'hubble_deep_field',
        'train',
        'hubble_deep_field.jpg',
        'public domain',
        'NASA, http://hubblesite.org/newscenter/archive/releases/2012/37/image/a/',
    ),
    _skimage(
        'immunohistochemistry',
        'train',
        'ihc.png',
        'no known copyright restrictions',
        'Center for Microscopy And Molecular Imaging (CMMI)',
    ),
    _skimage(
        'retina',
        'train',
        'retina.jpg',
        'CC0',
        'Mikael Häggström, https://commons.wikimedia.org/wiki/File:Fundus_photograph_of_normal_left_eye.jpg',
    ),
    _skimage('coffee', 'val', 'coffee.png', 'CC0', 'Rachel Michetti, Pikolo Espresso Bar'),
    _sklearn(
        'flower',
        'val',
        'flower.jpg',
        'CC BY 2.0',
        'vultilion, https://www.flickr.com/photos/vultilion/6056698931',
    ),
    _skimage('gravel', 'val', 'gravel.png', 'CC0', 'CC0Textures, Gravel04'),
    _skimage(
        'rocket',
        'val',
        'rocket.jpg',
        'public domain',
        'SpaceX, https://www.flickr.com/photos/spacexphotos/16511594820/',
    ),
)


def _import_source(package):
    try:
        if package == 'skimage':
            import skimage

            return skimage
        import sklearn.datasets
        import sklearn.model_selection

        return sklearn
    except ImportError as error:
        raise ImportError(
            'photo-digits is made of data inside scikit-learn and scikit-image, but '
            f'{package} cannot be imported; run: pip install soft_mm[photo-digits]'
        ) from error


@cache
def load_photographs(split):
    """Read a split's photographs, once per process.

    The files are opened where they were installed: ``skimage.data``'s own functions would download
    a missing one.

    Args:
        split (str): ``'train'`` or ``'val'``.

    Returns:
        tuple[np.ndarray]: (H, W, 3) uint8 BGR each; grey ones have three equal channels.

    Raises:
        ImportError: If scikit-image or scikit-learn is not installed.
        FileNotFoundError: If the installed release does not hold a picture.
        ValueError: If the split is unknown.
    """
    _check_split(split)
    images = []
    for photograph in PHOTOGRAPHS:
        if photograph.split != split:
            continue
        package = _import_source(photograph.package)
        path = Path(package.__file__).parent / photograph.file
        image = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if image is None:
            raise FileNotFoundError(f'{photograph.package} {package.__version__} does not hold {photograph.file}')
        image.setflags(write=False)
        images.append(image)
    return tuple(images)


@cache
def load_scans(split):
    """Read a split's digit scans, once per process.

    The split is stratified by class and independent of any generator's seed.

    Args:
        split (str): ``'train'`` (1400 scans) or ``'val'`` (397 scans).

    Returns:
        tuple[np.ndarray]: scans (N, 8, 8) float32, each scaled to a maximum of 1, and labels (N,)
        int64.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If the split is unknown.
    """
    _check_split(split)
    sklearn = _import_source('sklearn')
    digits = sklearn.datasets.load_digits()
    parts = sklearn.model_selection.train_test_split(
        np.arange(len(digits.target)),
        test_size=NUM_VAL_SCANS,
        stratify=digits.target,
        random_state=0,
    )
    chosen = parts[SPLITS.index(split)]
    scans = digits.images[chosen].astype(np.float32)
    scans /= scans.max(axis=(1, 2), keepdims=True)
    labels = digits.target[chosen].astype(np.int64)
    scans.setflags(write=False)
    labels.setflags(write=False)
    return scans, labels


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture with its ``K`` digits in the order of drawing: later digits lie on top.

    Attributes:
        image (np.ndarray): (H, W, 3) uint8, BGR (the order of mmcv and OpenCV).
        labels (np.ndarray): (K,) int64, the digits' classes 0..9.
        boxes (np.ndarray): (K, 4) float32, xyxy in pixels, tight around the visible mask; right and
            bottom are exclusive, so ``x2`` is the last column plus 1.
        masks (np.ndarray): (K, H, W) bool, visible pixels; no pixel belongs to two masks.
        areas (np.ndarray): (K,) int64, number of visible pixels.
        full_boxes (np.ndarray): (K, 4) float32, tight around the whole digit, what is hidden
            included.
        full_areas (np.ndarray): (K,) int64, number of pixels of the whole digit.
        semantic (np.ndarray): (H, W) uint8, 0 for the background and class + 1 for a digit.
    """

    image: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray
    areas: np.ndarray
    full_boxes: np.ndarray
    full_areas: np.ndarray
    semantic: np.ndarray


class _Generator:
    """What scenes and crops share: options, random streams, backgrounds, rendering of a digit."""

    kind: str

    def __init__(self, split, seed, size, max_angle, background, recolour, length):
        _check_split(split)
        self.split = split
        self.seed = _check_integer('seed', seed, 0)
        self.size = _check_size(size)
        self.max_angle = _check_number('max_angle', max_angle, 0, 180)
        self.length = None if length is None else _check_integer('length', length, 1)
        self.background = _check_background(background, self.length)
        self.recolour = _check_number('recolour', recolour, 0, 1)

    @property
    def options(self):
        """dict: Every option that the samples depend on, split and seed included."""
        return {name: value for name, value in vars(self).items() if not name.startswith('_')}

    def load_sources(self):
        """Read the split's pictures now; worker processes that are forked later share them."""
        load_photographs(self.split)
        load_scans(self.split)

    def _rng(self, index):
        return np.random.default_rng([self.seed, SPLITS.index(self.split), _KINDS.index(self.kind), index])

    def _check_index(self, index):
        index = operator.index(index)
        if index < 0 or (self.length is not None and index >= self.length):
            allowed = 'not negative' if self.length is None else f'in 0..{self.length - 1}'
            raise IndexError(f'index must be {allowed}, got {index}')
        return index

    def _strength(self, index):
        if isinstance(self.background, float):
            return self.background
        start, stop = self.background
        return start + (stop - start) * index / max(self.length - 1, 1)

    def _draw_background(self, rng, index):
        height, width = self.size
        photographs = load_photographs(self.split)
        photograph = photographs[rng.integers(len(photographs))]
        # photograph pixels per image pixel: at most magnified twice, at most reduced four times
        most = min(4.0, photograph.shape[0] / height, photograph.shape[1] / width)
        ratio = math.exp(rng.uniform(math.log(min(0.5, most)), math.log(most)))
        rows, columns = max(1, int(height * ratio)), max(1, int(width * ratio))
        top = rng.integers(photograph.shape[0] - rows + 1)
        left = rng.integers(photograph.shape[1] - columns + 1)
        image = cv2.resize(
            photograph[top : top + rows, left : left + columns],
            (width, height),
            interpolation=cv2.INTER_AREA if ratio > 1 else cv2.INTER_LINEAR,
        )
        if rng.random() < 0.5:
            image = np.ascontiguousarray(image[:, ::-1])
        if self.recolour:
            image = self._recolour(rng, image)
        strength = self._strength(index)
        if strength < 1:
            mean = np.array(cv2.mean(image)[:3])
            image = np.rint(mean + strength * (image - mean)).astype(np.uint8)
        return image

    def _recolour(self, rng, image):
        strength = self.recolour * rng.random()
        mean = np.array(cv2.mean(image)[:3])
        mixing = np.eye(3) + strength * rng.uniform(-1, 1, (3, 3))
        shift = mean + strength * rng.uniform(-96, 96, 3) - mixing @ mean
        return cv2.transform(image, np.column_stack([mixing, shift]))

    def _draw_digit(self, rng):
        """Draw what a digit keeps at any size: scan, label, angle, stroke threshold."""
        scans, labels = load_scans(self.split)
        chosen = rng.integers(len(labels))
        angle = math.radians(rng.uniform(-self.max_angle, self.max_angle))
        return scans[chosen], int(labels[chosen]), angle, rng.uniform(0.35, 0.55)


class SceneGenerator(_Generator):
    """Pictures with several digits, for detection, instance and semantic segmentation.

    Args:
        split (str): ``'train'`` or ``'val'``.
        seed (int): Not negative. Another seed gives other samples of the same digits and
            photographs.
        size (int | tuple[int, int]): Side, or (height, width), in pixels; at least 16.
        num_digits (tuple[int, int]): Fewest and most digits of a scene, both included. A scene
            whose digits leave no room gets fewer than drawn, never fewer than the minimum.
        digit_size (tuple[int, int], optional): Smallest and largest longest side of a digit's tight
            full box, in pixels. By default (20, 100), shrunk for a scene so small that 100 exceeds
            two fifths of its shorter side.
        max_angle (float): Digits are turned by up to this many degrees either way.
        background (float | tuple[float, float]): 1 shows the photograph, 0 its mean colour, values
            between blend. A pair (first, last) changes linearly over ``length`` samples, for a
            curriculum (keep the order: no shuffling).
        recolour (float): 0 keeps a photograph's colours. Up to 1, its channels are mixed and
            shifted at random, so that the colours of a few photographs are not learned.
        length (int, optional): Number of samples. By default unlimited.

    Raises:
        ValueError: If an option is outside of what is allowed.
    """

    kind = 'scene'

    def __init__(
        self,
        split='train',
        seed=0,
        *,
        size=256,
        num_digits=(2, 6),
        digit_size=None,
        max_angle=30.0,
        background=1.0,
        recolour=0.0,
        length=None,
    ):
        super().__init__(split, seed, size, max_angle, background, recolour, length)
        self.num_digits = _check_range('num_digits', num_digits, 1, 100)
        short = min(self.size)
        if digit_size is None:
            largest = max(MIN_DIGIT, min(100, int(0.4 * short)))
            digit_size = (max(MIN_DIGIT, min(20, largest // 2)), largest)
        self.digit_size = _check_range('digit_size', digit_size, MIN_DIGIT, short)
        needed, available = (
            self.num_digits[0] * self.digit_size[0] ** 2,
            self.size[0] * self.size[1] // 2,
        )
        if self.num_digits[0] > 1 and needed > available:  # a single digit always finds a place
            raise ValueError(
                f'{self.num_digits[0]} digits with a side of {self.digit_size[0]} pixels need '
                f'{needed} pixels, more than half of a scene of size {self.size} ({available}); '
                'reduce num_digits or digit_size, or enlarge size'
            )

    def generate(self, index):
        """Make one scene.

        Args:
            index (int): Not negative, below ``length`` where that is given.

        Returns:
            Scene: Picture and annotations.

        Raises:
            IndexError: If the index is out of range.
            RuntimeError: If the fewest digits found no place in many attempts.
        """
        index = self._check_index(index)
        rng = self._rng(index)
        background = self._draw_background(rng, index)
        fewest, most = self.num_digits
        count = rng.integers(fewest, most + 1)
        for _ in range(_RESTARTS):
            canvas = _Canvas(background.copy())
            while len(canvas.labels) < count and self._place_digit(canvas, rng):
                pass
            if len(canvas.labels) >= fewest:
                return canvas.to_scene()
        raise RuntimeError(
            f'no place for {fewest} digits of {self.digit_size} pixels in a scene of size '
            f'{self.size}; reduce num_digits or digit_size, or enlarge size'
        )

    def _place_digit(self, canvas, rng):
        scan, label, angle, threshold = self._draw_digit(rng)
        smallest, largest = self.digit_size
        side = int(rng.integers(smallest, largest + 1))
        while True:
            alpha, box = _render(scan, angle, threshold, side)
            for _ in range(_POSITIONS):
                position = _draw_position(rng, self.size, box)
                if canvas.add(rng, label, alpha, box, position):
                    return True
            if len(canvas.labels) >= self.num_digits[0] or side == smallest:
                return False
            side = max(smallest, side // 2)


class CropGenerator(_Generator):
    """Pictures of a single digit, for classification.

    Args:
        split (str): ``'train'`` or ``'val'``.
        seed (int): Not negative. Another seed gives other samples of the same digits and
            photographs.
        size (int | tuple[int, int]): Side, or (height, width), in pixels; at least 16.
        digit_size (tuple[float, float]): Smallest and largest longest side of the digit's tight
            box, as a part of the crop's shorter side. The whole digit lies inside the crop.
        max_angle (float): Digits are turned by up to this many degrees either way.
        background (float | tuple[float, float]): As for :class:`SceneGenerator`.
        recolour (float): As for :class:`SceneGenerator`.
        length (int, optional): Number of samples. By default unlimited.

    Raises:
        ValueError: If an option is outside of what is allowed.
    """

    kind = 'crop'

    def __init__(
        self,
        split='train',
        seed=0,
        *,
        size=64,
        digit_size=(0.5, 0.9),
        max_angle=30.0,
        background=1.0,
        recolour=0.0,
        length=None,
    ):
        super().__init__(split, seed, size, max_angle, background, recolour, length)
        short = min(self.size)
        smallest, largest = _check_pair('digit_size', digit_size)
        smallest = _check_number('digit_size', smallest, 0, 1)
        largest = _check_number('digit_size', largest, smallest, 1)
        self.digit_size = smallest, largest
        self._sides = math.ceil(smallest * short), math.floor(largest * short)
        if not MIN_DIGIT <= self._sides[0] <= self._sides[1]:
            raise ValueError(
                f'digit_size must allow a whole number of pixels of at least {MIN_DIGIT}, got '
                f'{self.digit_size} of {short} pixels'
            )

    def generate(self, index):
        """Make one crop.

        Args:
            index (int): Not negative, below ``length`` where that is given.

        Returns:
            tuple[np.ndarray, int]: image (H, W, 3) uint8 BGR (the order of mmcv and OpenCV), and
            the class 0..9.

        Raises:
            IndexError: If the index is out of range.
        """
        scene = self.generate_scene(index)
        return scene.image, int(scene.labels[0])

    def generate_scene(self, index):
        """Make the same crop with all annotations: a :class:`Scene` of one digit."""
        index = self._check_index(index)
        rng = self._rng(index)
        canvas = _Canvas(self._draw_background(rng, index))
        scan, label, angle, threshold = self._draw_digit(rng)
        alpha, box = _render(scan, angle, threshold, int(rng.integers(self._sides[0], self._sides[1] + 1)))
        canvas.add(rng, label, alpha, box, _draw_position(rng, self.size, box))
        return canvas.to_scene()


class _Canvas:
    """A picture under construction; ``owner`` holds each pixel's topmost digit, or -1."""

    def __init__(self, image):
        self.image = image
        self.owner = np.full(image.shape[:2], -1, np.int8)
        self.labels = []
        self.full_boxes = []
        self.full_areas = []
        self.visible = np.zeros(0, np.int64)

    def add(self, rng, label, alpha, box, position):
        """Draw a digit at ``position`` (x, y), unless it would hide too much of another one."""
        (x, y), (left, top, width, height) = position, box
        tight = alpha[top : top + height, left : left + width] >= 0.5
        owner = self.owner[y : y + height, x : x + width]
        hidden = np.bincount(owner[tight] + 1, minlength=len(self.labels) + 1)[1:]
        visible = self.visible - hidden
        if np.any(visible < MIN_VISIBLE * np.array(self.full_areas)):
            return False
        owner[tight] = len(self.labels)
        area = int(np.count_nonzero(tight))
        self.labels.append(label)
        self.full_boxes.append((x, y, x + width, y + height))
        self.full_areas.append(area)
        self.visible = np.append(visible, area)
        self._paint(rng, alpha, x - left, y - top)
        return True

    def _paint(self, rng, alpha, x, y):
        # the soft edge may reach over the border of the picture
        x0, y0 = max(x, 0), max(y, 0)
        below = self.image[y0 : y + alpha.shape[0], x0 : x + alpha.shape[1]]
        alpha = alpha[y0 - y : y0 - y + below.shape[0], x0 - x : x0 - x + below.shape[1], None]
        colour = _draw_colour(rng, below)
        below[:] = np.rint(below + alpha * (colour - below))

    def to_scene(self):
        labels = np.array(self.labels, np.int64)
        masks = self.owner == np.arange(len(labels), dtype=np.int8)[:, None, None]
        boxes = np.empty((len(labels), 4), np.float32)
        for box, mask in zip(boxes, masks, strict=True):
            x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
            box[:] = x, y, x + width, y + height
        values = np.append(labels + 1, 0).astype(np.uint8)  # owner -1 picks the last entry, the background
        return Scene(
            self.image,
            labels,
            boxes,
            masks,
            self.visible,
            np.array(self.full_boxes, np.float32),
            np.array(self.full_areas, np.int64),
            values[self.owner],
        )


def _draw_position(rng, size, box):
    return int(rng.integers(size[1] - box[2] + 1)), int(rng.integers(size[0] - box[3] + 1))


def _draw_colour(rng, below):
    """Draw a colour (3,) that differs from the pixels below, the more so the more they vary."""
    candidates = rng.integers(0, 256, (16, 3)).astype(np.float32)
    luma = candidates @ np.array([0.114, 0.587, 0.299], np.float32)
    mean, deviation = (float(value[0, 0]) for value in cv2.meanStdDev(cv2.cvtColor(below, cv2.COLOR_BGR2GRAY)))
    clear = np.flatnonzero(np.abs(luma - mean) >= min(MIN_CONTRAST + deviation, 110.0))
    if len(clear):
        return candidates[clear[0]]
    return np.full(3, 255 if mean < 128 else 0, np.float32)


def _render(scan, angle, threshold, side):
    """Render a scan so that the longest side of its tight box measures ``side`` pixels.

    Returns:
        tuple: alpha (h, w) float32 in [0, 1], of which >= 0.5 counts as digit, and the tight box
        (x, y, width, height) of that within alpha.
    """
    # Cubic magnification first, bilinear warping after it: warping 8x8 pixels directly would show
    # OpenCV's rounding of coordinates to 1/32 pixel as steps. The surface is smooth, so sampling it
    # at points does not alias.
    surface = cv2.resize(np.pad(scan, 1), None, fx=_OVERSAMPLE, fy=_OVERSAMPLE, interpolation=cv2.INTER_CUBIC)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    rows, columns = np.nonzero(surface >= threshold)
    points = rotation @ np.stack([columns, rows])
    low, high = points.min(axis=1), points.max(axis=1)
    scale = side / (high - low + 1).max()
    width, height = (np.ceil((high - low + 1) * scale) + 8).astype(int).tolist()
    best = None
    for step in range(8):
        matrix = np.empty((2, 3))
        matrix[:, :2] = scale * rotation
        # where a size is skipped at one position between pixels, another position gives it
        matrix[:, 2] = (np.array([width, height]) - 1 + step / 4) / 2 - scale * (low + high) / 2
        values = cv2.warpAffine(surface, matrix, (width, height), flags=cv2.INTER_LINEAR)
        box = cv2.boundingRect((values >= threshold).view(np.uint8))
        error = side - max(box[2:])
        if best is None or abs(error) < abs(best[0]):
            best = error, values, box, scale
        if error == 0:
            break
        # whole columns come and go at once, so ever smaller steps are taken
        scale *= 1 + error / side / (1 + step / 2)
    _, values, box, scale = best
    # the surface rises by about 0.7 per pixel of the scan, so this edge is about one pixel wide at
    # any size
    slope = scale * _OVERSAMPLE * 1.1
    return np.clip((values - threshold) * slope + 0.5, 0, 1).astype(np.float32), box


def _check_split(split):
    if split not in SPLITS:
        raise ValueError(f'split must be one of {SPLITS}, got {split!r}')


def _is_integer(value):
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _check_integer(name, value, least):
    if not _is_integer(value) or value < least:
        raise ValueError(f'{name} must be an integer of at least {least}, got {value!r}')
    return int(value)


def _check_number(name, value, least, most):
    number = _is_integer(value) or isinstance(value, (float, np.floating))
    if not number or not least <= value <= most:
        raise ValueError(f'{name} must lie in [{least}, {most}], got {value!r}')
    return float(value)


def _check_pair(name, value):
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f'{name} must be a pair, got {value!r}')
    return tuple(value)


def _check_range(name, value, least, most):
    smallest, largest = _check_pair(name, value)
    if not (_is_integer(smallest) and _is_integer(largest) and least <= smallest <= largest <= most):
        raise ValueError(f'{name} must be a pair of integers (smallest, largest) in [{least}, {most}], got {value!r}')
    return int(smallest), int(largest)


def _check_size(size):
    height, width = (size, size) if _is_integer(size) else _check_pair('size', size)
    return _check_integer('size', height, MIN_SIDE), _check_integer('size', width, MIN_SIDE)


def _check_background(background, length):
    if not isinstance(background, (tuple, list)):
        return _check_number('background', background, 0, 1)
    if length is None:
        raise ValueError(f'background={background!r} changes over the data set and therefore needs length')
    return tuple(_check_number('background', value, 0, 1) for value in _check_pair('background', background))
