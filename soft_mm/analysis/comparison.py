"""Attentions and their options on one small model: what each costs and how well it learns, under one budget.

A study trains every case with every seed by ``tools/train.py`` and measures what it costs by a token sweep. What is
finished is not done again, what was interrupted is resumed.
"""

import hashlib
import json
import os
import statistics
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from soft_mm.files import write_json, write_text

from .contenders import Contender
from .studies import QUICK, SEED, STUDIES
from .sweep import SweepOptions, machine, run_sweep
from .training import train_task

SEEDS = (0, 1, 2)
QUICK_SEEDS = (0,)


def compare_attention(study, groups=None, seeds=None, quick=False, jobs=None, work_dir=None, console=None):
    """Train and measure the cases of a study, and write ``comparison.json``, ``.md`` and ``.png``.

    They are written anew after every seed.

    Args:
        study (str): key of :data:`STUDIES`.
        groups (Sequence[str] | None): titles of the tables to fill. Defaults to None, all.
        seeds (Sequence[int] | None): every case is trained with each; a seed stands for weights and training data.
            Defaults to None, :data:`SEEDS`, and one where the quick form is asked for.
        quick (bool): a few iterations on a few samples, to see that everything runs. Defaults to False.
        jobs (int | None): trainings at a time, which share the processors. Defaults to None, one a processor, and one
            on a GPU.
        work_dir (str | Path | None): folder of trainings and results. Defaults to ``work_dirs/attention`` and the name
            of the study in it, with ``_quick`` where that is asked for.
        console (Console | None): where progress is shown. Defaults to a new one.

    Returns:
        dict: the report, as in ``comparison.json``.

    Raises:
        RuntimeError: if a training fails, or a measurement.
        ValueError: for an unknown study or group, for none, for no seed or one given twice, or for no job.
    """
    study, groups = _select(study, groups)
    if quick:
        study = replace(study, batch_size=1)
    seeds = (QUICK_SEEDS if quick else SEEDS) if seeds is None else seeds
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f'seeds={list(seeds)}: give at least one, and each once')
    jobs = jobs if jobs is not None else 1 if _device() == 'cuda' else len(os.sched_getaffinity(0))
    if jobs < 1:
        raise ValueError(f'jobs={jobs} must be 1 or more')
    console = console or Console()
    work_dir = Path(work_dir or Path('work_dirs/attention', study.name + '_quick' * quick))
    work_dir.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    console.rule(f'{study.name}: costs of {len(names)} cases')
    # What the quick form measures means nothing, so it may do so at once.
    costs = _measure_costs(study, names, quick, jobs if quick else 1, work_dir / 'costs.json', console)
    report = dict(
        study=study.name,
        quick=quick,
        machine=machine(_device()),
        size=list(study.size),
        batch_size=study.batch_size,
        groups={title: list(group) for title, group in groups.items()},
        cases={name: dict(options=study.cases[name], **costs[name], runs=[]) for name in names},
    )
    # All cases of a seed before the next one, so that what was interrupted holds whole comparisons.
    for seed in seeds:
        console.rule(f'{study.name}: data of seed {seed}')
        data = study.prepare(seed, quick)
        console.rule(f'{study.name}: {len(names)} cases with seed {seed}')
        for name, run in _train_cases(study, names, seed, data, quick, jobs, work_dir, console).items():
            case = report['cases'][name]
            case['runs'].append(run)
            case['top1'] = summarise_runs(case['runs'])
        _write_report(report, work_dir)
    console.print(markdown(report), markup=False, soft_wrap=True)
    return report


def _select(name, groups):
    if name not in STUDIES:
        raise ValueError(f'study {name!r} is unknown; choose one of {list(STUDIES)}')
    study = STUDIES[name]
    if groups is not None and (not groups or set(groups) - set(study.groups)):
        raise ValueError(f'groups={list(groups)}: choose one or more of {list(study.groups)}')
    return study, {title: group for title, group in study.groups.items() if groups is None or title in groups}


