"""Hooks of mmengine's runner."""

import logging
import os
from collections.abc import Container
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
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
