"""SOFT, the softmax-free transformer, for the OpenMMLab toolboxes. Importing it needs torch and mmengine only."""

from .configs import config_names, config_path
from .version import __version__

try:
    import mmengine  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != 'mmengine':
        raise
    raise ModuleNotFoundError(
        "soft_mm needs mmengine. To install it with the toolboxes: `pip install 'soft_mm[maintained]'` (onedl-*) or "
        "`pip install 'soft_mm[original]'` (OpenMMLab's own). To install it alone: `pip install onedl-mmengine` or "
        '`pip install mmengine`',
        name='mmengine',
    ) from error

try:
    from .models import SOFT, SoftmaxFreeAttention, SoftmaxFreeCrossAttention
except (ImportError, AttributeError) as error:
    # mmengine's registry hides these two errors when it imports a plugin, and reports only that SOFT is not registered.
    raise RuntimeError(f'soft_mm could not be imported: {type(error).__name__}: {error}') from error

__all__ = [
    'SOFT',
    'SoftmaxFreeAttention',
    'SoftmaxFreeCrossAttention',
    '__version__',
    'config_names',
    'config_path',
]
