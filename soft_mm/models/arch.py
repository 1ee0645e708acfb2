"""Architectures of SOFT, and checks of the backbone's arguments. Each ``parse_*`` function returns a canonical form."""

from collections.abc import Sequence
from typing import Any

from soft_mm.ops.checks import check_choice, check_integer, is_integer

NUM_STAGES = 4
MIN_SIDE = 32
OUT_TYPES = ('featmap', 'cls_token')
_KEYS = ('embed_dims', 'num_heads', 'depths', 'ratios', 'conv_sizes')
_REQUIRED = ('embed_dims', 'num_heads', 'depths')
# Filter size of stage 4 if the arch gives three. The authors' stage 4 has no local branch.
_LAST_CONV_SIZE = 3

#: The architectures of the papers. All have the ratios (8, 4, 2, 1) and the filter sizes (9, 5, 3, 3), of
#: which stage 4 uses none with its default attention.
ARCH_ZOO: dict[str, dict[str, tuple[int, ...]]] = dict(
    tiny=dict(embed_dims=(64, 128, 320, 512), num_heads=(2, 4, 10, 16), depths=(1, 2, 3, 2)),
    small=dict(embed_dims=(64, 128, 320, 512), num_heads=(2, 4, 10, 16), depths=(1, 3, 7, 4)),
    medium=dict(embed_dims=(64, 128, 288, 512), num_heads=(2, 4, 9, 16), depths=(1, 3, 29, 5)),
    large=dict(embed_dims=(64, 128, 320, 512), num_heads=(2, 4, 10, 16), depths=(1, 3, 40, 5)),
    huge=dict(embed_dims=(64, 128, 352, 512), num_heads=(2, 4, 11, 16), depths=(1, 5, 49, 5)),
)


