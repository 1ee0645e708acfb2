"""The SOFT backbone.

::

    image (B, 3, H, W)
      |  stage 1   three 3x3 convolutions, strides 2 1 2   positions   softmax-free blocks                     stride 4
      |  stage 2   one 3x3 convolution, stride 2           positions   softmax-free blocks                     stride 8
      |  stage 3   one 3x3 convolution, stride 2           positions   softmax-free blocks                     stride 16
      v  stage 4   one 3x3 convolution, stride 2           positions   class token, softmax blocks, LayerNorm  stride 32
                   (or another attention; no class token if it needs a grid)
"""

import inspect
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule, PretrainedInit
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from soft_mm.checkpoints.matching import (
    adapt_channels,
    check_normalized,
    conversion_command,
    find_state_dict,
    match_backbone,
)
from soft_mm.checkpoints.reading import is_address, load_weights
from soft_mm.ops.checks import check_bool, check_integer, check_rate, is_integer
from soft_mm.ops.kernel import compute_dtype, is_autocast_enabled
from soft_mm.ops.recording import has_dynamic_side, is_recorded, is_tracing, needs_standard_operators
from soft_mm.registry import MODELS, find_registered

from .arch import (
    ARCH_ZOO,
    MIN_SIDE,
    NUM_STAGES,
    check_frozen_stages,
    parse_arch,
    parse_attention,
    parse_img_size,
    parse_outputs,
)
from .attention.softmax_free import normalized_options
from .blocks import PreNormBlock, SoftmaxFreeBlock, reset_parameters
from .fused_layers import can_fuse, fused_conv

STEM_DIMS = 32
# What to do about keywords that configs of other backbones have.
_HINTS = dict(
    pretrained='set model.pretrained=None and _delete_=True in the backbone if the config inherits from one of another '
    'backbone, and name the weights of SOFT in init_cfg',
    norm_cfg="leave it out; to synchronise BatchNorm between GPUs, set sync_bn='torch' in the config",
)


def _is_pretrained(cfg: dict[str, Any]) -> bool:
    """Return whether an initialisation reads a checkpoint. Its type is resolved as mmengine does it."""
    kind = cfg.get('type')
    with WEIGHT_INITIALIZERS.switch_scope_and_registry(cfg.get('_scope_')) as registry:
        found = find_registered(registry, kind)
    if callable(found) and not inspect.isclass(found):
        raise ValueError(
            f'init_cfg has the type {kind!r}, a function: expected the name or the class of an initialiser'
        )
    return inspect.isclass(found) and issubclass(found, PretrainedInit)


