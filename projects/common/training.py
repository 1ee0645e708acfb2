"""Resumable trainings with ``tools/train.py``. A finished training is not repeated.

Each training runs in a separate process, because each toolbox needs its own default scope.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from soft_mm.utils import read_config, write_json

from .locks import inherited_files
from .run_logs import last_checkpoint, read_scalars

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Task:
    """Training to run.

    Attributes:
        name (str): Name of the training in messages.
        config (str): Path of the config, relative to the repository root.
        metrics (dict[str, tuple[str, float]]): Maps the runner's name of each metric to its name in the summary and to
            the factor that scales it to the range 0 to 1.
    """

    name: str
    config: str
    metrics: dict

    @property
    def config_file(self):
        """Path: Absolute path of the config."""
        return ROOT / self.config


def train_task(task, work_dir, data, console, options=None, pretrained=None, threads=None):
    """Run or resume a training, unless it is finished, and return its metrics.

    If the config, the options, the pretrained weights or the data have changed, the training starts again. The folder
    of the earlier run is renamed and kept.

    Args:
        task (Task): Training to run.
        work_dir (str | Path): Folder of the run.
        data (str | Path): File whose content identifies the data, such as the manifest of an exported data set.
        console (rich.console.Console): Console for messages.
        options (dict, optional): Options that override the config.
        pretrained (Path, optional): Checkpoint from which the training starts.
        threads (int, optional): Number of CPU threads, for several trainings in parallel. The output is then written
            to ``output.log`` in ``work_dir``. By default, PyTorch chooses the number, and the output is printed.

    Returns:
        dict[str, float]: The metrics by their names in the summary, and ``seconds``.

    Raises:
        RuntimeError: If the training fails.
    """
    work_dir = Path(work_dir)
    overrides = {key: _command_line_value(value) for key, value in (options or {}).items()}
    work_dir.mkdir(parents=True, exist_ok=True)
    record_file = work_dir / 'run.json'
    fingerprint = _fingerprint(task, data, overrides, pretrained)
    record = json.loads(record_file.read_text()) if record_file.is_file() else {}
    checkpoint = last_checkpoint(work_dir)
    checkpoint_lost = 'metrics' in record and checkpoint is None
    if (record or checkpoint) and (record.get('fingerprint') != fingerprint or checkpoint_lost):
        kept = work_dir.with_name(f'{work_dir.name}.{time.strftime("%Y%m%d-%H%M%S")}')
        work_dir.rename(kept)
        work_dir.mkdir()
        console.print(
            f'{task.name}: config, weights or data have changed, or the checkpoint is missing. The training starts '
            f'again; the earlier run is kept in {kept}',
            markup=False,
        )
        record, checkpoint = {}, None
    if 'metrics' in record:
        console.print(f'{task.name}: already finished')
        return dict(record['metrics'], seconds=record['seconds'])

    record = dict(fingerprint=fingerprint, seconds=record.get('seconds', 0.0))
    start = time.time()
    try:
        write_json(record_file, record)
        logged = _train_and_evaluate(task, work_dir, checkpoint, overrides, threads)
    except subprocess.CalledProcessError as error:
        code = error.returncode
        outcome = f'failed with exit code {code}' if code > 0 else f'was ended by signal {-code}'
        raise RuntimeError(f'{task.name} {outcome}: see its log in {work_dir}') from error
    finally:
        record['seconds'] = round(record['seconds'] + time.time() - start, 1)
        write_json(record_file, record)
    record['metrics'] = {name: round(logged[key] * scale, 4) for key, (name, scale) in task.metrics.items()}
    write_json(record_file, record)
    return dict(record['metrics'], seconds=record['seconds'])


def _train_and_evaluate(task, work_dir, checkpoint, overrides, threads):
    """Run ``tools/train.py``, and ``tools/test.py`` if the training logged no evaluation. Return the logged metrics."""
    log = work_dir / 'output.log' if threads else None
    common = [str(task.config_file), '--work-dir', str(work_dir)]
    resume = ['--resume', str(checkpoint)] if checkpoint else []
    changes = ['--cfg-options', *(f'{key}={value}' for key, value in overrides.items())] if overrides else []
    _run_tool('train.py', *common, *resume, *changes, log=log, threads=threads)
    logged = _logged_metrics(task, work_dir)
    if logged:
        return logged
    # If a run is interrupted after its last checkpoint and before its evaluation, the resumed run has no iterations
    # left and ends without an evaluation.
    metrics_file = work_dir / 'metrics.json'
    checkpoint = str(last_checkpoint(work_dir))
    _run_tool('test.py', *common, checkpoint, '--json', str(metrics_file), *changes, log=log, threads=threads)
    return json.loads(metrics_file.read_text())


def _command_line_value(value):
    """Format a value for ``--cfg-options``, which splits at spaces."""
    return str(value) if isinstance(value, (str, Path)) else str(value).replace(' ', '')


def _run_tool(name, *arguments, log, threads):
    command = [sys.executable, str(ROOT / 'tools' / name), *arguments]
    # `projects` and `soft_mm` must be imported from this repository, whatever the current directory is.
    paths = [str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(paths))
    options = dict(pass_fds=files) if (files := inherited_files()) else {}
    if log is None:
        subprocess.run(command, check=True, env=environment, **options)
        return
    environment['OMP_NUM_THREADS'] = str(threads)
    with open(log, 'a') as file:
        subprocess.run(command, check=True, stdout=file, stderr=subprocess.STDOUT, env=environment, **options)


def _fingerprint(task, data, overrides, pretrained):
    """Hash everything that the result of a run depends on: config, overrides, data and pretrained weights."""
    digest = hashlib.sha256(read_config(task.config_file).pretty_text.encode())
    digest.update(json.dumps(overrides, sort_keys=True).encode())
    digest.update(Path(data).read_bytes())
    if pretrained:
        digest.update(pretrained.read_bytes())
    return digest.hexdigest()


def _logged_metrics(task, work_dir):
    """Return the last evaluation in the logs of the training, or None."""
    records = [record for record in read_scalars(work_dir) if all(name in record for name in task.metrics)]
    return records[-1] if records else None
