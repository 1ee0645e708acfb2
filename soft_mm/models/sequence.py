"""An encoder of sequences of tokens, whose attention is any of those of the backbone, and what makes batches for it."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.model import BaseDataPreprocessor, BaseModule

from soft_mm.ops.attention import check_count
from soft_mm.registry import MODELS

from .blocks import SoftmaxFreeBlock
from .soft import reset_parameters

PADDING = 0


@MODELS.register_module()
class SequenceEncoder(BaseModule):
    """Classification backbone for sequences: embeddings, softmax-free blocks, and the mean over the tokens.

    Embeddings of tokens and positions are added and normalised as in BERT (arXiv:1810.04805), for the blocks are
    post-norm and have no norm before them. Attention takes no mask, whatever its type: padding takes part in it as any
    token does, embedded as its position alone, but does not enter the mean.

    Args:
        vocab_size (int): ids of tokens, that of padding, 0, included.
        length (int): most tokens of a sequence, as many as positions are learned.
        embed_dims (int): channels ``C``. Defaults to 64.
        num_heads (int): heads, a divisor of ``embed_dims``. Defaults to 2.
        depth (int): blocks. Defaults to 2.
        ratio (int): tokens in a row that become one landmark. Defaults to 16.
        conv_size (int): length of the filters of the local branch, odd. Defaults to 9.
        attention (dict | None): attention of every block, with the keys of :class:`SOFT`'s; ``grid_dims`` is 1.
            Defaults to None, which is ``dict(type='SoftmaxFreeAttention')``.
        init_cfg (dict | None): mmengine's. Defaults to None.

    Raises:
        ValueError: for a value that is not allowed.
        TypeError: for a key that the attention does not have.
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
            check_count(name, value)
        attention = {} if attention is None else attention
        if not isinstance(attention, dict):
            raise ValueError(f'attention={attention!r} must be a dict, the same for every block, or None')
        attention = dict(dict(grid_dims=1), **attention)
        if attention['grid_dims'] != 1:
            raise ValueError(
                f'attention: grid_dims={attention["grid_dims"]!r} must be 1, for sequences, or be left out'
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
            tokens (Tensor): ids ``(B, n)`` int64, ``n`` up to ``length``, with padding where a sequence is shorter.

        Returns:
            tuple[Tensor]: one of ``(B, C)``, the mean over the tokens that are not padding; zero where all are.

        Raises:
            ValueError: for another number of dimensions, more tokens than ``length``, or none.
        """
        if tokens.ndim != 2 or not 0 < tokens.shape[1] <= self.length:
            raise ValueError(
                f'input of shape {tuple(tokens.shape)}: expected ids (B, n) of 1 to {self.length} tokens; set `length` '
                'of the encoder to that of the longest sequence'
            )
        n = tokens.shape[1]
        x = self.embed_norm(self.token_embed(tokens) + self.pos_embed[:, :n])
        for block in self.blocks:
            x = block(x, (n,))
        present = (tokens != PADDING).unsqueeze(-1)
        return ((x * present).sum(1) / present.sum(1).clamp(min=1),)


@MODELS.register_module()
class SequencePreprocessor(BaseDataPreprocessor):
    """Stacks sequences of a batch, padded with 0 to one length, and moves all of the batch to the device.

    Args:
        length (int): tokens of every sequence of the batch.
        batch_augments (None): given by mmpretrain's ``ImageClassifier``, the mixing of images that its ``train_cfg``
            asks for. Ids cannot be mixed. Defaults to None.

    Raises:
        ValueError: for a length that is no whole number from 1 up, or for a mixing.
    """

    def __init__(self, length, batch_augments=None):
        super().__init__()
        check_count('length', length)
        if batch_augments is not None:
            raise ValueError(
                f'batch_augments={batch_augments!r} must be None, for ids of tokens cannot be mixed; leave `train_cfg` '
                'out of the classifier'
            )
        self.length = length

    def forward(self, data, training=False):
        """Make a batch.

        Args:
            data (dict): ``inputs``, a sequence of tensors ``(n,)``, and what else the model takes.
            training (bool): not used.

        Returns:
            dict: ``data`` on the device, with ``inputs`` ``(B, length)``.

        Raises:
            ValueError: for a tensor with another number of dimensions than one, or longer than ``length``.
        """
        inputs = data['inputs']
        unfit = [tuple(tokens.shape) for tokens in inputs if tokens.ndim != 1 or len(tokens) > self.length]
        if unfit:
            raise ValueError(
                f'inputs of shapes {unfit[:4]}: expected sequences (n,) of up to {self.length} tokens; set `length` of '
                'preprocessor and encoder to that of the longest sequence'
            )
        padded = [F.pad(tokens, (0, self.length - len(tokens)), value=PADDING) for tokens in inputs]
        return self.cast_data(dict(data, inputs=torch.stack(padded)))
