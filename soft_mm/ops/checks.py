"""Checks of arguments. Each raises a ``ValueError`` that states the given value and the allowed values."""

from collections.abc import Sequence
from typing import TypeGuard


def is_integer(value: object, minimum: int = 1) -> TypeGuard[int]:
    """Return whether a value is an integer (not a bool) >= ``minimum``.

    Args:
        value (object): Value to check.
        minimum (int): Smallest allowed value. Defaults to 1.

    Returns:
        bool: True for an integer >= ``minimum``.
    """
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def check_integer(name: str, value: object, minimum: int = 1, maximum: int | None = None) -> None:
    """Check that a value is an integer (not a bool) >= ``minimum`` and <= ``maximum``.

    Args:
        name (str): Name of the argument, for the message.
        value (object): Value to check.
        minimum (int): Smallest allowed value. Defaults to 1.
        maximum (int | None): Largest allowed value. Defaults to None: any.

    Raises:
        ValueError: If the value is not an integer or is outside the range.
    """
    if not is_integer(value, minimum) or (maximum is not None and value > maximum):
        bound = '' if maximum is None else f' and <= {maximum}'
        raise ValueError(f'{name}={value!r}: expected an integer >= {minimum}{bound}')


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_positive(name: str, value: object, maximum: float) -> None:
    """Check that a value is a number > 0 and <= ``maximum``.

    Args:
        name (str): Name of the argument, for the message.
        value (object): Value to check.
        maximum (float): Largest allowed value.

    Raises:
        ValueError: If the value is not a number or is outside the range.
    """
    if not _is_number(value) or not 0 < value <= maximum:
        raise ValueError(f'{name}={value!r}: expected a number > 0 and <= {maximum}')


def check_rate(name: str, value: object) -> None:
    """Check that a value is a number in [0, 1).

    Args:
        name (str): Name of the argument, for the message.
        value (object): Value to check.

    Raises:
        ValueError: If the value is not a number or out of range.
    """
    if not _is_number(value) or not 0 <= value < 1:
        raise ValueError(f'{name}={value!r}: expected a number >= 0 and < 1')


def check_bool(name: str, value: object) -> None:
    """Check that a value is True or False.

    Args:
        name (str): Name of the argument, for the message.
        value (object): Value to check.

    Raises:
        ValueError: If the value is not a bool.
    """
    if not isinstance(value, bool):
        raise ValueError(f'{name}={value!r}: expected True or False')


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Check that a value is one of ``choices``.

    Args:
        name (str): Name of the argument, for the message.
        value (object): Value to check.
        choices (Sequence): Allowed values.

    Raises:
        ValueError: If the value is none of them.
    """
    # An array compared with a string is an array.
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
        raise ValueError(f'{name}={value!r} is unknown; choose one of {tuple(choices)}')
