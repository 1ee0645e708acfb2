"""Checkpoints: reading them safely, comparing them with a model, and converting those of the authors.

Only :mod:`soft_mm.checkpoints.convert` imports models, so it is not imported here.
"""

from .official import from_official, to_official
from .reading import load_weights, read_checkpoint

__all__ = ['from_official', 'load_weights', 'read_checkpoint', 'to_official']
