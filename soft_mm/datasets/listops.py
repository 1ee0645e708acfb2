"""ListOps of Long Range Arena: nested lists of operators and digits, written by its published rule and read again.

A sample is a sequence such as ``[MAX 2 9 [MIN 4 7 ] 0 ]`` and the digit that it evaluates to. The rule is that of Long
Range Arena (arXiv:2011.04006, section 2.2.1, and its generator), after ListOps (arXiv:1804.06028). Samples of a split
depend on the seed and on the options alone, and no sequence is in two splits.
"""

from pathlib import Path

import numpy as np
from mmengine.dataset import BaseDataset

from soft_mm.files import read_manifest, write_json
from soft_mm.ops.attention import check_count
from soft_mm.registry import DATASETS

DIGITS = tuple('0123456789')
OPERATORS = ('[MIN', '[MAX', '[MED', '[SM')
END = ']'
#: Tokens by their id; 0 is padding, which no sample holds.
VOCABULARY = ('<pad>', *DIGITS, *OPERATORS, END)
SPLITS = ('train', 'val', 'test')
OPERATOR_PROB = 0.25  # of a node above the maximal depth
MIN_ARGS = 2
MANIFEST = 'listops.json'
_NAME = 'listops'

_HEADER = 'Source\tTarget'
_IDS = {token: index for index, token in enumerate(VOCABULARY) if index}
_TREES = 4096  # grown at a time
# Batches of trees, none of which is a new sample, before there are held to be no more.
_PATIENCE = 200


def tokenize(source):
    """Ids of the tokens of a source, which may have Long Range Arena's round brackets around its pairs.

    Args:
        source (str): Tokens with blanks between.

    Returns:
        np.ndarray: ``(n,)`` int64, see :data:`VOCABULARY`.

    Raises:
        ValueError: For an unknown token.
    """
    tokens = source.replace('(', ' ').replace(')', ' ').split()
    try:
        return np.array([_IDS[token] for token in tokens], np.int64)
    except KeyError as error:
        raise ValueError(
            f'token {error.args[0]!r} is unknown; allowed are {VOCABULARY[1:]} with blanks between, and round brackets'
        ) from None


def generate_samples(rng, min_length, max_length, max_depth, max_args):
    """Draw samples by the rule, one after the other and without end; some may be alike.

    A tree is given up as soon as it is known to grow too long, which leaves the distribution of the others as it is.

    Args:
        rng (np.random.Generator): Source of the random numbers.
        min_length, max_length (int): Only sequences with more and fewer tokens than these are kept.
        max_depth (int): Depth at which every node is a digit; that of the root is 1.
        max_args (int): Most arguments of an operator.

    Yields:
        tuple[np.ndarray, int] | None: Tokens ``(n,)`` uint8 and the digit that they evaluate to; None after each batch
            of trees, so that a caller can tell when they get rare.
    """
    while True:
        tokens, sizes, values = _assemble(rng, _grow(rng, min_length, max_length, max_depth, max_args))
        yield from zip(np.split(tokens, np.cumsum(sizes)[:-1]), values.tolist())
        yield None


def _grow(rng, min_length, max_length, max_depth, max_args):
    """Shapes of trees of an allowed length, all trees at once and depth by depth.

    Returns:
        list[np.ndarray]: For each depth the number of arguments of its nodes, 0 for a digit, in the order of the trees
            and in each of its parents.
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
        # Every argument that is still to come is one token at least.
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
    """Draw digits and operators of trees, and lay their tokens out.

    Args:
        rng (np.random.Generator): Source of the random numbers.
        levels (list[np.ndarray]): Shapes of the trees, see :func:`_grow`.

    Returns:
        tuple[np.ndarray, np.ndarray, np.ndarray]: tokens uint8 of one tree after the other, and for each tree their
            number and the digit that they evaluate to.
    """
    contents = [rng.integers(0, np.where(counts > 0, len(OPERATORS), len(DIGITS))) for counts in levels]
    operators = [np.flatnonzero(counts) for counts in levels]
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

    tokens = np.zeros(sizes[0].sum(), np.uint8)
    places = np.cumsum(sizes[0]) - sizes[0]
    for depth, (counts, content, nodes) in enumerate(zip(levels, contents, operators)):
        tokens[places] = np.where(counts > 0, _IDS[OPERATORS[0]], _IDS[DIGITS[0]]) + content
        if not nodes.size:
            break
        tokens[places[nodes] + sizes[depth][nodes] - 1] = _IDS[END]
        # A node's arguments follow it, each as long as those before it have left it to begin.
        before = np.cumsum(sizes[depth + 1]) - sizes[depth + 1]
        starts = np.cumsum(counts[nodes]) - counts[nodes]
        places = before + np.repeat(places[nodes] + 1 - before[starts], counts[nodes])
    return tokens, sizes[0], values[-1]


def _apply(operators, arguments, starts, counts):
    """Values of operators, the arguments of each of which are ``arguments[start : start + count]``."""
    order = np.lexsort((arguments, np.repeat(np.arange(counts.size), counts)))
    ordered = arguments[order]
    median = (ordered[starts + (counts - 1) // 2] + ordered[starts + counts // 2]) // 2
    total = np.add.reduceat(arguments, starts) % 10
    return np.choose(operators, (ordered[starts], ordered[starts + counts - 1], median, total))


def write_listops(folder, num_train, num_val, num_test, min_length, max_length, max_depth=10, max_args=10, seed=0):
    """Write ListOps into a folder, in the form of Long Range Arena.

    The folder holds ``basic_train.tsv``, ``basic_val.tsv`` and ``basic_test.tsv``, whose lines are a source, its tokens
    with blanks between, and a target, and the manifest ``listops.json`` with the options. Samples of ``test`` and
    ``val`` do not depend on ``num_train``. A folder that is complete and has the same options is left alone, and one
    whose writing was interrupted is written anew.

    Args:
        folder (str | Path): The folder; made if missing.
        num_train, num_val, num_test (int): Samples of the splits; 96 000, 2 000 and 2 000 at Long Range Arena.
        min_length, max_length (int): Sequences have more tokens than the one and fewer than the other; 500 and 2 000 at
            Long Range Arena.
        max_depth (int): Depth at which every node is a digit; that of the root is 1.
        max_args (int): Most arguments of an operator.
        seed (int): Not negative. Another seed gives other samples.

    Returns:
        bool: Whether anything was written; False if the folder was complete already.

    Raises:
        FileExistsError: If the folder holds files but no manifest of this data set, or is a file. Nothing is touched
            then.
        ValueError: If an option is outside of what is allowed, if the folder is complete with other options, or if
            there are too few sequences of these lengths.
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
            f'{folder} is complete with the options {existing["options"]}, and {options} were asked for; name another '
            'folder, or remove this one first'
        )
    folder.mkdir(parents=True, exist_ok=True)
    manifest = dict(name=_NAME, options=options, vocabulary=VOCABULARY)
    write_json(folder / MANIFEST, dict(manifest, complete=False))
    seen = set()
    # The largest split last, so that the others do not depend on its size.
    for index, split in reversed(list(enumerate(SPLITS))):
        samples = generate_samples(np.random.default_rng((seed, index)), **shape)
        _write_split(folder / f'basic_{split}.tsv', _distinct(samples, numbers[split], seen))
    write_json(folder / MANIFEST, dict(manifest, complete=True))
    return True


