"""Generators of photo-digits: handwritten digits on photographs, composed on the fly.

The digits are the 8x8 scans of scikit-learn's ``load_digits``, drawn at random size, angle, colour and position. The
photographs are files inside scikit-image and scikit-learn, so nothing is downloaded. The splits ``train`` and ``val``
share no digits and no photographs.

A sample depends on ``(seed, split, kind, index)`` and on the options of its generator. It does not depend on the order
of the samples or on the process. The pixels also depend on the installed OpenCV: its interpolation may differ in the
last bit between releases.
"""

import math
import operator

import cv2
import numpy as np

from soft_mm.ops.checks import check_choice

from .option_checks import (
    background_option,
    fraction_range,
    integer_option,
    integer_range,
    number_option,
    size_option,
)
from .rendering import MAX_CONTRAST, MIN_CONTRAST, MIN_DIGIT, Canvas, render_digit
from .sources import SPLITS, load_photographs, load_scans

_KINDS = ('scene', 'crop')
_POSITIONS = 20
_RESTARTS = 20


class _Generator:
    """Base class of both generators: options, random streams, backgrounds and digits."""

    kind: str

    def __init__(self, split, seed, size, max_angle, background, recolour, min_contrast, length):
        check_choice('split', split, SPLITS)
        self.split = split
        self.seed = integer_option('seed', seed, 0)
        self.size = size_option(size)
        self.max_angle = number_option('max_angle', max_angle, 0, 180)
        self.length = None if length is None else integer_option('length', length, 1)
        self.background = background_option(background, self.length)
        self.recolour = number_option('recolour', recolour, 0, 1)
        self.min_contrast = number_option('min_contrast', min_contrast, 0, MAX_CONTRAST)

    @property
    def options(self):
        """dict: All options that determine the samples, including split and seed."""
        return {name: value for name, value in vars(self).items() if not name.startswith('_')}

    def load_sources(self):
        """Read the photographs and scans of the split now, so that worker processes forked later share the memory."""
        load_photographs(self.split)
        load_scans(self.split)

    def _rng(self, index):
        return np.random.default_rng([self.seed, SPLITS.index(self.split), _KINDS.index(self.kind), index])

    def _check_index(self, index):
        index = operator.index(index)
        if index < 0 or (self.length is not None and index >= self.length):
            end = '' if self.length is None else f' and < {self.length}'
            raise IndexError(f'index={index}: expected an integer >= 0{end}')
        return index

    def _background_strength(self, index):
        if isinstance(self.background, float):
            return self.background
        start, stop = self.background
        return start + (stop - start) * index / max(self.length - 1, 1)

    def _draw_background(self, rng, index):
        height, width = self.size
        photographs = load_photographs(self.split)
        photograph = photographs[rng.integers(len(photographs))]
        # The ratio is in photograph pixels per image pixel. Photographs are enlarged at most 2x and reduced at most 4x.
        maximum = min(4.0, photograph.shape[0] / height, photograph.shape[1] / width)
        ratio = math.exp(rng.uniform(math.log(min(0.5, maximum)), math.log(maximum)))
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
        strength = self._background_strength(index)
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
        """Draw the properties of a digit that do not depend on its size: scan, label, angle and stroke threshold."""
        scans, labels = load_scans(self.split)
        chosen = rng.integers(len(labels))
        angle = math.radians(rng.uniform(-self.max_angle, self.max_angle))
        return scans[chosen], int(labels[chosen]), angle, rng.uniform(0.35, 0.55)

    def _draw_position(self, rng, box):
        return int(rng.integers(self.size[1] - box[2] + 1)), int(rng.integers(self.size[0] - box[3] + 1))


