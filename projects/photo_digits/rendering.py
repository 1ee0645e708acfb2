"""Rendering of photo-digits: draws digits of any size and angle onto a picture, and records their annotations."""

import math
from dataclasses import dataclass

import cv2
import numpy as np

MIN_DIGIT = 8  # side in pixels; a digit smaller than its 8x8 scan cannot be recognised
MIN_VISIBLE = 0.6  # smallest fraction of a digit that must stay visible under later digits
MIN_CONTRAST = 60.0  # default contrast of a digit with the picture below it, in grey levels
MAX_CONTRAST = 127.0  # black or white always has at least this contrast

_OVERSAMPLE = 8
_ENOUGH_CONTRAST = 110.0  # contrast above which a picture that varies strongly needs no more


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture with ``K`` digits in drawing order. Later digits hide earlier ones.

    Attributes:
        image (np.ndarray): (H, W, 3) uint8, BGR as in mmcv and OpenCV.
        labels (np.ndarray): (K,) int64, classes 0 to 9.
        boxes (np.ndarray): (K, 4) float32, xyxy in pixels, tight around the visible mask. ``x2`` and ``y2`` are
            exclusive: the last column and row plus 1.
        masks (np.ndarray): (K, H, W) bool, visible pixels. Masks do not overlap.
        areas (np.ndarray): (K,) int64, numbers of visible pixels.
        full_boxes (np.ndarray): (K, 4) float32, xyxy in pixels, tight around the whole digit, hidden parts included.
        full_areas (np.ndarray): (K,) int64, numbers of pixels of the whole digits, hidden parts included.
        semantic (np.ndarray): (H, W) uint8, 0 for background and class + 1 for digits.
    """

    image: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray
    areas: np.ndarray
    full_boxes: np.ndarray
    full_areas: np.ndarray
    semantic: np.ndarray


class Canvas:
    """A picture onto which digits are drawn.

    Args:
        image (np.ndarray): (H, W, 3) uint8, BGR, changed in place.
        min_contrast (float): Smallest difference between the luma of a digit and the mean luma below it, in grey
            levels, at most 127. Defaults to 60.
        gap (int | None): Smallest distance between the boxes of two digits in pixels. Defaults to None: digits may hide
            up to two fifths of each other.
    """

    def __init__(self, image, min_contrast=MIN_CONTRAST, gap=None):
        self.image = image
        self.min_contrast = min_contrast
        self.gap = gap
        self.owner = np.full(image.shape[:2], -1, np.int8)  # index of the topmost digit of each pixel, or -1
        self.labels = []
        self.full_boxes = []
        self.full_areas = []
        self.visible = np.zeros(0, np.int64)

    def add(self, rng, label, alpha, box, position):
        """Draw a digit, unless it would hide too much of an earlier one or come too close to it.

        Args:
            rng (np.random.Generator): Random generator for the colour of the digit.
            label (int): Class of the digit.
            alpha (np.ndarray): (h, w) float32, opacity of the digit, from :func:`render_digit`.
            box (tuple[int, int, int, int]): Tight box (x, y, width, height) of the digit within ``alpha``.
            position (tuple[int, int]): Column and row of the box's top left corner in the picture.

        Returns:
            bool: Whether the digit was drawn.
        """
        (x, y), (left, top, width, height) = position, box
        if self.gap is not None and any(
            x - self.gap < x2 and x1 < x + width + self.gap and y - self.gap < y2 and y1 < y + height + self.gap
            for x1, y1, x2, y2 in self.full_boxes
        ):
            return False
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

    def to_scene(self):
        """Collect the picture and its annotations.

        Returns:
            Scene: The picture with all digits that were drawn.
        """
        labels = np.array(self.labels, np.int64)
        masks = self.owner == np.arange(len(labels), dtype=np.int8)[:, None, None]
        boxes = np.empty((len(labels), 4), np.float32)
        for box, mask in zip(boxes, masks, strict=True):
            x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
            box[:] = x, y, x + width, y + height
        values = np.append(labels + 1, 0).astype(np.uint8)  # owner -1 selects the last entry, the background
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

    def _paint(self, rng, alpha, x, y):
        # The soft edge may extend beyond the border of the picture.
        x0, y0 = max(x, 0), max(y, 0)
        below = self.image[y0 : y + alpha.shape[0], x0 : x + alpha.shape[1]]
        alpha = alpha[y0 - y : y0 - y + below.shape[0], x0 - x : x0 - x + below.shape[1], None]
        colour = _draw_colour(rng, below, self.min_contrast)
        below[:] = np.rint(below + alpha * (colour - below))


def _draw_colour(rng, below, min_contrast):
    """Draw a random colour (3,) that contrasts with the pixels below, and more so if these vary strongly."""
    candidates = rng.integers(0, 256, (16, 3)).astype(np.float32)
    luma = candidates @ np.array([0.114, 0.587, 0.299], np.float32)
    mean, deviation = (float(value[0, 0]) for value in cv2.meanStdDev(cv2.cvtColor(below, cv2.COLOR_BGR2GRAY)))
    needed = max(min_contrast, min(min_contrast + deviation, _ENOUGH_CONTRAST))
    clear = np.flatnonzero(np.abs(luma - mean) >= needed)
    if len(clear):
        return candidates[clear[0]]
    return np.full(3, 255 if mean < 128 else 0, np.float32)


def render_digit(scan, angle, threshold, side):
    """Render a scan so that the longest side of its tight box measures ``side`` pixels.

    Args:
        scan (np.ndarray): (8, 8) float32, with a maximum of 1.
        angle (float): Rotation in radians.
        threshold (float): Value of the scan at the edge of the strokes.
        side (int): Longest side of the tight box in pixels.

    Returns:
        tuple: Opacity (h, w) float32 in [0, 1], and the tight box (x, y, width, height) of the pixels with an opacity
            >= 0.5.
    """
    # Magnify first (cubic), then warp (bilinear). OpenCV rounds coordinates to 1/32 pixel, which would be visible as
    # steps if the 8x8 pixels were warped directly. The magnified surface is smooth, so the warp does not alias.
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
        # At a given subpixel position, some sides cannot be reached, so each step tries another position.
        matrix[:, 2] = (np.array([width, height]) - 1 + step / 4) / 2 - scale * (low + high) / 2
        values = cv2.warpAffine(surface, matrix, (width, height), flags=cv2.INTER_LINEAR)
        box = cv2.boundingRect((values >= threshold).view(np.uint8))
        error = side - max(box[2:])
        if best is None or abs(error) < abs(best[0]):
            best = error, values, box, scale
        if error == 0:
            break
        # A small change of scale can add or remove a whole column, so the correction decreases with each step.
        scale *= 1 + error / side / (1 + step / 2)
    _, values, box, scale = best
    # The surface rises by about 0.7 per pixel of the scan, so with this slope the edge is about one pixel wide.
    slope = scale * _OVERSAMPLE * 1.1
    return np.clip((values - threshold) * slope + 0.5, 0, 1).astype(np.float32), box
