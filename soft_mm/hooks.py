"""Hooks of mmengine's runner."""

import contextlib
import json
import logging
import os
import sys
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dataset import DefaultSampler
from mmengine.dist import all_reduce, broadcast_object_list, is_main_process
from mmengine.fileio import LocalBackend, get_text, register_backend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import nn
from torch.utils.hooks import RemovableHandle

from soft_mm.ops.checks import check_bool
from soft_mm.registry import HOOKS
from soft_mm.utils import DataError, atomic_path, remove_unfinished


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
                remove_unfinished(self.out_dir)
        self.file_backend = _DelayedRemoval(self.file_backend)

    def _remove_outdated(self) -> None:
        if not hasattr(self, 'file_backend'):
            # An evaluation without a training, `runner.val()`.
            return
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
    that does not use an output of the backbone. Models in FSDP are not watched, because FSDP sets
    their gradients without autograd.
    """

    def __init__(self) -> None:
        self._missing: set[str] = set()
        self._handles: list[RemovableHandle] = []

    def before_train(self, runner: Runner) -> None:
        """Watch the gradients of all parameters that require one."""
        kinds = {kind.__name__ for module in runner.model.modules() for kind in type(module).__mro__}
        if kinds & {'FullyShardedDataParallel', 'FSDPModule'}:
            return
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


def _batch_size(loader: Any) -> int:
    """Count the images of an ordinary batch of a dataloader in this process. 0 if it is unknown."""
    # PyTorch gives no batch_size if there is a batch sampler of a toolbox.
    return getattr(loader.batch_sampler, 'batch_size', None) or loader.batch_size or 0


def _smallest_batch(loader: Any) -> int:
    """Count the images of the smallest batch of a dataloader in this process. 0 if it is unknown."""
    size, batches = _batch_size(loader), loader.batch_sampler
    sampler = getattr(batches, 'sampler', None)
    # Other samplers of mmengine are endless.
    drop_last = getattr(batches, 'drop_last', True)
    rest = len(sampler) % size if size and isinstance(sampler, DefaultSampler) and not drop_last else 0
    return rest or size


def _single_value_norms(model: nn.Module) -> Iterator[str]:
    """Yield the names of BatchNorms that compute with one value per image and channel, after a pooling to 1x1."""
    for name, module in model.named_modules():
        pooled = False
        for part_name, part in module.named_children() if isinstance(module, nn.Sequential) else ():
            if isinstance(part, nn.AdaptiveAvgPool2d):
                pooled = part.output_size in (1, (1, 1), [1, 1])
            elif isinstance(part, nn.Upsample):
                pooled = False
            elif pooled:
                for norm_name, norm in part.named_modules(prefix=f'{name}.{part_name}'.lstrip('.')):
                    if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.training:
                        yield norm_name


@HOOKS.register_module()
class BatchNormCheckHook(Hook):
    """Stop before the first step if a BatchNorm would get a single value per channel.

    It finds an ``nn.AdaptiveAvgPool2d`` to 1x1 that is followed by a BatchNorm in training mode in the same
    ``nn.Sequential``, as in the pyramid pooling of UperNet and PSPNet and the image pooling of DeepLabv3. Such a
    BatchNorm needs two images, of one process, or of all processes if it is synchronised. ``tools/train.py`` uses this
    hook.
    """

    def before_train(self, runner: Runner) -> None:
        """Check the model and the smallest batch.

        Raises:
            DataError: If a BatchNorm would get a single value per channel.
        """
        # As the training loop does, so that modules that stay in evaluation mode are left out.
        runner.model.train()
        images = _smallest_batch(runner.train_dataloader)
        for name in _single_value_norms(runner.model) if images == 1 else ():
            synchronised = isinstance(runner.model.get_submodule(name), nn.SyncBatchNorm)
            if not synchronised or runner.world_size == 1:
                raise DataError(batchnorm_needs_images(f' of {name}', _batch_size(runner.train_dataloader)))


def batchnorm_needs_images(place: str = '', batch_size: int | None = None) -> str:
    """Write the message for a BatchNorm that gets a single value per channel.

    Args:
        place (str): The BatchNorm. Defaults to ''.
        batch_size (int | None): Batch size of the training. Defaults to None: unknown.

    Returns:
        str: The message.
    """
    if batch_size in (1, None):
        remedy = 'Set train_dataloader.batch_size to 2 or more'
    else:
        remedy = f'The last batch of {batch_size} has one image: set train_dataloader.drop_last=True'
    return (
        f'BatchNorm{place} cannot be trained on one image, because it gets a single value per channel. {remedy}, or '
        "train on several GPUs with SyncBN, or set norm_cfg=dict(type='GN', num_groups=32) in this part of the model, "
        'or norm_eval=True if it belongs to a backbone. Accumulated gradients do not help'
    )


@HOOKS.register_module()
class ScaledRateHook(Hook):
    """Log the learning rate that ``auto_scale_lr`` gave, once, before the first step.

    ``tools/train.py --auto-scale-lr`` uses this hook.
    """

    def before_train(self, runner: Runner) -> None:
        """Log the rate of the config and the rate of the optimiser, with their batch sizes."""
        wrapper = runner.optim_wrapper
        wrappers = wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
        images = _batch_size(runner.train_dataloader)
        base = runner.cfg.auto_scale_lr['base_batch_size']
        for optimizer in (part.optimizer for part in wrappers):
            # Schedulers have changed `lr` already.
            rates = [group.get('initial_lr', group['lr']) for group in optimizer.param_groups]
            found = f'{min(rates):.4g}' if min(rates) == max(rates) else f'{min(rates):.4g} to {max(rates):.4g}'
            processes = '1 process' if runner.world_size == 1 else f'{runner.world_size} processes'
            print_log(
                f'--auto-scale-lr: the config has the learning rate {optimizer.defaults["lr"]:.4g} for '
                f'{base} images a step; with {runner.world_size * images} images '
                f'({processes}, {images} images each), it is {found}',
                'current',
            )


def _inner_datasets(dataset: Any) -> Iterator[Any]:
    """Yield a data set, or those inside wrappers such as ``ConcatDataset``."""
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    # Other objects may have attributes of these names.
    inner = [part for part in inner if hasattr(part, '__getitem__') and not isinstance(part, (str, dict))]
    if not inner:
        yield dataset
    for part in inner:
        yield from _inner_datasets(part)


def _name(dataset: Any) -> str:
    """Describe a data set by its type and paths."""
    parts = ', '.join(
        f'{name}={value!r}'
        for name in ('ann_file', 'data_root', 'data_prefix')
        if (value := getattr(dataset, name, None))
    )
    return f'{type(dataset).__name__}({parts})'


def no_images(dataset: Any) -> str:
    """Write the message for a data set without images.

    Args:
        dataset (Any): The data set.

    Returns:
        str: The message.
    """
    if _is_coco(dataset):
        try:
            _check_categories(dataset, 'train')
        except DataError as error:
            # The reason, if all annotations were left out.
            return str(error)
    return (
        f'{_name(dataset)} has no images: check its paths and suffixes, and that its images have '
        'annotations of the classes of the config'
    )


def _classes(dataset: Any) -> list[Any] | None:
    """Return the names of the classes, in the order of the labels. None if the data set has none."""
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    return list(classes) if isinstance(classes, (list, tuple)) else None


def _is_coco(dataset: Any) -> bool:
    """Find out whether mmdet's ``CocoDataset`` itself reads the annotations."""
    module = sys.modules.get('mmdet.datasets')
    if module is None or not _classes(dataset):
        return False
    readers = ('load_data_list', 'parse_data_info')
    return all(getattr(type(dataset), name, None) is getattr(module.CocoDataset, name) for name in readers)


