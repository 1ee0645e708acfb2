"""ListOps of Long Range Arena: generation, files, and a data set that reads them.

A sample is a sequence such as ``[MAX 2 9 [MIN 4 7 ] 0 ]`` and the digit to which it evaluates. Samples are drawn as in
Long Range Arena (arXiv:2011.04006, section 2.2.1, and its code), which follows ListOps (arXiv:1804.06028). The samples
of a split depend only on the seed and the options. No sequence occurs twice, within a split or across splits.
"""

from pathlib import Path

import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS

from projects.common.manifest import read_manifest
from soft_mm.ops.checks import check_integer
from soft_mm.utils import atomic_path, write_json

DIGITS = tuple('0123456789')
OPERATORS = ('[MIN', '[MAX', '[MED', '[SM')
END = ']'
#: Tokens by their id. Id 0 is padding and occurs in no sample.
VOCABULARY = ('<pad>', *DIGITS, *OPERATORS, END)
SPLITS = ('train', 'val', 'test')
OPERATOR_PROB = 0.25  # probability that a node above the maximum depth is an operator
MIN_ARGS = 2
MANIFEST = 'listops.json'
_NAME = 'listops'

_HEADER = 'Source\tTarget'
_IDS = {token: index for index, token in enumerate(VOCABULARY) if index}
_TREES = 4096  # number of trees per batch of the generator
# Number of batches of trees without a new sample after which generation fails.
_PATIENCE = 200


def tokenize(source):
    """Convert a source to token ids.

    Args:
        source (str): Tokens separated by spaces. Parentheses, which Long Range Arena writes around pairs, are ignored.

    Returns:
        np.ndarray: Token ids ``(n,)`` int64, see :data:`VOCABULARY`.

    Raises:
        ValueError: If a token is unknown.
    """
    tokens = source.replace('(', ' ').replace(')', ' ').split()
    try:
        return np.array([_IDS[token] for token in tokens], np.int64)
    except KeyError as error:
        raise ValueError(
            f'unknown token {error.args[0]!r}: expected {VOCABULARY[1:]}, separated by spaces, and parentheses'
        ) from None


def generate_samples(rng, min_length, max_length, max_depth, max_args):
    """Generate samples endlessly. The same sample can occur more than once.

    A tree is dropped as soon as it is certain to be too long. This does not change the distribution of the other trees.

    Args:
        rng (np.random.Generator): Random number generator.
        min_length, max_length (int): Keep only sequences with more than ``min_length`` and fewer than ``max_length``
            tokens.
        max_depth (int): Depth at which every node is a digit. The root has depth 1.
        max_args (int): Maximum number of arguments of an operator.

    Yields:
        tuple[np.ndarray, int] | None: Tokens ``(n,)`` uint8 and the digit to which they evaluate. None after each batch
            of trees, so that the caller can count batches without new samples.
    """
    while True:
        tokens, sizes, values = _assemble(rng, _grow(rng, min_length, max_length, max_depth, max_args))
        yield from zip(np.split(tokens, np.cumsum(sizes)[:-1]), values.tolist())
        yield None


def _grow(rng, min_length, max_length, max_depth, max_args):
    """Draw the shapes of a batch of trees, depth by depth, and keep the trees with an allowed length.

    Returns:
        list[np.ndarray]: For each depth, the number of arguments of every node (0 for a digit). Nodes are ordered by
            tree, then by parent.
    """
    trees, kept = np.arange(_TREES), np.ones(_TREES, bool)
    length = np.zeros(_TREES, np.int64)
    levels = []
    for depth in range(1, max_depth + 1):
        num_args = np.zeros(trees.size, np.int64)
        if depth < max_depth:
            operators = np.flatnonzero(rng.random(trees.size) < OPERATOR_PROB)
            num_args[operators] = rng.integers(MIN_ARGS, max_args + 1, operators.size)
        levels.append((trees, num_args))
        length += np.bincount(trees, 1 + (num_args > 0), _TREES).astype(np.int64)
        # Each argument of the next depth adds at least one token.
        kept &= length + np.bincount(trees, num_args, _TREES) < max_length
        trees = np.repeat(trees, num_args)
        growing = kept[trees]
        if not growing.all():
            levels = [(owners[kept[owners]], counts[kept[owners]]) for owners, counts in levels]
            trees = trees[growing]
        if not trees.size:
            break
    kept &= length > min_length
    return [counts[kept[owners]] for owners, counts in levels]