class PatchEmbed(nn.Sequential):
    """Patch embedding: 3x3 convolutions, each followed by BatchNorm and ReLU.

    Maps ``(B, in_channels, H, W)`` to ``(B, embed_dims, H / s, W / s)``, rounded up, with ``s`` the total stride.

    Args:
        in_channels (int): Channels of the input map.
        embed_dims (int): Channels of the output map.
        stem (bool): Whether this is the stem (stage 1) with three convolutions of strides 2, 1, 2. Otherwise there is
            one convolution of stride 2.
    """

    def __init__(self, in_channels: int, embed_dims: int, stem: bool) -> None:
        widths, strides = ([STEM_DIMS, STEM_DIMS, embed_dims], [2, 1, 2]) if stem else ([embed_dims], [2])
        layers: list[nn.Module] = []
        for width, stride in zip(widths, strides):
            conv = nn.Conv2d(in_channels, width, 3, stride, padding=1)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            in_channels = width
        super().__init__(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Embed a map ``(B, in_channels, H, W)``."""
        layers: list[Any] = list(self)
        kinds = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU) * (len(layers) // 3)
        fuses = not torch.is_grad_enabled() and can_fuse(x, layers, kinds)
        # Filters in half precision would be rounded again when they are folded. Autocast rounds folded filters once, as
        # it rounds the filters of the layers.
        if not fuses or any(tensor.dtype != torch.float32 for tensor in (x, *self.parameters())):
            return super().forward(x)
        for conv, norm in zip(layers[::3], layers[1::3]):
            x = fused_conv(x, conv, norm)
        return x


def resize_pos_embed(pos_embed: Tensor, grid: Sequence[int]) -> Tensor:
    """Resize position embeddings bilinearly, in float32 or wider.

    Args:
        pos_embed (Tensor): ``(1, C, h, w)``.
        grid (tuple[int, int]): New grid ``(H, W)``.

    Returns:
        Tensor: ``(1, C, H, W)`` in the dtype of ``pos_embed``, or in float32 for integers. If the grid is the same,
        ``pos_embed`` itself.
    """
    if not has_dynamic_side(grid) and tuple(pos_embed.shape[-2:]) == tuple(grid):
        return pos_embed
    wide = pos_embed.to(compute_dtype(pos_embed))
    if not needs_standard_operators():
        # The map to which they are added is channels-last.
        wide = wide.contiguous(memory_format=torch.channels_last)
    resized = nn.functional.interpolate(wide, size=tuple(grid), mode='bilinear', align_corners=False)
    # Integers, as a file may hold them, would be rounded.
    return resized.to(pos_embed.dtype) if pos_embed.is_floating_point() else resized


# Number of positions from which the loop over images is the faster copy.
_LARGE_MAP = 4096


def _channels_first(x: Tensor) -> Tensor:
    """Return a contiguous copy of a channels-last map, because mmcv's RoIAlign ignores the strides of a map."""
    # On a CPU, PyTorch transposes a large matrix several times faster than a batch of matrices.
    if torch.is_grad_enabled() or is_recorded() or not x.is_cpu or x.shape[-2:].numel() < _LARGE_MAP:
        return x.contiguous()
    out = x.new_empty(x.shape)
    for image, copy in zip(x, out):
        copy.flatten(1).copy_(image.flatten(1))
    return out


class SOFTStage(BaseModule):
    """One stage: patch embedding, position embeddings and blocks.

    Args:
        in_channels (int): Channels of the input map.
        embed_dims (int): Channels ``C`` of the stage.
        grid (tuple[int, int]): Grid of the learned position embeddings.
        blocks (list[nn.Module]): Blocks, called as ``block(tokens, grid)``.
        stem (bool): Whether this is stage 1.
        class_token (bool): Whether a class token is put before the tokens.
        final_norm (bool): Whether the stage ends with a LayerNorm, as stage 4 does.
        drop_rate (float): Dropout rate after the position embeddings.
        with_cp (bool): Whether to recompute the blocks in the backward pass.
    """

    def __init__(
        self,
        in_channels: int,
        embed_dims: int,
        grid: tuple[int, int],
        blocks: Sequence[nn.Module],
        stem: bool,
        class_token: bool,
        final_norm: bool,
        drop_rate: float,
        with_cp: bool,
    ) -> None:
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
        self.norm = nn.LayerNorm(embed_dims, eps=1e-6) if final_norm else nn.Identity()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Resize the position embeddings of a checkpoint with another grid."""
        key = f'{prefix}pos_embed'
        loaded, grid = state_dict.get(key), tuple(self.pos_embed.shape[-2:])
        if loaded is not None and loaded.ndim == 4 and tuple(loaded.shape[-2:]) != grid:
            print_log(f'{key} resized from {tuple(loaded.shape[-2:])} to {grid} positions', 'current')
            state_dict[key] = resize_pos_embed(loaded, grid)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Apply the stage.

        Args:
            x (Tensor): Map ``(B, C_in, H, W)``.

        Returns:
            tuple[Tensor, tuple[int, int]]: Tokens after the last block and the final LayerNorm if there is one, and
            their grid ``(H', W')``. The tokens are ``(B, H' * W', C)``, or with a class token, which comes first,
            ``(B, 1 + H' * W', C)``.

        Raises:
            ValueError: If the input and the weights have different devices or, outside autocast, different dtypes.
        """
        # Checked here, because FSDP moves and converts the weights of a stage just before this call.
        if x.device != self.pos_embed.device:
            raise ValueError(f'input on {x.device}, but the backbone is on {self.pos_embed.device}: move one of them')
        # Autocast converts all but float64.
        converted = x.dtype != torch.float64 and is_autocast_enabled(x.device.type)
        if x.dtype != self.pos_embed.dtype and not converted:
            raise ValueError(
                f'input of {x.dtype}, but the backbone has {self.pos_embed.dtype}: convert one of them, or use '
                'torch.autocast'
            )
        if not needs_standard_operators():
            # In channels-last format, a map and its tokens have the same memory layout, so no copy is needed.
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.patch_embed(x)
        grid = (x.shape[-2], x.shape[-1])
        if is_tracing():
            # A trace is for one grid. With another one, the addition in place fails, because it does not broadcast.
            grid = (int(grid[0]), int(grid[1]))
            x = x.clone().add_(resize_pos_embed(self.pos_embed, grid))
        else:
            x = x + resize_pos_embed(self.pos_embed, grid)
        x = x.permute(0, 2, 3, 1).flatten(1, 2)
        if self.class_token:
            x = torch.cat([(self.cls_token + self.cls_pos_embed).expand(x.shape[0], -1, -1), x], dim=1)
        x = self.pos_drop(x)
        # With the class token, the tokens are no cells of a map.
        block_grid = (1, 1 + grid[0] * grid[1]) if self.class_token else grid
        for block in self.blocks:
            if self.with_cp and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, block_grid, use_reentrant=False)
            else:
                x = block(x, block_grid)
        return self.norm(x), grid


