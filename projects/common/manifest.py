"""Manifest of a data set that a program wrote to a folder."""

import json


def read_manifest(path, name):
    """Read the manifest of a data set.

    Args:
        path (Path): Manifest file in the folder of the data set.
        name (str): Name of the data set. The manifest must hold the same ``name``.

    Returns:
        dict | None: The manifest, with the dict ``options`` of the data set and the flag ``complete``. None if the
            folder is missing or empty.

    Raises:
        FileExistsError: If the folder is a file, or holds files but no manifest of this data set.
    """
    folder = path.parent
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise FileExistsError(f'{folder} is a file, not a folder: give a new or an empty folder')
    if not any(folder.iterdir()):
        return None
    try:
        manifest = json.loads(path.read_text())
        valid = manifest['name'] == name and isinstance(manifest['options'], dict) and 'complete' in manifest
    except (OSError, ValueError, KeyError, TypeError):
        valid = False
    if not valid:
        raise FileExistsError(
            f'{folder} holds files but no {path.name} of the data set {name}, so nothing was written: give a new or an '
            'empty folder'
        )
    return manifest
