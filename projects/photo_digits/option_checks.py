"""Checks of the generators' options. Each returns the value in a canonical form, or raises a ``ValueError``."""

import numpy as np

from soft_mm.ops.checks import check_integer

MIN_SIDE = 16  # smallest side of an image, in pixels


def integer_option(name, value, minimum):
    """Return an integer >= ``minimum`` as int, or raise a ``ValueError``."""
    value = int(value) if isinstance(value, np.integer) else value
    check_integer(name, value, minimum)
    return value


def number_option(name, value, minimum, maximum):
    """Return a number in [``minimum``, ``maximum``] as float, or raise a ``ValueError``."""
    if not _is_number(value) or not minimum <= value <= maximum:
        raise ValueError(f'{name}={value!r}: expected a number in [{minimum}, {maximum}]')
    return float(value)


def integer_range(name, value, minimum, maximum):
    """Return a pair (smallest, largest) of integers in [``minimum``, ``maximum``], or raise a ``ValueError``."""
    if not _is_pair(value, _is_integer) or not minimum <= value[0] <= value[1] <= maximum:
        raise ValueError(
            f'{name}={value!r}: expected a pair of integers with {minimum} <= smallest <= largest <= {maximum}'
        )
    return int(value[0]), int(value[1])


def fraction_range(name, value):
    """Return a pair (smallest, largest) of numbers in [0, 1], or raise a ``ValueError``."""
    if not _is_pair(value, _is_number) or not 0 <= value[0] <= value[1] <= 1:
        raise ValueError(f'{name}={value!r}: expected a pair of numbers with 0 <= smallest <= largest <= 1')
    return float(value[0]), float(value[1])


def size_option(size):
    """Return an image size as (height, width) in pixels, or raise a ``ValueError``."""
    sides = (size, size) if _is_integer(size) else size
    if not _is_pair(sides, _is_integer) or min(sides) < MIN_SIDE:
        raise ValueError(
            f'size={size!r}: expected an integer >= {MIN_SIDE}, or a pair (height, width) of such integers'
        )
    return int(sides[0]), int(sides[1])


def background_option(background, length):
    """Return a background strength in [0, 1] as float, or a pair (first, last), or raise a ``ValueError``."""
    if _is_number(background) and 0 <= background <= 1:
        return float(background)
    if not _is_pair(background, _is_number) or not all(0 <= value <= 1 for value in background):
        raise ValueError(
            f'background={background!r}: expected a number in [0, 1], or a pair (first, last) of such numbers'
        )
    if length is None:
        raise ValueError(
            f'background={background!r}: a pair (first, last) needs the number of samples, but length=None; set length'
        )
    return float(background[0]), float(background[1])


def _is_integer(value):
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_number(value):
    return _is_integer(value) or isinstance(value, (float, np.floating))


def _is_pair(value, is_valid):
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(is_valid, value))
