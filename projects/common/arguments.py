"""Types of command-line arguments. A bad value ends the program with a message that names the option."""

import argparse


def at_least(minimum):
    """Return an argparse type for integers with a lower bound.

    Args:
        minimum (int): Smallest allowed value, at least 0.

    Returns:
        Callable[[str], int]: Type that raises an ``ArgumentTypeError`` for other values.
    """

    def convert(text):
        if not text.isdigit() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f'{text!r}: expected an integer >= {minimum}')
        return int(text)

    return convert
