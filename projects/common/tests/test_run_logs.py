"""Scalars and checkpoints in the work dir of a runner."""

import json

from projects.common.run_logs import last_checkpoint, read_scalars


def write_run(work_dir, name, records):
    folder = work_dir / name / 'vis_data'
    folder.mkdir(parents=True)
    (folder / 'scalars.json').write_text('\n'.join(json.dumps(record) for record in records))


def test_resumed_run_replaces_repeated_iterations(tmp_path):
    write_run(tmp_path, '20260101_1', [dict(loss=3.0, step=10), dict(loss=2.0, step=20)])
    write_run(tmp_path, '20260101_2', [dict(loss=1.5, step=20), dict(step=20, mIoU=5.0)])
    with open(tmp_path / '20260101_2/vis_data/scalars.json', 'a') as file:
        file.write('\n{"loss": 1.')
    records = read_scalars(tmp_path)
    assert [(r['step'], r.get('loss')) for r in records] == [(10, 3.0), (20, 1.5), (20, None)]


def test_last_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path) is None
    (tmp_path / 'last_checkpoint').write_text('/elsewhere/iter_5.pth')
    assert last_checkpoint(tmp_path) is None
    (tmp_path / 'iter_5.pth').write_bytes(b'')
    assert last_checkpoint(tmp_path) == tmp_path / 'iter_5.pth'
    # As after a run that was killed while it wrote the note.
    (tmp_path / 'last_checkpoint').write_text('')
    assert last_checkpoint(tmp_path) == tmp_path / 'iter_5.pth'
    (tmp_path / 'last_checkpoint').unlink()
    assert last_checkpoint(tmp_path) == tmp_path / 'iter_5.pth'
