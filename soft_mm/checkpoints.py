"""The authors' state dicts and ours: one table of names, read in both directions."""

import argparse
import codecs
import contextlib
import math
import os
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from .version import __version__

# Our layers of a block and the authors' layers that make up their rows.
_SOFTMAX_FREE_BLOCK = {
    'attn.qv': ('att.mha.W_q', 'att.mha.W_v'),
    'attn.landmark': ('att.mha.attn.Qlandmark_op',),
    'attn.landmark_norm': ('att.mha.attn.Qnorm_act.0',),
    'attn.local': ('att.mha.attn.conv',),
    'attn.proj': ('att.mha.ff',),
    'norm1': ('att.norm1',),
    'mlp.fc1': ('att.ff1',),
    'mlp.fc2': ('att.ff2',),
    'norm2': ('att.norm2',),
}
_SOFTMAX_BLOCK = {
    'norm1': ('norm1',),
    'attn.qkv': ('attn.q', 'attn.kv'),
    'attn.proj': ('attn.proj',),
    'norm2': ('norm2',),
    'mlp.fc1': ('mlp.fc1',),
    'mlp.fc2': ('mlp.fc2',),
}
# Of the rows of a stacked layer, the first in this many belongs to the first of the authors' layers.
_FIRST_SHARE = {'attn.qv': 2, 'attn.qkv': 3}


def _block_table(stage):
    return _SOFTMAX_BLOCK if stage == 3 else _SOFTMAX_FREE_BLOCK


def from_official(state_dict):
    """Rename the authors' state dict to ours.

    Args:
        state_dict (dict[str, Tensor]): the authors' names, ``pos_embed{1..4}``, ``block{1..4}.*``, ``head.*``, ...;
            the grids of the position embeddings are square.

    Returns:
        dict[str, Tensor]: ours, ``backbone.*`` and ``head.fc.*``.

    Raises:
        ValueError: for a name that the authors' models do not have, half of a stacked layer, shapes that cannot be
            stacked, or position embeddings on no square.
    """
    out, pieces = {}, {}
    for key, value in state_dict.items():
        if match := re.fullmatch(r'block([1-4])\.(\d+)\.(.+)\.(weight|bias)', key):
            stage = int(match[1]) - 1
            for layer, theirs in _block_table(stage).items():
                if match[3] in theirs:
                    name = f'backbone.stages.{stage}.blocks.{match[2]}.{layer}.{match[4]}'
                    pieces.setdefault(name, [None] * len(theirs))[theirs.index(match[3])] = value
                    # Keeps the order of the authors' keys.
                    out[name] = value
                    break
            else:
                raise ValueError(f"{key!r} is no key of the authors' SOFT models")
        elif match := re.fullmatch(r'patch_embed([1-4])\.proj\.(.+)', key):
            out[f'backbone.stages.{int(match[1]) - 1}.patch_embed.{match[2]}'] = value
        elif match := re.fullmatch(r'pos_embed([1-4])', key):
            stage = int(match[1]) - 1
            if value.ndim != 3:
                raise ValueError(f'{key!r} has the shape {tuple(value.shape)} and not (1, positions, channels)')
            if stage == 3:
                out['backbone.stages.3.cls_pos_embed'] = value[:, :1]
                value = value[:, 1:]
            side = math.isqrt(value.shape[1])
            if side * side != value.shape[1]:
                raise ValueError(f'{key!r} holds {value.shape[1]} positions, which are not the cells of a square grid')
            out[f'backbone.stages.{stage}.pos_embed'] = value.transpose(1, 2).reshape(1, -1, side, side)
        elif key == 'cls_token' or key.startswith('norm.'):
            out[f'backbone.stages.3.{key}'] = value
        elif key.startswith('head.'):
            out[f'head.fc.{key[5:]}'] = value
        else:
            raise ValueError(f"{key!r} is no key of the authors' SOFT models")
    for name, values in pieces.items():
        if any(value is None for value in values):
            raise ValueError(f"{name!r} is stacked from {len(values)} of the authors' layers, and not all are there")
        shapes = [tuple(value.shape) for value in values]
        if any(not shape or shape[1:] != shapes[0][1:] for shape in shapes):
            raise ValueError(f"{name!r} is stacked from the authors' layers, whose shapes {shapes} do not fit together")
        out[name] = torch.cat(values) if len(values) > 1 else values[0]
    return out


