"""The model zoo's tables: written from the metafiles, whose sizes and costs are measured on the configs' models."""

from pathlib import Path

import yaml

from .complexity import config_complexity

INDEX = 'model-index.yml'
PUBLISHED = ' (published by the authors, not reproduced)'
ARCHS = ('tiny', 'small', 'medium', 'large', 'huge')
_HEADINGS = dict(
    en='| arch | parameters | multiply-adds, 224x224 | ImageNet top-1, plain / norm | RetinaNet box AP '
    '| Mask R-CNN box / mask AP | UperNet mIoU |',
    zh='| 结构 | 参数量 | 乘加数(224x224) | ImageNet top-1(普通 / 归一化) | RetinaNet 检测框 AP '
    '| Mask R-CNN 检测框 / 掩码 AP | UperNet mIoU |',
)


def read_metafiles(root):
    """The metafiles that the model index imports.

    Args:
        root (Path): folder of the repository.

    Returns:
        dict[Path, dict]: file to content.
    """
    index = yaml.safe_load((root / INDEX).read_text(encoding='utf-8'))
    return {root / name: yaml.safe_load((root / name).read_text(encoding='utf-8')) for name in index['Import']}


def write_measured(root):
    """Measure parameters and multiply-adds of every model in the metafiles and write them there.

    Args:
        root (Path): folder of the repository.
    """
    for file, content in read_metafiles(root).items():
        for model in content['Models']:
            model['Metadata'].update(measure(root, model))
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
        file.write_text(text, encoding='utf-8')


def measure(root, model):
    """Parameters, and multiply-adds (the toolboxes' FLOPs) of one forward at the model's input size.

    Args:
        root (Path): folder of the repository.
        model (dict): entry of a metafile.

    Returns:
        dict[str, int]: ``Parameters`` and ``FLOPs``.
    """
    whole = config_complexity(root / model['Config'], tuple(model['Metadata']['Input Size']))[-1]
    return dict(Parameters=whole.parameters, FLOPs=whole.multiply_adds)


def tables(root):
    """The tables of the READMEs.

    Args:
        root (Path): folder of the repository.

    Returns:
        dict[Path, str]: README file to the table between its markers.
    """
    metafiles = read_metafiles(root)
    out = {file.with_name('README.md'): _folder_table(content['Models']) for file, content in metafiles.items()}
    models = {model['Name']: model for content in metafiles.values() for model in content['Models']}
    for language, file in (('en', root / 'README.md'), ('zh', root / 'README_zh-CN.md')):
        out[file] = _zoo_table(models, _HEADINGS[language])
    return out


def replace_table(text, table, file):
    """A README's text with the table between its markers replaced.

    Raises:
        ValueError: if the markers are not there once each.
    """
    begin, end = '<!-- model zoo: written by tools/make_model_zoo.py -->', '<!-- end of model zoo -->'
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f'{file} must have the lines {begin} and {end} once each')
    before, rest = text.split(begin)
    return f'{before}{begin}\n{table}\n{end}{rest.split(end)[1]}'


def stale_readmes(root, write):
    """READMEs whose table is not that of the metafiles, and with ``write`` the mending of them.

    Args:
        root (Path): folder of the repository.
        write (bool): whether to write them.

    Returns:
        list[Path]: files that were stale.
    """
    stale = []
    for file, table in tables(root).items():
        text = file.read_text(encoding='utf-8')
        new = replace_table(text, table, file)
        if new != text:
            stale.append(file)
            if write:
                file.write_text(new, encoding='utf-8')
    return stale


def _published(model):
    """Metrics of a model as the authors published them, by short names."""
    results = model.get('Results') or []
    return {
        key.removesuffix(PUBLISHED): value
        for result in results
        for key, value in result['Metrics'].items()
        if key.endswith(PUBLISHED)
    }


def _folder_table(models):
    rows = ['| config | parameters | multiply-adds | published by the authors, not reproduced |', '|---|---|---|---|']
    for model in models:
        file, data = Path(model['Config']).name, model['Metadata']
        size = 'x'.join(map(str, data['Input Size']))
        published = ', '.join(f'{key} {value}' for key, value in _published(model).items())
        rows.append(
            f'| [{model["Name"]}]({file}) | {data["Parameters"] / 1e6:.2f} M | {data["FLOPs"] / 1e9:.1f} G at {size} '
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
