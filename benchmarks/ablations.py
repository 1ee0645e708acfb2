"""Ablations of the implementation of SOFT: each replaces one implementation choice by its alternative.

An ablation gives the same results as soft_mm, up to rounding. Attention ablations are registered types that replace
``SoftmaxFreeAttention`` in a config. Other ablations replace submodules of a built backbone. Two further types,
:class:`PlainSoftmaxAttention` and :class:`ReferenceAttention`, compute an attention by its plain formula.
"""

from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from soft_mm.models.attention import SoftmaxAttention, SoftmaxFreeAttention
from soft_mm.models.attention.base import LocalBranch, split_heads
from soft_mm.models.blocks import MLP
from soft_mm.models.soft import PatchEmbed
from soft_mm.ops import reference
from soft_mm.ops.blockwise import chunk_slices
from soft_mm.ops.kernel import compute_dtype, gaussian_kernel
from soft_mm.registry import MODELS


@MODELS.register_module()
class PlainSoftmaxAttention(SoftmaxAttention):
    """Softmax attention by its formula, which holds the ``n x n`` scores, without PyTorch's fused kernel."""

    def attend(self, q, k, v, grid):
        return torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1) @ v


@MODELS.register_module()
class ReferenceAttention(SoftmaxFreeAttention):
    """The authors' plain attention by the formulas of :mod:`soft_mm.ops.reference`, without options.

    Args:
        embed_dims, num_heads, ratio, conv_size: As in :class:`~soft_mm.models.attention.SoftmaxFreeAttention`.
    """

    def __init__(self, embed_dims, num_heads, ratio, conv_size):
        super().__init__(embed_dims, num_heads, ratio, conv_size)

    def attend(self, q, v, grid):
        norm = self.landmark_norm
        landmarks = reference.conv_landmarks(q, grid, self.landmark.weight, norm.weight, norm.bias, norm.eps)
        return reference.softmax_free_attention(q, landmarks, v, reference.newton_inverse)


def _multiply_middle(matrix, gathered, inverted):
    """Multiply ``gathered`` by ``M``. ``matrix`` is ``M``, or the inverse of ``M`` with ``inverted``."""
    return torch.cholesky_solve(gathered, torch.linalg.cholesky_ex(matrix)[0]) if inverted else matrix @ gathered


@MODELS.register_module()
class ComposedAutogradAttention(SoftmaxFreeAttention):
    """Chunks of tokens with PyTorch's gradient checkpointing instead of the hand-written backward pass."""

    def attend(self, q, v, grid):
        landmarks, pool_factor, _ = self.landmarks(q, grid)
        matrix, inverted = self.middle(landmarks, pool_factor)
        landmarks = landmarks.to(compute_dtype(q))

        def gather(tokens, values, landmarks):
            return gaussian_kernel(tokens, landmarks).transpose(-2, -1) @ values

        def spread(tokens, landmarks, weights):
            return gaussian_kernel(tokens, landmarks) @ weights

        chunks = chunk_slices(q, landmarks)
        gathered = sum(checkpoint(gather, q[:, :, c], v[:, :, c], landmarks, use_reentrant=False) for c in chunks)
        weights = _multiply_middle(matrix, gathered, inverted)
        return torch.cat([checkpoint(spread, q[:, :, c], landmarks, weights, use_reentrant=False) for c in chunks], 2)


@MODELS.register_module()
class HeldKernelAttention(SoftmaxFreeAttention):
    """Attention that computes ``P`` once and holds it for the backward pass."""

    def attend(self, q, v, grid):
        landmarks, pool_factor, _ = self.landmarks(q, grid)
        matrix, inverted = self.middle(landmarks, pool_factor)
        cross = gaussian_kernel(q, landmarks)
        return cross @ _multiply_middle(matrix, cross.transpose(-2, -1) @ v, inverted)


