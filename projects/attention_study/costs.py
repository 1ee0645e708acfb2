"""Measure the costs of each case of a study: parameters, multiply-adds, memory and speed of its backbone."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

from rich.console import Console

from benchmarks.sweep import SweepOptions, machine, run_sweep
from benchmarks.targets import Target
from soft_mm.utils import build_model, write_json

from .studies import case_config


def measure_costs(study, names, device, quick, jobs, file, progress):
    """Measure the costs of the cases of a study. Costs in the cache are not measured again.

    Args:
        study (Study): Study of the cases.
        names (list[str]): Names of the cases. Times are compared with the first case.
        device (str): Device to measure on.
        quick (bool): Whether to measure roughly, to test that everything works.
        jobs (int): Number of measurements in parallel. More than one makes the times unreliable.
        file (Path): JSON file that serves as a cache. It is written after every case.
        progress (rich.progress.Progress): Progress bar to update.

    Returns:
        dict[str, dict]: Maps the name of a case to ``parameters``, ``multiply_adds`` (one forward pass of one sample),
            ``training_bytes``, and ``training_images_per_second``, ``training_time_ratio``,
            ``inference_images_per_second`` and ``inference_time_ratio`` with ``median``, ``low`` and ``high`` each.

    Raises:
        RuntimeError: If a measurement fails.
    """
    options = SweepOptions(
        batch_size=study.batch_size, device=device, repeats=2 if quick else 7, seconds=2.0 if quick else 10.0
    )
    known = json.loads(file.read_text()) if file.is_file() else {}
    targets = {name: _target(study, name) for name in names}
    peer = targets[names[0]]
    # A cached cost is valid only for the same machine, options and configs.
    settings = [machine(device), asdict(options), study.size, peer.config]
    keys = {
        name: hashlib.sha256(json.dumps([settings, target.config], sort_keys=True).encode()).hexdigest()
        for name, target in targets.items()
    }
    missing = [name for name in names if keys[name] not in known]
    bar = progress.add_task('costs', total=len(missing))
    with ThreadPoolExecutor(jobs) as pool:
        measured = pool.map(lambda name: _measure(targets[name], study.size, peer, options), missing)
        for name, cost in zip(missing, measured):
            known[keys[name]] = dict(parameters=_count_parameters(study, name), **cost)
            write_json(file, known)
            progress.advance(bar)
    return {name: known[keys[name]] for name in names}


def _target(study, name):
    cfg = case_config(study, study.cases[name], measured=True)
    return Target(
        name,
        'backbone',
        cfg.to_dict()['model']['backbone'],
        imports=tuple(cfg.custom_imports.imports),
    )


def _count_parameters(study, name):
    # Counted for the model that is trained, because the measured model can have more position embeddings.
    model = build_model(case_config(study, study.cases[name]), backbone_only=True)
    return sum(parameter.numel() for parameter in model.parameters())


def _measure(target, size, peer, options):
    def sweep(**changes):
        # Quiet, because a progress bar for a single point would disturb the one of the study.
        (row,) = run_sweep([target], [size], replace(options, **changes), peer, Console(quiet=True))
        # If only the measurement of the peer fails, the row has no ratio.
        if row['status'] != 'ok' or (target != peer and 'ratio' not in row) or row['multiply_adds'] is None:
            raise RuntimeError(f'{target.name} could not be measured: {row.get("message", row)}')
        return row

    def images_per_second(row):
        # The lower quartile of the time is the upper quartile of the speed.
        swapped = dict(median='median', low='high', high='low')
        return {key: options.batch_size / row['seconds'][other] for key, other in swapped.items()}

    training, inference = sweep(train=True), sweep(memory=False)
    ratio_to_itself = dict(median=1.0, low=1.0, high=1.0)
    return dict(
        multiply_adds=inference['multiply_adds'] // options.batch_size,
        training_bytes=training['bytes'],
        training_images_per_second=images_per_second(training),
        training_time_ratio=training.get('ratio', ratio_to_itself),
        inference_images_per_second=images_per_second(inference),
        inference_time_ratio=inference.get('ratio', ratio_to_itself),
    )
