"""Hooks of mmengine's runner."""

import json
import logging
import os
import sys
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, get_text, register_backend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch.nn import Module
from torch.utils.hooks import RemovableHandle

from soft_mm.registry import HOOKS
from soft_mm.utils import atomic_path


class AtomicBackend(LocalBackend):
    """mmengine's backend for local files, with an atomic ``put`` (temporary file, then rename)."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a file.

        Args:
            obj (bytes): Content.
            filepath (str | Path): File to write. Its folder is made if it does not exist.

        Raises:
            OSError: If the disk is full. An older file of the name is kept.
        """
        os.makedirs(os.path.dirname(filepath) or '.', exist_ok=True)
        with atomic_path(filepath) as temporary, temporary.open('wb') as file:
            file.write(obj)
            file.flush()
            os.fsync(file.fileno())


register_backend('soft_mm_atomic', AtomicBackend)


class _DelayedRemoval:
    """A file backend that notes which files and folders to remove, instead of removing them."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._noted: list[tuple[Any, str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self._noted.append((self._backend.remove, path))

    def rmtree(self, path: str) -> None:
        self._noted.append((self._backend.rmtree, path))

    def remove_noted(self, kept: Container[object]) -> None:
        for remove, path in self._noted:
            if path not in kept:
                remove(path)
        self._noted.clear()


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """Save checkpoints as mmengine's ``CheckpointHook`` does, but never leave a work directory without the last one.

    The last checkpoint stays if the training is killed or the disk is full while the next one is written.
    Files on a local disk are written atomically by mmengine's ``Runner``, not by its ``FlexibleRunner``. Older
    checkpoints are removed after the new one is written instead of before, so one more than ``max_keep_ckpts`` needs
    space, and two best ones per metric of ``save_best``. ``tools/train.py`` uses this hook where
    ``default_hooks.checkpoint`` has mmengine's type. It takes the same arguments as mmengine's hook.
    """

    backend_args: Any
    file_backend: Any

    def before_train(self, runner: Runner) -> None:
        """Choose the backend, and remove the unfinished files of a training that was killed."""
        super().before_train(runner)
        local = self.backend_args in (None, dict(backend='local')) and self.file_client_args is None
        if local and type(self.file_backend) is LocalBackend:
            self.backend_args = dict(backend='soft_mm_atomic')
            if is_main_process():
                for unfinished in Path(self.out_dir).glob('.*.part'):
                    unfinished.unlink(missing_ok=True)

        self.file_backend = _DelayedRemoval(self.file_backend)

    def _remove_outdated(self) -> None:
        # A new checkpoint can have the name of the old one.
        best = (getattr(self, 'best_ckpt_path', None), *getattr(self, 'best_ckpt_path_dict', {}).values())
        self.file_backend.remove_noted({self.last_ckpt, *best})

    def after_train_epoch(self, runner: Runner) -> None:
        """Save a checkpoint after every ``interval`` epochs."""
        super().after_train_epoch(runner)
        self._remove_outdated()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Save a checkpoint after every ``interval`` iterations."""
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        self._remove_outdated()

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Save the best checkpoint."""
        super().after_val_epoch(runner, metrics)
        self._remove_outdated()


@HOOKS.register_module()
class MissingGradientHook(Hook):
    """Warn after the first training step if parameters that should learn got no gradient.

    The cause is often reentrant activation checkpointing (``activation_checkpointing`` of mmengine's runner), or a head
    that does not use an output of the backbone.
    """

    def __init__(self) -> None:
        self._missing: set[str] = set()
        self._handles: list[RemovableHandle] = []

    def before_train(self, runner: Runner) -> None:
        """Watch the gradients of all parameters that require one."""
        for name, parameter in runner.model.named_parameters():
            if parameter.requires_grad:
                self._missing.add(name)
                self._handles.append(parameter.register_hook(lambda _, name=name: self._missing.discard(name)))

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Warn once, and stop watching."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._missing:
            names = sorted(self._missing)
            print_log(
                f'{len(names)} parameters got no gradient in the first step, such as {", ".join(names[:3])}. If they '
                'should learn, check that the head uses every output of the backbone. To save memory, use with_cp=True '
                "of the backbone instead of mmengine's activation_checkpointing",
                'current',
                logging.WARNING,
            )


class DataError(ValueError):
    """A data set does not fit the config."""


def _inner_datasets(dataset: Any) -> Iterator[Any]:
    """Yield a data set and those inside wrappers such as ``ConcatDataset``."""
    yield dataset
    inner = getattr(dataset, 'datasets', [dataset.dataset] if hasattr(dataset, 'dataset') else [])
    for part in inner:
        yield from _inner_datasets(part)


def _source(dataset: Any) -> str:
    """Say where a data set comes from."""
    parts = ', '.join(
        f'{name}={value!r}'
        for name in ('ann_file', 'data_root', 'data_prefix')
        if (value := getattr(dataset, name, None))
    )
    return f'{type(dataset).__name__}({parts})'


def no_images(dataset: Any) -> str:
    """Say that a data set has no images.

    Args:
        dataset (Any): The data set.

    Returns:
        str: The message.
    """
    return (
        f'{_source(dataset)} has no images: check its paths and suffixes, and that its images have annotations of the '
        'classes of the config'
    )


def _coco_categories(dataset: Any) -> list[dict[str, Any]]:
    """Read the categories of a COCO file. mmdet does not keep them."""
    text = get_text(dataset.ann_file, backend_args=dataset.backend_args)
    try:
        # Without the annotations, which take seconds and gigabytes in a large file.
        start = text.index('[', text.rindex('"categories"'))
        categories = json.JSONDecoder().raw_decode(text, start)[0]
        if {category['id'] for category in categories} >= set(dataset.cat_ids):
            return categories
    except (ValueError, TypeError, KeyError):
        pass
    return json.loads(text)['categories']


def _check_categories(dataset: Any) -> None:
    """Compare the classes of mmdet's ``CocoDataset`` with the categories of its file."""
    module = sys.modules.get('mmdet.datasets')
    classes = tuple(getattr(dataset, 'metainfo', {}).get('classes') or ())
    if (
        module is None
        or not classes
        or getattr(type(dataset), 'load_data_list', None) is not (module.CocoDataset.load_data_list)
    ):
        return
    categories = _coco_categories(dataset)
    names = {category['id']: category['name'] for category in categories}
    found = tuple(names[number] for number in dataset.cat_ids)
    if found != classes:
        missing = [name for name in classes if name not in found]
        problem = f'lacks {", ".join(missing)}' if missing else 'has them in another order'
        raise DataError(
            f'{dataset.ann_file}: mmdet numbers the classes in the order of the categories in the file, but the config '
            f'has the classes {", ".join(classes)} and the file {problem}. Set metainfo=dict(classes=...) of the data '
            f'set to {tuple(names[number] for number in names)}, and num_classes of the heads to {len(names)}'
        )
    ignored = sorted(set(names.values()) - set(classes))
    if ignored:
        print_log(
            f'{dataset.ann_file}: annotations of {len(ignored)} categories that the config does not name are ignored: '
            f'{", ".join(ignored[:10])}',
            'current',
            logging.WARNING,
        )


def _number_of_classes(head: Any) -> int:
    # Heads of mmsegmentation with one output channel tell two classes apart.
    return 2 if getattr(head, 'out_channels', None) == 1 else head.num_classes


def _check_heads(dataset: Any, model: Module) -> None:
    """Check that every head has at least as many classes as the data set."""
    classes = getattr(dataset, 'metainfo', {}).get('classes') or ()
    for name, head in model.named_modules():
        # The head of region proposals knows no classes.
        if not name.endswith('head') or name.endswith('rpn_head') or not hasattr(head, 'num_classes'):
            continue
        if _number_of_classes(head) < len(classes):
            raise DataError(
                f'{name} has num_classes={head.num_classes}, but {_source(dataset)} has {len(classes)} classes: set '
                'num_classes of every head to this number'
            )


def _check_dataset(dataset: Any, model: Module) -> None:
    _check_heads(dataset, model)
    for part in _inner_datasets(dataset):
        if hasattr(part, '__len__') and len(part) == 0:
            raise DataError(no_images(part))
        _check_categories(part)


@HOOKS.register_module()
class DataCheckHook(Hook):
    """Check the data sets against the config, where the toolboxes would give a wrong result or stop later.

    - A data set without images (mmengine's ``InfiniteSampler`` would wait forever).
    - mmdet's ``CocoDataset`` whose classes are not those of its file in their order: labels would get wrong names.
    - Heads with fewer classes than the data set.
    - Label maps of mmsegmentation with a value that is no class: it is left out of the metrics, and the training stops
      with an error that names no file.

    ``tools/train.py`` and ``tools/test.py`` use it.
    """

    def __init__(self) -> None:
        self._head: Any = None

    def before_train(self, runner: Runner) -> None:
        """Check the data sets of training and validation.

        Raises:
            DataError: If one does not fit the config.
        """
        _check_dataset(runner.train_dataloader.dataset, runner.model)
        if runner.val_loop is not None:
            _check_dataset(runner.val_dataloader.dataset, runner.model)

    def before_test(self, runner: Runner) -> None:
        """Check the data set of the test.

        Raises:
            DataError: If it does not fit the config.
        """
        _check_dataset(runner.test_dataloader.dataset, runner.model)

    def _before_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, mode: str = 'train') -> None:
        """Check the label maps of a batch.

        Raises:
            DataError: If a label is neither a class nor the value that the head ignores.
        """
        samples = data_batch.get('data_samples') if isinstance(data_batch, dict) else None
        for sample in samples or ():
            # Test-time augmentation gives a list of samples per image.
            sample = sample[0] if isinstance(sample, (list, tuple)) else sample
            if 'gt_sem_seg' not in sample:
                continue
            if self._head is None:
                self._head = next(part for name, part in runner.model.named_modules() if name.endswith('decode_head'))
            labels, count, ignored = sample.gt_sem_seg.data, _number_of_classes(self._head), self._head.ignore_index
            wrong = ((labels >= count) | (labels < 0)) & (labels != ignored)
            if wrong.any():
                raise DataError(
                    f'{sample.get("seg_map_path", "a label map")} has the values '
                    f'{labels[wrong].unique().tolist()[:10]}, but the model has the classes 0 to {count - 1}, and '
                    f'{ignored} for pixels that are left out. Correct the label map, or num_classes of the heads and '
                    'reduce_zero_label of the data set'
                )