def to_official(state_dict):
    """Rename our state dict to the authors': the inverse of :func:`from_official`.

    Args:
        state_dict (dict[str, Tensor]): ours, ``backbone.*`` and ``head.fc.*``.

    Returns:
        dict[str, Tensor]: the authors' names.

    Raises:
        ValueError: for a name that our models do not have.
    """
    out = {}
    for key, value in state_dict.items():
        if match := re.fullmatch(r'backbone\.stages\.([0-3])\.blocks\.(\d+)\.(.+)\.(weight|bias)', key):
            stage, block, layer, kind = int(match[1]), match[2], match[3], match[4]
            if layer not in _block_table(stage):
                raise ValueError(f'{key!r} is no key of a SOFT classifier')
            theirs = _block_table(stage)[layer]
            first = len(value) // _FIRST_SHARE[layer] if len(theirs) > 1 else len(value)
            for name, rows in zip(theirs, (value[:first], value[first:])):
                out[f'block{stage + 1}.{block}.{name}.{kind}'] = rows
        elif match := re.fullmatch(r'backbone\.stages\.([0-3])\.patch_embed\.(.+)', key):
            out[f'patch_embed{int(match[1]) + 1}.proj.{match[2]}'] = value
        elif match := re.fullmatch(r'backbone\.stages\.([0-3])\.pos_embed', key):
            tokens = value.flatten(2).transpose(1, 2)
            if match[1] == '3':
                tokens = torch.cat([state_dict['backbone.stages.3.cls_pos_embed'], tokens], dim=1)
            out[f'pos_embed{int(match[1]) + 1}'] = tokens
        elif match := re.fullmatch(r'backbone\.stages\.3\.(cls_token|norm\.weight|norm\.bias)', key):
            out[match[1]] = value
        elif match := re.fullmatch(r'head\.fc\.(weight|bias)', key):
            out[f'head.{match[1]}'] = value
        elif key != 'backbone.stages.3.cls_pos_embed':
            raise ValueError(f'{key!r} is no key of a SOFT classifier')
    return out


@dataclass(frozen=True)
class Conversion:
    """A checkpoint of the authors in our names.

    Attributes:
        state_dict: ours, ``backbone.*`` and, unless left out, ``head.fc.*``.
        arch: a name of :attr:`SOFT.arch_zoo`, or a dict with ``embed_dims``, ``num_heads``, ``depths``, ``ratios``
            and ``conv_sizes``.
        normalized: True or False, or None where the file does not tell.
        num_classes: of the classifier, or None without one.
        grids: of the position embeddings, one a stage.
        weights: where the weights were found: ``'state_dict_ema'``, ``'state_dict'``, ``'model'`` or ``'bare'``.
        dropped: keys of the authors that were left out on purpose.
        num_source: number of keys that the weights had.
        beside: what else the file holds: other weights, the optimizer's state, settings.
    """

    state_dict: dict
    arch: object
    normalized: object
    num_classes: object
    grids: tuple
    weights: str
    dropped: tuple
    num_source: int
    beside: tuple


def read_checkpoint(path):
    """Read a checkpoint file without running code from it.

    Of what a pickle may hold beside tensors, ``argparse.Namespace`` alone is admitted.

    Args:
        path (str | Path): a file of PyTorch, or of safetensors where its name ends so.

    Returns:
        dict: what the file holds.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no checkpoint, is cut off, or holds code, or if safetensors is not installed.
    """
    return _read(path, _load_weights_only)


def load_weights(path):
    """Read what a backbone or a model starts from: a file, without running code from it, or an address, which is left
    to mmengine.

    Beside tensors and containers, a file may hold what mmengine's runner saves: arrays of NumPy, settings, and the
    history of its logs. They are not built, nothing but their names is looked at.

    Args:
        path (str): file of mmengine or of :func:`save_conversion`, or an address.

    Returns:
        dict: what the file holds; in the place of what was not built stand objects without content.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: as :func:`read_checkpoint`; for an address of a file of safetensors.
    """
    if '://' not in path:
        return _read(path, _load_without_history)
    if path.endswith('.safetensors'):
        raise ValueError(f'{path} is an address of safetensors, which mmengine does not read: download the file')
    from mmengine.runner.checkpoint import CheckpointLoader

    return CheckpointLoader.load_checkpoint(path, map_location='cpu', logger='silent')


