"""Files that are written at once, and the manifest that a data set in a folder has."""

import json


def write_text(path, text):
    """Write a file at once, so that an interruption leaves the earlier one.

    Args:
        path (Path): The file.
        text (str): What it holds then.
    """
    part = path.with_suffix('.part')
    part.write_text(text)
    part.replace(path)


def write_json(path, content, indent=2):
    """As :func:`write_text`, JSON that ends with a line break."""
    write_text(path, json.dumps(content, indent=indent) + '\n')


def read_manifest(path, name):
    """Read the manifest of a data set, which says of what its folder is made.

    Args:
        path (Path): The manifest within the folder.
        name (str): Its entry ``name``.

    Returns:
        dict | None: The manifest, with a dict of ``options`` and whether the folder is ``complete``; None for a missing
            or empty folder.

    Raises:
        FileExistsError: If the folder holds files but no manifest of this data set, or is a file.
    """
    folder = path.parent
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise FileExistsError(f'{folder} is not a folder')
    if not any(folder.iterdir()):
        return None
    try:
        manifest = json.loads(path.read_text())
        ours = manifest['name'] == name and isinstance(manifest['options'], dict) and 'complete' in manifest
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise FileExistsError(
            f'{folder} is not empty and holds no {path.name} of this data set, so nothing was written; name a new '
            'or an empty folder'
        )
    return manifest
