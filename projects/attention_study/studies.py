"""Definition of the studies: the small models, the cases to compare, and the data to train on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from projects.common.training import Task
from projects.listops.listops_data import MANIFEST as LISTOPS_MANIFEST
from projects.listops.listops_data import write_listops
from projects.photo_digits.dataset_files import MANIFEST, export_photo_digits
from projects.photo_digits.packed import pack_crops
from soft_mm.utils import read_config


@dataclass(frozen=True)
class Study:
    """One small model and the cases to compare on it.

    Attributes:
        name: Name of the study.
        task: Training config and metric.
        cases: Maps the name of a case to the backbone options that it sets.
        groups: Maps the title of a table to the names of its cases. The first case is the reference of the others.
        size: Input size for measuring costs, ``(1, n)`` for a sequence.
        batch_size: Batch size for measuring costs.
        prepare: Function called as ``prepare(seed, quick)``. It writes the data, and returns the config overrides that
            set the paths of the data, and a file whose content identifies the data.
        cost_options: Backbone options for measuring costs only.
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
#: Config overrides for a quick test.
QUICK = {
    'train_cfg.max_iters': _QUICK_ITERS,
    'train_cfg.val_interval': _QUICK_ITERS,
    'param_scheduler.0.end': 2,
    'param_scheduler.1.begin': 2,
    'param_scheduler.1.end': _QUICK_ITERS,
    'train_dataloader.batch_size': _QUICK_BATCH,
}
#: Placeholder in the options of a case. :func:`with_seed` replaces it by the seed of the run.
SEED = 'the seed of the run'


def with_seed(case, seed):
    """Replace the placeholder :data:`SEED` in the options of a case.

    Args:
        case (dict): Backbone options of the case.
        seed (int): Seed of the run.

    Returns:
        dict: The options with the seed.
    """
    return {key: seed if value is SEED else value for key, value in case.items()}


def case_config(study, case, measured=False):
    """Return the config of a case with seed 0.

    Args:
        study (Study): Study of the case.
        case (dict): Backbone options of the case.
        measured (bool): Whether to apply the options for measuring costs. Defaults to False.

    Returns:
        Config: The config of the whole model.
    """
    cfg = read_config(study.task.config_file)
    options = with_seed(case, 0) | (study.cost_options if measured else {})
    cfg.merge_from_dict({f'model.backbone.{key}': value for key, value in options.items()})
    return cfg


def _attention(**options):
    return {f'attention.{key}': value for key, value in options.items()}


def _soft(max_landmarks, **options):
    return _attention(max_landmarks=max_landmarks, **options)


def _attentions(budget):
    """Return SOFT and the baselines of the papers, each with ``budget`` landmarks, projected tokens or features."""
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


# Photo-digits: at most 16 landmarks per stage, and as many projected tokens or features for the baselines.

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
_STAGE_4_CASES = {
    'softmax': {},
    'softmax-free': {'attention.3.type': 'SoftmaxFreeAttention'},
    'softmax-free, normalised': {'attention.3.type': 'SoftmaxFreeAttention', 'attention.3.normalized': True},
}
_STAGE_4_TASK = Task('stage-4', 'projects/attention_study/configs/stage_4_study.py', {'accuracy/top1': ('top1', 0.01)})
_CROPS_TASK = Task(
    'photo-digits', 'projects/attention_study/configs/photo_digits_study.py', {'accuracy/top1': ('top1', 0.01)}
)


def _prepare_crops(seed, quick):
    cfg = read_config(_CROPS_TASK.config_file)
    # Large, nearly upright digits on faded photographs, because the full task cannot be learned within minutes.
    digits = dict(digit_size=(0.8, 0.9), max_angle=10.0)
    crops = dict(digits, size=48, background=0.5)
    val = Path(f'{_CROPS}_quick' if quick else _CROPS)
    export_photo_digits(val, splits=('val',), num_crops=100 if quick else 1000, num_scenes=1, crop_options=crops)
    # The curriculum of the demo's classifier: small crops whose background fades in, then crops as in validation.
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


# ListOps: at most 32 landmarks, projected tokens or features.

_LISTOPS = Path('data/listops_comparison')
_LISTOPS_CASES = _attentions(32)
_LISTOPS_TASK = Task('listops', 'projects/attention_study/configs/listops_study.py', {'accuracy/top1': ('top1', 0.01)})


def _prepare_listops(seed, quick):
    cfg = read_config(_LISTOPS_TASK.config_file)
    train, val = (_QUICK_SAMPLES, 32) if quick else (cfg.batch_size * cfg.max_iters, 2000)
    folder = _LISTOPS / f'{train}_{val}_{cfg.min_length}_{cfg.max_length}_{seed}'
    write_listops(folder, train, val, 1, cfg.min_length, cfg.max_length, seed=seed)
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
        Study(
            'stage-4',
            _STAGE_4_TASK,
            _STAGE_4_CASES,
            {'stage 4': tuple(_STAGE_4_CASES)},
            size=(48, 48),
            batch_size=64,
            prepare=_prepare_crops,
        ),
        # The trainings use short sequences. Costs are measured at the sequence length of Long Range Arena.
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