class SceneGenerator(_Generator):
    """Generator of pictures with several digits, for detection, instance and semantic segmentation.

    Args:
        split (str): ``'train'`` or ``'val'``.
        seed (int): Seed, at least 0. Another seed gives other samples of the same digits and photographs.
        size (int | tuple[int, int]): Side, or (height, width), in pixels; at least 16.
        num_digits (tuple[int, int]): Minimum and maximum number of digits in a scene. The number is drawn at random. If
            there is no room for it, the scene has fewer digits, but at least the minimum.
        digit_size (tuple[int, int], optional): Minimum and maximum of the longest side of a digit's tight box in
            pixels, hidden parts included. The default is (20, 100). In a small scene, the maximum is two fifths of the
            shorter side, and the minimum half of that.
        max_angle (float): Largest rotation of a digit in degrees, in both directions.
        background (float | tuple[float, float]): 1 shows the photograph, 0 its mean colour, and a number between them a
            blend. A pair (first, last) changes linearly over ``length`` samples, as a curriculum for a sampler that
            does not shuffle.
        recolour (float): Strength, from 0 to 1, of random mixing and shifting of a photograph's channels. It prevents a
            model from learning the colours of the few photographs. 0 keeps the colours.
        min_contrast (float): Smallest difference between the luma of a digit and the mean luma below it, from 0 to 127
            grey levels. Defaults to 60.
        gap (int, optional): Smallest distance between the boxes of two digits in pixels. By default digits may overlap,
            but at least three fifths of each stay visible.
        length (int, optional): Number of samples. By default unlimited.

    Raises:
        ValueError: If an option has an invalid value.
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
        min_contrast=MIN_CONTRAST,
        gap=None,
        length=None,
    ):
        super().__init__(split, seed, size, max_angle, background, recolour, min_contrast, length)
        self.gap = None if gap is None else integer_option('gap', gap, 0)
        self.num_digits = integer_range('num_digits', num_digits, 1, 100)
        shorter = min(self.size)
        if digit_size is None:
            largest = max(MIN_DIGIT, min(100, int(0.4 * shorter)))
            digit_size = (max(MIN_DIGIT, min(20, largest // 2)), largest)
        self.digit_size = integer_range('digit_size', digit_size, MIN_DIGIT, shorter)
        needed = self.num_digits[0] * (self.digit_size[0] + (self.gap or 0)) ** 2
        available = self.size[0] * self.size[1] // 2
        if self.num_digits[0] > 1 and needed > available:  # a single digit always finds room
            raise ValueError(
                f'{self.num_digits[0]} digits with a side of {self.digit_size[0]} pixels and gap={self.gap} need '
                f'{needed} pixels: expected at most {available}, half of a scene of size {self.size}; reduce '
                'num_digits, digit_size or gap, or increase size'
            )

    def generate(self, index):
        """Generate one scene.

        Args:
            index (int): At least 0, and below ``length`` if there is one.

        Returns:
            Scene: Picture and annotations.

        Raises:
            IndexError: If the index is out of range.
            RuntimeError: If no attempt found room for the minimum number of digits.
        """
        index = self._check_index(index)
        rng = self._rng(index)
        background = self._draw_background(rng, index)
        minimum, maximum = self.num_digits
        count = rng.integers(minimum, maximum + 1)
        for _ in range(_RESTARTS):
            canvas = Canvas(background.copy(), self.min_contrast, self.gap)
            while len(canvas.labels) < count and self._place_digit(canvas, rng):
                pass
            if len(canvas.labels) >= minimum:
                return canvas.to_scene()
        raise RuntimeError(
            f'no room for {minimum} digits of {self.digit_size} pixels with gap={self.gap} in a scene of size '
            f'{self.size}; reduce num_digits, digit_size or gap, or increase size'
        )

    def _place_digit(self, canvas, rng):
        scan, label, angle, threshold = self._draw_digit(rng)
        smallest, largest = self.digit_size
        side = int(rng.integers(smallest, largest + 1))
        while True:
            alpha, box = render_digit(scan, angle, threshold, side)
            for _ in range(_POSITIONS):
                if canvas.add(rng, label, alpha, box, self._draw_position(rng, box)):
                    return True
            if len(canvas.labels) >= self.num_digits[0] or side == smallest:
                return False
            side = max(smallest, side // 2)


class CropGenerator(_Generator):
    """Generator of pictures of a single digit, for classification.

    Args:
        split (str): ``'train'`` or ``'val'``.
        seed (int): Seed, at least 0. Another seed gives other samples of the same digits and photographs.
        size (int | tuple[int, int]): Side, or (height, width), in pixels; at least 16.
        digit_size (tuple[float, float]): Minimum and maximum of the longest side of the digit's tight box, as a
            fraction of the shorter side of the crop. The whole digit lies inside the crop.
        max_angle (float): Largest rotation of the digit in degrees, in both directions.
        background (float | tuple[float, float]): See :class:`SceneGenerator`.
        recolour (float): See :class:`SceneGenerator`.
        min_contrast (float): See :class:`SceneGenerator`.
        length (int, optional): Number of samples. By default unlimited.

    Raises:
        ValueError: If an option has an invalid value.
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
        min_contrast=MIN_CONTRAST,
        length=None,
    ):
        super().__init__(split, seed, size, max_angle, background, recolour, min_contrast, length)
        shorter = min(self.size)
        self.digit_size = smallest, largest = fraction_range('digit_size', digit_size)
        self._sides = math.ceil(smallest * shorter), math.floor(largest * shorter)
        if not MIN_DIGIT <= self._sides[0] <= self._sides[1]:
            raise ValueError(
                f'digit_size={self.digit_size} is {smallest * shorter:g} to {largest * shorter:g} of {shorter} pixels: '
                f'expected a range that contains an integer and starts at {MIN_DIGIT} pixels or more; increase '
                'digit_size or size'
            )

    def generate(self, index):
        """Generate one crop.

        Args:
            index (int): At least 0, and below ``length`` if there is one.

        Returns:
            tuple[np.ndarray, int]: Image (H, W, 3) uint8, BGR as in mmcv and OpenCV, and class 0 to 9.

        Raises:
            IndexError: If the index is out of range.
        """
        scene = self.generate_scene(index)
        return scene.image, int(scene.labels[0])

    def generate_scene(self, index):
        """Generate the crop that :meth:`generate` returns, with all its annotations.

        Args:
            index (int): At least 0, and below ``length`` if there is one.

        Returns:
            Scene: Picture and annotations of its one digit.

        Raises:
            IndexError: If the index is out of range.
        """
        index = self._check_index(index)
        rng = self._rng(index)
        canvas = Canvas(self._draw_background(rng, index), self.min_contrast)
        scan, label, angle, threshold = self._draw_digit(rng)
        alpha, box = render_digit(scan, angle, threshold, int(rng.integers(self._sides[0], self._sides[1] + 1)))
        canvas.add(rng, label, alpha, box, self._draw_position(rng, box))
        return canvas.to_scene()