def _assemble(rng, levels):
    """Draw the digits and operators of trees, and arrange their tokens in order.

    Args:
        rng (np.random.Generator): Random number generator.
        levels (list[np.ndarray]): Shapes of the trees, see :func:`_grow`.

    Returns:
        tuple[np.ndarray, np.ndarray, np.ndarray]: The tokens of all trees, concatenated, uint8; the number of tokens of
            each tree; the digit to which each tree evaluates.
    """
    contents = [rng.integers(0, np.where(counts > 0, len(OPERATORS), len(DIGITS))) for counts in levels]
    operators = [np.flatnonzero(counts) for counts in levels]
    # From the deepest nodes up: the number of tokens and the value of every subtree.
    sizes, values = [], []
    for counts, content, nodes in zip(reversed(levels), reversed(contents), reversed(operators)):
        size, value = np.ones_like(counts), content.copy()
        if nodes.size:
            starts = np.cumsum(counts[nodes]) - counts[nodes]
            size[nodes] = 2 + np.add.reduceat(sizes[-1], starts)
            value[nodes] = _apply(content[nodes], values[-1], starts, counts[nodes])
        sizes.append(size)
        values.append(value)
    sizes.reverse()

    # From the root down: the position of the first token of every subtree.
    tokens = np.zeros(sizes[0].sum(), np.uint8)
    places = np.cumsum(sizes[0]) - sizes[0]
    for depth, (counts, content, nodes) in enumerate(zip(levels, contents, operators)):
        tokens[places] = np.where(counts > 0, _IDS[OPERATORS[0]], _IDS[DIGITS[0]]) + content
        if not nodes.size:
            break
        tokens[places[nodes] + sizes[depth][nodes] - 1] = _IDS[END]
        # The arguments follow their operator, one after the other.
        before = np.cumsum(sizes[depth + 1]) - sizes[depth + 1]
        starts = np.cumsum(counts[nodes]) - counts[nodes]
        places = before + np.repeat(places[nodes] + 1 - before[starts], counts[nodes])
    return tokens, sizes[0], values[-1]