def _device():
    return 'cuda' if torch.cuda.is_available() else 'cpu'


def _backbone_config(study, case, measured=False):
    """The backbone of a case with its scope, for a registry without a default one."""
    config = Config(dict(Config.fromfile(study.task.config_file).model.backbone))
    config.merge_from_dict(_with_seed(case, 0) | (study.cost_options if measured else {}))
    return config.to_dict()


def _with_seed(case, seed):
    return {key: seed if value is SEED else value for key, value in case.items()}


def _measure_costs(study, names, quick, jobs, file, console):
    """Parameters, multiply-adds, memory and speed of each case; those measured before are read from the file."""
    options = SweepOptions(
        batch_size=study.batch_size, device=_device(), repeats=2 if quick else 7, seconds=2.0 if quick else 10.0
    )
    known = json.loads(file.read_text()) if file.is_file() else {}
    contenders = {
        name: Contender(name, name, 'backbone', _backbone_config(study, study.cases[name], True)) for name in names
    }
    peer = contenders[names[0]]
    settings = [machine(options.device), asdict(options), study.size, peer.config]
    keys = {
        name: hashlib.sha256(json.dumps([settings, contender.config], sort_keys=True).encode()).hexdigest()
        for name, contender in contenders.items()
    }
    with _progress(console) as progress, ThreadPoolExecutor(jobs) as pool:
        missing = [name for name in names if keys[name] not in known]
        bar = progress.add_task('costs', total=len(missing))
        found = pool.map(lambda name: _measure_cost(study, name, contenders[name], peer, options), missing)
        for name, cost in zip(missing, found):
            known[keys[name]] = cost
            write_json(file, known)
            progress.advance(bar)
    return {name: known[keys[name]] for name in names}


def _measure_cost(study, name, contender, peer, options):
    def measure(**changes):
        # Its progress would be that of one point.
        (row,) = run_sweep([contender], [study.size], replace(options, **changes), peer, Console(quiet=True))
        # A peer that fails leaves no ratio.
        if row['status'] != 'ok' or (contender != peer and 'ratio' not in row) or row['multiply_adds'] is None:
            raise RuntimeError(f'{name} could not be measured: {row.get("message", row)}')
        return row

    def speed(row):
        # The lower quartile of the time is the upper one of the speed.
        turned = dict(median='median', low='high', high='low')
        return {key: options.batch_size / row['seconds'][other] for key, other in turned.items()}

    training, inference = measure(train=True), measure(memory=False)
    itself = dict(median=1.0, low=1.0, high=1.0)
    with DefaultScope.overwrite_default_scope('mmengine'):
        model = MODELS.build(_backbone_config(study, study.cases[name]))
    return dict(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        multiply_adds=inference['multiply_adds'] // options.batch_size,
        training_bytes=training['bytes'],
        training_images_per_second=speed(training),
        training_time_ratio=training.get('ratio', itself),
        inference_images_per_second=speed(inference),
        inference_time_ratio=inference.get('ratio', itself),
    )


