"""Checkpoints: safe reading, comparison with a model, and conversion of the authors' checkpoints.

:mod:`soft_mm.checkpoints.convert` imports the models, and the models import this package. To avoid a circular import,
it is not imported here.
"""

from .official import from_official, to_official
from .reading import load_weights, read_checkpoint

__all__ = ['from_official', 'load_weights', 'read_checkpoint', 'to_official']
