"""Names and paths of the configs in the package."""

import difflib
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _folder() -> Path:
    # openmim requires the configs of an installed package in `.mim`. A checkout has them in its root.
    for folder in (_PACKAGE / '.mim' / 'configs', _PACKAGE.parent / 'configs'):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f'{_PACKAGE / ".mim" / "configs"} does not exist: reinstall soft_mm')


def config_names() -> list[str]:
    """List the names of all configs, such as ``'coco/retinanet_soft-tiny-norm_fpn_1x_coco.py'``.

    Returns:
        list[str]: Paths relative to the folder of the configs, excluding ``_base_/``.

    Raises:
        FileNotFoundError: If the package was installed without configs.
    """
    folder = _folder()
    names = (path.relative_to(folder).as_posix() for path in folder.glob('*/*.py'))
    return sorted(name for name in names if not name.startswith('_base_/'))


def config_path(name: str) -> str:
    """Return the path of a config, for example to use it in ``_base_`` or on a command line.

    Args:
        name (str): One of :func:`config_names`, or a path that starts with ``_base_/``.

    Returns:
        str: Path of the file.

    Raises:
        FileNotFoundError: If the config does not exist. The message lists the closest names.

    Examples:
        >>> import soft_mm
        >>> path = soft_mm.config_path('coco/mask-rcnn_soft-tiny-norm_fpn_1x_coco.py')
    """
    path = _folder() / name
    if not path.is_file():
        known = config_names()
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
        raise FileNotFoundError(
            f'soft_mm has no config {name!r}; the closest are {near}. soft_mm.config_names() lists all'
        )
    return str(path)
