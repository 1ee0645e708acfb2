"""Train every case of a study with every seed, measure the costs of every case, and report both.

``tools/train.py`` runs the trainings. An interrupted study is resumed, and finished trainings are not repeated.
"""

import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.sweep import machine
from projects.common.training import train_task
from soft_mm.ops.checks import check_integer

from .costs import measure_costs
from .studies import QUICK, STUDIES, with_seed
from .study_report import markdown, summarise_runs, write_report

SEEDS = (0, 1, 2)
QUICK_SEEDS = (0,)


def compare_attention(study, groups=None, seeds=None, quick=False, jobs=None, work_dir=None, console=None):
    """Train and measure the cases of a study, and write ``comparison.json``, ``.md`` and ``.png``.

    The three files are written after every seed.

    Args:
        study (str): Key of :data:`~projects.attention_study.studies.STUDIES`.
        groups (Sequence[str] | None): Titles of the tables to fill. Defaults to None: all tables.
        seeds (Sequence[int] | None): Seeds with which every case is trained. A seed determines the initial weights and
            the training data. Defaults to None: :data:`SEEDS`, or :data:`QUICK_SEEDS` with ``quick``.
        quick (bool): Whether to run only a few iterations on a few samples, to test that everything works. Defaults to
            False.
        jobs (int | None): Number of trainings in parallel. They share the CPUs. Defaults to None: one per CPU, or one
            if there is a GPU.
        work_dir (str | Path | None): Folder of the trainings and the results. Defaults to None:
            ``work_dirs/attention/<study>``, or ``work_dirs/attention/<study>_quick`` with ``quick``.
        console (Console | None): Console for messages. Defaults to None: a new one.

    Returns:
        dict: The report, which is also the content of ``comparison.json``.

    Raises:
        RuntimeError: If a training or a measurement fails.
        ValueError: If the study or a group is unknown, if groups or seeds are empty, if a seed occurs twice, if
            ``jobs`` is not an integer >= 1, or if ``work_dir`` is a file.
    """
    study, groups = _select(study, groups)
    if quick:
        study = replace(study, batch_size=1)
    seeds = (QUICK_SEEDS if quick else SEEDS) if seeds is None else seeds
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f'seeds={list(seeds)}: expected one or more different seeds')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    jobs = jobs if jobs is not None else 1 if device == 'cuda' else len(os.sched_getaffinity(0))
    check_integer('jobs', jobs)
    console = console or Console()
    work_dir = Path(work_dir or Path('work_dirs/attention', study.name + '_quick' * quick))
    if work_dir.is_file():
        raise ValueError(f'work_dir={str(work_dir)!r} is a file: expected a folder, or a new name')
    work_dir.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    console.rule(f'{study.name}: costs of {len(names)} cases')
    with _progress(console) as progress:
        # With `quick`, the costs are meaningless, so they may be measured in parallel.
        costs = measure_costs(study, names, device, quick, jobs if quick else 1, work_dir / 'costs.json', progress)
    report = dict(
        study=study.name,
        quick=quick,
        machine=machine(device),
        size=list(study.size),
        batch_size=study.batch_size,
        groups={title: list(group) for title, group in groups.items()},
        cases={name: dict(options=study.cases[name], **costs[name], runs=[]) for name in names},
    )
    # The outer loop runs over the seeds, so that an interrupted study has complete results for its first seeds.
    for seed in seeds:
        console.rule(f'{study.name}: data of seed {seed}')
        data = study.prepare(seed, quick)
        console.rule(f'{study.name}: {len(names)} cases with seed {seed}')
        for name, run in _train_cases(study, names, seed, data, quick, jobs, work_dir, console).items():
            case = report['cases'][name]
            case['runs'].append(run)
            case['top1'] = summarise_runs(case['runs'])
        write_report(report, work_dir)
    console.print(markdown(report), markup=False, soft_wrap=True)
    return report


def _select(name, groups):
    if name not in STUDIES:
        raise ValueError(f'study={name!r}: expected one of {list(STUDIES)}')
    study = STUDIES[name]
    if groups is not None and (not groups or set(groups) - set(study.groups)):
        raise ValueError(f'groups={list(groups)}: expected None, or one or more of {list(study.groups)}')
    return study, {title: group for title, group in study.groups.items() if groups is None or title in groups}


def _progress(console):
    columns = (TextColumn('{task.description}'), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def _train_cases(study, names, seed, data, quick, jobs, work_dir, console):
    """Train every case with one seed. Return the metrics of each case by its name."""
    threads = max(torch.get_num_threads() // jobs, 1)
    data_options, manifest = data
    results = {}

    def train(name):
        options = {f'model.backbone.{key}': value for key, value in with_seed(study.cases[name], seed).items()}
        options |= {'randomness.seed': seed, **data_options, **(QUICK if quick else {})}
        slug = ''.join(letter if letter.isalnum() else '-' for letter in name)
        task = replace(study.task, name=f'{name}, seed {seed}')
        folder = work_dir / slug / f'seed-{seed}'
        return name, dict(seed=seed, **train_task(task, folder, manifest, console, options, threads=threads))

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
