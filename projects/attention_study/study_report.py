"""Write the results of a study as JSON, as Markdown tables and as a figure."""

import statistics

from soft_mm.utils import make_figure, write_json, write_text


def write_report(report, work_dir):
    """Write ``comparison.json``, ``comparison.md`` and ``comparison.png``.

    Args:
        report (dict): Report of :func:`~projects.attention_study.compare.compare_attention`.
        work_dir (Path): Folder of the files.
    """
    write_json(work_dir / 'comparison.json', report)
    write_text(work_dir / 'comparison.md', markdown(report))
    draw_comparison(report, work_dir / 'comparison.png')


def summarise_runs(runs):
    """Summarise the accuracy over the seeds.

    Args:
        runs (list[dict]): One run per seed, with ``top1``.

    Returns:
        dict[str, float]: ``mean``, and the extremes ``low`` and ``high``.
    """
    values = [run['top1'] for run in runs]
    return dict(mean=statistics.mean(values), low=min(values), high=max(values))


def markdown(report):
    """Format a report as Markdown, with one table per group.

    Args:
        report (dict): Report of :func:`~projects.attention_study.compare.compare_attention`.

    Returns:
        str: Markdown text.
    """
    names = list(report['cases'])
    seeds = len(report['cases'][names[0]]['runs'])
    unit = 'images' if report['size'][0] > 1 else 'sequences'
    size = '{}x{}'.format(*report['size']) if unit == 'images' else f'{report["size"][1]} tokens'
    lines = [
        f'# {report["study"]}',
        '',
        f'Costs are measured for the backbone at {size} and batch {report["batch_size"]}, with '
        f'{report["machine"]["threads"]} threads. Training is one forward and backward. "Time" is relative to '
        f'{names[0]}, measured alternately with it, with quartiles. Compare rows by "time", because {unit}/s were '
        f'measured at different times. Multiply-adds are for one forward pass. Top-1 is the mean over {seeds} '
        f'seed{"s" * (seeds > 1)}, with the lowest and the highest value.',
    ]
    if report['quick']:
        lines += ['', '**Quick test: these accuracies are meaningless.**']
    for title, group in report['groups'].items():
        lines += [
            '',
            f'| {title} | parameters | multiply-adds | training memory | training, {unit}/s | time | '
            f'inference, {unit}/s | time | top-1 |',
            '|---' + '|---:' * 8 + '|',
        ]
        lines += [_row(name, report['cases'][name]) for name in group]
    return '\n'.join(lines) + '\n'


def _row(name, case):
    def speed(phase):
        return '{median:.0f} ({low:.0f}-{high:.0f})'.format(**case[f'{phase}_images_per_second'])

    def ratio(phase):
        return '{median:.2f} ({low:.2f}-{high:.2f})'.format(**case[f'{phase}_time_ratio'])

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
    """Draw the accuracy of every seed and the mean over the seeds, one panel per group.

    Args:
        report (dict): Report of :func:`~projects.attention_study.compare.compare_attention`.
        path (str | Path): Image file to write.
    """
    columns = min(len(report['groups']), 2)
    rows = -(-len(report['groups']) // columns)
    figure, axes = make_figure(rows, columns, (6 * columns, 3 * rows))
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
