"""Reading of the work dir of mmengine's runner."""

import json
from pathlib import Path

from soft_mm.runner import find_newest_checkpoint


def read_scalars(work_dir):
    """Read the logged scalars of all runs in a work dir, oldest run first.

    Args:
        work_dir (str | Path): Work dir of a runner with mmengine's ``LocalVisBackend``.

    Returns:
        list[dict]: Records of training (with ``loss``) and of evaluation, each with ``step``. If a resumed run repeated
            some iterations, the training records of the earlier run for these iterations are dropped.
    """
    records = []
    for path in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        run = []
        for line in path.read_text().splitlines():
            try:
                run.append(json.loads(line))
            except json.JSONDecodeError:
                # An interrupted run may leave an incomplete last line.
                continue
        first = min((record['step'] for record in run if 'loss' in record), default=float('inf'))
        records = [record for record in records if 'loss' not in record or record['step'] < first] + run
    return records


def read_losses(work_dir):
    """Read the training losses of all runs in a work dir.

    Args:
        work_dir (str | Path): See :func:`read_scalars`.

    Returns:
        list[tuple[int, float]]: Iterations and losses.
    """
    return [(record['step'], record['loss']) for record in read_scalars(work_dir) if 'loss' in record]


def last_checkpoint(work_dir):
    """Return the newest checkpoint of a work dir.

    Args:
        work_dir (str | Path): Work dir of a runner with mmengine's ``CheckpointHook``. It may have been moved after the
            run.

    Returns:
        Path | None: The checkpoint, or None if there is none.
    """
    note = Path(work_dir) / 'last_checkpoint'
    name = Path(note.read_text().strip()).name if note.is_file() else ''
    if name and (checkpoint := Path(work_dir) / name).is_file():
        return checkpoint
    if not any(Path(work_dir).glob('*.pth')):
        return None
    # A run that is killed while it writes the note leaves the checkpoints themselves.
    newest = find_newest_checkpoint(work_dir)
    return Path(newest) if newest and Path(newest).parent == Path(work_dir) and Path(newest).is_file() else None
