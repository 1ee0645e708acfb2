"""Targets of a token sweep: attention operators alone and whole backbones, each with a short name."""

import ast
import functools
import importlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from soft_mm.complexity import encodes_sequences, random_input
from soft_mm.models.attention import build_attention
from soft_mm.registry import MODELS as SOFT_MODELS
from soft_mm.utils import read_config, toolbox_scope

from .ablations import ABLATIONS, OPERATOR_ABLATIONS, REPLACEMENTS, ablate_attention

# An operator alone is measured with the ratio and the filter size of stage 1.
_STAGE_1 = dict(ratio=8, conv_size=9)
#: Side of a token of stage 1 in pixels. It is the same in all these backbones except DeiT.
STRIDE = 4
# Softmax-free attention in all four stages.
_LINEAR = dict(type='SoftmaxFreeAttention', solver='cholesky', max_landmarks=49)

#: Short names of backbones, with configs for the registries of soft_mm and the toolboxes.
BACKBONES = {
    'soft-tiny': dict(type='soft_mm.SOFT', arch='tiny', attention=dict(solver='cholesky', max_landmarks=49)),
    'soft-tiny-linear': dict(type='soft_mm.SOFT', arch='tiny', attention=[_LINEAR] * 4),
    'soft-tiny-authors': dict(type='soft_mm.SOFT', arch='tiny'),
    'resnet-50': dict(type='mmdet.ResNet', depth=50),
    'swin-tiny': dict(type='mmdet.SwinTransformer', drop_path_rate=0.2),
    'pvt-tiny': dict(type='mmdet.PyramidVisionTransformer', num_layers=[2, 2, 2, 2]),
    'pvtv2-b1': dict(type='mmdet.PyramidVisionTransformerV2', embed_dims=64, num_layers=[2, 2, 2, 2]),
    'twins-pcpvt-small': dict(type='mmpretrain.PCPVT', arch='small', out_indices=(0, 1, 2, 3)),
    'twins-svt-small': dict(type='mmpretrain.SVT', arch='small', out_indices=(0, 1, 2, 3)),
    'deit-tiny': dict(type='mmpretrain.VisionTransformer', arch='deit-tiny', out_type='featmap'),
    # `make test-gpu` has no toolbox.
    'timm-swin-tiny': dict(
        type='soft_mm.TimmBackbone', name='swin_tiny_patch4_window7_224', options=dict(strict_img_size=False)
    ),
    'timm-resnet-50': dict(type='soft_mm.TimmBackbone', name='resnet50'),
}
#: Short names of operators, with configs for :func:`~soft_mm.models.attention.build_attention`.
OPERATORS = {
    'attn-soft': dict(solver='cholesky', max_landmarks=49),
    'attn-soft-norm': dict(solver='cholesky', max_landmarks=49, normalized=True),
    'attn-soft-newton': dict(solver='newton', max_landmarks=49),
    'attn-soft-newton-norm': dict(solver='newton', max_landmarks=49, normalized=True),
    'attn-soft-unbounded': dict(solver='cholesky'),
    'attn-soft-authors': dict(),
    'attn-soft-authors-norm': dict(normalized=True),
    'attn-soft-reference': dict(type='ReferenceAttention'),
    'attn-softmax-fused': dict(type='SoftmaxAttention'),
    'attn-softmax-plain': dict(type='PlainSoftmaxAttention'),
    'attn-linformer': dict(type='LinformerAttention'),
    'attn-performer': dict(type='PerformerAttention'),
    'attn-nystrom': dict(type='NystromAttention'),
    'attn-spatial-reduction': dict(type='SpatialReductionAttention'),
    # A sweep should show its quadratic cost, so the limit is larger than any number of tokens in a sweep.
    'attn-gaussian': dict(type='GaussianKernelAttention', max_tokens=2**20),
}


@SOFT_MODELS.register_module()
class TimmBackbone(nn.Module):
    """Backbone of timm without pretrained weights, for images of any size.

    Args:
        name (str): Name of the model in timm.
        options (dict | None): Further arguments of ``timm.create_model``. Defaults to None.
    """

    def __init__(self, name, options=None):
        super().__init__()
        timm = importlib.import_module('timm')
        self.model = timm.create_model(name, features_only=True, **(options or {}))

    def forward(self, x):
        """Compute the feature maps of images ``(N, 3, H, W)``."""
        return tuple(self.model(x))