def _steps(pipeline: Any) -> Iterator[Any]:
    """Yield the transforms of a pipeline, and those inside them."""
    for step in getattr(pipeline, 'transforms', None) or getattr(pipeline, 'subroutines', None) or ():
        yield step
        yield from _steps(step)


def _check_annotations(content: dict[str, Any], file: str, evaluated: bool) -> None:
    """Find annotations that mmdet would leave out without a word, or on which pycocotools would fail.

    Args:
        content (dict): Content of a COCO file, which mmdet has read.
        file (str): Name of the file.
        evaluated (bool): pycocotools reads the file too.

    Raises:
        DataError: If an annotation has an unknown category, or pycocotools would fail. Others are warnings.
    """
    known = {category['id'] for category in content['categories']}
    sizes = {image['id']: (image['width'], image['height']) for image in content['images']}
    # Files of images alone, such as those of test-dev, have no annotations. mmdet skips those with `ignore`.
    annotations = [annotation for annotation in content.get('annotations', []) if not annotation.get('ignore')]
    wrong = [annotation for annotation in annotations if annotation['category_id'] not in known]
    if wrong:
        numbers = sorted({annotation['category_id'] for annotation in wrong}, key=str)[:10]
        raise DataError(
            f'{file}: {len(wrong)} annotations have the category_id {", ".join(map(str, numbers))}, which is the id of '
            f'no category: the ids are {", ".join(map(str, sorted(known, key=str)[:20]))}. mmdet would leave them out. '
            'Correct category_id, or add the categories'
        )
    incomplete = sum('iscrowd' not in annotation for annotation in annotations)
    if incomplete and evaluated:
        raise DataError(
            f'{file}: {incomplete} annotations have no iscrowd, without which pycocotools cannot evaluate: set it to 0'
        )
    left_out, beyond = 0, 0
    for annotation in annotations:
        if annotation['image_id'] not in sizes:
            left_out += 1
            continue
        x, y, width, height = annotation['bbox']
        whole_width, whole_height = sizes[annotation['image_id']]
        inside = x < whole_width and y < whole_height and x + width > 0 and y + height > 0
        left_out += not inside or annotation['area'] <= 0 or width < 1 or height < 1
        # Annotations are often rounded up to the next pixel.
        beyond += inside and (min(x, y) < -1 or x + width > whole_width + 1 or y + height > whole_height + 1)
    if left_out:
        print_log(
            f'{file}: {left_out} of {len(annotations)} annotations are left out: their image is not in the file, or '
            'the box lies outside of it or is narrower than a pixel, or their area is 0',
            'current',
            logging.WARNING,
        )
    if beyond:
        print_log(
            f'{file}: {beyond} of {len(annotations)} boxes reach beyond their image: bbox must be '
            '[x, y, width, height] in pixels, with x and y of the upper left corner',
            'current',
            logging.WARNING,
        )