def _progress(console):
    columns = (TextColumn('{task.description}'), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def _train_cases(study, names, seed, data, quick, jobs, work_dir, console):
    threads = max(torch.get_num_threads() // jobs, 1)
    given, manifest = data
    results = {}

    def train(name):
        options = {f'model.backbone.{key}': value for key, value in _with_seed(study.cases[name], seed).items()}
        options |= {'randomness.seed': seed, **given, **(QUICK if quick else {})}
        slug = ''.join(letter if letter.isalnum() else '-' for letter in name)
        run = replace(study.task, name=f'{name}, seed {seed}')
        folder = work_dir / slug / f'seed-{seed}'
        return name, dict(seed=seed, **train_task(run, folder, manifest, console, options, threads=threads))

    with _progress(console) as progress, ThreadPoolExecutor(jobs) as pool:
        bar = progress.add_task('trainings', total=len(names))
        try:
            for future in as_completed([pool.submit(train, name) for name in names]):
                name, results[name] = future.result()
                console.print(f'{name}, seed {seed}: top-1 {results[name]["top1"]:.3f}')
                progress.advance(bar)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {name: results[name] for name in names}


def _write_report(report, work_dir):
    write_json(work_dir / 'comparison.json', report)
    write_text(work_dir / 'comparison.md', markdown(report))
    draw_comparison(report, work_dir / 'comparison.png')


def summarise_runs(runs):
    """Mean and extremes of ``top1`` over the seeds."""
    values = [run['top1'] for run in runs]
    return dict(mean=statistics.mean(values), low=min(values), high=max(values))


def markdown(report):
    """The tables of a report, one a group, as Markdown."""
    names = list(report['cases'])
    seeds = len(report['cases'][names[0]]['runs'])
    unit = 'images' if report['size'][0] > 1 else 'sequences'
    size = '{}x{}'.format(*report['size']) if unit == 'images' else f'{report["size"][1]} tokens'
    lines = [
        f'# {report["study"]}',
        '',
        f'Costs are those of the backbone at {size} and batch {report["batch_size"]}, with '
        f'{report["machine"]["threads"]} threads: training is forward and backward, times are multiples of that of '
        f'{names[0]}, measured in turns with it, with quartiles. Compare lines by these: {unit}/s are of different '
        'minutes. Multiply-adds are of one forward. Top-1 is the mean of '
        f'{seeds} seed{"s" * (seeds > 1)}, with the lowest and the highest.',
    ]
    if report['quick']:
        lines += ['', '**The quick form: these accuracies mean nothing.**']
    for title, group in report['groups'].items():
        lines += [
            '',
            f'| {title} | parameters | multiply-adds | training memory | training, {unit}/s | time | '
            f'inference, {unit}/s | time | top-1 |',
            '|---' + '|---:' * 8 + '|',
        ]
        lines += [_line(name, report['cases'][name]) for name in group]
    return '\n'.join(lines) + '\n'


def _line(name, case):
    def speed(which):
        return '{median:.0f} ({low:.0f}-{high:.0f})'.format(**case[f'{which}_images_per_second'])

    def ratio(which):
        return '{median:.2f} ({low:.2f}-{high:.2f})'.format(**case[f'{which}_time_ratio'])

    cells = (
        name,
        f'{case["parameters"] / 1e6:.3f} M',
        f'{case["multiply_adds"] / 1e6:.1f} M',
        f'{case["training_bytes"] / 2**20:.0f} MiB',
        speed('training'),
        ratio('training'),
        speed('inference'),
        ratio('inference'),
        '{mean:.3f} ({low:.3f}-{high:.3f})'.format(**case['top1']),
    )
    return f'| {" | ".join(cells)} |'


def draw_comparison(report, path):
    """Draw the accuracy of every seed, one panel a group, with the mean as a bar across.

    Args:
        report (dict): of :func:`compare_attention`.
        path (str | Path): picture to write.
    """
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    columns = min(len(report['groups']), 2)
    rows = -(-len(report['groups']) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6 * columns, 3 * rows), squeeze=False, layout='constrained')
    for axis in axes.flat[len(report['groups']) :]:
        axis.set_axis_off()
    for axis, (title, names) in zip(axes.flat, report['groups'].items()):
        for place, name in enumerate(names):
            values = [run['top1'] for run in report['cases'][name]['runs']]
            axis.plot(values, [place] * len(values), 'o', alpha=0.6)
            axis.plot(report['cases'][name]['top1']['mean'], place, '|', color='black', markersize=16)
        axis.set(title=title, xlabel='top-1', yticks=range(len(names)), yticklabels=names)
        axis.invert_yaxis()
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
