"""Parameters and multiply-adds of a model, including those of attention products and the Cholesky solve."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from soft_mm.utils import build_model, read_config, toolbox_scope

_aten = torch.ops.aten


# PyTorch's counter would count these operators as 0. The formulas take the shapes of the arguments.
def _cholesky_flops(matrix: Sequence[int], *_: Any, **__: Any) -> int:
    return torch.Size(matrix[:-2]).numel() * matrix[-1] ** 3 // 3


def _cholesky_solve_flops(right: Sequence[int], factor: Sequence[int], *_: Any, **__: Any) -> int:
    # Forward and backward substitution, m^2 / 2 multiply-adds per column each.
    return 2 * torch.Size(right).numel() * factor[-1]


def _fused_attention_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


_MORE_FORMULAE = {
    _aten.linalg_cholesky_ex: _cholesky_flops,
    _aten.cholesky_solve: _cholesky_solve_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu: _fused_attention_flops,
}


@dataclass(frozen=True)
class Part:
    """Cost of a module of a model, or of the whole model.

    Attributes:
        name: Name of the module in the model, ``''`` for the whole model.
        parameters: Number of parameters. Shared parameters count once.
        multiply_adds: Multiply-adds of one forward pass.
    """

    name: str
    parameters: int
    multiply_adds: int


def flop_counter() -> FlopCounterMode:
    """Create PyTorch's flop counter with additional formulas, for the Cholesky solve and fused attention on a CPU.

    Returns:
        FlopCounterMode: The counter, a context manager.
    """
    return FlopCounterMode(display=False, custom_mapping=_MORE_FORMULAE)


def count_multiply_adds(run: Callable[[], object]) -> int:
    """Count multiply-adds: half of the floating-point operations of matrix products and convolutions.

    Args:
        run (Callable[[], object]): Function that runs a forward pass.

    Returns:
        int: Multiply-adds.
    """
    with (counter := flop_counter()):
        run()
    return counter.get_total_flops() // 2


def parts_of(model: nn.Module, prefix: str = '') -> list[str]:
    """List the modules to count separately: the children of the model, of its backbone, and of module lists.

    Args:
        model (nn.Module): A model or a backbone.
        prefix (str): Prefix of every name. Defaults to ''.

    Returns:
        list[str]: Names of the modules. Modules without parameters are left out.
    """
    names: list[str] = []
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            names += [f'{prefix}{name}.{index}' for index in range(len(child))]
        elif name == 'backbone':
            names += parts_of(child, f'{prefix}{name}.')
        elif next(child.parameters(), None) is not None:
            names.append(prefix + name)
    return names


def model_complexity(model: nn.Module, run: Callable[[], object]) -> list[Part]:
    """Count the parameters and multiply-adds of a model and of its modules.

    Args:
        model (nn.Module): The model.
        run (Callable[[], object]): Function that runs one forward pass of the model.

    Returns:
        list[Part]: The modules of :func:`parts_of`, then the whole model. Operations outside these modules count for
        the whole model only.
    """
    with torch.no_grad(), (counter := flop_counter()):
        run()
    root = type(model).__name__
    counts = {name: sum(by_operator.values()) for name, by_operator in counter.get_flop_counts().items()}

    def flops(name: str) -> int:
        # The counter sees forward calls only. If the model calls another method of a module, sum its children.
        if f'{root}.{name}' in counts:
            return counts[f'{root}.{name}']
        return sum(flops(f'{name}.{child}') for child, _ in model.get_submodule(name).named_children())

    parts = [Part(name, _count_parameters(model.get_submodule(name)), flops(name) // 2) for name in parts_of(model)]
    return [*parts, Part('', _count_parameters(model), counter.get_total_flops() // 2)]


def _count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def encodes_sequences(backbone: Mapping[str, Any]) -> bool:
    """Return whether a backbone encodes sequences of token ids instead of images.

    Args:
        backbone (dict): Config of the backbone.

    Returns:
        bool: True if the config has a ``vocab_size``.
    """
    return 'vocab_size' in backbone


def random_input(
    backbone: Mapping[str, Any], size: Sequence[int], batch_size: int = 1, device: torch.device | str | None = None
) -> Tensor:
    """Draw a random input of a backbone.

    Args:
        backbone (dict): Config of the backbone.
        size (tuple[int, ...]): ``(H, W)`` in pixels. For a sequence ``(n,)`` or ``(1, n)``.
        batch_size (int): Number of images or sequences. Defaults to 1.
        device (torch.device | str | None): Device. Defaults to None: the CPU.

    Returns:
        Tensor: Images ``(B, C, H, W)``, or token ids ``(B, n)`` for a sequence encoder.
    """
    if encodes_sequences(backbone):
        return torch.randint(1, backbone['vocab_size'], (batch_size, size[-1]), device=device)
    return torch.rand(batch_size, backbone.get('in_channels', 3), *size, device=device)


def config_complexity(config: str | Path, shape: Sequence[int], backbone_only: bool = False) -> list[Part]:
    """Count the parameters and multiply-adds of the model of a config for one input.

    Classifiers and segmentors run on tensors without data, which costs no computation. Detectors select proposals by
    their values, and some heads use kernels of mmcv, so these models run on tensors with data.

    Args:
        config (str | Path): Config file of mmpretrain, mmdet, mmsegmentation or mmrotate. Of mmpose and mmaction2, the
            backbone alone is counted.
        shape (tuple[int, ...]): ``(H, W)`` of the image in pixels. For a sequence ``(n,)`` or ``(1, n)``.
        backbone_only (bool): Count the backbone alone. Defaults to False.

    Returns:
        list[Part]: See :func:`model_complexity`.

    Raises:
        FileNotFoundError: If the config does not exist.
        ValueError: If the config has no model (or backbone, if requested), if it encodes sequences and the shape is
            neither ``(n,)`` nor ``(1, n)``, or if it is of mmpose or mmaction2 and not only the backbone is requested.
    """
    cfg = read_config(config)
    if 'model' not in cfg or (backbone_only and 'backbone' not in cfg.model):
        raise ValueError(f'{config} has no `model`{".backbone" * backbone_only}; give the config of a whole model')
    backbone = cfg.model.get('backbone', {})
    if encodes_sequences(backbone) and math.prod(shape[:-1]) != 1:
        raise ValueError(
            f'{config} encodes sequences: shape={tuple(shape)}: expected 1 and the number of tokens (--shape 1 N)'
        )
    if cfg.get('default_scope') in ('mmpose', 'mmaction') and not backbone_only:
        raise ValueError(
            f'{config}: models of {cfg.default_scope} take no single image: count the backbone alone (--backbone)'
        )
    # The number of proposals of a detector depends on its random weights, so they are seeded.
    with toolbox_scope(cfg) as scope, torch.random.fork_rng([]):
        torch.manual_seed(0)
        # The counter fails if a module is called with a parameter that requires a gradient.
        model: Any = build_model(cfg, backbone_only).eval().requires_grad_(False)
        image = random_input(backbone, shape)
        if scope in ('mmdet', 'mmrotate') and not backbone_only:
            from mmdet.structures import DetDataSample

            sizes = dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'), tuple(shape))
            samples = [DetDataSample(metainfo=dict(sizes, scale_factor=(1.0, 1.0)))]
            return model_complexity(model, lambda: model(image, samples, mode='tensor'))
        if scope == 'mmseg' and not backbone_only:
            # The forward method of some heads, such as Mask2Former's, needs more arguments than mode='tensor' passes.
            metas = [dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape'), tuple(shape))]
            model.forward = functools.partial(model.encode_decode, batch_img_metas=metas)
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                return model_complexity(model, lambda: model(image))
        except RuntimeError:
            # Kernels of mmcv need tensors with data.
            return model_complexity(model, lambda: model(image))
