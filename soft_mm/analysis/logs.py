"""What mmengine's runner leaves in a work dir."""

import json
from pathlib import Path


def read_scalars(work_dir):
    """Read the records of every run of a work dir, a resumed run after the one that it resumes.

    Args:
        work_dir (str | Path): work dir of a runner with mmengine's ``LocalVisBackend``.

    Returns:
        list[dict]: records of training (with ``loss``) and of evaluation, each with ``step``, by rising time. Where
        a run was resumed, the training records of iterations that were done twice are the later ones.
    """
    records = []
    for path in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        run = []
        for line in path.read_text().splitlines():
            try:
                run.append(json.loads(line))
            except json.JSONDecodeError:
                # The last line of an interrupted run may be cut.
                continue
        first = min((record['step'] for record in run if 'loss' in record), default=float('inf'))
        records = [record for record in records if 'loss' not in record or record['step'] < first] + run
    return records


def last_checkpoint(work_dir):
    """The newest checkpoint of a work dir, or None.

    Args:
        work_dir (str | Path): work dir of a runner with mmengine's ``CheckpointHook``.

    Returns:
        Path | None: the file, which exists.
    """
    note = Path(work_dir) / 'last_checkpoint'
    if not note.is_file():
        return None
    checkpoint = Path(work_dir) / Path(note.read_text().strip()).name
    return checkpoint if checkpoint.is_file() else None