def _read(path, load):
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist')
    with path.open('rb') as file:
        start = file.read(512).removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if start.startswith((b'<!', b'<html', b'<?xml')):
        raise ValueError(f'{path} is a web page and no checkpoint: download the file itself')
    if path.suffix == '.safetensors':
        safetensors = import_safetensors(path)
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, ValueError) as error:
            raise ValueError(f'{path} cannot be read as safetensors, it may be cut off: {error}') from None
    try:
        loaded = load(path)
    except Exception as error:
        # What the bytes of another file make the unpickler stumble over is any exception.
        if match := re.search(r'(?:unsupported global: )?GLOBAL [\w.]+|unrecognized function', str(error), re.I):
            raise ValueError(
                f'{path} is refused: it holds more than tensors and settings, which may run code when read ({match[0]})'
            ) from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise ValueError(f'{path} is no checkpoint of PyTorch, or is cut off ({reason})') from None
    if not isinstance(loaded, dict):
        raise ValueError(f'{path} holds a {type(loaded).__name__} and no dict of weights')
    return loaded


def _load_weights_only(path):
    if hasattr(torch.serialization, 'safe_globals'):
        admitted = torch.serialization.safe_globals([argparse.Namespace])
    else:
        admitted = contextlib.nullcontext()
        # Of PyTorch 2.4; before it the files that hold one are refused.
        getattr(torch.serialization, 'add_safe_globals', lambda names: None)([argparse.Namespace])
    with admitted:
        return torch.load(path, map_location='cpu', weights_only=True)


class _Unbuilt:
    """Stands where a checkpoint has what is not needed: takes what a pickle does to an object, and keeps nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass


class _History(_Unbuilt):
    """Stands for mmengine's HistoryBuffer."""


def _attribute(owner, name):
    # mmengine pickles statistics as getattr(HistoryBuffer, 'mean'); of anything else it might lead to code.
    if owner is not _History or name.startswith('_'):
        raise pickle.UnpicklingError(f'GLOBAL builtins.getattr of {name}')
    return _Unbuilt