def _check_options(options):
    least = dict(num_train=1, num_val=1, num_test=1, min_length=0, max_length=2, max_depth=1, max_args=MIN_ARGS, seed=0)
    for name, value in options.items():
        check_count(name, value, least[name])
    longest = 1
    for _ in range(options['max_depth'] - 1):
        longest = min(2 + options['max_args'] * longest, options['max_length'])
    if not options['min_length'] + 1 < options['max_length'] or options['min_length'] >= longest:
        raise ValueError(
            f'no sequence has more than min_length={options["min_length"]} and fewer than max_length='
            f'{options["max_length"]} tokens at max_depth={options["max_depth"]}, max_args={options["max_args"]}; '
            'lengths must lie two or more apart, and the tree be able to grow so long'
        )


def _distinct(samples, number, seen):
    """The first ``number`` samples that are not among ``seen``, which they join."""
    idle = 0
    while number:
        sample = next(samples)
        if sample is None:
            idle += 1
            if idle > _PATIENCE:
                raise ValueError(
                    f'{_PATIENCE * _TREES} trees held no new sequence of the lengths asked for, after '
                    f'{len(seen)} were found; ask for fewer samples, or for lengths that lie farther apart'
                )
        elif (key := sample[0].tobytes()) not in seen:
            seen.add(key)
            idle, number = 0, number - 1
            yield sample


def _write_split(path, samples):
    names = np.array(VOCABULARY, object)
    # An interrupted run must not leave a file that looks whole.
    part = path.with_suffix('.part')
    with part.open('w', encoding='ascii') as file:
        file.write(f'{_HEADER}\n')
        for tokens, value in samples:
            file.write(f'{" ".join(names[tokens])}\t{value}\n')
    part.replace(path)


@DATASETS.register_module()
class ListOps(BaseDataset):
    """ListOps as sequences of tokens with a digit each, for classification.

    Results hold ``tokens`` (n,) int64, see :data:`VOCABULARY`, ``gt_label`` and ``sample_idx``.

    Args:
        ann_file (str): File of a split, such as ``'basic_train.tsv'``, as :func:`write_listops` or Long Range Arena
            writes it.
        metainfo, data_root, filter_cfg, indices, serialize_data, pipeline, test_mode, lazy_init, max_refetch: As in
            :class:`mmengine.dataset.BaseDataset`.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If an option is unknown.
        ValueError: If a line of the file is no sample.
    """

    METAINFO = dict(classes=DIGITS)

    def load_data_list(self):
        """Read the file.

        Returns:
            list[dict]: ``tokens`` (n,) uint8, an eighth of the memory of what a pipeline is given, and ``gt_label``.
        """
        path = Path(self.ann_file)
        if not path.is_file():
            raise FileNotFoundError(
                f'there is no ListOps file {path}: `python tools/make_listops.py {path.parent}` writes it'
            )
        with path.open(encoding='utf-8') as file:
            header = next(file, '').rstrip('\n')
            if header != _HEADER:
                raise ValueError(f'{path} begins with {header[:80]!r}, where a ListOps file has {_HEADER!r}')
            return [self._read_sample(line, f'{path}, line {number}') for number, line in enumerate(file, 2)]

    @staticmethod
    def _read_sample(line, place):
        source, _, target = line.rstrip('\n').rpartition('\t')
        if not source or target not in DIGITS:
            raise ValueError(f'{place}: {line[:80]!r} must be a source, a tab, and a digit')
        try:
            tokens = tokenize(source)
        except ValueError as error:
            raise ValueError(f'{place}: {error}') from None
        return dict(tokens=tokens.astype(np.uint8), gt_label=int(target))

    def get_data_info(self, idx):
        """A sample by its index, with ``tokens`` (n,) int64."""
        info = super().get_data_info(idx)
        info['tokens'] = info['tokens'].astype(np.int64)
        return info