@MMENGINE_MODELS.register_module()
@MODELS.register_module()
class SOFT(BaseModule):
    """Softmax-free transformer backbone for classification, detection and segmentation.

    Papers: *SOFT: Softmax-free Transformer with Linear Complexity* (NeurIPS 2021, https://arxiv.org/abs/2110.11945),
    *Softmax-free Linear Transformers* (IJCV 2024, https://arxiv.org/abs/2207.03341).

    Args:
        arch (str | dict): ``'tiny'``, ``'small'``, ``'medium'``, ``'large'``, ``'huge'``, or a dict. A dict needs
            ``embed_dims``, ``num_heads`` and ``depths`` with four integers each. It may have ``ratios``, four
            integers: the side of the patch of tokens that becomes one landmark (default ``(8, 4, 2, 1)``; the last must
            be 1 if stage 4 has a class token). It may have ``conv_sizes``, three or four odd integers:
            the side of the filters of the local branch (default ``(9, 5, 3, 3)``). Defaults to ``'tiny'``.
        attention (dict | list[dict] | None): Attention: one dict for stages 1 to 3, or a list of three or four dicts.
            Missing keys take the defaults of the type, see :class:`SoftmaxFreeAttention`. The default type is
            ``'SoftmaxFreeAttention'``, in stage 4 ``'SoftmaxAttention'``, as in the papers. Defaults to None: the
            default types.
        out_indices (int | Sequence[int]): Indices of the stages whose outputs are returned: 0 for stage 1, 3 for
            stage 4. Stages after the last one are not built. Defaults to ``(0, 1, 2, 3)``.
        out_type (str): ``'featmap'``: all outputs are maps. ``'cls_token'``: the last output is the class token, which
            needs the index 3 in ``out_indices``, and in stage 4 an attention that takes a class token:
            ``'SoftmaxAttention'`` or ``'PerformerAttention'``. With another attention, stage 4 has no class token, and
            a classifier uses ``'featmap'`` with mmpretrain's ``GlobalAveragePooling``. Defaults to ``'featmap'``.
        in_channels (int): Channels of the image. Defaults to 3.
        img_size (int | tuple[int, int]): Image size in pixels, or (height, width), for which position embeddings are
            learned. The forward pass resizes them for images of another size. Loading a checkpoint resizes its position
            embeddings to this size. Defaults to 224.
        drop_rate (float): Dropout rate after the position embeddings, and in the output projections and MLPs of
            stage 4. Defaults to 0.
        drop_path_rate (float): Rate of stochastic depth in the last block. It increases linearly from 0 in the first
            block. Defaults to 0.
        frozen_stages (int): -1 freezes nothing. 0 freezes the patch embedding and the position embeddings of stage 1.
            ``k`` from 1 to 4 freezes the first ``k`` stages. Frozen modules get no gradient and stay in evaluation
            mode. Defaults to -1.
        norm_eval (bool): Whether to keep every BatchNorm in evaluation mode during training. Defaults to False.
        with_cp (bool): Whether to recompute the blocks in the backward pass to save memory. Defaults to False.
        init_cfg (dict | list[dict] | None): See mmengine's ``BaseModule``. With ``type='Pretrained'``, the checkpoint
            must have every parameter in the expected shape, except for the grid of the position embeddings. For images
            of other channels than in the checkpoint, it takes the key ``new_channels``, see
            :func:`soft_mm.checkpoints.matching.adapt_channels`. Its key ``fresh_attention``, such as ``[3]``, lists the
            indices of stages whose attentions keep their initial values if they do not fit the checkpoint. Defaults to
            None: the authors' initialisation.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If a keyword is unknown.

    Examples:
        >>> import torch
        >>> from soft_mm import SOFT
        >>> maps = SOFT('tiny').eval()(torch.rand(1, 3, 200, 232))
        >>> [tuple(m.shape) for m in maps]
        [(1, 64, 50, 58), (1, 128, 25, 29), (1, 320, 13, 15), (1, 512, 7, 8)]
    """

    arch_zoo = ARCH_ZOO

    def __init__(
        self,
        arch: str | dict[str, Any] = 'tiny',
        attention: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        out_type: str = 'featmap',
        in_channels: int = 3,
        img_size: int | Sequence[int] = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
        **unknown: object,
    ) -> None:
        if unknown:
            allowed = [name for name in inspect.signature(SOFT).parameters if name != 'unknown']
            hints = ''.join(f'. {name}: {_HINTS[name]}' for name in sorted(unknown) if name in _HINTS)
            raise TypeError(f'SOFT does not take the keywords {sorted(unknown)}; allowed are {allowed}{hints}')
        super().__init__(init_cfg)
        self.arch = parse_arch(arch)
        attentions = parse_attention(attention)
        self.out_indices, self.out_type = parse_outputs(out_indices, out_type)
        num_stages = self.out_indices[-1] + 1
        self.img_size = parse_img_size(img_size)
        check_integer('in_channels', in_channels)
        check_rate('drop_rate', drop_rate)
        check_rate('drop_path_rate', drop_path_rate)
        check_frozen_stages(frozen_stages, num_stages)
        check_bool('norm_eval', norm_eval)
        check_bool('with_cp', with_cp)
        self.in_channels = in_channels
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp

        dims, heads, depths = (self.arch[key] for key in ('embed_dims', 'num_heads', 'depths'))
        drop_paths = (drop_path_rate * block / max(sum(depths) - 1, 1) for block in range(sum(depths)))
        self.stages = nn.ModuleList()
        for i in range(num_stages):
            grid = tuple(-(-side // 2 ** (i + 2)) for side in self.img_size)
            last = i == NUM_STAGES - 1
            options: dict[str, Any] = dict(
                ratio=self.arch['ratios'][i], conv_size=self.arch['conv_sizes'][i], attention=attentions[i], grid=grid
            )
            if last:
                options['drop_rate'] = drop_rate
            block_type: Any = PreNormBlock if last else SoftmaxFreeBlock
            blocks = [block_type(dims[i], heads[i], drop_path=next(drop_paths), **options) for _ in range(depths[i])]
            class_token = last and self._takes_class_token(blocks[0].attn)
            channels = in_channels if i == 0 else dims[i - 1]
            self.stages.append(
                SOFTStage(channels, dims[i], grid, blocks, i == 0, class_token, last, drop_rate, with_cp)
            )
        reset_parameters(self)
        self._freeze_stages()

    def _takes_class_token(self, attention: nn.Module) -> bool:
        """Return whether stage 4 has a class token, and check the options that depend on its attention."""
        name = type(attention).__name__
        # An attention of other code may need a grid.
        if getattr(attention, 'needs_grid', True):
            if self.out_type == 'cls_token':
                raise ValueError(
                    f"out_type='cls_token': {name} in stage 4 needs a grid, so it takes no class token; set "
                    "out_type='featmap', with neck=dict(type='GlobalAveragePooling') in a classifier of mmpretrain, or "
                    "choose 'SoftmaxAttention' for stage 4"
                )
            return False
        if self.arch['ratios'][-1] != 1:
            raise ValueError(
                f'arch dict: ratios={self.arch["ratios"]}: expected 1 as the last entry, because {name} in stage 4 has '
                'no landmarks'
            )
        return True

    def init_weights(self) -> None:
        """Load the checkpoint of ``init_cfg``, or call mmengine's initialisation if there is none.

        Unlike mmengine, this method refuses a checkpoint that does not fit.

        Raises:
            FileNotFoundError: If the checkpoint file does not exist.
            ValueError: If ``init_cfg`` is malformed, or the checkpoint does not fit or cannot be read.
        """
        cfgs = self.init_cfg if isinstance(self.init_cfg, (list, tuple)) else [self.init_cfg]
        if self.init_cfg is None or isinstance(self.init_cfg, dict) and not self.init_cfg:
            cfgs = []
        if not all(isinstance(cfg, dict) and 'type' in cfg for cfg in cfgs):
            raise ValueError(
                f'init_cfg={self.init_cfg!r}: expected a dict such as '
                "dict(type='Pretrained', checkpoint='classifier.pth', prefix='backbone.'), a list of dicts, or None"
            )
        pretrained = [cfg for cfg in cfgs if _is_pretrained(cfg)]
        overrides = [cfg.get('override') for cfg in cfgs]
        parts = [part for value in overrides for part in (value if isinstance(value, (list, tuple)) else [value])]
        if any(isinstance(part, dict) and _is_pretrained(part) for part in parts):
            raise ValueError(
                f'init_cfg={self.init_cfg!r}: mmengine would read a checkpoint in override without a check for code; '
                'make init_cfg a list, with the checkpoint as a separate dict'
            )
        if not pretrained:
            super().init_weights()
            return
        # The checkpoint sets every parameter, so the other initialisers of a list would have no effect.
        path, prefix = pretrained[-1].get('checkpoint'), pretrained[-1].get('prefix') or ''
        if not isinstance(path, str):
            raise ValueError(f'init_cfg={dict(pretrained[-1])}: expected the key checkpoint with a file or an address')
        if not isinstance(prefix, str):
            raise ValueError(f'init_cfg={dict(pretrained[-1])}: expected a string as prefix')
        fresh = pretrained[-1].get('fresh_attention', ())
        if not isinstance(fresh, (list, tuple)) or not all(is_integer(i, 0) and i < NUM_STAGES for i in fresh):
            raise ValueError(
                f'fresh_attention={fresh!r} in init_cfg: expected a list of indices of stages, such as [3] for stage 4'
            )
        normalized = normalized_options(self)
        if not is_address(path) and not os.path.isfile(os.path.expanduser(path)):
            raise FileNotFoundError(
                f'init_cfg names the checkpoint {path!r}, which does not exist. To convert weights of the authors, run '
                f'{conversion_command("SRC", path, any(normalized))}. To train without a checkpoint, set init_cfg=None'
            )
        target, content = self.state_dict(), load_weights(path)
        state_dict, adapted = adapt_channels(
            find_state_dict(content, path), prefix, self.in_channels, pretrained[-1].get('new_channels')
        )
        fit = match_backbone(state_dict, target, prefix, path, any(normalized), fresh)
        check_normalized(content, normalized_options(self, fit.fresh), path)
        weights = {
            key: resize_pos_embed(value, target[key].shape[-2:]) if key in fit.resized else value
            for key, value in fit.weights.items()
        }
        self.load_state_dict({**target, **weights})
        print_log(fit.report + adapted, 'current', logging.INFO)
        self._is_init = True

    def _freeze_stages(self) -> None:
        frozen = list(self.stages[: max(self.frozen_stages, 0)])
        if self.frozen_stages == 0:
            self.stages[0].pos_embed.requires_grad = False
            frozen = [self.stages[0].get_submodule('patch_embed')]
        for module in frozen:
            module.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> 'SOFT':
        """Set training or evaluation mode.

        Frozen stages, and with ``norm_eval`` every BatchNorm, always stay in evaluation mode.

        Args:
            mode (bool): Whether to set training mode. Defaults to True.

        Returns:
            SOFT: The backbone itself.
        """
        super().train(mode)
        if mode:
            self._freeze_stages()
            if self.norm_eval:
                for module in self.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
        return self

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.layout != torch.strided:
            kind = x.layout if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f'input of {kind}: expected a dense tensor (B, {self.in_channels}, H, W)')
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f'input of shape {tuple(x.shape)}: expected (B, {self.in_channels}, H, W); for another number of '
                'channels, set in_channels'
            )
        if min(x.shape[-2:]) < MIN_SIDE:
            raise ValueError(
                f'input of {x.shape[-2]}x{x.shape[-1]} pixels: expected both sides >= {MIN_SIDE}; '
                'enlarge the image, or pad it by the data_preprocessor: pad_size_divisor=32 in mmdet and mmpretrain, '
                'size_divisor=32 and test_cfg=dict(size_divisor=32) in mmsegmentation'
            )
        if not x.is_floating_point():
            raise ValueError(
                f'input of {x.dtype}: expected floating-point numbers; normalise images with the data_preprocessor'
            )
        stage: Any = self.stages[-1]
        norm = stage.patch_embed[1]
        single = isinstance(norm, nn.BatchNorm2d) and norm.training and x.shape[0] == 1
        if single and max(x.shape[-2:]) <= 2 ** (len(self.stages) + 1):
            raise ValueError(
                f'BatchNorm cannot be trained on one image of {x.shape[-2]}x{x.shape[-1]} pixels, which is a single '
                'value at the last stage: use more images per batch, larger images, or norm_eval=True'
            )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs of the stages of ``out_indices``.

        Args:
            x (Tensor): Images ``(B, in_channels, H, W)`` with ``H >= 32`` and ``W >= 32``. The sides need not be
                multiples of 32.

        Returns:
            tuple[Tensor, ...]: One output per stage of ``out_indices``: a map ``(B, C, ceil(H / s), ceil(W / s))`` with
            stride ``s`` = 4, 8, 16 or 32. The map of stage 4 is taken after the final LayerNorm, without a class
            token. With ``out_type='cls_token'``, the last output is the class token ``(B, C4)`` after that LayerNorm.

        Raises:
            TypeError: If the input is not a dense tensor.
            ValueError: If the number of dimensions or channels, the dtype or the device is wrong, a side is shorter
                than 32 pixels, or BatchNorm would be trained on a single value.
        """
        self._check_input(x)
        outputs = []
        stage: Any
        for i, stage in enumerate(self.stages):
            tokens, grid = stage(x)
            if stage.class_token:
                if self.out_type == 'cls_token':
                    outputs.append(tokens[:, 0])
                    break
                tokens = tokens[:, 1:]
            x = tokens.unflatten(1, grid).permute(0, 3, 1, 2)
            if i in self.out_indices:
                outputs.append(_channels_first(x))
        return tuple(outputs)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Return the depth of a parameter, for layer-wise learning rate decay.

        mmpretrain's ``LearningRateDecayOptimWrapperConstructor`` calls this method.

        Args:
            param_name (str): Name of the parameter in the whole model.
            prefix (str): Prefix of the backbone's parameters, such as ``'backbone.'``.

        Returns:
            tuple[int, int]: Depth, and number of depths, which is the number of blocks + 2. The embeddings of stage 1
            have depth 0. The ``k``-th block, and the embeddings of a later stage directly before it, have depth ``k``.
            All other parameters have the largest depth.
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