_BUILT = {
    *(f'collections.{name}' for name in ('OrderedDict', 'Counter', 'defaultdict', 'deque')),
    *(
        f'{module}.{name}'
        for module in ('builtins', '__builtin__')
        for name in ('set', 'frozenset', 'slice', 'complex')
    ),
    *('torch.Size', 'torch.device', 'torch.serialization._get_layout'),
    *(f'torch._utils.{name}' for name in ('_rebuild_tensor', '_rebuild_tensor_v2', '_rebuild_parameter')),
}
_NOT_BUILT = {
    'argparse.Namespace': _Unbuilt,
    '_codecs.encode': _Unbuilt,
    'mmengine.logging.history_buffer.HistoryBuffer': _History,
    'mmengine.config.config.ConfigDict': _Unbuilt,
    **dict.fromkeys(('__builtin__.getattr', 'builtins.getattr'), _attribute),
    **dict.fromkeys(('numpy.ndarray', 'numpy.dtype'), _Unbuilt),
    **{
        f'numpy.{core}.multiarray.{name}': _Unbuilt for core in ('core', '_core') for name in ('_reconstruct', 'scalar')
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        full = f'{module}.{name}'
        if full in _NOT_BUILT:
            return _NOT_BUILT[full]
        if full in _BUILT or (module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f'GLOBAL {full}')


def _load_without_history(path):
    module = SimpleNamespace(
        __name__='soft_mm.checkpoints',
        Unpickler=_Unpickler,
        load=lambda *args, **options: _Unpickler(*args, **options).load(),
    )
    return torch.load(path, map_location='cpu', weights_only=False, pickle_module=module)


def import_safetensors(path):
    """The package ``safetensors``, for a file that is to be read or written.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise ValueError(f'{path} is a file of safetensors, which is not installed: pip install safetensors') from None
    return safetensors


def convert_checkpoint(checkpoint, weights=None, backbone_only=False):
    """Convert a checkpoint of the authors, as :func:`read_checkpoint` gives it.

    Args:
        checkpoint (dict): a bare state dict, or one under ``state_dict_ema``, ``state_dict`` or ``model``; names may
            have the prefix ``module.``; an ``argparse.Namespace`` under ``args`` tells the model.
        weights (str | None): ``'ema'``, ``'raw'``, or None for the averaged weights where there are any.
        backbone_only (bool): leave the classifier out.

    Returns:
        Conversion: every key of the source is in it or in its ``dropped``, every parameter of the model is reached.

    Raises:
        ValueError: if the weights asked for are not there, or are not those of a SOFT model of the authors.
    """
    from soft_mm.models import SOFT

    source, name = _find_weights(checkpoint, weights)
    official = {key.removeprefix('module.'): value for key, value in source.items()}
    if not any(key.startswith('block1.') for key in official):
        raise ValueError(
            f'this is no SOFT model of the authors: it has no keys block1.*, but {sorted(official)[:4]} and so on'
        )
    dropped = tuple(key for key in official if backbone_only and key.startswith('head.'))
    ours = from_official({key: value for key, value in official.items() if key not in dropped})
    arch, grids = _read_arch(ours)
    num_classes = _read_classes(ours)
    with torch.device('meta'):
        backbone = SOFT(arch, out_type='cls_token')
    target = {f'backbone.{key}': value.shape for key, value in backbone.state_dict().items()}
    for stage, grid in enumerate(grids):
        key = f'backbone.stages.{stage}.pos_embed'
        target[key] = (*target[key][:2], *grid)
    wrong = [
        f'{key} {tuple(ours[key].shape)} for {tuple(shape)}'
        for key, shape in target.items()
        if key in ours and ours[key].shape != shape
    ]
    missing = [key for key in target if key not in ours]
    surplus = [key for key in ours if key not in target and not key.startswith('head.fc.')]
    if missing or surplus or wrong:
        raise ValueError(
            f'the weights do not make up a SOFT model: {len(missing)} parameters missing {missing[:4]}, '
            f'{len(surplus)} unknown {surplus[:4]}, {len(wrong)} of another shape {wrong[:4]}'
        )
    known = {_arch_key(facts): known for known, facts in SOFT.arch_zoo.items()}
    named = known.get(_arch_key(arch)) if _usual(arch) else None
    beside = () if name == 'bare' else tuple(str(key) for key in checkpoint if key != name)
    normalized = _read_normalized(checkpoint)
    return Conversion(ours, named or arch, normalized, num_classes, grids, name, dropped, len(source), beside)


def _find_weights(checkpoint, weights):
    if weights not in (None, 'ema', 'raw'):
        raise ValueError(f"weights={weights!r} is unknown; choose 'ema' or 'raw'")
    places = [key for key in ('state_dict_ema', 'state_dict', 'model') if isinstance(checkpoint.get(key), dict)]
    if weights == 'ema' and 'state_dict_ema' not in places:
        raise ValueError(f'there are no averaged weights (state_dict_ema), only {places or "a bare state dict"}')
    if weights == 'raw':
        places = [key for key in places if key != 'state_dict_ema'] or places
        if places == ['state_dict_ema']:
            raise ValueError('there are only averaged weights (state_dict_ema)')
    source, name = (checkpoint[places[0]], places[0]) if places else (checkpoint, 'bare')
    strangers = [
        key for key, value in source.items() if not isinstance(key, str) or not isinstance(value, torch.Tensor)
    ]
    if strangers or not source:
        raise ValueError(f'the state dict ({name}) holds no tensors under {strangers[:4]}: this is no SOFT checkpoint')
    return source, name


def _read_arch(ours):
    """Architecture and grids off the shapes of our keys."""
    dims, depths, heads, ratios, sizes, grids = [], [], [], [], [], []
    for stage in range(4):
        prefix = f'backbone.stages.{stage}.'
        position = ours.get(f'{prefix}pos_embed')
        blocks = [int(key.split('.')[4]) for key in ours if key.startswith(f'{prefix}blocks.')]
        if position is None or not blocks:
            raise ValueError(f'stage {stage + 1} is not there: it has no position embeddings or no blocks')
        dims.append(position.shape[1])
        depths.append(max(blocks) + 1)
        grids.append(tuple(position.shape[-2:]))
        if stage < 3:
            local = ours.get(f'{prefix}blocks.0.attn.local.weight')
            landmark = ours.get(f'{prefix}blocks.0.attn.landmark.weight')
            if local is None or landmark is None:
                raise ValueError(f'stage {stage + 1} has no softmax-free attention')
            if local.ndim != 4 or landmark.ndim != 4:
                shapes = f'{tuple(local.shape)} and {tuple(landmark.shape)}'
                raise ValueError(f'stage {stage + 1}: filters of the shapes {shapes} are none of a convolution')
            heads.append(local.shape[0])
            sizes.append(local.shape[-1])
            ratios.append(landmark.shape[-1])
    # The shapes of stage 4 do not show its heads; their width is that of the others.
    heads.append(max(dims[3] * heads[0] // dims[0], 1))
    arch = dict(embed_dims=dims, num_heads=heads, depths=depths, ratios=[*ratios, 1], conv_sizes=sizes)
    return {key: tuple(value) for key, value in arch.items()}, tuple(grids)


def _arch_key(arch):
    return tuple(tuple(arch[key]) for key in ('embed_dims', 'num_heads', 'depths'))


def _usual(arch):
    return arch['ratios'] == (8, 4, 2, 1) and arch['conv_sizes'] == (9, 5, 3)


def _read_classes(ours):
    weight, bias = ours.get('head.fc.weight'), ours.get('head.fc.bias')
    if weight is None and bias is None:
        return None
    if weight is None or bias is None or weight.ndim != 2 or len(weight) != len(bias):
        shapes = [None if value is None else tuple(value.shape) for value in (weight, bias)]
        raise ValueError(f'the classifier does not tell its number of classes: weight {shapes[0]}, bias {shapes[1]}')
    return len(weight)


def _read_normalized(checkpoint):
    name = getattr(checkpoint.get('args'), 'model', None)
    match = (
        re.fullmatch(r'soft_(norm_)?(tiny|small|medium|large|huge)', name.lower()) if isinstance(name, str) else None
    )
    return bool(match[1]) if match else None


def save_conversion(conversion, path, normalized, source):
    """Write a conversion, whole or not at all.

    Args:
        conversion (Conversion): what to write.
        path (Path): ``.pth``, a dict with ``meta`` and ``state_dict``, or ``.safetensors``, the weights with the meta
            data as texts.
        normalized (bool): of the attention, for the meta data.
        source (str): name of the authors' file, for the meta data.

    Raises:
        ValueError: if safetensors is needed and not installed.
        OSError: if the file cannot be written.
    """
    part = path.with_name(f'.{path.name}.part')
    meta = dict(arch=conversion.arch, normalized=normalized, num_classes=conversion.num_classes, source=source)
    meta |= dict(weights=conversion.weights, soft_mm_version=__version__)
    try:
        if path.suffix == '.safetensors':
            tensors = {key: value.contiguous().clone() for key, value in conversion.state_dict.items()}
            metadata = {key: str(value) for key, value in meta.items()}
            import_safetensors(path).torch.save_file(tensors, part, metadata)
        else:
            torch.save(dict(meta=meta, state_dict=conversion.state_dict), part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def config_of(conversion, path, normalized):
    """The text of a config that loads a conversion: of a classifier, or of a backbone where there is no classifier.

    Args:
        conversion (Conversion): what was converted.
        path (Path): the file that it was written to.
        normalized (bool): of the attention.

    Returns:
        str: lines of Python.
    """
    named = isinstance(conversion.arch, str)
    arch = conversion.arch if named else 'small'
    batch = '8xb128' if arch in ('tiny', 'small') else '8xb32'
    base = f'configs/imagenet/soft-{arch}{"-norm" * normalized}_{batch}_in1k.py'
    backbone, model = [], []
    if not named:
        facts = ', '.join(f'{key}={value}' for key, value in conversion.arch.items())
        backbone.append(f'arch=dict(_delete_=True, {facts})')
    if conversion.grids[0] != (56, 56):
        backbone.append(f'img_size={tuple(4 * side for side in conversion.grids[0])}')
    if conversion.num_classes is None or path.suffix == '.safetensors':
        # mmengine's runner does not read safetensors, and a backbone alone is no whole model.
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
