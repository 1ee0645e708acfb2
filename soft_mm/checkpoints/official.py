"""Translation between the authors' state dicts and ours, with one table for both directions."""

import math
import re
from collections.abc import Mapping

import torch

# Each of our layers of a block, and the authors' layers whose rows are stacked to form it.
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
_BLOCKS = (_SOFTMAX_FREE_BLOCK, _SOFTMAX_FREE_BLOCK, _SOFTMAX_FREE_BLOCK, _SOFTMAX_BLOCK)
# Number of equal parts in the rows of a stacked layer. The first of the authors' layers is one part.
_FIRST_SHARE = {'attn.qv': 2, 'attn.qkv': 3}
_EXPECTED = "of the authors' SOFT classifiers: only checkpoints of their classification code can be converted"


def from_official(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the keys of the authors' state dict to ours.

    Args:
        state_dict (dict[str, Tensor]): State dict with the authors' keys: ``pos_embed{1..4}``, ``block{1..4}.*``,
            ``head.*`` and so on. The grids of the position embeddings must be square.

    Returns:
        dict[str, Tensor]: State dict with our keys: ``backbone.*`` and ``head.fc.*``.

    Raises:
        ValueError: If a key is unknown, if a layer to stack is missing or its shape does not fit, or if the grid of
            position embeddings is not square.
    """
    out: dict[str, torch.Tensor] = {}
    pieces: dict[str, list[torch.Tensor | None]] = {}
    for key, value in state_dict.items():
        if match := re.fullmatch(r'block([1-4])\.(\d+)\.(.+)\.(weight|bias)', key):
            stage = int(match[1]) - 1
            for layer, theirs in _BLOCKS[stage].items():
                if match[3] in theirs:
                    name = f'backbone.stages.{stage}.blocks.{match[2]}.{layer}.{match[4]}'
                    pieces.setdefault(name, [None] * len(theirs))[theirs.index(match[3])] = value
                    # A placeholder, to keep the order of the authors' keys.
                    out[name] = value
                    break
            else:
                raise ValueError(f'{key!r} is not a key {_EXPECTED}')
        elif match := re.fullmatch(r'patch_embed([1-4])\.proj\.(.+)', key):
            out[f'backbone.stages.{int(match[1]) - 1}.patch_embed.{match[2]}'] = value
        elif match := re.fullmatch(r'pos_embed([1-4])', key):
            stage = int(match[1]) - 1
            # Those of stage 4 begin with the class token.
            if value.ndim != 3 or value.shape[0] != 1 or 0 in value[:, int(stage == 3) :].shape:
                raise ValueError(f'{key!r} has the shape {tuple(value.shape)}: expected (1, positions, channels)')
            if stage == 3:
                out['backbone.stages.3.cls_pos_embed'] = value[:, :1]
                value = value[:, 1:]
            side = math.isqrt(value.shape[1])
            if side * side != value.shape[1]:
                raise ValueError(f'{key!r} holds {value.shape[1]} positions: expected a square grid')
            out[f'backbone.stages.{stage}.pos_embed'] = value.transpose(1, 2).reshape(1, -1, side, side)
        elif key == 'cls_token' or key.startswith('norm.'):
            out[f'backbone.stages.3.{key}'] = value
        elif key.startswith('head.'):
            out[f'head.fc.{key[5:]}'] = value
        else:
            raise ValueError(f'{key!r} is not a key {_EXPECTED}')
    for name, values in pieces.items():
        layers = [value for value in values if value is not None]
        if len(layers) < len(values):
            raise ValueError(
                f"{name!r} is stacked from {len(values)} of the authors' layers, but the checkpoint has {len(layers)} "
                'of them: give a complete checkpoint'
            )
        shapes = [tuple(value.shape) for value in layers]
        if any(not shape or shape[1:] != shapes[0][1:] for shape in shapes):
            raise ValueError(f"{name!r} is stacked from the authors' layers, whose shapes {shapes} do not fit together")
        out[name] = torch.cat(layers) if len(layers) > 1 else layers[0]
    return out


def to_official(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the keys of our state dict to the authors' keys, the inverse of :func:`from_official`.

    Args:
        state_dict (dict[str, Tensor]): State dict with our keys: ``backbone.*`` and ``head.fc.*``.

    Returns:
        dict[str, Tensor]: State dict with the authors' keys.

    Raises:
        ValueError: If a key is unknown.
    """
    out = {}
    for key, value in state_dict.items():
        if match := re.fullmatch(r'backbone\.stages\.([0-3])\.blocks\.(\d+)\.(.+)\.(weight|bias)', key):
            stage, block, layer, kind = int(match[1]), match[2], match[3], match[4]
            if layer not in _BLOCKS[stage]:
                raise ValueError(f'{key!r} is not a key of a SOFT classifier: expected backbone.* and head.fc.*')
            theirs = _BLOCKS[stage][layer]
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
            raise ValueError(f'{key!r} is not a key of a SOFT classifier: expected backbone.* and head.fc.*')
    return out
