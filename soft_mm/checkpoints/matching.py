"""Comparison of a checkpoint with the model that should load it."""

import ast
import re
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soft_mm.ops.kernel import compute_dtype

_BASELINES = tuple(
    f'{name}Attention'
    for name in ('Softmax', 'Linformer', 'Performer', 'Nystrom', 'SpatialReduction', 'GaussianKernel')
)


def non_tensor_keys(state_dict: Mapping[Any, Any]) -> list[Any]:
    """List the keys of a state dict that are not strings or whose values are not dense tensors of real numbers.

    Args:
        state_dict (dict): State dict to check.

    Returns:
        list: The keys, empty for a proper state dict.
    """
    return [key for key, value in state_dict.items() if not isinstance(key, str) or not _is_plain(value)]


def _is_plain(value: object) -> bool:
    """Return whether a value is a dense tensor of real numbers."""
    if not isinstance(value, Tensor):
        return False
    return value.layout == torch.strided and not value.is_quantized and not value.is_complex()


def conversion_command(source: str, target: str, normalized: bool) -> str:
    """Return the command that converts a checkpoint of the authors.

    Args:
        source (str): The authors' file.
        target (str): File to write.
        normalized (bool): Whether the attention is normalised.

    Returns:
        str: The command in backticks. It has the full path of the tool if soft_mm is used from its clone.
    """
    tool = Path(__file__).resolve().parents[2] / 'tools' / 'convert_checkpoint.py'
    name = tool if tool.is_file() else 'tools/convert_checkpoint.py'
    command = ['python', str(name), source, target, *['--normalized'] * normalized]
    return f'`{shlex.join(command)}`'