@dataclass(frozen=True)
class Target:
    """Target of a sweep, as plain data that can be sent to a worker process.

    Attributes:
        name: Name that the user gave.
        kind: ``'operator'`` or ``'backbone'``.
        config: Config of the attention or the backbone.
        replacement: Key of :data:`~benchmarks.ablations.REPLACEMENTS` to apply to the built backbone, or None.
        imports: Modules to import before building, such as the ``custom_imports`` of a config file.
    """

    name: str
    kind: str
    config: dict
    replacement: str | None = None
    imports: tuple[str, ...] = ()

    @property
    def is_sequence(self):
        """bool: Whether the target encodes sequences. Its sizes are then ``(1, n)`` for ``n`` tokens."""
        return encodes_sequences(self.config)

    def tokens(self, size):
        """Count the tokens of stage 1, or of a sequence.

        Args:
            size (tuple[int, int]): Image size in pixels, or ``(1, n)`` for a sequence.

        Returns:
            int: Number of tokens.
        """
        return size[1] if self.is_sequence else math.prod(_grid(size))


def _grid(size):
    """Return the grid of stage 1 for an image size in pixels."""
    return tuple(-(-side // STRIDE) for side in size)


def parse_target(text):
    """Read a target from its name.

    Args:
        text (str): ``BASE[:OPTIONS][@ABLATION]``. ``BASE`` is a key of :data:`OPERATORS` or :data:`BACKBONES`, the
            registered name of a backbone with its scope (``mmdet.ResNet``), or a config file, whose backbone is
            measured. ``OPTIONS`` override the config. They are ``key=value`` pairs separated by commas, such as
            ``soft-tiny:arch=small,attention.max_landmarks=196``. ``ABLATION`` is one of
            :data:`~benchmarks.ablations.ABLATIONS`.

    Returns:
        Target: The target.

    Raises:
        ValueError: If a name or an ablation is unknown, an option has no ``=``, or the ablation does not apply.
    """
    what, at, ablation = text.partition('@')
    if at and ablation not in ABLATIONS:
        raise ValueError(f'{text!r}: unknown ablation {ablation!r}; expected one of {list(ABLATIONS)}')
    base, _, rest = what.partition(':')
    options = _parse_options(rest, text)
    if base in OPERATORS:
        return _parse_operator(text, dict(OPERATORS[base], **options), ablation)
    config, imports = _backbone_config(text, base)
    config.merge_from_dict(options)
    return _parse_backbone(text, config.to_dict(), ablation, imports)


def _parse_operator(text, config, ablation):
    if ablation and ablation not in OPERATOR_ABLATIONS:
        raise ValueError(
            f'{text!r}: ablation {ablation!r} does not apply to an operator; choose one of '
            f'{list(OPERATOR_ABLATIONS)}, or measure a backbone'
        )
    try:
        if ablation:
            config = ablate_attention(config, ablation)
        with torch.device('meta'):
            build_attention(config, 1, 1, **_STAGE_1)
    except (TypeError, ValueError) as error:
        raise ValueError(f'{text!r}: {error}') from None
    return Target(text, 'operator', config)


def _backbone_config(text, base):
    """Return the config of a backbone, with its scope in ``type``, and the modules to import for it."""
    if base in BACKBONES:
        return Config(BACKBONES[base]), ()
    if base.endswith('.py') and Path(base).is_file():
        cfg = read_config(base)
        backbone = cfg.get('model', {}).get('backbone')
        if backbone is None:
            raise ValueError(f'{text!r}: the config has no model.backbone; give the config of a whole model')
        scope = cfg.get('default_scope')
        if scope and '.' not in backbone.type:
            backbone.type = f'{scope}.{backbone.type}'
        imports = cfg.get('custom_imports', {}).get('imports', ())
        return Config(backbone), (imports,) if isinstance(imports, str) else tuple(imports)
    if '.' in base and not base.endswith('.py'):
        return Config(dict(type=base)), ()
    raise ValueError(
        f'{text!r}: unknown target; expected an operator {list(OPERATORS)}, a backbone {list(BACKBONES)}, a '
        'registered backbone with its scope, such as mmdet.ResNet:depth=50, or an existing config file'
    )


def _parse_backbone(text, config, ablation, imports):
    if not ablation:
        return Target(text, 'backbone', config, imports=imports)
    if config['type'].rpartition('.')[2] != 'SOFT':
        raise ValueError(f'{text!r}: {config["type"]} has no ablations: expected soft_mm.SOFT; leave the ablation out')
    if ablation in REPLACEMENTS:
        return Target(text, 'backbone', config, ablation, imports)
    attention = config.get('attention') or {}
    try:
        if isinstance(attention, dict):
            attention = ablate_attention(attention, ablation)
        else:
            attention = [ablate_attention(stage or {}, ablation) for stage in attention]
    except ValueError as error:
        raise ValueError(f'{text!r}: {error}') from None
    return Target(text, 'backbone', dict(config, attention=attention), imports=imports)


def _parse_options(text, target):
    """Parse ``a=1,b.c=x`` into a dict. Commas within brackets do not separate options."""
    options, depth, start = {}, 0, 0
    for end, letter in enumerate(f'{text},'):
        depth += (letter in '([{') - (letter in ')]}')
        if letter != ',' or depth:
            continue
        item, start = text[start:end].strip(), end + 1
        if not item:
            continue
        key, equals, value = item.partition('=')
        if not equals:
            raise ValueError(f'{target!r}: option {item!r} must have the form key=value')
        try:
            options[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            options[key.strip()] = value.strip()
    return options


def build_step(target, size, batch_size, train, device, heads=2, head_dims=32):
    """Build a target and the function to measure.

    Args:
        target (Target): Target to build.
        size (tuple[int, int]): Height and width of the images in pixels. An operator works on the grid of stage 1,
            whose sides are a quarter of these. For a sequence ``(1, n)``.
        batch_size (int): Number of images or sequences.
        train (bool): Whether to run forward and backward, instead of forward only.
        device (torch.device | str): Device to compute on.
        heads (int): Number of heads of an operator. Defaults to 2.
        head_dims (int): Channels per head of an operator. Defaults to 32.

    Returns:
        Callable[[], None]: Function that runs one step.

    Raises:
        ValueError: If the backbone is not registered, or if the size of a sequence does not have the form ``(1, n)``.
    """
    if target.is_sequence and size[0] != 1:
        raise ValueError(f'{target.name!r} encodes sequences: size {size[0]}x{size[1]}: expected 1xN with N tokens')
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        if target.kind == 'operator':
            function, inputs, parameters = build_operator(target, size, batch_size, train, device, heads, head_dims)
        else:
            function, inputs, parameters = build_backbone(target, size, batch_size, train, device)

    def step():
        if not train:
            with torch.no_grad():
                function(*inputs)
            return
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        for tensor in (*inputs, *parameters):
            tensor.grad = None

    return step


def build_operator(target, size, batch_size, train, device, heads, head_dims):
    """Build the attention of an operator, without its projections.

    Args:
        target, size, batch_size, train, device, heads, head_dims: As in :func:`build_step`.

    Returns:
        tuple[Callable, list[Tensor], tuple[Parameter, ...]]: The function to measure, its inputs, and parameters that
            may receive a gradient. The inputs are random tokens after the projection of the attention.
    """
    grid = _grid(size)
    module = build_attention(target.config, heads * head_dims, heads, **_STAGE_1).to(device).train(train)
    x = torch.randn(batch_size, math.prod(grid), heads * head_dims, device=device)
    with torch.no_grad():
        projected = module.project(x, grid)
    inputs = [tensor.detach().requires_grad_(train) for tensor in projected]
    return functools.partial(module.attend, grid=grid), inputs, tuple(module.parameters())


def build_backbone(target, size, batch_size, train, device):
    """Build a backbone.

    Args:
        target, size, batch_size, train, device: As in :func:`build_step`.

    Returns:
        tuple[nn.Module, list[Tensor], tuple[Parameter, ...]]: The model, its inputs, and its parameters.

    Raises:
        ValueError: If the backbone is not registered.
    """
    for module in target.imports:
        importlib.import_module(module)
    scope, _, kind = target.config['type'].rpartition('.')
    scope = scope or 'mmengine'
    try:
        with toolbox_scope(Config(dict(default_scope=scope))), MODELS.switch_scope_and_registry(scope) as registry:
            if registry.get(kind) is None:
                raise ValueError(
                    f'{target.name!r}: {target.config["type"]} is not in the registry of {scope}; check its name'
                )
            model = registry.build(dict(target.config, type=kind)).to(device)
    except ModuleNotFoundError as error:
        if error.name not in (scope, f'{scope}.models', 'timm'):
            raise
        raise ValueError(f'{target.name!r} needs {error.name.split(".")[0]}, which is not installed') from None
    # Not chained, because train() of some backbones returns None.
    model.train(train)
    if target.replacement:
        REPLACEMENTS[target.replacement](model)
    return model, [random_input(target.config, size, batch_size, device)], tuple(model.parameters())