def _check_categories(dataset: Any, mode: str, evaluated: bool = False) -> None:
    """Compare the classes of mmdet's ``CocoDataset`` with the categories of its file, and check its annotations."""
    classes = _classes(dataset)
    if classes is None or not _is_coco(dataset):
        return
    # mmdet does not keep the categories.
    content = json.loads(get_text(dataset.ann_file, backend_args=dataset.backend_args))
    _check_annotations(content, dataset.ann_file, evaluated)
    names = {category['id']: category['name'] for category in content['categories']}
    found = [names[number] for number in dataset.cat_ids]
    missing = [name for name in classes if name not in found]
    in_order = found == classes[: len(found)]
    if not in_order or (missing and mode != 'train'):
        problem = f'has no category {", ".join(map(str, missing))}' if missing else f'has the order {", ".join(found)}'
        message = (
            f'{dataset.ann_file}: mmdet numbers the classes in the order of the categories in the file. The config has '
            f'the classes {", ".join(map(str, classes))}, but the file {problem}. Labels would get wrong names: change '
            'metainfo=dict(classes=...) of the data set, or the categories of the file. They may have no annotation'
        )
        if missing or mode != 'test':
            raise DataError(message)
        # The numbers are right if the model was trained with the same order.
        print_log(message, 'current', logging.WARNING)
    elif missing:
        print_log(f'{dataset.ann_file} has no category {", ".join(map(str, missing[:10]))}', 'current', logging.WARNING)
    ignored = [name for name in names.values() if name not in classes]
    if ignored:
        print_log(
            f'{dataset.ann_file}: annotations of {len(ignored)} categories that the config does not name are ignored: '
            f'{", ".join(ignored[:10])}',
            'current',
            logging.WARNING,
        )


def _coco_sizes(dataset: Any) -> dict[str, tuple[int, int]]:
    """Collect the height and width that COCO files give for each image. Other data sets have none.

    Raises:
        DataError: If an instance has no mask, but the pipeline reads masks.
    """
    sizes = {}
    for part in filter(_is_coco, _inner_datasets(dataset)):
        with_mask = any(getattr(step, 'with_mask', False) for step in _steps(part.pipeline))
        for index in range(len(part)):
            info = part.get_data_info(index)
            sizes[info['img_path']] = (info['height'], info['width'])
            if with_mask and not all('mask' in instance for instance in info['instances']):
                raise DataError(
                    f'{part.ann_file}: annotations of {info["img_path"]} have no segmentation, but the config reads '
                    'masks: add polygons, or use a model and pipelines without masks'
                )
    return sizes


