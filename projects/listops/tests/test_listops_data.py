"""Tests of the ListOps data: the rule (with an independent evaluator and probabilities), the files, the data set."""

import json
import runpy
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS

from projects.listops import ListOps, listops_data
from projects.listops.listops_data import MANIFEST, VOCABULARY, generate_samples, tokenize, write_listops

SMALL = dict(num_train=60, num_val=20, num_test=20, min_length=8, max_length=40)
UNLIMITED = dict(min_length=0, max_length=10**9)
VALUES = {
    '[MIN': min,
    '[MAX': max,
    '[MED': lambda arguments: int(np.median(arguments)),
    '[SM': lambda arguments: sum(arguments) % 10,
}


def parse(source):
    """Parse a source to a tree: a digit, or a pair of an operator and its arguments."""
    left = source.split()[::-1]

    def node():
        token = left.pop()
        if token.isdigit():
            return int(token)
        arguments = []
        while left[-1] != ']':
            arguments.append(node())
        left.pop()
        return token, arguments

    tree = node()
    assert not left
    return tree


def value(tree):
    return tree if isinstance(tree, int) else VALUES[tree[0]]([value(argument) for argument in tree[1]])


def nodes(tree, depth=1):
    """Yield every node of a tree with its depth."""
    yield tree, depth
    for argument in () if isinstance(tree, int) else tree[1]:
        yield from nodes(argument, depth + 1)


def bracketed(tree):
    """Write a tree as Long Range Arena does: the arguments and the end join the operator one by one, in brackets."""
    if isinstance(tree, int):
        return str(tree)
    text = tree[0]
    for part in [*map(bracketed, tree[1]), ']']:
        text = f'( {text} {part} )'
    return text


def text(tokens):
    return ' '.join(VOCABULARY[token] for token in tokens)


def draw(number, **options):
    # Bounded, so that the test ends if the generator yields nothing.
    drawn = islice(generate_samples(np.random.default_rng(0), **options), 2 * number + 1000)
    samples = [sample for sample in drawn if sample is not None][:number]
    assert len(samples) == number
    return samples


def read(folder, split):
    header, *lines = (folder / f'basic_{split}.tsv').read_text().splitlines()
    assert header == 'Source\tTarget'
    return lines


