"""What is compared: small models, their cases and the data that they are trained on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mmengine.config import Config

from soft_mm.datasets.export import MANIFEST, export_photo_digits
from soft_mm.datasets.listops import MANIFEST as LISTOPS_MANIFEST
from soft_mm.datasets.listops import write_listops
from soft_mm.datasets.packed import pack_crops

from .training import Task


@dataclass(frozen=True)
class Study:
    """One small model, and what is compared on it.

    Attributes:
        name: what it is called.
        task: its training and its one metric.
        cases: name to the options of the backbone's config that the case sets.
        groups: title of a table to the names of its cases, the first of which the others are compared with.
        size: of the input on which costs are measured; of a sequence ``(1, n)``.
        batch_size: of the measurement.
        prepare: called with a seed and whether it is the quick form, writes the data and gives the overrides of the
            config that name them, and the file that says of what they are made.
        cost_options: options that the backbone has in the measurement alone.
    """

    name: str
    task: Task
    cases: dict
    groups: dict
    size: tuple
    batch_size: int
    prepare: Callable
    cost_options: dict = field(default_factory=dict)


_QUICK_ITERS, _QUICK_BATCH = 8, 8
_QUICK_SAMPLES = _QUICK_ITERS * _QUICK_BATCH
#: Overrides of a config for the quick form.
QUICK = {
    'train_cfg.max_iters': _QUICK_ITERS,
    'train_cfg.val_interval': _QUICK_ITERS,
    'param_scheduler.0.end': 2,
    'param_scheduler.1.begin': 2,
    'param_scheduler.1.end': _QUICK_ITERS,
    'train_dataloader.batch_size': _QUICK_BATCH,
}
#: Stands in the options of a case for the seed of the run.
SEED = 'the seed of the run'


def _attention(**options):
    return {f'attention.{key}': value for key, value in options.items()}


def _soft(max_landmarks, **options):
    return _attention(max_landmarks=max_landmarks, **options)


def _attentions(budget):
    """The attentions that the papers compare, each with ``budget`` landmarks, projected tokens or features."""
    return {
        'SOFT': _soft(budget),
        'SOFT, normalised': _soft(budget, normalized=True),
        'softmax': _attention(type='SoftmaxAttention'),
        'Linformer': _attention(type='LinformerAttention', proj_tokens=budget),
        'Performer': _attention(type='PerformerAttention', num_features=budget, seed=SEED),
        'Nystromformer': _attention(type='NystromAttention', num_landmarks=budget),
        'spatial reduction': _attention(type='SpatialReductionAttention'),
        'full Gaussian kernel': _attention(type='GaussianKernelAttention'),
    }


# --- photo-digits: at most 16 landmarks a stage, which are all tokens of the later stages, and the same to the rivals

_CROPS = Path('data/photo_digits_comparison')
_CROPS_BUDGET = 16
_CROP_ATTENTIONS = _attentions(_CROPS_BUDGET)
_CROP_CASES = {
    **_CROP_ATTENTIONS,
    'sampler mean': _soft(_CROPS_BUDGET, sampler='mean'),
    'sampler random': _soft(_CROPS_BUDGET, sampler='random', seed=SEED),
    'Cholesky': _soft(_CROPS_BUDGET, solver='cholesky'),
    'SVD': _soft(_CROPS_BUDGET, solver='svd'),
    '1 landmark': _soft(1),
    '4 landmarks': _soft(4),
    'unbounded landmarks': {},
    '1 iteration': _soft(_CROPS_BUDGET, newton_iterations=1),
    '5 iterations': _soft(_CROPS_BUDGET, newton_iterations=5),
    '10 iterations': _soft(_CROPS_BUDGET, newton_iterations=10),
    'Cholesky, normalised': _soft(_CROPS_BUDGET, normalized=True, solver='cholesky'),
}
_CROP_GROUPS = {
    'attention': tuple(_CROP_ATTENTIONS),
    'sampler': ('SOFT', 'sampler mean', 'sampler random'),
    'inverse': ('SOFT', 'Cholesky', 'SVD'),
    'landmarks': ('SOFT', '1 landmark', '4 landmarks', 'unbounded landmarks'),
    'Newton iterations': ('SOFT', '1 iteration', '5 iterations', '10 iterations'),
    'normalisation': ('SOFT', 'SOFT, normalised', 'Cholesky', 'Cholesky, normalised'),
}
_CROPS_TASK = Task('photo-digits', '_base_/comparison/photo_digits.py', {'accuracy/top1': ('top1', 0.01)})


def _prepare_crops(seed, quick):
    cfg = Config.fromfile(_CROPS_TASK.config_file)
    # Large and nearly upright digits on half-faded photographs: the whole task takes longer than minutes to learn.
    digits = dict(digit_size=(0.8, 0.9), max_angle=10.0)
    crops = dict(digits, size=48, background=0.5)
    val = Path(f'{_CROPS}_quick' if quick else _CROPS)
    export_photo_digits(val, splits=('val',), num_crops=100 if quick else 1000, num_scenes=1, crop_options=crops)
    # As the demo's classifier is trained: small crops whose background fades in, then crops of the size of validation.
    shapes = (dict(digits, size=32, background=(0.0, 0.5)), crops)
    lengths = (
        (_QUICK_SAMPLES // 2,) * 2 if quick else (cfg.batch_size * cfg.small_iters, cfg.batch_size * cfg.full_iters)
    )
    options = {
        f'train_dataloader.dataset.datasets.{i}.ann_file': pack_crops(
            f'{_CROPS}_packed', 2 * seed + i, length, recolour=0.8, **shape
        )
        for i, (shape, length) in enumerate(zip(shapes, lengths))
    }
    for loader in ('val_dataloader', 'test_dataloader'):
        options[f'{loader}.dataset.data_root'] = f'{val}/'
    return options, val / MANIFEST


# --- ListOps: sequences, the budget of 32

_LISTOPS = Path('data/listops_comparison')
_LISTOPS_CASES = _attentions(32)
_LISTOPS_TASK = Task('listops', '_base_/comparison/listops.py', {'accuracy/top1': ('top1', 0.01)})


def _prepare_listops(seed, quick):
    cfg = Config.fromfile(_LISTOPS_TASK.config_file)
    train, val = (_QUICK_SAMPLES, 32) if quick else (cfg.batch_size * cfg.max_iters, 2000)
    shortest, longest = cfg.lengths
    folder = _LISTOPS / f'{train}_{val}_{shortest}_{longest}_{seed}'
    write_listops(folder, train, val, 1, shortest, longest, seed=seed)
    loaders = ('train_dataloader', 'val_dataloader', 'test_dataloader')
    return {f'{loader}.dataset.data_root': f'{folder}/' for loader in loaders}, folder / LISTOPS_MANIFEST


#: Studies by name.
STUDIES = {
    study.name: study
    for study in (
        Study(
            'photo-digits',
            _CROPS_TASK,
            _CROP_CASES,
            _CROP_GROUPS,
            size=(48, 48),
            batch_size=64,
            prepare=_prepare_crops,
        ),
        # Costs are those at the length of Long Range Arena.
        Study(
            'listops',
            _LISTOPS_TASK,
            _LISTOPS_CASES,
            {'attention': tuple(_LISTOPS_CASES)},
            size=(1, 2048),
            batch_size=4,
            prepare=_prepare_listops,
            cost_options=dict(length=2048),
        ),
    )
}
