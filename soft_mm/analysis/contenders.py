"""What a token sweep compares: attention operators alone and whole backbones, each named by a short text."""

import ast
import importlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import MODELS

from soft_mm.models import GaussianKernelAttention, SoftmaxFreeAttention, SpatialReductionAttention
from soft_mm.models.attention import build_attention
from soft_mm.ops import reference

from .complexity import encodes_sequences, random_input
from .variants import VARIANTS, apply_variant

# An operator alone is that of stage 1.
_SHAPE = dict(ratio=8, conv_size=9)
# A token of stage 1 stands for 4x4 pixels, as in every backbone here but DeiT.
STRIDE = 4

#: Backbones by short name: what the registries of the toolboxes build.
BACKBONES = {
    'soft-tiny': dict(type='soft_mm.SOFT', arch='tiny', attention=dict(solver='cholesky', max_landmarks=49)),
    'soft-tiny-authors': dict(type='soft_mm.SOFT', arch='tiny'),
    'resnet-50': dict(type='mmdet.ResNet', depth=50),
    'swin-tiny': dict(type='mmdet.SwinTransformer', drop_path_rate=0.2),
    'pvt-tiny': dict(type='mmdet.PyramidVisionTransformer', num_layers=[2, 2, 2, 2]),
    'pvtv2-b1': dict(type='mmdet.PyramidVisionTransformerV2', embed_dims=64, num_layers=[2, 2, 2, 2]),
    'twins-pcpvt-small': dict(type='mmpretrain.PCPVT', arch='small', out_indices=(0, 1, 2, 3)),
    'twins-svt-small': dict(type='mmpretrain.SVT', arch='small', out_indices=(0, 1, 2, 3)),
    'deit-tiny': dict(type='mmpretrain.VisionTransformer', arch='deit-tiny', out_type='featmap'),
}
#: Operators by short name: config of an attention, that of SOFT where it has no type; without any, the authors' plain
#: form by the formulae of :mod:`soft_mm.ops.reference`, and the softmax attention of PyTorch.
OPERATORS = {
    'attn-soft': dict(solver='cholesky', max_landmarks=49),
    'attn-soft-norm': dict(solver='cholesky', max_landmarks=49, normalized=True),
    'attn-soft-newton': dict(solver='newton', max_landmarks=49),
    'attn-soft-newton-norm': dict(solver='newton', max_landmarks=49, normalized=True),
    'attn-soft-unbounded': dict(solver='cholesky'),
    'attn-soft-authors': dict(),
    'attn-soft-authors-norm': dict(normalized=True),
    'attn-linformer': dict(type='LinformerAttention'),
    'attn-performer': dict(type='PerformerAttention'),
    'attn-nystrom': dict(type='NystromAttention'),
    'attn-spatial-reduction': dict(type='SpatialReductionAttention'),
    # That n x n numbers are held is what is to be seen.
    'attn-gaussian': dict(type='GaussianKernelAttention', max_tokens=2**20),
    'attn-soft-reference': None,
    'attn-softmax-fused': None,
    'attn-softmax-plain': None,
}