def parse_arch(arch: str | dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return an architecture as a dict of tuples, with defaults for missing keys.

    Args:
        arch (str | dict): A key of :data:`ARCH_ZOO`, or a dict, see :class:`~soft_mm.models.SOFT`.

    Returns:
        dict[str, tuple[int, ...]]: ``embed_dims``, ``num_heads``, ``depths``, ``ratios``, ``conv_sizes``.

    Raises:
        ValueError: If the name or a key is unknown, a key is missing, or a value is out of its range.
    """
    if isinstance(arch, str):
        if arch not in ARCH_ZOO:
            raise ValueError(
                f'arch={arch!r} is unknown; choose one of {list(ARCH_ZOO)} or give a dict with {list(_REQUIRED)}'
            )
        arch = ARCH_ZOO[arch]
    if not isinstance(arch, dict):
        raise ValueError(f'arch={arch!r}: expected one of {list(ARCH_ZOO)} or a dict')
    missing = [key for key in _REQUIRED if key not in arch]
    unknown = [key for key in arch if key not in _KEYS]
    if missing or unknown:
        raise ValueError(
            f'arch dict: missing keys {missing}, unknown keys {unknown}; expected {list(_REQUIRED)} and optionally '
            "['ratios', 'conv_sizes']"
        )
    arch = dict(dict(ratios=(8, 4, 2, 1), conv_sizes=(9, 5, 3)), **arch)
    for key in _KEYS:
        values = arch[key]
        lengths = (NUM_STAGES - 1, NUM_STAGES) if key == 'conv_sizes' else (NUM_STAGES,)
        if not isinstance(values, (list, tuple)) or len(values) not in lengths:
            raise ValueError(f'arch dict: {key}={values!r}: expected {" or ".join(map(str, lengths))} integers')
        for value in values:
            check_integer(f'arch dict: {key}', value)
        arch[key] = tuple(values)
    if len(arch['conv_sizes']) < NUM_STAGES:
        arch['conv_sizes'] += (_LAST_CONV_SIZE,)
    for dims, heads in zip(arch['embed_dims'], arch['num_heads']):
        if dims % heads:
            raise ValueError(
                f'arch dict: embed_dims={arch["embed_dims"]}, num_heads={arch["num_heads"]}: expected each width to be '
                f'a multiple of its number of heads, but {dims} is no multiple of {heads}'
            )
    if any(size % 2 == 0 for size in arch['conv_sizes']):
        raise ValueError(f'arch dict: conv_sizes={arch["conv_sizes"]}: expected odd integers')
    return arch


def parse_attention(attention: dict[str, Any] | Sequence[dict[str, Any]] | None) -> Sequence[dict[str, Any]]:
    """Return the attention configs of the four stages.

    Args:
        attention (dict | list[dict] | None): One config for stages 1 to 3, or a list of three or four configs. None is
            an empty config. The default type of stage 4 is ``'SoftmaxAttention'``.

    Returns:
        Sequence[dict]: Four configs.

    Raises:
        ValueError: If ``attention`` has another form, or sets ``grid_dims`` to another value than 2.
    """
    cfgs: Any = {} if attention is None else attention
    cfgs = list(cfgs) if isinstance(cfgs, (list, tuple)) else [cfgs] * (NUM_STAGES - 1)
    if len(cfgs) not in (NUM_STAGES - 1, NUM_STAGES) or not all(isinstance(cfg, dict) for cfg in cfgs):
        raise ValueError(
            f'attention={attention!r}: expected None, a dict for stages 1 to 3, a list of three dicts for stages 1 to '
            '3, or a list of four dicts'
        )
    last = cfgs.pop() if len(cfgs) == NUM_STAGES else {}
    cfgs.append(dict(dict(type='SoftmaxAttention'), **last))
    if not all(is_integer(dims) and dims == 2 for dims in (cfg.get('grid_dims', 2) for cfg in cfgs)):
        raise ValueError(f'attention={attention!r}: expected grid_dims=2, because images have two sides; leave it out')
    if any(cfg.get('init_cfg') is not None for cfg in cfgs):
        raise ValueError(f'attention={attention!r}: init_cfg has no effect here; set init_cfg of the backbone')
    return cfgs


def parse_outputs(out_indices: int | Sequence[int], out_type: str) -> tuple[tuple[int, ...], str]:
    """Check ``out_indices`` and ``out_type``.

    Args:
        out_indices (int | Sequence[int]): Indices of stages, counted from 0.
        out_type (str): One of :data:`OUT_TYPES`.

    Returns:
        tuple[tuple[int, ...], str]: ``out_indices`` as a tuple, and ``out_type``.

    Raises:
        ValueError: If a stage does not exist, the stages are not in ascending order, ``out_type`` is unknown, or the
            class token is requested without the last stage.
    """
    check_choice('out_type', out_type, OUT_TYPES)
    given: tuple[Any, ...] = tuple(out_indices) if isinstance(out_indices, (list, tuple)) else (out_indices,)
    valid = all(is_integer(index, 0) and index < NUM_STAGES for index in given)
    if not given or not valid or list(given) != sorted(set(given)):
        raise ValueError(
            f'out_indices={out_indices!r}: expected indices from 0 to {NUM_STAGES - 1}, each once, in ascending order'
        )
    if out_type == 'cls_token' and given[-1] != NUM_STAGES - 1:
        raise ValueError(
            f"out_type='cls_token' needs index {NUM_STAGES - 1} (stage {NUM_STAGES}), got out_indices={out_indices!r}"
        )
    return given, out_type


def parse_img_size(img_size: int | Sequence[int]) -> tuple[int, int]:
    """Return an image size as ``(height, width)``.

    Args:
        img_size (int | tuple[int, int]): Side of a square, or height and width, in pixels.

    Returns:
        tuple[int, int]: Height and width.

    Raises:
        ValueError: If it is not one or two integers >= 32.
    """
    sides: tuple[Any, ...] = tuple(img_size) if isinstance(img_size, (list, tuple)) else (img_size, img_size)
    if len(sides) != 2 or not all(is_integer(side, MIN_SIDE) for side in sides):
        raise ValueError(f'img_size={img_size!r}: expected an integer or two integers (height, width) >= {MIN_SIDE}')
    return sides[0], sides[1]


def check_frozen_stages(frozen_stages: int, num_stages: int) -> None:
    """Check that ``frozen_stages`` is an integer from -1 to the number of stages.

    Args:
        frozen_stages (int): Value to check.
        num_stages (int): Number of stages that are built.

    Raises:
        ValueError: If it is not an integer in this range.
    """
    if not is_integer(frozen_stages, -1) or frozen_stages > num_stages:
        raise ValueError(
            f'frozen_stages={frozen_stages!r}: expected -1 (nothing), 0 (embeddings of stage 1), or the number of '
            f'stages to freeze, at most {num_stages} with these out_indices'
        )
