"""Hooks of mmengine's runner."""

import logging
from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch.utils.hooks import RemovableHandle

from soft_mm.registry import HOOKS


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
