"""The manifest of a data set that a program wrote into a folder."""

import json


def read_manifest(path, name):
    """Read the manifest of a data set.

    Args:
        path (Path): The manifest file. Its folder is the folder of the data set.
        name (str): Name of the data set, which the manifest must hold as its entry ``name``.

    Returns:
        dict | None: The manifest. It holds the dict ``options`` of the data set and the flag ``complete``. None if the
            folder is missing or empty.

    Raises:
        FileExistsError: If the folder holds files but no manifest of this data set, or if it is a file.
    """
    folder = path.parent
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise FileExistsError(f'{folder} is a file, not a folder: name a new or an empty folder')
    if not any(folder.iterdir()):
        return None
    try:
        manifest = json.loads(path.read_text())
        valid = manifest['name'] == name and isinstance(manifest['options'], dict) and 'complete' in manifest
    except (OSError, ValueError, KeyError, TypeError):
        valid = False
    if not valid:
        raise FileExistsError(
            f'{folder} holds files but no {path.name} of the data set {name}, so nothing was written: name a new or an '
            'empty folder'
        )
    return manifest