@dataclass(frozen=True)
class Contender:
    """One thing to measure, as data that a worker process can be sent.

    Attributes:
        name: as the user gave it.
        base: what stands in the name before the options.
        kind: ``'operator'`` or ``'backbone'``.
        config: options of the operator, or config of the backbone.
        variant: a key of :data:`~soft_mm.analysis.variants.VARIANTS`, or None.
    """

    name: str
    base: str
    kind: str
    config: dict
    variant: str | None = None

    @property
    def is_sequence(self):
        """Whether it encodes sequences, whose size is 1 and the tokens."""
        return encodes_sequences(self.config)

    def tokens(self, size):
        """Tokens of stage 1 at an input of a size, those of a sequence."""
        return size[1] if self.is_sequence else math.prod(-(-side // STRIDE) for side in size)


def parse_contender(text):
    """Read a contender from its name.

    Args:
        text (str): a key of :data:`BACKBONES` or :data:`OPERATORS`, the registered name of a backbone with its scope
            (``mmdet.ResNet``), or a config file, whose backbone is taken. After a colon may follow options that
            override, ``key=value`` separated by commas, as in ``soft-tiny:arch=small,attention.max_landmarks=196``,
            and at the end, after an ``@``, the name of one of :data:`~soft_mm.analysis.variants.VARIANTS`.

    Returns:
        Contender: the contender.

    Raises:
        ValueError: for a name that is none of these, or options that cannot be read.
    """
    what, _, variant = text.partition('@')
    variant = variant or None
    if variant and variant not in VARIANTS:
        raise ValueError(f'{text!r}: variant {variant!r} is unknown; choose one of {list(VARIANTS)}')
    base, _, rest = what.partition(':')
    options = _parse_options(rest, text)
    if base in OPERATORS:
        given = OPERATORS[base]
        if given is None and options:
            raise ValueError(f'{text!r}: {base} takes no options')
        contender = Contender(text, base, 'operator', dict(given or {}, **options), variant)
        if given is not None:
            _check_operator(contender)
        if variant and (given is None or 'type' in given):
            raise ValueError(f'{text!r}: {base} has no variants, only the operators of SOFT have')
        return contender
    if base in BACKBONES:
        config = Config(BACKBONES[base])
    elif base.endswith('.py') and Path(base).is_file():
        cfg = Config.fromfile(base)
        backbone = cfg.get('model', {}).get('backbone')
        if backbone is None:
            raise ValueError(f'{text!r}: the config has no model.backbone')
        scope = cfg.get('default_scope')
        if scope and '.' not in backbone.type:
            backbone.type = f'{scope}.{backbone.type}'
        config = Config(backbone)
    elif '.' in base and not base.endswith('.py'):
        config = Config(dict(type=base))
    else:
        raise ValueError(
            f'{text!r} is unknown; choose of the operators {list(OPERATORS)}, the backbones {list(BACKBONES)}, give a '
            'registered backbone with its scope, such as mmdet.ResNet:depth=50, or a config file'
        )
    config.merge_from_dict(options)
    if variant and config.type != 'soft_mm.SOFT':
        raise ValueError(f'{text!r}: {config.type} has no variants, only soft_mm.SOFT has')
    return Contender(text, base, 'backbone', config.to_dict(), variant)


def _check_operator(contender):
    try:
        with torch.device('meta'):
            build_attention(contender.config, 1, 1, **_SHAPE)
    except (TypeError, ValueError) as error:
        raise ValueError(f'{contender.name!r}: {error}') from None


def _parse_options(text, whole):
    """``a=1,b.c=x`` as a dict; commas within brackets do not separate."""
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
            raise ValueError(f'{whole!r}: option {item!r} must have the form key=value')
        try:
            options[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            options[key.strip()] = value.strip()
    return options


def build_step(contender, size, batch_size, train, device, heads=2, head_dims=32):
    """Build one contender and what is to be timed.

    Args:
        contender (Contender): what to build.
        size (tuple[int, int]): height and width of the images in pixels, of which an operator has a quarter each; of a
            sequence 1 and its tokens.
        batch_size (int): images.
        train (bool): forward and backward, instead of forward alone.
        device (torch.device | str): where to compute.
        heads (int): of an operator.
        head_dims (int): channels of each.

    Returns:
        Callable[[], None]: one step.

    Raises:
        ValueError: if the backbone is not registered, or for a sequence whose size does not begin with 1.
    """
    if contender.is_sequence and size[0] != 1:
        raise ValueError(f'{contender.name!r} encodes sequences: size {size[0]}x{size[1]} must be 1xN, of N tokens')
    build = _build_operator if contender.kind == 'operator' else _build_backbone
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        function, inputs, parameters = build(contender, size, batch_size, device, heads, head_dims, train)

    def step():
        with apply_variant(contender.variant):
            run()

    def run():
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


def _build_operator(contender, size, batch_size, device, heads, head_dims, train):
    grid = tuple(-(-side // STRIDE) for side in size)
    tokens = grid[0] * grid[1]
    # As a projection leaves them: a token's heads side by side.
    q, k, v = (torch.randn(batch_size, tokens, heads, head_dims, device=device).transpose(1, 2) for _ in range(3))
    if train:
        for tensor in (q, k, v):
            tensor.requires_grad_()
    if contender.base == 'attn-softmax-fused':
        return F.scaled_dot_product_attention, (q, k, v), ()
    if contender.base == 'attn-softmax-plain':
        return _plain_softmax_attention, (q, k, v), ()
    module = build_attention(contender.config, heads * head_dims, heads, **_SHAPE).to(device).train(train)
    if contender.base == 'attn-soft-reference':
        return lambda q, v: _reference_attention(module, q, v, grid), (q, v), tuple(module.parameters())
    if isinstance(module, (SoftmaxFreeAttention, GaussianKernelAttention)):
        inputs = (q, v)
    elif isinstance(module, SpatialReductionAttention):
        inputs = (q, k.detach().transpose(1, 2).flatten(2).requires_grad_(train))
    else:
        inputs = (q, k, v)
    return lambda *inputs: module.attend(*inputs, grid), inputs, tuple(module.parameters())


def _reference_attention(module, q, v, grid):
    norm, q = module.landmark_norm, q * module.head_dims**-0.25
    landmarks = reference.conv_landmarks(q, grid, module.landmark.weight, norm.weight, norm.bias, norm.eps)
    return reference.softmax_free_attention(q, landmarks, v, reference.newton_inverse)


def _plain_softmax_attention(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1) @ v


def _build_backbone(contender, size, batch_size, device, heads, head_dims, train):
    config = dict(contender.config)
    scope = config['type'].rpartition('.')[0]
    # The toolboxes register their models when these are imported.
    for module in (scope, f'{scope}.models'):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name not in (scope, f'{scope}.models'):
                raise
            raise ValueError(f'{contender.name!r} needs {scope}, which is not installed') from None
    if MODELS.get(config['type']) is None:
        raise ValueError(f'{contender.name!r}: {config["type"]} is not in the registry of {scope}')
    model = MODELS.build(config).to(device)
    # That of some backbones returns nothing.
    model.train(train)
    return model, (random_input(config, size, batch_size, device),), tuple(model.parameters())