def _check_same_classes(classes: list[Any] | None, origin: str, dataset: Any) -> None:
    """Compare the numbers of the classes of a data set with those that the model learns.

    Raises:
        DataError: If a class has another number.
    """
    own = _classes(dataset)
    # A model that gets the names of the classes as its input may be tested on others.
    if not classes or not own or own == classes or getattr(dataset, 'return_classes', False):
        return
    labels = {name: label for label, name in enumerate(classes)}
    moved = [(name, label) for label, name in enumerate(own) if labels.get(name, label) != label]
    if moved:
        name, label = moved[0]
        raise DataError(
            f'{_name(dataset)}: the class {name} has the label {label}, but {origin} has {labels[name]}. The classes '
            f'are {", ".join(map(str, own[:20]))}, and there {", ".join(map(str, classes[:20]))}. Folders of classes '
            'are numbered in alphabetical order: every split needs the same folders. An empty one will do'
        )


def _check_label_map(sample: BaseDataElement, labels: torch.Tensor, eight_bits: bool) -> None:
    """Compare a label map with the file that it was read from, and with its image.

    Args:
        sample (BaseDataElement): Sample of mmsegmentation.
        labels (Tensor): Its labels, after the pipeline.
        eight_bits (bool): mmsegmentation reads the file, as 8-bit numbers.

    Raises:
        DataError: If the file has several channels, another size than the image, or labels above 255.
    """
    from PIL import Image

    path = sample.get('seg_map_path')
    if labels.ndim != 3 or labels.shape[0] != 1:
        raise DataError(
            f'{path} has {labels.shape[-1]} channels: a label map has one channel (or a palette), whose values are the '
            'numbers of the classes. Convert its colours to these numbers'
        )
    try:
        image = Image.open(path)
    except (AttributeError, OSError):
        # Not a local file, or another format, which a transform of the user reads.
        return
    with image:
        height, width = sample.get('ori_shape', image.size[::-1])[:2]
        if image.size != (width, height):
            raise DataError(
                f'{path} has {image.size[0]}x{image.size[1]} pixels, but its image {sample.get("img_path")} has '
                f'{width}x{height}. Make a label map of the same size, without interpolation between labels. '
                'Photographs with an EXIF orientation are turned upright when they are read'
            )
        if eight_bits and image.mode[0] in 'IF' and (largest := np.asarray(image).max()) > 255:
            raise DataError(
                f'{path} has labels up to {largest}, but mmsegmentation reads 8 bits, so 256 becomes 0: use the '
                'numbers 0 to 254, and 255 for pixels to ignore'
            )


def _classes_of_head(model: Any) -> tuple[int, int | None, str]:
    """Find the head that takes the labels: its number of classes, or 0 if unknown, the label it ignores, its name."""
    while hasattr(model, 'module'):
        model = model.module
    roi_head = getattr(model, 'roi_head', None)
    for head in (
        getattr(model, 'decode_head', None),
        getattr(roi_head, 'bbox_head', None),
        getattr(model, 'bbox_head', None),
        getattr(model, 'head', None),
    ):
        # A cascade has a list of heads.
        head = head[-1] if isinstance(head, nn.ModuleList) else head
        count = getattr(head, 'num_classes', None)
        # A head of region proposals has one class for all labels.
        if isinstance(count, int) and 'RPN' not in type(head).__name__:
            # A head of mmsegmentation with one output channel tells two classes apart.
            count = 2 if getattr(head, 'out_channels', None) == 1 else count
            return count, getattr(head, 'ignore_index', None), type(head).__name__
    return 0, None, ''


