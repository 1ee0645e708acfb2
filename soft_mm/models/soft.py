"""The SOFT backbone.

::

    image (B, 3, H, W)
      |  stage 1   three 3x3 convolutions, strides 2 1 2   positions   softmax-free blocks                     stride 4
      |  stage 2   one 3x3 convolution, stride 2           positions   softmax-free blocks                     stride 8
      |  stage 3   one 3x3 convolution, stride 2           positions   softmax-free blocks                     stride 16
      v  stage 4   one 3x3 convolution, stride 2           positions   class token, softmax blocks, LayerNorm  stride 32
"""

import inspect
import logging
import os
import re

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS as MMENGINE_MODELS
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from soft_mm.checkpoints import load_weights
from soft_mm.ops.kernel import is_compiling
from soft_mm.registry import MODELS

from .blocks import SoftmaxBlock, SoftmaxFreeBlock

NUM_STAGES = 4
MIN_SIDE = 32
STEM_DIMS = 32
_PRETRAINED = ('Pretrained', 'PretrainedInit')


class PatchEmbed(nn.Sequential):
    """Patch embedding: 3x3 convolutions, each with BatchNorm and ReLU.

    In evaluation mode a BatchNorm is folded into the weights of its convolution at each forward, which costs nothing
    beside a pass over the map.

    Args:
        in_channels (int): channels of the input map.
        embed_dims (int): channels of the output map.
        stem (bool): the embedding of stage 1, three convolutions of strides 2, 1, 2; else one of stride 2.
    """

    def __init__(self, in_channels, embed_dims, stem):
        widths, strides = ([STEM_DIMS, STEM_DIMS, embed_dims], [2, 1, 2]) if stem else ([embed_dims], [2])
        layers = []
        for width, stride in zip(widths, strides):
            layers += [
                nn.Conv2d(in_channels, width, 3, stride, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            in_channels = width
        super().__init__(*layers)

    def forward(self, x):
        """Map ``(B, C_in, H, W)`` in, map ``(B, C, H', W')`` out."""
        layers = list(self)
        for conv, norm, activation in zip(layers[::3], layers[1::3], layers[2::3]):
            # Someone else may have folded it for good and left an identity.
            if norm.training or not isinstance(norm, _BatchNorm):
                x = norm(conv(x))
            else:
                dtype = torch.promote_types(conv.weight.dtype, torch.float32)
                scale = norm.weight.to(dtype) * torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
                weight = conv.weight * scale[:, None, None, None]
                bias = norm.bias + (conv.bias - norm.running_mean) * scale
                weight, bias = weight.to(conv.weight.dtype), bias.to(conv.bias.dtype)
                x = F.conv2d(x, weight, bias, conv.stride, conv.padding)
            x = activation(x)
        return x


def reset_parameters(module):
    """The authors' rule: truncated normals of deviation 0.02 for linear layers and embeddings, else PyTorch's."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    for name, parameter in module.named_parameters():
        if name.rpartition('.')[2] in ('pos_embed', 'cls_pos_embed', 'cls_token'):
            nn.init.trunc_normal_(parameter, std=0.02)


def resize_pos_embed(pos_embed, grid):
    """Resize a map of position embeddings ``(1, C, h, w)`` to ``grid = (H, W)``, bilinearly and in float32 or wider."""
    if tuple(pos_embed.shape[-2:]) == tuple(grid):
        return pos_embed
    wide = pos_embed.to(torch.promote_types(pos_embed.dtype, torch.float32))
    return F.interpolate(wide, size=tuple(grid), mode='bilinear', align_corners=False).to(pos_embed.dtype)


class SOFTStage(BaseModule):
    """One stage: patch embedding, position embeddings, blocks.

    Args:
        in_channels (int): channels of the input map.
        embed_dims (int): channels ``C`` of the stage.
        grid (tuple[int, int]): grid of the learned position embeddings.
        blocks (list[nn.Module]): called as ``block(tokens, grid)``.
        stem (bool): whether this is stage 1.
        class_token (bool): whether a class token and a final LayerNorm belong to the stage, as in stage 4.
        drop_rate (float): dropout after the position embeddings.
        with_cp (bool): recompute the blocks in the backward pass.
    """

    def __init__(self, in_channels, embed_dims, grid, blocks, stem, class_token, drop_rate, with_cp):
        super().__init__()
        self.with_cp = with_cp
        self.patch_embed = PatchEmbed(in_channels, embed_dims, stem)
        self.pos_embed = nn.Parameter(torch.zeros(1, embed_dims, *grid))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(blocks)
        self.class_token = class_token
        if class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dims))
            self.cls_pos_embed = nn.Parameter(torch.zeros(1, 1, embed_dims))
            self.norm = nn.LayerNorm(embed_dims, eps=1e-6)
        self._positions = None, None

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Resize the position embeddings of a checkpoint that was trained on another grid."""
        key = f'{prefix}pos_embed'
        loaded, grid = state_dict.get(key), tuple(self.pos_embed.shape[-2:])
        if loaded is not None and loaded.ndim == 4 and tuple(loaded.shape[-2:]) != grid:
            print_log(f'{key} resized from {tuple(loaded.shape[-2:])} to {grid} positions', 'current')
            state_dict[key] = resize_pos_embed(loaded, grid)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def train(self, mode=True):
        """Set the mode, and forget the position embeddings that were resized in the other."""
        self._positions = None, None
        return super().train(mode)

    def __getstate__(self):
        """Copies and pickles leave out what :meth:`positions` keeps."""
        return dict(self.__dict__, _positions=(None, None))

    def positions(self, grid):
        """Position embeddings of a grid as tokens ``(1, n, C)``.

        They are kept from one evaluation forward to the next of the same size. A weight that is written to through
        ``.data`` in between goes unseen until :meth:`train` or ``eval()`` is called, as the toolboxes' loops do.
        """
        pos_embed = self.pos_embed
        traced = is_compiling() or torch.jit.is_tracing()
        if torch.is_grad_enabled() or traced or pos_embed.is_inference():
            return resize_pos_embed(pos_embed, grid).flatten(2).transpose(1, 2)
        key = grid, pos_embed.dtype, pos_embed.device, id(pos_embed), pos_embed._version
        if self._positions[0] != key:
            self._positions = key, resize_pos_embed(pos_embed, grid).flatten(2).transpose(1, 2).contiguous()
        return self._positions[1]

    def forward(self, x):
        """Map ``(B, C_in, H, W)`` in.

        Returns:
            tuple[Tensor, tuple[int, int]]: tokens ``(B, n, C)`` after the last block, with the class token first
            where there is one, and their grid.
        """
        # Channels last, a map is its tokens: between them nothing is copied.
        x = self.patch_embed(x.contiguous(memory_format=torch.channels_last))
        grid = tuple(x.shape[-2:])
        x = x.permute(0, 2, 3, 1).flatten(1, 2) + self.positions(grid)
        if self.class_token:
            x = torch.cat([(self.cls_token + self.cls_pos_embed).expand(x.shape[0], -1, -1), x], dim=1)
        x = self.pos_drop(x)
        for block in self.blocks:
            if self.with_cp and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, grid, use_reentrant=False)
            else:
                x = block(x, grid)
        return x, grid


@MMENGINE_MODELS.register_module()
@MODELS.register_module()
class SOFT(BaseModule):
    """Softmax-free transformer backbone for classification, detection and segmentation.

    Papers: *SOFT: Softmax-free Transformer with Linear Complexity* (NeurIPS 2021, https://arxiv.org/abs/2110.11945),
    *Softmax-free Linear Transformers* (IJCV 2024, https://arxiv.org/abs/2207.03341).

    Args:
        arch (str | dict): ``'tiny'``, ``'small'``, ``'medium'``, ``'large'``, ``'huge'``, or a dict with
            ``embed_dims``, ``num_heads`` and ``depths``, four whole numbers each, and where they differ from the
            papers ``ratios`` (four, side of the patch of tokens behind a landmark, default ``(8, 4, 2, 1)``; stage 4
            has no landmarks, so its ratio is 1) and ``conv_sizes`` (three odd numbers, side of the filters of the
            local branch, default ``(9, 5, 3)``). Defaults to ``'tiny'``.
        attention (dict | list[dict] | None): attention of stages 1 to 3, one dict for all or three, one per stage.
            Keys left out take their default, see :class:`SoftmaxFreeAttention`. Defaults to None, which is
            ``dict(type='SoftmaxFreeAttention')``.
        out_indices (Sequence[int]): stages whose outputs are returned, 0 to 3. Stages behind the last one are not
            built. Defaults to ``(0, 1, 2, 3)``.
        out_type (str): ``'featmap'``: maps only; ``'cls_token'``: the last output is the class token, which needs
            stage 3 among ``out_indices``. Defaults to ``'featmap'``.
        in_channels (int): channels of the image. Defaults to 3.
        img_size (int | tuple[int, int]): image size (height, width) for which position embeddings are learned; for
            any other size they are resized in the forward, and checkpoints learned at another one are resized when
            loaded. Defaults to 224.
        drop_rate (float): dropout after the position embeddings, and in the projections and MLPs of stage 4.
            Defaults to 0.
        drop_path_rate (float): stochastic depth, rising linearly from 0 in the first block to this rate in the last.
            Defaults to 0.
        frozen_stages (int): -1 freezes nothing; 0 the patch embedding and position embeddings of stage 1; ``k`` from
            1 to 4 everything of the first ``k`` stages. Frozen parts get no gradient and stay in evaluation mode.
            Defaults to -1.
        norm_eval (bool): keep every BatchNorm in evaluation mode while training. Defaults to False.
        with_cp (bool): recompute the blocks in the backward pass to save memory. Defaults to False.
        init_cfg (dict | list[dict] | None): mmengine's. Without it the weights are initialised as the authors do. With
            ``type='Pretrained'`` every parameter must be found in the checkpoint with its shape. Defaults to None.

    Raises:
        ValueError: for a value that is not allowed.
        TypeError: for an unknown keyword.

    Example:
        >>> import torch
        >>> from soft_mm import SOFT
        >>> maps = SOFT('tiny').eval()(torch.rand(1, 3, 200, 232))
        >>> [tuple(m.shape) for m in maps]
        [(1, 64, 50, 58), (1, 128, 25, 29), (1, 320, 13, 15), (1, 512, 7, 8)]
    """

    arch_zoo = dict(
        tiny=dict(embed_dims=(64, 128, 320, 512), num_heads=(2, 4, 10, 16), depths=(1, 2, 3, 2)),
        small=dict(embed_dims=(64, 128, 320, 512), num_heads=(2, 4, 10, 16), depths=(1, 3, 7, 4)),
        medium=dict(embed_dims=(64, 128, 288, 512), num_heads=(2, 4, 9, 16), depths=(1, 3, 29, 5)),
        large=dict(embed_dims=(64, 128, 320, 512), num_heads=(2, 4, 10, 16), depths=(1, 3, 40, 5)),
        huge=dict(embed_dims=(64, 128, 352, 512), num_heads=(2, 4, 11, 16), depths=(1, 5, 49, 5)),
    )

    def __init__(
        self,
        arch='tiny',
        attention=None,
        out_indices=(0, 1, 2, 3),
        out_type='featmap',
        in_channels=3,
        img_size=224,
        drop_rate=0.0,
        drop_path_rate=0.0,
        frozen_stages=-1,
        norm_eval=False,
        with_cp=False,
        init_cfg=None,
        **unknown,
    ):
        if unknown:
            allowed = [name for name in inspect.signature(SOFT).parameters if name != 'unknown']
            raise TypeError(f'SOFT has no keywords {sorted(unknown)}; allowed are {allowed}')
        super().__init__(init_cfg)
        self.arch = self._parse_arch(arch)
        attentions = self._parse_attention(attention)
        self.out_indices, self.out_type = self._parse_outputs(out_indices, out_type)
        num_stages = self.out_indices[-1] + 1
        img_size = self._parse_img_size(img_size)
        _check_whole('in_channels', in_channels, 1)
        _check_rate('drop_rate', drop_rate)
        _check_rate('drop_path_rate', drop_path_rate)
        if _not_whole(frozen_stages) or not -1 <= frozen_stages <= num_stages:
            raise ValueError(
                f'frozen_stages={frozen_stages!r} must be -1 (nothing), 0 (patch embedding of stage 1) or a number of '
                f'stages up to {num_stages}, the stages that out_indices={self.out_indices} needs'
            )
        for name, value in dict(norm_eval=norm_eval, with_cp=with_cp).items():
            if not isinstance(value, bool):
                raise ValueError(f'{name}={value!r} must be True or False')
        self.in_channels = in_channels
        self.img_size = img_size
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp

        dims, heads, depths = (self.arch[key] for key in ('embed_dims', 'num_heads', 'depths'))
        drop_paths = (drop_path_rate * block / max(sum(depths) - 1, 1) for block in range(sum(depths)))
        self.stages = nn.ModuleList()
        for i in range(num_stages):
            grid = tuple(-(-side // 2 ** (i + 2)) for side in img_size)
            if i < NUM_STAGES - 1:
                local = dict(
                    ratio=self.arch['ratios'][i],
                    conv_size=self.arch['conv_sizes'][i],
                    attention=attentions[i],
                    grid=grid,
                )
                blocks = [
                    SoftmaxFreeBlock(dims[i], heads[i], drop_path=next(drop_paths), **local) for _ in range(depths[i])
                ]
            else:
                blocks = [SoftmaxBlock(dims[i], heads[i], drop_rate, next(drop_paths)) for _ in range(depths[i])]
            channels = in_channels if i == 0 else dims[i - 1]
            last = i == NUM_STAGES - 1
            self.stages.append(SOFTStage(channels, dims[i], grid, blocks, i == 0, last, drop_rate, with_cp))
        reset_parameters(self)
        self._freeze_stages()

    @classmethod
    def _parse_arch(cls, arch):
        if isinstance(arch, str):
            if arch not in cls.arch_zoo:
                raise ValueError(
                    f'arch={arch!r} is unknown; choose one of {list(cls.arch_zoo)} or give a dict with '
                    'embed_dims, num_heads, depths'
                )
            arch = cls.arch_zoo[arch]
        if not isinstance(arch, dict):
            raise ValueError(f'arch={arch!r} must be one of {list(cls.arch_zoo)} or a dict')
        lengths = dict(embed_dims=4, num_heads=4, depths=4, ratios=4, conv_sizes=3)
        missing = [key for key in ('embed_dims', 'num_heads', 'depths') if key not in arch]
        unknown = [key for key in arch if key not in lengths]
        if missing or unknown:
            raise ValueError(
                f'arch dict: missing keys {missing}, unknown keys {unknown}; embed_dims, num_heads and depths are '
                'needed, ratios and conv_sizes allowed'
            )
        arch = dict(dict(ratios=(8, 4, 2, 1), conv_sizes=(9, 5, 3)), **arch)
        for key, length in lengths.items():
            values = arch[key]
            if not isinstance(values, (list, tuple)) or len(values) != length:
                raise ValueError(f'arch dict: {key}={values!r} must hold {length} whole numbers')
            for value in values:
                _check_whole(f'arch dict: {key}', value, 1)
            arch[key] = tuple(values)
        for dims, heads in zip(arch['embed_dims'], arch['num_heads']):
            if dims % heads:
                raise ValueError(
                    f'arch dict: {heads} heads do not divide a width of {dims} '
                    f'(embed_dims={arch["embed_dims"]}, num_heads={arch["num_heads"]})'
                )
        if arch['ratios'][-1] != 1:
            raise ValueError(f'arch dict: ratios={arch["ratios"]} must end in 1, for stage 4 has no landmarks')
        if any(size % 2 == 0 for size in arch['conv_sizes']):
            raise ValueError(f'arch dict: conv_sizes={arch["conv_sizes"]} must be odd')
        return arch

    @staticmethod
    def _parse_attention(attention):
        attention = {} if attention is None else attention
        if not isinstance(attention, (list, tuple)):
            attention = [attention] * (NUM_STAGES - 1)
        if len(attention) != NUM_STAGES - 1 or not all(isinstance(cfg, dict) for cfg in attention):
            raise ValueError(f'attention={attention!r} must be a dict, or a list of three dicts, for stages 1 to 3')
        return attention

    @staticmethod
    def _parse_outputs(out_indices, out_type):
        if out_type not in ('featmap', 'cls_token'):
            raise ValueError(f"out_type={out_type!r} is unknown; choose 'featmap' or 'cls_token'")
        given = tuple(out_indices) if isinstance(out_indices, (list, tuple)) else (out_indices,)
        if (
            not given
            or any(_not_whole(i) or not 0 <= i < NUM_STAGES for i in given)
            or list(given) != sorted(set(given))
        ):
            raise ValueError(
                f'out_indices={out_indices!r} must be stages from 0 to {NUM_STAGES - 1}, each once, in rising order'
            )
        if out_type == 'cls_token' and given[-1] != NUM_STAGES - 1:
            raise ValueError(f"out_type='cls_token' needs stage {NUM_STAGES - 1} in out_indices={out_indices!r}")
        return given, out_type

    @staticmethod
    def _parse_img_size(img_size):
        sides = tuple(img_size) if isinstance(img_size, (list, tuple)) else (img_size, img_size)
        if len(sides) != 2 or any(_not_whole(side) or side < MIN_SIDE for side in sides):
            raise ValueError(
                f'img_size={img_size!r} must be one or two whole numbers (height, width) from {MIN_SIDE} up'
            )
        return sides

    def init_weights(self):
        """Load the checkpoint of ``init_cfg``, or leave the weights to mmengine's initialisers.

        Unlike mmengine's loader this one does not let a checkpoint of another model pass.

        Raises:
            FileNotFoundError: if there is no such checkpoint file.
            ValueError: if ``init_cfg`` names no checkpoint, or one that does not fit.
        """
        cfgs = self.init_cfg if isinstance(self.init_cfg, (list, tuple)) else [self.init_cfg or {}]
        if not all(isinstance(cfg, dict) for cfg in cfgs):
            raise ValueError(
                f'init_cfg={self.init_cfg!r} must be a dict such as '
                "dict(type='Pretrained', checkpoint='classifier.pth', prefix='backbone.'), a list of such, or None"
            )
        pretrained = [cfg for cfg in cfgs if getattr(cfg.get('type'), '__name__', cfg.get('type')) in _PRETRAINED]
        if not pretrained:
            super().init_weights()
            return
        # A checkpoint sets every parameter, so that nothing is left to initialisers beside it.
        path, prefix = pretrained[-1].get('checkpoint'), pretrained[-1].get('prefix') or ''
        if not isinstance(path, str):
            raise ValueError(f'init_cfg={dict(pretrained[-1])} must name a checkpoint file')
        if '://' not in path and not os.path.isfile(path):
            raise FileNotFoundError(
                f'init_cfg names the checkpoint {path!r}, which does not exist. Weights of the authors are converted '
                f'by `python tools/convert_checkpoint.py SRC {path}`; init_cfg=None trains without'
            )
        loaded = load_weights(path)
        self._load_pretrained(loaded.get('state_dict', loaded), prefix, path)
        self._is_init = True

    def _load_pretrained(self, state_dict, prefix, path):
        if prefix and not prefix.endswith('.'):
            prefix += '.'
        found = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        if any(key.removeprefix('module.').startswith('block1.') for key in state_dict):
            raise ValueError(
                f"{path} has the names of the authors' code: convert it by `python tools/convert_checkpoint.py {path} "
                'converted.pth`'
            )
        target = self.state_dict()
        missing = [key for key in target if key not in found]
        # Stages that out_indices does not ask for are not built.
        left_out = [key for key in found if key.startswith('stages.') and int(key.split('.')[1]) >= len(self.stages)]
        unexpected = [key for key in found if key not in target and key not in left_out]
        misshapen = [
            f'{key} {tuple(found[key].shape)} for {tuple(value.shape)}'
            for key, value in target.items()
            if key in found and not key.endswith('.pos_embed') and found[key].shape != value.shape
        ]
        if missing or unexpected or misshapen:
            prefixes = sorted({key.split('.')[0] for key in state_dict})
            hint = (
                ''
                if len(missing) < len(target)
                else f'; the checkpoint has keys under {prefixes}: set `prefix` in init_cfg'
            )
            raise ValueError(
                f'the checkpoint {path} ({describe_backbone(found)}) does not fit this SOFT backbone '
                f'({describe_backbone(target)}), prefix {prefix!r}: '
                f'{len(missing)} keys missing {missing[:4]}, {len(unexpected)} unexpected {unexpected[:4]}, '
                f'{len(misshapen)} of another shape {misshapen[:4]}{hint}'
            )
        grids = {
            key: tuple(value.shape[-2:])
            for key, value in target.items()
            if key.endswith('.pos_embed') and found[key].shape != value.shape
        }
        resized = [f'{key} from {tuple(found[key].shape[-2:])} to {grid}' for key, grid in grids.items()]
        found.update((key, resize_pos_embed(found[key], grid)) for key, grid in grids.items())
        self.load_state_dict({key: found[key] for key in target})
        others = sorted({key.split('.')[0] for key in state_dict if not key.startswith(prefix)})
        report = [f'SOFT: all {len(target)} backbone keys loaded from {path}']
        report += [f'resized: {", ".join(resized)}'] * bool(resized)
        report += [f'left out: {len(left_out)} keys of stages that out_indices does not need'] * bool(left_out)
        report += [f'not of the backbone: keys under {others}'] * bool(others)
        print_log('; '.join(report), 'current', logging.INFO)

    def _freeze_stages(self):
        frozen = list(self.stages[: max(self.frozen_stages, 0)])
        if self.frozen_stages == 0:
            self.stages[0].pos_embed.requires_grad = False
            frozen = [self.stages[0].patch_embed]
        for module in frozen:
            module.eval()
            module.requires_grad_(False)

    def train(self, mode=True):
        """Set training mode, but leave frozen stages, and with ``norm_eval`` every BatchNorm, in evaluation mode."""
        super().train(mode)
        if mode:
            self._freeze_stages()
            if self.norm_eval:
                for module in self.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
        return self

    def forward(self, x):
        """Compute the outputs of the stages of ``out_indices``.

        Args:
            x (Tensor): images ``(B, in_channels, H, W)``, both sides at least 32; neither need be a multiple of 32.

        Returns:
            tuple[Tensor]: one per stage of ``out_indices``: maps ``(B, C, ceil(H / s), ceil(W / s))`` with ``s`` =
            4, 8, 16, 32, that of stage 4 after the final LayerNorm and without the class token. With
            ``out_type='cls_token'`` the last is the class token ``(B, C4)`` after the final LayerNorm.

        Raises:
            ValueError: for another number of dimensions or channels, or a side under 32.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f'input of shape {tuple(x.shape)}: expected (B, {self.in_channels}, H, W)')
        if min(x.shape[-2:]) < MIN_SIDE:
            raise ValueError(
                f'input of {x.shape[-2]}x{x.shape[-1]} pixels: both sides must be at least {MIN_SIDE}; '
                'enlarge or pad it'
            )
        outputs = []
        for i, stage in enumerate(self.stages):
            tokens, grid = stage(x)
            if stage.class_token:
                tokens = stage.norm(tokens)
                if self.out_type == 'cls_token':
                    outputs.append(tokens[:, 0])
                    break
                tokens = tokens[:, 1:]
            x = tokens.unflatten(1, grid).permute(0, 3, 1, 2)
            if i in self.out_indices:
                # mmcv's RoIAlign reads a map as if it were contiguous, whatever its strides.
                outputs.append(x.contiguous())
        return tuple(outputs)

    def get_layer_depth(self, param_name, prefix=''):
        """Depth of a parameter, for layer-wise learning rate decay (mmpretrain's
        ``LearningRateDecayOptimWrapperConstructor``).

        Args:
            param_name (str): name of the parameter in the whole model.
            prefix (str): prefix of the backbone's parameters in it, such as ``'backbone.'``.

        Returns:
            tuple[int, int]: 0 for the stem, ``k`` for what enters or belongs to the ``k``-th block, the last for all
            the rest; and the number of depths, blocks + 2.
        """
        depths = self.arch['depths'][: len(self.stages)]
        num_layers = sum(depths) + 2
        parts = param_name[len(prefix) :].split('.')
        if not param_name.startswith(prefix) or parts[0] != 'stages' or parts[2] == 'norm':
            return num_layers - 1, num_layers
        stage = int(parts[1])
        if parts[2] == 'blocks':
            return sum(depths[:stage]) + int(parts[3]) + 1, num_layers
        return 0 if stage == 0 else sum(depths[:stage]) + 1, num_layers


def describe_backbone(state_dict):
    """Depths and widths of a backbone as its state dict shows them, as a short text.

    Args:
        state_dict (dict[str, Tensor]): with keys ``stages.*``.

    Returns:
        str: such as ``'depths 1, 2, widths 64, 128'``, or ``'no SOFT backbone'``.
    """
    blocks = [re.match(r'stages\.(\d+)\.blocks\.(\d+)\.', key) for key in state_dict]
    depths = {}
    for match in filter(None, blocks):
        stage, block = int(match[1]), int(match[2])
        depths[stage] = max(depths.get(stage, 0), block + 1)
    if not depths:
        return 'no SOFT backbone'
    keys = [f'stages.{stage}.pos_embed' for stage in sorted(depths)]
    widths = [str(state_dict[key].shape[1]) if key in state_dict else '?' for key in keys]
    return f'depths {", ".join(str(depths[k]) for k in sorted(depths))}, widths {", ".join(widths)}'


def _not_whole(value):
    return not isinstance(value, int) or isinstance(value, bool)


def _check_whole(name, value, minimum):
    if _not_whole(value) or value < minimum:
        raise ValueError(f'{name}: {value!r} must be a whole number from {minimum} up')


def _check_rate(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f'{name}={value!r} must be a number from 0 up to, but not including, 1')