def find_state_dict(checkpoint: dict[str, Any], path: str) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint: its entry ``state_dict``, or the checkpoint itself.

    Args:
        checkpoint (dict): Content of the file.
        path (str): File of the checkpoint, for the message.

    Returns:
        dict[str, Tensor]: The state dict.

    Raises:
        ValueError: If the state dict is not a dict of tensors.
    """
    state_dict = checkpoint.get('state_dict', checkpoint)
    if not isinstance(state_dict, dict):
        raise ValueError(f'{path}: state_dict is a {type(state_dict).__name__}: expected a dict of tensors')
    if non_tensors := non_tensor_keys(state_dict):
        raise ValueError(
            f'{path}: expected a dict of tensors, but the entries {non_tensors[:4]} are not dense tensors of real '
            f'numbers. To convert a checkpoint of the authors, run '
            f'{conversion_command(path, "converted.pth", normalized=False)}, with --normalized if its attention is '
            'normalised'
        )
    return state_dict


@dataclass(frozen=True)
class StateDictDiff:
    """Differences between a state dict and the state dict that a model expects.

    Attributes:
        missing: Keys that only the model has.
        unexpected: Keys that only the checkpoint has.
        misshapen: One text ``'key found_shape for expected_shape'`` per key with another shape.
        resized: Keys of position embeddings with the same channels on another grid. They fit after resizing.
    """

    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]
    resized: list[str]

    @property
    def fits(self) -> bool:
        """bool: Whether there are no differences but resized position embeddings."""
        return not (self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        return (
            f'{len(self.missing)} missing {self.missing[:4]}, {len(self.unexpected)} unexpected {self.unexpected[:4]}, '
            f'{len(self.misshapen)} of another shape {self.misshapen[:4]}'
        )


def compare_state_dicts(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> StateDictDiff:
    """Compare the keys and shapes of two state dicts.

    Args:
        found (dict[str, Tensor]): State dict of a checkpoint.
        expected (dict[str, Tensor]): State dict of a model.

    Returns:
        StateDictDiff: The differences.
    """
    differing = [key for key in expected if key in found and found[key].shape != expected[key].shape]
    resized = [key for key in differing if key.endswith('.pos_embed') and _same_channels(found[key], expected[key])]
    misshapen = [key for key in differing if key not in resized]
    return StateDictDiff(
        missing=[key for key in expected if key not in found],
        unexpected=[key for key in found if key not in expected],
        misshapen=[f'{key} {tuple(found[key].shape)} for {tuple(expected[key].shape)}' for key in misshapen],
        resized=resized,
    )


def _same_channels(found: Tensor, expected: Tensor) -> bool:
    return found.ndim == expected.ndim == 4 and found.shape[:2] == expected.shape[:2] and found.numel() > 0


def check_whole_model(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str) -> None:
    """Check that a checkpoint has every weight of a model. Toolboxes keep the random values of missing weights.

    Args:
        found (dict[str, Tensor]): State dict of the checkpoint.
        expected (dict[str, Tensor]): State dict of the model.
        path (str): File of the checkpoint, for the message.

    Raises:
        ValueError: If weights are missing or have another shape. Position embeddings may have another grid.
    """
    diff = compare_state_dicts(found, expected)
    if diff.missing or diff.misshapen:
        raise ValueError(
            f'{path} does not fit the model of this config. Of its {len(expected)} weights: {diff}. Give the config '
            'with which the checkpoint was trained'
        )


def _trained_forms(text: object) -> set[bool]:
    """Return the values of ``normalized`` in the text of a config with a SOFT backbone, without running the text.

    The set is empty if the text has no SOFT backbone or cannot be read.
    """
    try:
        nodes = list(ast.walk(ast.parse(text))) if isinstance(text, str) else []
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    forms = set()
    for options in map(_keywords, nodes):
        if _last_name(options.get('type'), '') != 'SOFT':
            continue
        attention = options.get('attention', ast.Constant(None))
        parts = attention.elts if isinstance(attention, (ast.List, ast.Tuple)) else [attention]
        for stage, part in enumerate(map(_keywords, parts)):
            kind = _last_name(part.get('type'), 'SoftmaxFreeAttention' if stage < 3 else 'SoftmaxAttention')
            if kind == 'SoftmaxFreeAttention':
                forms.add(bool(_constant(part.get('normalized'), False)))
            elif kind not in _BASELINES:
                # A type of other code may be normalised by default.
                return set()
    return forms


def _last_name(node: ast.AST | None, default: str) -> str:
    return str(_constant(node, default)).rpartition('.')[2]


def _keywords(node: ast.AST) -> dict[str | None, ast.expr]:
    return {keyword.arg: keyword.value for keyword in node.keywords} if isinstance(node, ast.Call) else {}


def _constant(node: ast.AST | None, default: object = None) -> object:
    return node.value if isinstance(node, ast.Constant) else default


def check_normalized(checkpoint: Mapping[str, Any], normalized: Collection[bool], path: str) -> None:
    """Check that attention is normalised if and only if it is in a checkpoint.

    The weights have the same names and shapes in both forms, so a mistake would remain unnoticed. A checkpoint of
    ``tools/convert_checkpoint.py`` says which form it has. A checkpoint of mmengine's runner has the text of the
    training's config, which is read without running it. Other checkpoints are not checked.

    Args:
        checkpoint (dict): Content of the file.
        normalized (Collection[bool]): The option ``normalized`` of each softmax-free attention of the model.
        path (str): File of the checkpoint, for the message.

    Raises:
        ValueError: If an attention has the other form.
    """
    meta = checkpoint.get('meta')
    # Metadata of safetensors are strings.
    recorded = str(meta.get('normalized')) if isinstance(meta, dict) else ''
    if recorded in ('True', 'False') and any(str(form) != recorded for form in normalized):
        found, option = ('normalised', 'without') if recorded == 'True' else ('plain', 'with')
        raise ValueError(
            f'the attention in {path} is {found}, as recorded by tools/convert_checkpoint.py, but the config has '
            f'normalized={recorded != "True"}. Set normalized={recorded} in the attention. If the record is wrong, '
            f'convert the file of the authors again {option} --normalized'
        )
    trained = _trained_forms(meta.get('cfg')) if isinstance(meta, dict) else set()
    if trained and not set(normalized) <= trained:
        raise ValueError(
            f'the attention in {path} was trained with normalized={_describe(trained)}, but the config has '
            f'normalized={_describe(set(normalized))}: give the config of the training, or set the same value'
        )


def _describe(forms: set[bool]) -> str:
    return ' and '.join(map(str, sorted(forms)))


@dataclass(frozen=True)
class BackboneFit:
    """Weights for a backbone, found in a checkpoint.

    Attributes:
        weights: State dict with the keys of the backbone.
        resized: Keys of position embeddings that must be resized.
        fresh: Names of the attentions that do not fit the checkpoint and keep their initial values.
        report: One line for the log: which keys of the checkpoint are loaded, resized or unused.
    """

    weights: dict[str, Tensor]
    resized: list[str]
    fresh: list[str]
    report: str


def adapt_channels(
    state_dict: Mapping[str, Tensor], prefix: str, channels: int, rule: str | None
) -> tuple[Mapping[str, Tensor], str]:
    """Change the first convolution of a checkpoint for images with another number of channels.

    Args:
        state_dict (dict[str, Tensor]): State dict of the checkpoint.
        prefix (str): Prefix of the backbone's keys in the checkpoint.
        channels (int): Channels ``C`` of the images.
        rule (str | None): ``'mean'``: every channel gets the mean weight of the checkpoint's ``c`` channels, times
            ``c / C``, so an image with equal channels gives the same output. ``'zero'``: new channels get zeros and
            come last, so the output does not depend on them at first. None: no change.

    Returns:
        tuple[dict[str, Tensor], str]: State dict, and a text for the log, empty without a change.

    Raises:
        ValueError: If the rule is unknown, or is ``'zero'`` for fewer channels than the checkpoint has.
    """
    if rule not in (None, 'mean', 'zero'):
        raise ValueError(f"new_channels={rule!r} in init_cfg: expected 'mean', 'zero' or None")
    key = f'{prefix}{"." * (prefix != "" and not prefix.endswith("."))}stages.0.patch_embed.0.weight'
    weight = state_dict.get(key)
    if rule is None or weight is None or weight.ndim != 4 or weight.numel() == 0 or weight.shape[1] == channels:
        return state_dict, ''
    given = weight.shape[1]
    if rule == 'mean':
        new = weight.to(compute_dtype(weight)).mean(1, keepdim=True).repeat(1, channels, 1, 1) * (given / channels)
    elif channels > given:
        new = torch.cat([weight, weight.new_zeros(len(weight), channels - given, *weight.shape[2:])], 1)
    else:
        raise ValueError(f"new_channels='zero' cannot make {given} channels {channels}: set new_channels='mean'")
    return {**state_dict, key: new}, f'; {key} changed from {given} to {channels} channels by the rule {rule!r}'


def _without(keys: Collection[str], *state_dicts: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{key: value for key, value in state_dict.items() if key not in keys} for state_dict in state_dicts]


def _misfit_attentions(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], stages: Collection[int]
) -> tuple[list[str], set[str]]:
    """Return the names of the expected attentions of these stages that do not fit, and the keys that belong to them.

    These are the keys of the attentions on both sides, and of a class token that only one side has.
    """
    attentions: dict[str, list[dict[str, torch.Size]]] = {}
    for side, state_dict in enumerate((expected, found)):
        for key, value in state_dict.items():
            match = re.match(r'(stages\.(\d+)\.blocks\.\d+\.attn)\.', key)
            if match and int(match[2]) in stages:
                attentions.setdefault(match[1], [{}, {}])[side][key] = value.shape
    misfits = {name: {*needed, *given} for name, (needed, given) in attentions.items() if needed and needed != given}
    prefixes = {name.partition('.blocks.')[0] for name in misfits}
    tokens = {f'{prefix}.{name}' for prefix in prefixes for name in ('cls_token', 'cls_pos_embed')}
    return list(misfits), {
        *(tokens & (found.keys() ^ expected.keys())),
        *(key for keys in misfits.values() for key in keys),
    }


def match_backbone(
    state_dict: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    prefix: str,
    path: str,
    normalized: bool,
    fresh_attention: Collection[int] = (),
) -> BackboneFit:
    """Find the weights of a backbone in a checkpoint.

    Args:
        state_dict (dict[str, Tensor]): State dict of the checkpoint.
        expected (dict[str, Tensor]): State dict of the backbone. It has only the stages that ``out_indices`` needs.
        prefix (str): Prefix of the backbone's keys in the checkpoint, such as ``'backbone.'``.
        path (str): File of the checkpoint, for messages.
        normalized (bool): Whether the backbone has normalised attention, for messages.
        fresh_attention (Collection[int]): Indices of stages whose attentions keep their initial values if they do not
            fit the checkpoint. A class token belongs to the attention of its stage. Defaults to ().

    Returns:
        BackboneFit: The weights, and what was found.

    Raises:
        ValueError: If a key is missing, unexpected or of another shape, or if the checkpoint has the authors' names.
            Position embeddings on another grid are allowed.
    """
    if prefix and not prefix.endswith('.'):
        prefix += '.'
    if any(key.removeprefix('module.').startswith('block1.') for key in state_dict):
        command = conversion_command(path, 'converted.pth', normalized)
        raise ValueError(f"{path} has the authors' names: convert it by {command}")
    found = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    stages = {key.split('.')[1] for key in expected if key.startswith('stages.')}
    unused = [key for key in found if key.startswith('stages.') and key.split('.')[1] not in stages]
    used = {key: value for key, value in found.items() if key not in unused}
    fresh, fresh_keys = _misfit_attentions(used, expected, fresh_attention)
    diff = compare_state_dicts(*_without(fresh_keys, used, expected))
    if not diff.fits:
        hint = ''
        if len(diff.missing) == len(expected):
            prefixes = sorted({key.split('.')[0] for key in state_dict})
            hint = f'. The checkpoint has keys under {prefixes}: set `prefix` in init_cfg'
        elif any('stages.0.patch_embed.0.weight' in text for text in diff.misshapen):
            hint = ". For images with another number of channels, set new_channels='mean' or 'zero' in init_cfg"
        else:
            names, keys = _misfit_attentions(used, expected, range(len(stages)))
            if names and compare_state_dicts(*_without(keys, used, expected)).fits:
                numbers = sorted({int(name.split('.')[1]) for name in names})
                hint = (
                    f'. Only attentions do not fit: {", ".join(names)}. To train them from their initial values, set '
                    f'fresh_attention={numbers} in init_cfg'
                )
        raise ValueError(
            f'the checkpoint {path} ({describe_backbone(found)}) does not fit this SOFT backbone '
            f'({describe_backbone(expected)}), prefix {prefix!r}: {diff}{hint}'
        )
    loaded = {key: used[key] for key in expected if key not in fresh_keys}
    count = 'all' if len(loaded) == len(expected) else f'{len(loaded)} of'
    report = [f'SOFT: {count} {len(expected)} backbone keys loaded from {path}']
    if fresh:
        tokens = sorted(key for key in fresh_keys & expected.keys() if '.cls_' in key)
        report.append(f'initial values kept: {", ".join([*fresh, *tokens])}')
        report.append(f'left out: {len(fresh_keys & used.keys())} keys of the attentions in the checkpoint')
    if diff.resized:
        grids = (f'{k} from {tuple(used[k].shape[-2:])} to {tuple(expected[k].shape[-2:])}' for k in diff.resized)
        report.append(f'resized: {", ".join(grids)}')
    if unused:
        report.append(f'unused: {len(unused)} keys of stages that out_indices does not need')
    if others := sorted({key.split('.')[0] for key in state_dict if not key.startswith(prefix)}):
        report.append(f'not of the backbone: keys under {others}')
    return BackboneFit(loaded, diff.resized, fresh, '; '.join(report))


def describe_backbone(state_dict: Mapping[str, Tensor]) -> str:
    """Describe the depths and widths of a backbone from its state dict.

    Args:
        state_dict (dict[str, Tensor]): State dict with keys ``stages.*``.

    Returns:
        str: A text such as ``'depths 1, 2, widths 64, 128'``, or ``'no SOFT backbone'``.
    """
    blocks = [re.match(r'stages\.(\d+)\.blocks\.(\d+)\.', key) for key in state_dict]
    depths: dict[int, int] = {}
    for match in filter(None, blocks):
        stage, block = int(match[1]), int(match[2])
        depths[stage] = max(depths.get(stage, 0), block + 1)
    if not depths:
        return 'no SOFT backbone'
    keys = [f'stages.{stage}.pos_embed' for stage in sorted(depths)]
    shapes = [state_dict[key].shape if key in state_dict else () for key in keys]
    widths = [str(shape[1]) if len(shape) > 1 else '?' for shape in shapes]
    return f'depths {", ".join(str(depths[k]) for k in sorted(depths))}, widths {", ".join(widths)}'