@HOOKS.register_module()
class DataCheckHook(Hook):
    """Check the data, where the toolboxes would give a wrong result or an error that names no file.

    - A data set without images.
    - mmdet's ``CocoDataset``, if the config lists the classes in another order than the file, or one that the file
      lacks: labels would get wrong names. Another order is a warning before a test.
    - Annotations of a COCO file that mmdet would leave out, or that lack a mask; images of another size than the file
      gives.
    - Classes that have other labels in the data set of the evaluation than in that of the training.
    - Label maps in colour, of another size than the image, or with labels above 255.
    - Labels in a batch that are not below the number of classes. mmsegmentation would leave their pixels out of the
      metrics, and some heads of mmdet take their boxes for background.
    - Classes of a segmentation that no evaluated pixel has, which mIoU leaves out. This is a warning.

    ``tools/train.py`` and ``tools/test.py`` use it, unless ``custom_hooks`` of the config has it already.

    Args:
        strict (bool): Whether a fault of the data ends the run. If not, it is a warning, and what it leads to is up to
            the toolbox. Defaults to True.
    """

    def __init__(self, strict: bool = True) -> None:
        check_bool('strict', strict)
        self.strict = strict
        self._sizes: dict[str, tuple[int, int]] = {}
        self._checked: set[str | None] = set()
        self._trained_classes: list[Any] | None = None
        self._pixels = torch.zeros(256, dtype=torch.long)

    def before_train(self, runner: Runner) -> None:
        """Check the data sets of training and validation.

        Raises:
            DataError: If one has no images or does not fit the config.
        """
        dataset = runner.train_dataloader.dataset
        with self._refusal():
            self._check_dataset(dataset, 'train')
        if runner.val_loop is not None:
            with self._refusal():
                _check_same_classes(_classes(dataset), 'the training', runner.val_dataloader.dataset)
                self._check_dataset(runner.val_dataloader.dataset, 'val', runner.val_loop)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Remember the classes of the training."""
        meta = checkpoint.get('meta')
        meta = meta.get('dataset_meta') if isinstance(meta, dict) else None
        classes = meta.get('classes') if isinstance(meta, dict) else None
        self._trained_classes = list(classes) if isinstance(classes, (list, tuple)) else None

    def before_test(self, runner: Runner) -> None:
        """Check the data set of the test.

        Raises:
            DataError: If it has no images or lacks a class, or if a class has another number than in the training.
        """
        dataset = runner.test_dataloader.dataset
        with self._refusal():
            _check_same_classes(self._trained_classes, 'the training of the checkpoint', dataset)
            self._check_dataset(dataset, 'test', runner.test_loop)

    @contextlib.contextmanager
    def _refusal(self) -> Iterator[None]:
        """End the run with the sentence of a fault, or log it."""
        try:
            yield
        except DataError as error:
            if self.strict:
                raise
            print_log(str(error), 'current', logging.WARNING)

    def _check_dataset(self, dataset: Any, mode: str, loop: Any = None) -> None:
        if hasattr(dataset, '__len__') and len(dataset) == 0:
            raise DataError(no_images(next(_inner_datasets(dataset))))
        fault: list[str | None] = [None]
        if is_main_process():
            metrics = getattr(getattr(loop, 'evaluator', None), 'metrics', ())
            # Without a file of its own, mmdet's metric writes complete annotations.
            evaluated = any(getattr(metric, '_coco_api', None) is not None for metric in metrics)
            try:
                for part in _inner_datasets(dataset):
                    _check_categories(part, mode, evaluated)
            except DataError as error:
                fault = [str(error)]
        # All processes end, instead of waiting for the first one.
        broadcast_object_list(fault)
        if fault[0] is not None:
            raise DataError(fault[0])
        self._sizes.update(_coco_sizes(dataset))

    def _check_files(self, sample: BaseDataElement, labels: torch.Tensor | None, dataset: Any) -> None:
        """Compare the files of a sample with each other, once."""
        path, seg_map_path = sample.get('img_path'), sample.get('seg_map_path')
        found, expected = tuple(sample.get('ori_shape', ()))[:2], self._sizes.pop(path, None)
        if expected and found and found != expected:
            raise DataError(
                f'{path} has {found[1]}x{found[0]} pixels, but the annotation file gives '
                f'{expected[1]}x{expected[0]}. Boxes and masks would be at wrong places: scale the annotations to the '
                'image. Photographs with an EXIF orientation are turned upright when they are read'
            )
        if labels is not None and seg_map_path not in self._checked:
            self._checked.add(seg_map_path)
            module = sys.modules.get('mmseg.datasets.transforms')
            kinds = getattr(module, 'LoadAnnotations', ())
            parts = _inner_datasets(dataset)
            eight_bits = any(type(step) is kinds for part in parts for step in _steps(getattr(part, 'pipeline', None)))
            _check_label_map(sample, labels, eight_bits)

    def _before_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, mode: str = 'train') -> None:
        """Check the labels of a batch.

        Raises:
            DataError: If a label is not below the number of classes, and not the value for ignored pixels, or if files
                do not fit together.
        """
        samples = data_batch.get('data_samples') if isinstance(data_batch, dict) else None
        if not isinstance(samples, (list, tuple)):
            return
        loaders = dict(train='train_dataloader', val='val_dataloader', test='test_dataloader')
        dataset = getattr(getattr(runner, loaders[mode], None), 'dataset', None)
        if mode == 'train':
            count, ignored, owner = _classes_of_head(runner.model)
        else:
            # The metrics of mmsegmentation use the classes of the data set and ignore 255.
            count, ignored, owner = len(_classes(dataset) or ()), 255, type(dataset).__name__
        # Test-time augmentation gives a list of samples for each form of an image.
        flat = [part for item in samples for part in (item if isinstance(item, (list, tuple)) else [item])]
        with self._refusal():
            self._check_samples(flat, mode, dataset, count, ignored, owner)

    def _check_samples(
        self, samples: Sequence[Any], mode: str, dataset: Any, count: int, ignored: int | None, owner: str
    ) -> None:
        for sample in samples:
            if not isinstance(sample, BaseDataElement):
                continue
            labels = sample.gt_sem_seg.data if 'gt_sem_seg' in sample else None
            self._check_files(sample, labels, dataset)
            if not count:
                continue
            if labels is not None and ignored is not None:
                file = sample.get('seg_map_path')
                if mode != 'train':
                    self._pixels += torch.bincount(labels[labels >= 0].cpu(), minlength=256)[:256]
            elif mode != 'train':
                # A zero-shot evaluation has other classes than the model.
                continue
            elif 'gt_label' in sample:
                labels, file = sample.gt_label, sample.get('img_path')
            elif 'gt_instances' in sample and 'labels' in sample.gt_instances:
                labels, file = sample.gt_instances.labels, sample.get('img_path')
            else:
                continue
            wrong = labels >= count if ignored is None else (labels >= count) & (labels != ignored)
            if wrong.any():
                raise DataError(
                    f'{file or "an image"} has the labels {labels[wrong].unique().tolist()[:10]}, but {owner} has the '
                    f'classes 0 to {count - 1}. Correct the labels, or set num_classes of the heads'
                    f'{"" if ignored is None else " and reduce_zero_label of the data set"}'
                )

    def _report_missing_classes(self, dataset: Any) -> None:
        """Warn of classes that no pixel of the evaluated label maps has."""
        all_reduce(self._pixels)
        pixels, names = self._pixels.tolist(), _classes(dataset) or []
        self._pixels = torch.zeros(256, dtype=torch.long)
        missing = [str(name) for name, number in zip(names, pixels) if not number]
        if missing and sum(pixels):
            print_log(
                f'No pixel of the evaluated label maps has the class {", ".join(missing[:10])}'
                f'{f" and {len(missing) - 10} more" if len(missing) > 10 else ""}: mIoU leaves such classes out. '
                f'{pixels[255] / sum(pixels):.1%} of the pixels have the label 255, which is ignored',
                'current',
                logging.WARNING,
            )

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Warn of classes without a pixel."""
        self._report_missing_classes(runner.val_dataloader.dataset)

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Warn of classes without a pixel."""
        self._report_missing_classes(runner.test_dataloader.dataset)


@HOOKS.register_module()
class PictureNameHook(Hook):
    """Stop before a test that draws its predictions if two pictures would have the same file name.

    The hooks of mmpretrain and mmdet name a picture after the image without its folder, so the later one would replace
    the first. ``tools/test.py --show-dir`` uses this hook.
    """

    def before_test(self, runner: Runner) -> None:
        """Compare the names of all images of the test.

        Raises:
            DataError: If two images in different folders have the same name.
        """
        found: dict[str, str] = {}
        for dataset in _inner_datasets(runner.test_dataloader.dataset):
            for index in range(len(dataset)) if hasattr(dataset, 'get_data_info') else ():
                path = dataset.get_data_info(index).get('img_path')
                if path and found.setdefault(os.path.basename(path), path) != path:
                    raise DataError(
                        f'--show-dir: {found[os.path.basename(path)]} and {path} have the same name, so the picture of '
                        'one would replace that of the other: rename such images, evaluate their folders one by one, '
                        'or leave out --show-dir'
                    )