@MODELS.register_module()
class OneProjectionAttention(SoftmaxFreeAttention):
    """Attention that projects queries and values by one product instead of two."""

    def project(self, x, grid):
        q, v = F.linear(x, self.qv.weight, self.qv.bias).chunk(2, dim=-1)
        return split_heads(q * self.head_dims**-0.25, self.num_heads), split_heads(v, self.num_heads)


class LocalBranchOverHeads(nn.Module):
    """Local branch as a convolution with one group per head and the channels of a head in the batch dimension.

    Args:
        local (LocalBranch): Module to replace. Its filters are shared.
    """

    def __init__(self, local):
        super().__init__()
        self.weight = local.weight
        self.padding = local.padding

    def forward(self, v, grid):
        """Convolve values ``(B, n, C)`` on ``grid`` and return ``(B, n, C)``."""
        heads = self.weight.shape[0]
        maps = v.unflatten(-1, (heads, -1)).permute(0, 3, 2, 1).flatten(0, 1).unflatten(-1, grid)
        out = F.conv2d(maps, self.weight, padding=self.padding, groups=heads)
        return out.unflatten(0, (v.shape[0], -1)).permute(0, 3, 4, 2, 1).flatten(3).flatten(1, 2)


class ChannelsFirstEmbed(nn.Sequential):
    """Patch embedding that works in channels-first instead of channels-last format."""

    def forward(self, x):
        """Embed a map ``(B, C_in, H, W)``."""
        return super().forward(x.contiguous())


def _replace_modules(model, cls, make):
    """Replace every module of the class ``cls`` by ``make(module)``, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is cls:
                setattr(parent, name, make(child))


def compute_local_over_heads(model):
    """Replace the local branches of a model by :class:`LocalBranchOverHeads`, in place."""
    _replace_modules(model, LocalBranch, LocalBranchOverHeads)


def compute_mlps_at_once(model):
    """Replace the MLPs of a model by plain sequences of their layers, in place.

    The sequences hold the whole hidden layer and recompute nothing.
    """
    _replace_modules(model, MLP, lambda mlp: nn.Sequential(OrderedDict(mlp.named_children())))


def call_layers_apart(model):
    """Add hooks without effect to the layers of MLPs and patch embeddings, so that each layer is called."""
    for part in model.modules():
        if isinstance(part, (MLP, PatchEmbed)):
            for layer in part:
                layer.register_forward_hook(lambda module, args, output: None)


def keep_channels_first(model):
    """Replace the patch embeddings of a model by :class:`ChannelsFirstEmbed`, in place."""
    _replace_modules(model, PatchEmbed, lambda embed: ChannelsFirstEmbed(*embed))


#: Attention ablations, with the registered types that replace ``SoftmaxFreeAttention`` in a config.
ATTENTIONS = {
    'composed-autograd': 'ComposedAutogradAttention',
    'held-kernel': 'HeldKernelAttention',
    'one-projection': 'OneProjectionAttention',
}
#: Other ablations, with the functions that replace submodules of a built backbone in place.
REPLACEMENTS = {
    'local-over-heads': compute_local_over_heads,
    'mlp-at-once': compute_mlps_at_once,
    'channels-first': keep_channels_first,
    'layers-apart': call_layers_apart,
}
#: All ablations.
ABLATIONS = (*ATTENTIONS, *REPLACEMENTS)
#: Ablations that also apply to an attention operator, which has no projections and no local branch.
OPERATOR_ABLATIONS = ('composed-autograd', 'held-kernel')


def ablate_attention(config, ablation):
    """Apply an attention ablation to the config of an attention.

    Args:
        config (dict): Config of a ``SoftmaxFreeAttention``.
        ablation (str): Key of :data:`ATTENTIONS`.

    Returns:
        dict: The config with the type of the ablation.

    Raises:
        ValueError: If the config has another type than ``SoftmaxFreeAttention``.
    """
    kind = config.get('type', 'SoftmaxFreeAttention')
    if kind != 'SoftmaxFreeAttention':
        raise ValueError(f'{kind} has no ablation {ablation!r}: expected SoftmaxFreeAttention; leave the ablation out')
    return dict(config, type=ATTENTIONS[ablation])
