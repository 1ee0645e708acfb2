"""Trainings by ``tools/train.py`` that are resumed when interrupted, and not done again when finished.

Each is a process of its own, so that each toolbox has its own default scope.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config

from soft_mm.files import write_json

from .logs import last_checkpoint, read_scalars

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Task:
    """A training.

    Attributes:
        name: what it is called.
        config: config file, below ``configs``.
        metrics: the runner's name of a metric to the summary's name and its scale to the range 0 to 1.
    """

    name: str
    config: str
    metrics: dict

    @property
    def config_file(self):
        return ROOT / 'configs' / self.config


def train_task(task, work_dir, data, console, options=None, pretrained=None, threads=None):
    """Run or resume one training and return its metrics, or return those of the finished run.

    A finished run is done again, and the earlier one kept aside, when its config, its options, its pretrained weights
    or its data have changed.

    Args:
        task (Task): what to train.
        work_dir (str | Path): folder of the run.
        data (str | Path): file that says of what the data are made, such as the manifest of an exported data set.
        console (rich.console.Console): where is said what is skipped or started over.
        options (dict | None): overrides of the config. Defaults to None.
        pretrained (Path | None): weights that the run starts from, if any. Defaults to None.
        threads (int | None): of the training, one of several at a time; what it prints then goes to ``output.log`` in
            its folder. Defaults to None, PyTorch's number, and output to the terminal.

    Returns:
        dict: the metrics by their names in ``task.metrics``, and ``seconds``.

    Raises:
        RuntimeError: if the training fails.
    """
    work_dir, options = Path(work_dir), {key: _as_argument(value) for key, value in (options or {}).items()}
    work_dir.mkdir(parents=True, exist_ok=True)
    record_file = work_dir / 'run.json'
    fingerprint = _fingerprint(task, data, options, pretrained)
    record = json.loads(record_file.read_text()) if record_file.is_file() else {}
    checkpoint = last_checkpoint(work_dir)
    lost = 'metrics' in record and checkpoint is None
    if (record or checkpoint) and (record.get('fingerprint') != fingerprint or lost):
        aside = work_dir.with_name(f'{work_dir.name}.{time.strftime("%Y%m%d-%H%M%S")}')
        work_dir.rename(aside)
        work_dir.mkdir()
        console.print(
            f'{task.name}: config, weights or data have changed, or the checkpoint is gone: starting over, '
            f'the earlier run is kept in {aside}'
        )
        record, checkpoint = {}, None
    if 'metrics' in record:
        console.print(f'{task.name}: finished already')
        return dict(record['metrics'], seconds=record['seconds'])
    record = dict(fingerprint=fingerprint, seconds=record.get('seconds', 0.0))
    start = time.time()
    log = work_dir / 'output.log' if threads else None
    try:
        write_json(record_file, record)
        common = [str(task.config_file), '--work-dir', str(work_dir)]
        resume = ['--resume', str(checkpoint)] if checkpoint else []
        overrides = ['--cfg-options', *(f'{key}={value}' for key, value in options.items())] if options else []
        _run_tool('train.py', *common, *resume, *overrides, log=log, threads=threads)
        metrics_file = work_dir / 'metrics.json'
        if _logged_metrics(task, work_dir) is None:
            # Interrupted between its last checkpoint and its evaluation, a training has nothing left to do.
            checkpoint = str(last_checkpoint(work_dir))
            _run_tool('test.py', *common, checkpoint, '--json', str(metrics_file), *overrides, log=log, threads=threads)
    except subprocess.CalledProcessError as error:
        code = error.returncode
        how = f'failed with exit code {code}' if code > 0 else f'was ended by signal {-code}'
        raise RuntimeError(f'{task.name} {how}; its log is in {work_dir}') from error
    finally:
        record['seconds'] = round(record['seconds'] + time.time() - start, 1)
        write_json(record_file, record)
    logged = _logged_metrics(task, work_dir) or json.loads(metrics_file.read_text())
    record['metrics'] = {name: round(logged[key] * scale, 4) for key, (name, scale) in task.metrics.items()}
    write_json(record_file, record)
    return dict(record['metrics'], seconds=record['seconds'])


def _as_argument(value):
    """A value as mmengine reads it from the command line, where blanks separate."""
    return value if isinstance(value, str) else str(value) if isinstance(value, Path) else str(value).replace(' ', '')


def _run_tool(name, *arguments, log, threads):
    command = [sys.executable, str(ROOT / 'tools' / name), *arguments]
    if log is None:
        subprocess.run(command, check=True)
        return
    with open(log, 'a') as file:
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
        subprocess.run(command, check=True, stdout=file, stderr=subprocess.STDOUT, env=environment)


def _fingerprint(task, data, options, pretrained):
    """What a finished run depends on: its config, the weights that it starts from and the data."""
    digest = hashlib.sha256(Config.fromfile(task.config_file).pretty_text.encode())
    digest.update(json.dumps(options, sort_keys=True).encode())
    digest.update(Path(data).read_bytes())
    if pretrained:
        digest.update(pretrained.read_bytes())
    return digest.hexdigest()


def _logged_metrics(task, work_dir):
    """The last evaluation in the logs of the trainings, or None."""
    records = [record for record in read_scalars(work_dir) if all(name in record for name in task.metrics)]
    return records[-1] if records else None