def snapshot(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp('data') / 'listops'
    assert write_listops(out, **SMALL) is True
    return out


@pytest.mark.parametrize(
    ('number', 'options'),
    [
        (1500, dict(min_length=16, max_length=64, max_depth=10, max_args=10)),
        (300, dict(min_length=5, max_length=30, max_depth=3, max_args=4)),
        (40, dict(min_length=500, max_length=2000, max_depth=10, max_args=10)),
        (300, dict(min_length=0, max_length=2, max_depth=1, max_args=2)),
    ],
)
def test_samples_follow_the_rule(number, options):
    found = set()
    for tokens, digit in draw(number, **options):
        assert options['min_length'] < len(tokens) < options['max_length'] and tokens.dtype == np.uint8
        tree = parse(text(tokens))
        assert digit == value(tree)
        for node, depth in nodes(tree):
            assert depth <= options['max_depth']
            if not isinstance(node, int):
                assert 2 <= len(node[1]) <= options['max_args']
                found.add(node[0])
    assert found == (set(VALUES) if options['max_depth'] > 1 else set())


def assert_frequencies(counts, probabilities):
    """Assert that counts lie within five standard deviations of a multinomial."""
    total = sum(counts.values())
    assert set(counts) <= set(probabilities)
    for key, probability in probabilities.items():
        deviation = (total * probability * (1 - probability)) ** 0.5
        assert abs(counts[key] - total * probability) < 5 * deviation + 1, key


def test_probabilities_of_the_rule():
    max_depth, max_args = 4, 6
    trees = [parse(text(tokens)) for tokens, _ in draw(8000, **UNLIMITED, max_depth=max_depth, max_args=max_args)]
    counts = {name: Counter() for name in ('kind', 'digit', 'operator', 'arguments', 'deepest')}
    for tree in trees:
        for node, depth in nodes(tree):
            digit = isinstance(node, int)
            counts['kind' if depth < max_depth else 'deepest'][digit] += 1
            counts['digit' if digit else 'operator'][node if digit else node[0]] += 1
            if not digit:
                counts['arguments'][len(node[1])] += 1
    assert set(counts['deepest']) == {True}
    assert_frequencies(counts['kind'], {True: 0.75, False: 0.25})
    assert_frequencies(counts['digit'], dict.fromkeys(range(10), 0.1))
    assert_frequencies(counts['operator'], dict.fromkeys(VALUES, 0.25))
    assert_frequencies(counts['arguments'], dict.fromkeys(range(2, max_args + 1), 1 / (max_args - 1)))


def length_probabilities(bound, max_depth, max_args):
    """Compute the probability of every length below a bound, by convolutions from the deepest nodes up."""
    lengths = np.zeros(bound)
    lengths[1] = 1
    for _ in range(max_depth - 1):
        together, deeper = lengths, np.zeros(bound)
        for _ in range(2, max_args + 1):
            together = np.convolve(together, lengths)[:bound]
            deeper[2:] += together[:-2] * 0.25 / (max_args - 1)
        deeper[1] += 0.75
        lengths = deeper
    return lengths


@pytest.mark.parametrize('shape', [dict(max_depth=10, max_args=10), dict(max_depth=3, max_args=3)])
def test_dropping_trees_early_keeps_the_distribution_of_lengths(shape):
    bounds = dict(min_length=3, max_length=18)
    counts = Counter(len(tokens) for tokens, _ in draw(20000, **bounds, **shape))
    probabilities = length_probabilities(18, **shape)[4:]
    probabilities /= probabilities.sum()
    assert_frequencies(counts, {4 + index: probability for index, probability in enumerate(probabilities)})


def test_arguments_are_laid_out_in_order():
    tokens = tokenize('[MAX 2 9 [MIN 4 7 ] 0 ]')
    assert tokens.dtype == np.int64 and text(tokens) == '[MAX 2 9 [MIN 4 7 ] 0 ]'
    assert tokens.tolist() == [12, 3, 10, 11, 5, 8, 15, 1, 15] and VOCABULARY[0] not in text(range(1, 16))


def test_files(folder):
    lines = {split: read(folder, split) for split in ('train', 'val', 'test')}
    assert [len(found) for found in lines.values()] == [60, 20, 20]
    sources = {line.split('\t')[0] for found in lines.values() for line in found}
    assert len(sources) == 100
    for line in sum(lines.values(), []):
        source, target = line.split('\t')
        assert int(target) == value(parse(source)) and 8 < len(source.split()) < 40
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest['complete'] is True and manifest['options'] == dict(SMALL, max_depth=10, max_args=10, seed=0)
    assert set(path.name for path in folder.iterdir()) == {MANIFEST, *(f'basic_{split}.tsv' for split in lines)}


def test_samples_depend_only_on_seed_split_and_options(folder, tmp_path):
    write_listops(tmp_path / 'again', **SMALL)
    write_listops(tmp_path / 'other', **SMALL, seed=1)
    write_listops(tmp_path / 'longer', **dict(SMALL, num_train=300))
    for split in ('train', 'val', 'test'):
        lines = read(folder, split)
        assert read(tmp_path / 'again', split) == lines and read(tmp_path / 'other', split) != lines
        assert read(tmp_path / 'longer', split)[: len(lines)] == lines


def test_splits_are_disjoint_with_few_different_sequences(tmp_path):
    """There are only 400 different sequences of four tokens."""
    few = dict(num_train=350, num_val=25, num_test=25, min_length=3, max_length=5, max_args=2)
    write_listops(tmp_path, **few)
    sources = [line.split('\t')[0] for split in ('train', 'val', 'test') for line in read(tmp_path, split)]
    assert len(set(sources)) == len(sources) == 400
    with pytest.raises(ValueError, match='after 400 were found: request fewer samples'):
        write_listops(tmp_path / 'more', **dict(few, num_train=351))
    assert sorted(path.name for path in (tmp_path / 'more').glob('*.tsv')) == ['basic_test.tsv', 'basic_val.tsv']


def test_complete_folder_is_left_unchanged(folder):
    before = snapshot(folder)
    assert write_listops(folder, **SMALL) is False
    with pytest.raises(ValueError, match="is complete with the options .*'max_length': 40.*'max_length': 41"):
        write_listops(folder, **dict(SMALL, max_length=41))
    assert snapshot(folder) == before


def test_foreign_folders_are_refused(tmp_path):
    (tmp_path / 'basic_train.tsv').write_text('mine')
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match='nothing was written'):
        write_listops(tmp_path, **SMALL)
    assert snapshot(tmp_path) == before
    (tmp_path / MANIFEST).write_text('{"name": "something else"}')
    with pytest.raises(FileExistsError, match='nothing was written'):
        write_listops(tmp_path, **SMALL)
    with pytest.raises(FileExistsError, match='not a folder'):
        write_listops(tmp_path / MANIFEST, **SMALL)


