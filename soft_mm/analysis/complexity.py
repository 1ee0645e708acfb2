"""Parameters and multiply-adds, those of attention products and of the direct solve included."""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.registry import MODELS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from soft_mm.inference import toolbox_scope

_aten = torch.ops.aten


def _cholesky_flops(shape, *args, out_shape=None, **kwargs):
    return torch.Size(shape[:-2]).numel() * shape[-1] ** 3 // 3


def _cholesky_solve_flops(right_shape, factor_shape, *args, out_shape=None, **kwargs):
    # A forward and a backward substitution, each m^2 / 2 multiply-adds for every column.
    return 2 * torch.Size(right_shape).numel() * factor_shape[-1]


def _attention_flops(query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs):
    return sdpa_flop_count(query_shape, key_shape, value_shape)


# What PyTorch's counter leaves out.
_MORE_FORMULAE = {
    _aten.linalg_cholesky_ex: _cholesky_flops,
    _aten.cholesky_solve: _cholesky_solve_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}


@dataclass(frozen=True)
class Part:
    """One row of the table: a part of a model.

    Attributes:
        name: of the module within the model, ``''`` for the whole.
        parameters: number of parameters, each counted once.
        multiply_adds: of one forward.
    """

    name: str
    parameters: int
    multiply_adds: int


def flop_counter():
    """PyTorch's flop counter with formulae for the direct solve and for fused attention on a CPU."""
    return FlopCounterMode(display=False, custom_mapping=_MORE_FORMULAE)


def count_multiply_adds(run):
    """Multiply-adds of ``run()``, half of the floating point operations of its products and convolutions.

    Args:
        run (Callable[[], object]): a forward.

    Returns:
        int: multiply-adds.
    """
    counter = flop_counter()
    with counter:
        run()
    return counter.get_total_flops() // 2


def parts_of(model, prefix=''):
    """Names of the modules that the table shows: children, those of a backbone one by one, and entries of lists.

    Args:
        model (nn.Module): a model, or a backbone.
        prefix (str): put before every name.

    Returns:
        list[str]: names.
    """
    names = []
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            names += [f'{prefix}{name}.{index}' for index in range(len(child))]
        elif name == 'backbone':
            names += parts_of(child, f'{prefix}{name}.')
        elif next(child.parameters(), None) is not None:
            names.append(prefix + name)
    return names


def model_complexity(model, run):
    """Count a model, as a whole and part by part.

    Args:
        model (nn.Module): the model.
        run (Callable[[], object]): one forward of it.

    Returns:
        list[Part]: the parts in the order of the model, and the whole last. What lies between the parts, such as
            position embeddings of the model itself, is in the whole alone.
    """
    counter = flop_counter()
    with torch.no_grad(), counter:
        run()
    root = type(model).__name__
    counts = {name: sum(by_operator.values()) for name, by_operator in counter.get_flop_counts().items()}

    def flops(name):
        # Some parts are entered by a method of their own, not by a call, and only their children are.
        if f'{root}.{name}' in counts:
            return counts[f'{root}.{name}']
        return sum(flops(f'{name}.{child}') for child, _ in model.get_submodule(name).named_children())

    parts = [Part(name, _count_parameters(model.get_submodule(name)), flops(name) // 2) for name in parts_of(model)]
    return [*parts, Part('', _count_parameters(model), counter.get_total_flops() // 2)]


def _count_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def encodes_sequences(backbone):
    """Whether the config of a backbone is that of an encoder of sequences, which takes ids of tokens."""
    return 'vocab_size' in backbone


def random_input(backbone, size, batch_size=1, device=None):
    """What a backbone takes: images ``(B, C, H, W)``, or for an encoder of sequences ids ``(B, n)``.

    Args:
        backbone (dict): its config.
        size (tuple[int, ...]): height and width, or the tokens, with or without a 1 before them.
        batch_size (int): images or sequences. Defaults to 1.
        device (torch.device | str | None): where. Defaults to None, the CPU.

    Returns:
        Tensor: the input.
    """
    if encodes_sequences(backbone):
        return torch.randint(1, backbone['vocab_size'], (batch_size, size[-1]), device=device)
    return torch.rand(batch_size, backbone.get('in_channels', 3), *size, device=device)


def config_complexity(config, shape, backbone_only=False):
    """Count the model of a config at an input size.

    Nothing is computed but in a detector, which selects its proposals by their values, and in heads with kernels of
    mmcv's own.

    Args:
        config (str | Path): config file of mmpretrain, mmdet or mmsegmentation.
        shape (tuple[int, ...]): height and width of the one image, in pixels; of a sequence ``(n,)`` or
            ``(1, n)``.
        backbone_only (bool): the backbone alone. Defaults to False.

    Returns:
        list[Part]: see :func:`model_complexity`.

    Raises:
        FileNotFoundError: if there is no such config.
        ValueError: if the config has no model, or no backbone where that alone is asked for; for a shape that
            is none of a sequence.
    """
    cfg = Config.fromfile(config)
    if 'model' not in cfg or (backbone_only and 'backbone' not in cfg.model):
        raise ValueError(f'{config} has no `model`{".backbone" * backbone_only}; give the config of a whole model')
    backbone = cfg.model.get('backbone', {})
    if encodes_sequences(backbone) and math.prod(shape[:-1]) != 1:
        raise ValueError(
            f'{config} encodes sequences: shape={tuple(shape)} must be 1 and the number of tokens (--shape 1 N)'
        )
    # Seeded, for the proposals of a detector depend on the weights.
    with toolbox_scope(cfg) as scope, torch.random.fork_rng([]):
        torch.manual_seed(0)
        # The counter asks parameters that are handed to a module for their gradient's function, and there is none.
        model = MODELS.build(cfg.model.backbone if backbone_only else cfg.model).eval().requires_grad_(False)
        image = random_input(backbone, shape)
        if scope == 'mmdet' and not backbone_only:
            from mmdet.structures import DetDataSample

            sizes = dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'), tuple(shape))
            samples = [DetDataSample(metainfo=dict(sizes, scale_factor=(1.0, 1.0)))]
            return model_complexity(model, lambda: model(image, samples, mode='tensor'))
        if scope == 'mmseg' and not backbone_only:
            # Some heads have a forward for prediction alone.
            metas = [dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape'), tuple(shape))]
            model.forward = functools.partial(model.encode_decode, batch_img_metas=metas)
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                return model_complexity(model, lambda: model(image))
        except RuntimeError:
            # Kernels of mmcv's own take tensors with data only.
            return model_complexity(model, lambda: model(image))
