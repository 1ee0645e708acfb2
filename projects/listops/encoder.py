"""Sequence encoder that can use any attention of the backbone, and a preprocessor that pads sequences."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.model import BaseDataPreprocessor, BaseModule
from mmengine.registry import MODELS

from soft_mm.models.blocks import SoftmaxFreeBlock, reset_parameters
from soft_mm.ops.checks import check_integer

PADDING = 0


@MODELS.register_module()
class SequenceEncoder(BaseModule):
    """Classification backbone for sequences: embeddings, softmax-free blocks, mean over the tokens.

    Token and position embeddings are added and normalised as in BERT (arXiv:1810.04805), because post-norm blocks
    do not normalise their input. Padding tokens take part neither in the attention, which gets them as its mask,
    nor in the mean. If the attention forms patches or segments of tokens, the padded length decides where they end.
    It changes the result if ``max_landmarks`` pools landmarks, with random landmarks, with ``sampler='mean'``
    unless the padded length is a multiple of ``ratio``, with Linformer, and with Nystrom's means of segments.
    Otherwise it does not, up to rounding, if the last patch with a token is complete: if it is at least the length
    of the sequence, rounded up to a multiple of ``ratio``.

    Args:
        vocab_size (int): Number of token ids, including id 0 for padding.
        length (int): Maximum number of tokens in a sequence, and number of learned position embeddings.
        embed_dims (int): Channels ``C``. Defaults to 64.
        num_heads (int): Number of heads, a divisor of ``embed_dims``. Defaults to 2.
        depth (int): Number of blocks. Defaults to 2.
        ratio (int): Number of consecutive tokens per landmark. Defaults to 16.
        conv_size (int): Length of the filters of the local branch, odd. Defaults to 9.
        attention (dict | None): Attention of every block, with the keys of ``attention`` in :class:`soft_mm.SOFT`.
            ``grid_dims`` is always 1. Defaults to None: ``dict(type='SoftmaxFreeAttention')``.
        init_cfg (dict | None): See mmengine's ``BaseModule``. Defaults to None.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If the type of the attention does not have one of the keys.
    """

    def __init__(
        self,
        vocab_size,
        length,
        embed_dims=64,
        num_heads=2,
        depth=2,
        ratio=16,
        conv_size=9,
        attention=None,
        init_cfg=None,
    ):
        super().__init__(init_cfg)
        for name, value in dict(vocab_size=vocab_size, length=length, depth=depth).items():
            check_integer(name, value)
        attention = {} if attention is None else attention
        if not isinstance(attention, dict):
            raise ValueError(f'attention={attention!r}: expected None or one dict for all blocks')
        attention = dict(dict(grid_dims=1), **attention)
        if attention['grid_dims'] != 1:
            raise ValueError(
                f'attention: grid_dims={attention["grid_dims"]!r}: expected 1 for sequences; leave the key out'
            )
        self.length = length
        self.token_embed = nn.Embedding(vocab_size, embed_dims, padding_idx=PADDING)
        self.pos_embed = nn.Parameter(torch.zeros(1, length, embed_dims))
        self.embed_norm = nn.LayerNorm(embed_dims)
        self.blocks = nn.ModuleList(
            SoftmaxFreeBlock(embed_dims, num_heads, ratio, conv_size, attention, grid=(length,)) for _ in range(depth)
        )
        reset_parameters(self)
        nn.init.trunc_normal_(self.token_embed.weight, std=0.02)
        nn.init.zeros_(self.token_embed.weight[PADDING].detach())

    def forward(self, tokens):
        """Encode sequences.

        Args:
            tokens (Tensor): Token ids ``(B, n)`` int64 with ``1 <= n <= length``. Id 0 is padding.

        Returns:
            tuple[Tensor]: One tensor ``(B, C)``, the mean over the tokens that are not padding. It is zero for a
                sequence that consists of padding only. Padding changes it only as described for the class.

        Raises:
            ValueError: If the input is not two-dimensional, empty, or longer than ``length``.
        """
        if tokens.ndim != 2 or not 0 < tokens.shape[1] <= self.length:
            raise ValueError(
                f'input of shape {tuple(tokens.shape)}: expected ids (B, n) of 1 to {self.length} tokens; set `length` '
                'of the encoder to the length of the longest sequence'
            )
        n = tokens.shape[1]
        x = self.embed_norm(self.token_embed(tokens) + self.pos_embed[:, :n])
        mask = tokens != PADDING
        for block in self.blocks:
            x = block(x, (n,), mask)
        present = mask.unsqueeze(-1)
        return ((x * present).sum(1) / present.sum(1).clamp(min=1),)


@MODELS.register_module()
class SequencePreprocessor(BaseDataPreprocessor):
    """Pad the sequences of a batch with 0 to one length, stack them, and move the batch to the device.

    Args:
        length (int): Number of tokens of every padded sequence.
        batch_augments (None): Must be None. mmpretrain's ``ImageClassifier`` passes the augmentations of its
            ``train_cfg`` here, such as mixup, but token ids cannot be mixed. Defaults to None.

    Raises:
        ValueError: If ``length`` is not an integer >= 1, or if ``batch_augments`` is given.
    """

    def __init__(self, length, batch_augments=None):
        super().__init__()
        check_integer('length', length)
        if batch_augments is not None:
            raise ValueError(
                f'batch_augments={batch_augments!r}: expected None, because token ids cannot be mixed; leave '
                '`train_cfg` out of the classifier'
            )
        self.length = length

    def forward(self, data, training=False):
        """Build a batch.

        Args:
            data (dict): ``inputs``, a list of tensors ``(n,)``, and other entries for the model.
            training (bool): Unused.

        Returns:
            dict: ``data`` on the device, with ``inputs`` ``(B, length)``.

        Raises:
            ValueError: If an input does not have one dimension, or is longer than ``length``.
        """
        inputs = data['inputs']
        unfit = [tuple(tokens.shape) for tokens in inputs if tokens.ndim != 1 or len(tokens) > self.length]
        if unfit:
            raise ValueError(
                f'inputs of shapes {unfit[:4]}: expected sequences (n,) of at most {self.length} tokens; set `length` '
                'of the preprocessor and the encoder to the length of the longest sequence'
            )
        padded = [F.pad(tokens, (0, self.length - len(tokens)), value=PADDING) for tokens in inputs]
        return self.cast_data(dict(data, inputs=torch.stack(padded)))