def test_interrupted_run_is_completed(folder, tmp_path, monkeypatch):
    def interrupted(samples, number, seen):
        yield next(samples)
        raise KeyboardInterrupt

    monkeypatch.setattr(listops_data, '_distinct', interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_listops(tmp_path, **dict(SMALL, seed=5))
    assert json.loads((tmp_path / MANIFEST).read_text())['complete'] is False
    assert not list(tmp_path.glob('*.tsv'))
    monkeypatch.undo()
    assert write_listops(tmp_path, **SMALL) is True
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in folder.iterdir()}
    assert write_listops(tmp_path, **SMALL) is False


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(num_train=0), 'num_train=0: expected an integer >= 1'),
        (dict(num_val=1.5), 'num_val=1.5'),
        (dict(num_test=True), 'num_test=True'),
        (dict(min_length=-1), 'min_length=-1'),
        (dict(max_args=1), 'max_args=1: expected an integer >= 2'),
        (dict(max_depth=0), 'max_depth=0'),
        (dict(seed=-1), 'seed=-1'),
        (dict(max_length=9), 'more than min_length=8 and fewer than max_length=9'),
        (dict(max_depth=2, max_args=6), 'with max_depth=2 and max_args=6'),
    ],
)
def test_bad_options_touch_nothing(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write_listops(tmp_path / 'new', **(SMALL | options))
    assert not (tmp_path / 'new').exists()


def test_data_set(folder):
    dataset = DATASETS.build(dict(type='ListOps', data_root=str(folder), ann_file='basic_val.tsv'))
    lines = read(folder, 'val')
    assert len(dataset) == len(lines) and dataset.metainfo['classes'] == tuple('0123456789')
    for index, line in enumerate(lines):
        data = dataset[index]
        assert set(data) == {'tokens', 'gt_label', 'sample_idx'} and data['sample_idx'] == index
        assert data['tokens'].dtype == np.int64 and f'{text(data["tokens"])}\t{data["gt_label"]}' == line
    part = ListOps(f'{folder}/basic_val.tsv', indices=[7, 3], lazy_init=True, serialize_data=False)
    part.full_init()
    assert len(part) == 2 and text(part[0]['tokens']) == lines[7].split('\t')[0]


def test_files_of_long_range_arena_are_read(folder, tmp_path):
    assert bracketed(parse('[MAX 2 [MIN 4 7 ] ]')) == '( ( ( [MAX 2 ) ( ( ( [MIN 4 ) 7 ) ] ) ) ] )'
    pairs = [line.split('\t') for line in read(folder, 'train')]
    rows = ['Source\tTarget', *(f'{bracketed(parse(source))}\t{target}' for source, target in pairs)]
    # Line ends as written by Python's csv module.
    (tmp_path / 'basic_train.tsv').write_bytes(''.join(f'{row}\r\n' for row in rows).encode())
    ours, theirs = (ListOps('basic_train.tsv', data_root=str(root)) for root in (folder, tmp_path))
    assert len(ours) == len(theirs) == 60
    for a, b in zip(ours, theirs):
        assert a['tokens'].tolist() == b['tokens'].tolist() and a['gt_label'] == b['gt_label']


def test_pipeline_of_mmpretrain(folder, use):
    use('mmpretrain')
    plain = ListOps('basic_test.tsv', data_root=str(folder))
    packed = ListOps('basic_test.tsv', data_root=str(folder), pipeline=[dict(type='PackInputs', input_key='tokens')])
    for data, sample in zip(plain, packed):
        assert torch.equal(sample['inputs'], torch.from_numpy(data['tokens'])) and sample['inputs'].ndim == 1
        assert sample['data_samples'].gt_label.tolist() == [data['gt_label']]
        assert sample['data_samples'].sample_idx == data['sample_idx']


def test_missing_file_error_names_the_command_that_writes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=f'`python -m projects.listops.make_listops {tmp_path}`'):
        ListOps('basic_train.tsv', data_root=str(tmp_path))
    with pytest.raises(TypeError, match='split'):
        ListOps('basic_train.tsv', split='train')


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('', "basic_train.tsv is '': expected"),
        ('[MAX 2 9 ]\t9\n', r"first line of .*basic_train.tsv is '\[MAX 2 9 ]\\t9'"),
        ('Source\tTarget\n[MAX 2 9 ]\t9\n[MAX 2 9 ]\t10\n', r'basic_train.tsv, line 3: .* a tab and a digit'),
        ('Source\tTarget\n[MAX 2 9 ] 9\n', 'line 2: .* a tab and a digit'),
        ('Source\tTarget\n[MAX 2 9 ]\t\n', 'line 2: .* a tab and a digit'),
        ('Source\tTarget\n[MAX 2 <pad> ]\t2\n', "line 2: unknown token '<pad>': expected"),
        ('Source\tTarget\n[FIRST 2 9 ]\t2\n', r"line 2: unknown token '\[FIRST': expected"),
    ],
)
def test_invalid_lines_are_reported(tmp_path, content, message):
    (tmp_path / 'basic_train.tsv').write_text(content)
    with pytest.raises(ValueError, match=message):
        ListOps('basic_train.tsv', data_root=str(tmp_path))


def test_command_line(folder, tmp_path, monkeypatch, capsys):
    def run(*options):
        arguments = ['--train', '60', '--val', '20', '--test', '20', '--min-length', '8', '--max-length', '40']
        monkeypatch.setattr('sys.argv', ['make_listops.py', str(tmp_path / 'out'), *arguments, *options])
        runpy.run_module('projects.listops.make_listops', run_name='__main__')
        return capsys.readouterr().out

    assert 'written' in run()
    assert all(read(tmp_path / 'out', split) == read(folder, split) for split in ('train', 'val', 'test'))
    assert 'nothing to do' in run()
    with pytest.raises(SystemExit) as exit_info:
        run('--max-args', '4')
    assert exit_info.value.code == 2 and 'is complete with the options' in capsys.readouterr().err
