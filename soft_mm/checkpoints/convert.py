"""Conversion of the authors' checkpoints. No other module of this package imports models."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from soft_mm.models import SOFT
from soft_mm.models.arch import parse_arch
from soft_mm.utils import atomic_path
from soft_mm.version import __version__

from .matching import compare_state_dicts, non_tensor_keys
from .official import from_official
from .reading import import_safetensors


@dataclass(frozen=True)
class Conversion:
    """Result of :func:`convert_checkpoint`.

    Attributes:
        state_dict: Weights with our keys: ``backbone.*`` and, with a classifier, ``head.fc.*``.
        arch: A key of :attr:`SOFT.arch_zoo`, or a dict with ``embed_dims``, ``num_heads``, ``depths``, ``ratios`` and
            ``conv_sizes``.
        normalized: Whether the attention is normalised. None if the file does not specify it.
        num_classes: Number of classes of the classifier, or None without a classifier.
        grids: Grids of the position embeddings, one per stage.
        weights: Entry of the file that holds the weights: ``'state_dict_ema'``, ``'state_dict'``, ``'model'``, or
            ``'bare'`` if the file itself is the state dict.
        dropped: The authors' keys that were left out on request.
        num_source: Number of keys of the source weights.
        unused: Entries of the file that were not converted: other weights, optimizer state, settings.
    """

    state_dict: dict[str, torch.Tensor]
    arch: str | dict[str, tuple[int, ...]]
    normalized: bool | None
    num_classes: int | None
    grids: tuple[tuple[int, int], ...]
    weights: str
    dropped: tuple[str, ...]
    num_source: int
    unused: tuple[str, ...]


def convert_checkpoint(
    checkpoint: dict[str, Any], weights: str | None = None, backbone_only: bool = False
) -> Conversion:
    """Convert a checkpoint of the authors.

    Args:
        checkpoint (dict): Output of :func:`~soft_mm.checkpoints.read_checkpoint`: a bare state dict, or a dict with a
            state dict under ``state_dict_ema``, ``state_dict`` or ``model``. Keys may have the prefix
            ``module.``. If there is an ``argparse.Namespace`` under ``args``, its ``model`` says whether the attention
            is normalised.
        weights (str | None): ``'ema'`` for averaged weights, or ``'raw'`` for the weights of the last step. Defaults to
            None: the averaged weights if the file has them.
        backbone_only (bool): Leave out the classifier. Defaults to False.

    Returns:
        Conversion: The converted weights. Every key of the source is converted or listed in ``dropped``, and every
        parameter of the backbone is set.

    Raises:
        ValueError: If the requested weights are missing, or do not form a SOFT model with the authors' names.
    """
    source, name = _find_weights(checkpoint, weights)
    official = {key.removeprefix('module.'): value for key, value in source.items()}
    if not any(key.startswith('block1.') for key in official):
        raise ValueError(
            f'not a SOFT model of the authors: the keys are {sorted(official)[:4]}...: expected keys block1.*; give a '
            "checkpoint of the authors' classification code"
        )
    dropped = tuple(key for key in official if backbone_only and key.startswith('head.'))
    ours = from_official({key: value for key, value in official.items() if key not in dropped})
    arch, grids = _read_arch(ours)
    num_classes = _read_classes(ours)
    with torch.device('meta'):
        backbone = SOFT(arch, out_type='cls_token')
    target = {f'backbone.{key}': value for key, value in backbone.state_dict().items()}
    diff = compare_state_dicts({key: value for key, value in ours.items() if not key.startswith('head.fc.')}, target)
    if diff.missing or diff.unexpected or diff.misshapen:
        raise ValueError(f"the weights do not form a SOFT model: {diff}; give the authors' unmodified file")
    named = next((known for known in SOFT.arch_zoo if parse_arch(known) == backbone.arch), None)
    unused = () if name == 'bare' else tuple(str(key) for key in checkpoint if key != name)
    normalized = _read_normalized(checkpoint)
    return Conversion(ours, named or arch, normalized, num_classes, grids, name, dropped, len(source), unused)


def _find_weights(checkpoint: dict[str, Any], weights: str | None) -> tuple[dict[str, torch.Tensor], str]:
    if weights not in (None, 'ema', 'raw'):
        raise ValueError(f"weights={weights!r} is unknown; choose 'ema', 'raw' or None")
    places = [key for key in ('state_dict_ema', 'state_dict', 'model') if isinstance(checkpoint.get(key), dict)]
    if weights == 'ema' and 'state_dict_ema' not in places:
        raise ValueError(
            f"weights='ema': the file has no averaged weights (state_dict_ema), only {places or 'a bare state dict'}; "
            'leave the option out'
        )
    if weights == 'raw':
        places = [key for key in places if key != 'state_dict_ema'] or places
        if places == ['state_dict_ema']:
            raise ValueError("weights='raw': the file has only averaged weights (state_dict_ema); leave the option out")
    source, name = (checkpoint[places[0]], places[0]) if places else (checkpoint, 'bare')
    non_tensors = non_tensor_keys(source)
    if non_tensors or not source:
        found = f'it has other entries, {non_tensors[:4]}' if non_tensors else 'it is empty'
        raise ValueError(f'not a SOFT checkpoint: {name}: expected a dict of names and tensors, but {found}')
    return source, name


def _read_arch(ours: Mapping[str, torch.Tensor]) -> tuple[dict[str, tuple[int, ...]], tuple[tuple[int, int], ...]]:
    """Infer the architecture and the grids of the position embeddings from keys and shapes."""
    dims, depths, heads, ratios, sizes, grids = [], [], [], [], [], []
    for stage in range(4):
        prefix = f'backbone.stages.{stage}.'
        position = ours.get(f'{prefix}pos_embed')
        blocks = sorted({int(key.split('.')[4]) for key in ours if key.startswith(f'{prefix}blocks.')})
        if position is None or not blocks:
            raise ValueError(f'stage {stage + 1} has no position embeddings or no blocks: expected all four stages')
        if blocks != list(range(len(blocks))):
            raise ValueError(f'stage {stage + 1} has blocks {blocks[:9]}: expected them numbered from 0')
        dims.append(position.shape[1])
        depths.append(len(blocks))
        grids.append((position.shape[-2], position.shape[-1]))
        if stage < 3:
            local = ours.get(f'{prefix}blocks.0.attn.local.weight')
            landmark = ours.get(f'{prefix}blocks.0.attn.landmark.weight')
            if local is None or landmark is None:
                raise ValueError(
                    f'stage {stage + 1} has no softmax-free attention: expected att.mha.attn.conv and Qlandmark_op in '
                    f'block{stage + 1}.0'
                )
            if local.ndim != 4 or landmark.ndim != 4:
                shapes = f'{tuple(local.shape)} and {tuple(landmark.shape)}'
                raise ValueError(f'stage {stage + 1}: filters of shapes {shapes}: expected four dimensions')
            heads.append(local.shape[0])
            sizes.append(local.shape[-1])
            ratios.append(landmark.shape[-1])
    # No shape of stage 4 depends on its number of heads. In the authors' models, all heads have the same width.
    heads.append(max(dims[3] * heads[0] // dims[0], 1))
    arch = dict(embed_dims=dims, num_heads=heads, depths=depths, ratios=[*ratios, 1], conv_sizes=sizes)
    return {key: tuple(value) for key, value in arch.items()}, tuple(grids)


def _read_classes(ours: Mapping[str, torch.Tensor]) -> int | None:
    weight, bias = ours.get('head.fc.weight'), ours.get('head.fc.bias')
    if weight is None and bias is None:
        return None
    if weight is None or bias is None or weight.ndim != 2 or len(weight) != len(bias):
        shapes = [None if value is None else tuple(value.shape) for value in (weight, bias)]
        raise ValueError(
            f'classifier: weight {shapes[0]}, bias {shapes[1]}: expected (classes, channels) and (classes,); to leave '
            'out the classifier, use --backbone-only'
        )
    return len(weight)


def _read_normalized(checkpoint: dict[str, Any]) -> bool | None:
    name = getattr(checkpoint.get('args'), 'model', None)
    text = name.lower() if isinstance(name, str) else ''
    match = re.fullmatch(r'soft_(norm_)?(tiny|small|medium|large|huge)', text)
    return bool(match[1]) if match else None


def save_conversion(conversion: Conversion, path: Path, normalized: bool, source: str) -> None:
    """Write a conversion atomically (temporary file, then rename).

    Args:
        conversion (Conversion): Conversion to write.
        path (Path): File to write. A ``.pth`` file holds a dict with ``meta`` and ``state_dict``. A ``.safetensors``
            file holds the weights, and the metadata as strings.
        normalized (bool): Whether the attention is normalised, for the metadata.
        source (str): Name of the authors' file, for the metadata.

    Raises:
        ValueError: If the file ends in ``.safetensors`` and safetensors is not installed.
        OSError: If the file cannot be written.
    """
    meta = dict(arch=conversion.arch, normalized=normalized, num_classes=conversion.num_classes, source=source)
    meta |= dict(weights=conversion.weights, soft_mm_version=__version__)
    with atomic_path(path) as temporary:
        if path.suffix == '.safetensors':
            tensors = {key: value.contiguous().clone() for key, value in conversion.state_dict.items()}
            metadata = {key: str(value) for key, value in meta.items()}
            import_safetensors(path).torch.save_file(tensors, temporary, metadata)
        else:
            torch.save(dict(meta=meta, state_dict=conversion.state_dict), temporary)


def config_of(conversion: Conversion, path: Path, normalized: bool) -> str:
    """Return the text of a config that loads a converted checkpoint.

    Args:
        conversion (Conversion): Conversion that was written.
        path (Path): File of the converted checkpoint.
        normalized (bool): Whether the attention is normalised.

    Returns:
        str: Config in Python. It loads the whole classifier from a ``.pth`` file. It loads only the backbone from a
        ``.safetensors`` file, or if there is no classifier.
    """
    arch = conversion.arch if isinstance(conversion.arch, str) else 'small'
    batch = '8xb128' if arch in ('tiny', 'small') else '8xb32'
    base = f'configs/imagenet/soft-{arch}{"-norm" * normalized}_{batch}_in1k.py'
    backbone, model = [], []
    if not isinstance(conversion.arch, str):
        facts = ', '.join(f'{key}={value}' for key, value in conversion.arch.items())
        backbone.append(f'arch=dict(_delete_=True, {facts})')
    if conversion.grids[0] != (56, 56):
        backbone.append(f'img_size={tuple(4 * side for side in conversion.grids[0])}')
    if conversion.num_classes is None or path.suffix == '.safetensors':
        # load_from needs a whole model in a .pth file. Otherwise init_cfg loads the backbone.
        backbone.append(f"init_cfg=dict(type='Pretrained', checkpoint={str(path)!r}, prefix='backbone.')")
    if backbone:
        model.append(f'backbone=dict({", ".join(backbone)})')
    if conversion.num_classes not in (None, 1000):
        model.append(f'head=dict(num_classes={conversion.num_classes})')
    lines = [f'_base_ = {base!r}']
    if model:
        lines.append(f'model = dict({", ".join(model)})')
    if conversion.num_classes is not None and path.suffix != '.safetensors':
        lines.append(f'load_from = {str(path)!r}')
    return '\n'.join(lines)
