"""Write the model zoo tables of the READMEs from the metafiles. Run it from the repository root."""

import argparse
import sys
from pathlib import Path

import yaml

from soft_mm.complexity import config_complexity
from soft_mm.utils import write_text

ROOT = Path(__file__).resolve().parents[1]
INDEX = 'model-index.yml'
# Metafiles that the model index does not import, because the wheel does not carry the projects.
PROJECTS = 'projects/*/metafile.yml'
PUBLISHED = ' (published by the authors, not reproduced)'
ARCHS = ('tiny', 'small', 'medium', 'large', 'huge')
BEGIN, END = '<!-- model zoo: written by .dev_scripts/model_zoo.py -->', '<!-- end of model zoo -->'
HEADINGS = dict(
    en='| arch | parameters | multiply-adds, 224x224 | ImageNet top-1, plain / norm | RetinaNet box AP '
    '| Mask R-CNN box / mask AP | UperNet mIoU |',
    zh='| 结构 | 参数量 | 乘加数（224x224） | ImageNet top-1（普通 / 归一化） | RetinaNet 检测框 AP '
    '| Mask R-CNN 检测框 / 掩码 AP | UperNet mIoU |',
)


def read_metafiles(root):
    """Read the metafiles of the model index and of the projects.

    Args:
        root (Path): The repository.

    Returns:
        dict[Path, dict]: Content of each metafile.
    """
    index = yaml.safe_load((root / INDEX).read_text(encoding='utf-8'))
    files = [*(root / name for name in index['Import']), *sorted(root.glob(PROJECTS))]
    return {file: yaml.safe_load(file.read_text(encoding='utf-8')) for file in files}


def write_measured(root):
    """Count parameters and multiply-adds of every model, and write them into the metafiles.

    Args:
        root (Path): The repository.
    """
    for file, content in read_metafiles(root).items():
        for model in content['Models']:
            model['Metadata'].update(measure(root, model))
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
        write_text(file, text)


def measure(root, model):
    """Count the parameters and multiply-adds of one model, for one forward at its input size.

    Args:
        root (Path): The repository.
        model (dict): Entry of a metafile.

    Returns:
        dict[str, int]: ``Parameters``, and ``FLOPs``: the toolboxes' name for multiply-adds.
    """
    whole = config_complexity(root / model['Config'], tuple(model['Metadata']['Input Size']))[-1]
    return dict(Parameters=whole.parameters, FLOPs=whole.multiply_adds)


def tables(root):
    """Format the tables of all READMEs.

    Args:
        root (Path): The repository.

    Returns:
        dict[Path, str]: Table of each README.
    """
    metafiles = read_metafiles(root)
    out = {}
    for file, content in metafiles.items():
        folder = file.parent
        links = {model['Name']: (root / model['Config']).relative_to(folder).as_posix() for model in content['Models']}
        out[folder / 'README.md'] = _folder_table(content['Models'], links)
    models = {model['Name']: model for content in metafiles.values() for model in content['Models']}
    for language, file in (('en', root / 'README.md'), ('zh', root / 'README_zh-CN.md')):
        out[file] = _zoo_table(models, HEADINGS[language])
    return out


def replace_table(text, table, file):
    """Replace the table between the two marker lines of a README.

    Args:
        text (str): The README.
        table (str): The new table.
        file (Path): Path of the README, for the error.

    Returns:
        str: The README with the new table.

    Raises:
        ValueError: If a marker is missing or repeated.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f'{file}: expected the lines {BEGIN} and {END} exactly once each')
    before, rest = text.split(BEGIN)
    return f'{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}'


def stale_readmes(root, write):
    """Find the READMEs whose table differs from the metafiles.

    Args:
        root (Path): The repository.
        write (bool): Whether to write the correct tables.

    Returns:
        list[Path]: READMEs that differed.
    """
    stale = []
    for file, table in tables(root).items():
        text = file.read_text(encoding='utf-8')
        new = replace_table(text, table, file)
        if new != text:
            stale.append(file)
            if write:
                write_text(file, new)
    return stale


def _published(model):
    """Return the metrics of a model that the authors published, with short names."""
    results = model.get('Results') or []
    return {
        key.removesuffix(PUBLISHED): value
        for result in results
        for key, value in result['Metrics'].items()
        if key.endswith(PUBLISHED)
    }


def _folder_table(models, links):
    rows = ['| config | parameters | multiply-adds | published by the authors, not reproduced |', '|---|---|---|---|']
    for model in models:
        name, data = model['Name'], model['Metadata']
        size = 'x'.join(map(str, data['Input Size']))
        published = ', '.join(f'{key} {value}' for key, value in _published(model).items())
        rows.append(
            f'| [{name}]({links[name]}) | {data["Parameters"] / 1e6:.2f} M | {data["FLOPs"] / 1e9:.1f} G at {size} '
            f'| {published or "-"} |'
        )
    return '\n'.join(rows)


def _zoo_table(models, heading):
    def found(start, arch, *metrics):
        model = next((model for name, model in models.items() if name.startswith(start.format(arch))), None)
        published = _published(model) if model else {}
        return ' / '.join(str(published[metric]) for metric in metrics) if published else '-'

    rows = [heading, '|' + '---|' * (heading.count('|') - 1)]
    for arch in ARCHS:
        name = next(name for name in models if name.startswith(f'soft-{arch}-norm_') and name.endswith('_in1k'))
        data = models[name]['Metadata']
        cells = [
            arch,
            f'{data["Parameters"] / 1e6:.1f} M',
            f'{data["FLOPs"] / 1e9:.1f} G',
            f'{found("soft-{}_8xb", arch, "top-1")} / {found("soft-{}-norm_8xb", arch, "top-1")}',
            found('retinanet_soft-{}-norm_fpn_1x', arch, 'box AP'),
            found('mask-rcnn_soft-{}-norm_fpn_1x', arch, 'box AP', 'mask AP'),
            found('upernet_soft-{}-norm_8xb2-160k_ade20k', arch, 'mIoU'),
        ]
        rows.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        '--measure', action='store_true', help='count parameters and multiply-adds again and update the metafiles'
    )
    choice.add_argument(
        '--check', action='store_true', help='write nothing; exit with an error if a table differs from its metafile'
    )
    args = parser.parse_args()
    if args.measure:
        write_measured(ROOT)
    stale = [str(file.relative_to(ROOT)) for file in stale_readmes(ROOT, write=not args.check)]
    if args.check and stale:
        sys.exit(f'outdated tables: {", ".join(stale)}; run python .dev_scripts/model_zoo.py')
    print(f'{"written" if stale else "up to date"}{": " * bool(stale)}{", ".join(stale)}')


if __name__ == '__main__':
    main()
