"""The configs that came with the package: their names and their files."""

import difflib
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _folder():
    # In an installed package, where openmim looks; beside the package in a checkout that is not installed.
    for folder in (_PACKAGE / '.mim' / 'configs', _PACKAGE.parent / 'configs'):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f'there are no configs in {_PACKAGE / ".mim"}: install soft_mm again')


def config_names():
    """Names of all configs, such as ``'coco/retinanet_soft-tiny-norm_fpn_1x_coco.py'``.

    Returns:
        list[str]: file names from the configs' folder on, without those that are parts of others.

    Raises:
        FileNotFoundError: if the package was installed without them.
    """
    folder = _folder()
    names = (path.relative_to(folder).as_posix() for path in folder.glob('*/*.py'))
    return sorted(name for name in names if not name.startswith('_base_/'))


def config_path(name):
    """File of a config, for ``_base_`` of a config elsewhere or for a command line.

    Args:
        name (str): one of :func:`config_names`, or a file name under ``_base_/``.

    Returns:
        str: its path.

    Raises:
        FileNotFoundError: if there is no such config; the nearest names are given.

    Example:
        >>> import soft_mm
        >>> path = soft_mm.config_path('coco/mask-rcnn_soft-tiny-norm_fpn_1x_coco.py')
    """
    path = _folder() / name
    if not path.is_file():
        known = config_names()
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
        raise FileNotFoundError(f'soft_mm has no config {name!r}; near it are {near}, soft_mm.config_names() has all')
    return str(path)