def _apply(operators, arguments, starts, counts):
    """Evaluate operators. The arguments of operator ``i`` are ``arguments[starts[i] : starts[i] + counts[i]]``."""
    order = np.lexsort((arguments, np.repeat(np.arange(counts.size), counts)))
    ordered = arguments[order]
    median = (ordered[starts + (counts - 1) // 2] + ordered[starts + counts // 2]) // 2
    total = np.add.reduceat(arguments, starts) % 10
    return np.choose(operators, (ordered[starts], ordered[starts + counts - 1], median, total))


def write_listops(folder, num_train, num_val, num_test, min_length, max_length, max_depth=10, max_args=10, seed=0):
    """Write ListOps to a folder, in the format of Long Range Arena.

    The folder gets the files ``basic_train.tsv``, ``basic_val.tsv`` and ``basic_test.tsv``, and the manifest
    ``listops.json`` with the options. Each line of a split is a source (tokens separated by spaces), a tab and the
    target digit. The samples of ``test`` and ``val`` do not depend on ``num_train``. A complete folder with the same
    options is left unchanged. After an interruption, all files are written again.

    Args:
        folder (str | Path): Folder to write. It is created if it is missing.
        num_train, num_val, num_test (int): Number of samples per split. Long Range Arena has 96 000, 2 000 and 2 000.
        min_length, max_length (int): Sequences have more than ``min_length`` and fewer than ``max_length`` tokens. Long
            Range Arena has 500 and 2 000.
        max_depth (int): Depth at which every node is a digit. The root has depth 1. Defaults to 10.
        max_args (int): Maximum number of arguments of an operator. Defaults to 10.
        seed (int): Seed, at least 0. Another seed gives other samples. Defaults to 0.

    Returns:
        bool: True if files were written, False if the folder was already complete.

    Raises:
        FileExistsError: If the folder is a file, or holds files but no manifest of this data set. Nothing is changed in
            this case.
        ValueError: If an option is out of range, if the folder is complete with other options, or if there are too few
            different sequences of these lengths.
    """
    folder = Path(folder)
    numbers = dict(train=num_train, val=num_val, test=num_test)
    shape = dict(min_length=min_length, max_length=max_length, max_depth=max_depth, max_args=max_args)
    options = {**{f'num_{split}': number for split, number in numbers.items()}, **shape, 'seed': seed}
    _check_options(options)
    existing = read_manifest(folder / MANIFEST, _NAME)
    if existing is not None and existing['complete']:
        if existing['options'] == options:
            return False
        raise ValueError(
            f'{folder} is complete with the options {existing["options"]}, but {options} were requested: choose '
            'another folder, or remove this one first'
        )
    folder.mkdir(parents=True, exist_ok=True)
    manifest = dict(name=_NAME, options=options, vocabulary=VOCABULARY)
    write_json(folder / MANIFEST, dict(manifest, complete=False))
    seen = set()
    # The training split comes last, so that the other splits do not depend on its size.
    for index, split in reversed(list(enumerate(SPLITS))):
        samples = generate_samples(np.random.default_rng((seed, index)), **shape)
        _write_split(folder / f'basic_{split}.tsv', _distinct(samples, numbers[split], seen))
    write_json(folder / MANIFEST, dict(manifest, complete=True))
    return True


def _check_options(options):
    least = dict(num_train=1, num_val=1, num_test=1, min_length=0, max_length=2, max_depth=1, max_args=MIN_ARGS, seed=0)
    for name, value in options.items():
        check_integer(name, value, least[name])
    longest = 1
    for _ in range(options['max_depth'] - 1):
        longest = min(2 + options['max_args'] * longest, options['max_length'])
    if not options['min_length'] + 1 < options['max_length'] or options['min_length'] >= longest:
        raise ValueError(
            f'no sequence has more than min_length={options["min_length"]} and fewer than max_length='
            f'{options["max_length"]} tokens with max_depth={options["max_depth"]} and max_args={options["max_args"]}: '
            'expected max_length >= min_length + 2, and trees that can grow longer than min_length'
        )


def _distinct(samples, number, seen):
    """Yield the first ``number`` samples whose tokens are not in ``seen``, and add their tokens to ``seen``."""
    idle = 0
    while number:
        sample = next(samples)
        if sample is None:
            idle += 1
            if idle > _PATIENCE:
                raise ValueError(
                    f'{_PATIENCE * _TREES} trees gave no new sequence of the requested lengths after '
                    f'{len(seen)} were found: request fewer samples, or a wider range of lengths'
                )
        elif (key := sample[0].tobytes()) not in seen:
            seen.add(key)
            idle, number = 0, number - 1
            yield sample


def _write_split(path, samples):
    names = np.array(VOCABULARY, object)
    with atomic_path(path) as temporary, temporary.open('w', encoding='ascii') as file:
        file.write(f'{_HEADER}\n')
        for tokens, value in samples:
            file.write(f'{" ".join(names[tokens])}\t{value}\n')


@DATASETS.register_module()
class ListOps(BaseDataset):
    """ListOps for classification. A sample is a sequence of tokens and a digit.

    A sample holds ``tokens`` (n,) int64, see :data:`VOCABULARY`, ``gt_label`` and ``sample_idx``.

    Args:
        ann_file (str): File of a split, for example ``'basic_train.tsv'``, written by :func:`write_listops` or by Long
            Range Arena.
        metainfo, data_root, filter_cfg, indices, serialize_data, pipeline, test_mode, lazy_init, max_refetch: See
            :class:`mmengine.dataset.BaseDataset`.

    Raises:
        FileNotFoundError: If the file does not exist.
        TypeError: If an option is unknown.
        ValueError: If a line of the file is not a sample.
    """

    METAINFO = dict(classes=DIGITS)

    def load_data_list(self):
        """Read the samples of the file.

        Returns:
            list[dict]: ``tokens`` (n,) and ``gt_label``. The tokens are uint8 to save memory.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If a line of the file is not a sample.
        """
        path = Path(self.ann_file)
        if not path.is_file():
            raise FileNotFoundError(
                f'ListOps file {path} does not exist: write it with '
                f'`python -m projects.listops.make_listops {path.parent}`'
            )
        with path.open(encoding='utf-8') as file:
            header = next(file, '').rstrip('\n')
            if header != _HEADER:
                raise ValueError(f'first line of {path} is {header[:80]!r}: expected {_HEADER!r}')
            return [self._read_sample(line, f'{path}, line {number}') for number, line in enumerate(file, 2)]

    @staticmethod
    def _read_sample(line, place):
        source, _, target = line.rstrip('\n').rpartition('\t')
        if not source or target not in DIGITS:
            raise ValueError(f'{place}: {line[:80]!r}: expected a source, a tab and a digit')
        try:
            tokens = tokenize(source)
        except ValueError as error:
            raise ValueError(f'{place}: {error}') from None
        return dict(tokens=tokens.astype(np.uint8), gt_label=int(target))

    def get_data_info(self, idx):
        """Return a sample.

        Args:
            idx (int): Position in the data set.

        Returns:
            dict: The sample, with ``tokens`` (n,) int64.
        """
        info = super().get_data_info(idx)
        info['tokens'] = info['tokens'].astype(np.int64)
        return info
