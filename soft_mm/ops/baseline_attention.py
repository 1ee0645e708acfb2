"""Attentions that the papers compare with SOFT, as functions of projected queries, keys and values.

All take ``(B, h, n, d)`` and approximate ``softmax(q k^T / sqrt(d)) v``, except :func:`gaussian_attention`, which is
SOFT's kernel without decomposition. Softmax products use PyTorch's fused attention, which holds nothing of size
``n x n`` or ``n x m``.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernel import compute_dtype, gaussian_kernel, without_autocast


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute softmax attention with PyTorch's fused kernel (arXiv:1706.03762, section 3.2).

    Args:
        q (Tensor): Queries ``(B, h, n, d)``.
        k (Tensor): Keys ``(B, h, m, d)``.
        v (Tensor): Values ``(B, h, m, d)``.
        mask (Tensor | None): ``(B, m)``, True where a key takes part. Defaults to None: all.

    Returns:
        Tensor: ``(B, h, n, d)``, zero for an image in which no key takes part.
    """
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v)
    empty = ~mask.any(-1, keepdim=True)
    # The softmax over no key at all would be NaN, and its gradient too.
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=(mask | empty)[:, None, None])
    return out.masked_fill(empty[:, None, None], 0)


def linformer_attention(q: Tensor, k: Tensor, v: Tensor, key_weight: Tensor, value_weight: Tensor) -> Tensor:
    """Compute softmax attention over ``p`` learned combinations of keys and values.

    Source: Linformer, arXiv:2006.04768, eq. 7.

    Args:
        q (Tensor): Queries ``(B, h, n, d)``.
        k (Tensor): Keys ``(B, h, n, d)``.
        v (Tensor): Values ``(B, h, n, d)``.
        key_weight (Tensor): ``(p, n)``, shared by the heads.
        value_weight (Tensor): ``(p, n)``.

    Returns:
        Tensor: ``(B, h, n, d)``.
    """
    return F.scaled_dot_product_attention(q, key_weight.to(k.dtype) @ k, value_weight.to(v.dtype) @ v)


def resize_sequence_projection(weight: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize a projection of tokens to another grid, bilinearly and with antialiasing.

    The result is multiplied by the ratio of the token counts. A row that averages the tokens then still averages them.

    Args:
        weight (Tensor): ``(p, H, W)`` on the learned grid.
        grid (tuple[int, int]): Grid of the tokens.

    Returns:
        Tensor: ``(p, n)``.
    """
    learned = tuple(weight.shape[1:])
    if learned == tuple(grid):
        return weight.flatten(1)
    wide = weight[None].to(compute_dtype(weight))
    resized = F.interpolate(wide, size=tuple(grid), mode='bilinear', align_corners=False, antialias=True)[0]
    return resized.flatten(1) * (math.prod(learned) / math.prod(grid))


def orthogonal_features(
    num_features: int, dims: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Draw the directions of FAVOR+: normal vectors, orthogonal within groups of ``dims`` (Performer, section 2.4).

    Args:
        num_features (int): Number of directions.
        dims (int): Their dimension ``d``.
        generator (torch.Generator | None): Random generator. Defaults to None: PyTorch's own.
        device (torch.device | str | None): Device of the generator and of the result. Defaults to None: the CPU.

    Returns:
        Tensor: ``(num_features, d)``.
    """
    groups = -(-num_features // dims)
    basis, upper = torch.linalg.qr(torch.randn(groups, dims, dims, generator=generator, device=device))
    # The directions are uniform on the sphere only if the diagonal of R is positive, so its signs are moved into Q.
    basis = basis * upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    basis = basis.flatten(0, 1)[:num_features]
    lengths = torch.randn(num_features, dims, generator=generator, device=device).norm(dim=1, keepdim=True)
    return basis * lengths


@without_autocast
def performer_attention(
    q: Tensor, k: Tensor, v: Tensor, features: Tensor, eps: float = 1e-6, mask: Tensor | None = None
) -> Tensor:
    """Compute softmax attention by positive random features (Performer, arXiv:2009.14794, lemma 1).

    Args:
        q (Tensor): Queries ``(B, h, n, d)``.
        k (Tensor): Keys ``(B, h, n, d)``.
        v (Tensor): Values ``(B, h, n, d)``.
        features (Tensor): ``(m, d)``, see :func:`orthogonal_features`.
        eps (float): Added to the features, so that the sum of the weights of a query is never 0. Defaults to 1e-6.
        mask (Tensor | None): ``(B, n)``, True where a key takes part. An image without such a key gives zeros. Defaults
            to None: all.

    Returns:
        Tensor: ``(B, h, n, d)`` in the dtype of ``v``, computed in float32 or wider.
    """
    dtype = compute_dtype(q)
    q, k, values = (tensor.to(dtype) for tensor in (q, k, v))
    q, k = (tensor * q.shape[-1] ** -0.25 for tensor in (q, k))
    features = features.to(dtype)

    def logits(x: Tensor) -> Tensor:
        return x @ features.T - x.square().sum(-1, keepdim=True) / 2

    # The maximum is subtracted to avoid overflow. The common factor cancels in the quotient.
    q, k = logits(q), logits(k)
    q = (q - q.detach().amax(-1, keepdim=True)).exp() + eps
    if mask is None:
        k = (k - k.detach().amax((-2, -1), keepdim=True)).exp() + eps
    else:
        absent = ~mask[:, None, :, None]
        k = k.masked_fill(absent, -torch.inf)
        largest = k.detach().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(dtype).min)
        k = ((k - largest).exp() + eps).masked_fill(absent, 0)
    out, total = q @ (k.transpose(-2, -1) @ values), q @ k.sum(-2).unsqueeze(-1)
    if mask is not None:
        total = total.masked_fill(total == 0, 1)
    return (out / total).to(v.dtype)


@without_autocast
def iterative_pinv(matrix: Tensor, iterations: int = 6) -> Tensor:
    """Compute the pseudo-inverse of row-stochastic matrices by a third-order iteration.

    Source: Nystromformer, arXiv:2102.03902, eq. 11.

    Args:
        matrix (Tensor): ``(..., m, m)``.
        iterations (int): Number of iterations. Defaults to 6, as in the paper.

    Returns:
        Tensor: ``(..., m, m)`` in float32 or wider.
    """
    matrix = matrix.to(compute_dtype(matrix))
    size = matrix.abs()
    scale = size.sum(-1).amax(-1) * size.sum(-2).amax(-1)
    inverse = matrix.transpose(-2, -1) / scale[..., None, None]
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(iterations):
        product = matrix @ inverse
        inverse = inverse @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product))) / 4
    return inverse


def nystrom_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_landmarks: Tensor,
    key_landmarks: Tensor,
    iterations: int = 6,
    mask: Tensor | None = None,
    present: Tensor | None = None,
) -> Tensor:
    """Compute ``softmax(q l_k^T) softmax(l_q l_k^T)^+ softmax(l_q k^T) v`` (Nystromformer, arXiv:2102.03902, eq. 13).

    Args:
        q (Tensor): Queries ``(B, h, n, d)``.
        k (Tensor): Keys ``(B, h, n, d)``.
        v (Tensor): Values ``(B, h, n, d)``.
        query_landmarks (Tensor): ``(B, h, m, d)``.
        key_landmarks (Tensor): ``(B, h, m, d)``.
        iterations (int): Iterations of :func:`iterative_pinv`. Defaults to 6.
        mask (Tensor | None): ``(B, n)``, True where a key takes part. Defaults to None: all.
        present (Tensor | None): ``(B, m)``, True where a landmark is present. An image without one gives zeros.
            Defaults to None: all.

    Returns:
        Tensor: ``(B, h, n, d)``.
    """
    gathered = softmax_attention(query_landmarks, k, v, mask)
    weights = _solve_landmarks(query_landmarks, key_landmarks, gathered, iterations, present)
    return softmax_attention(q, key_landmarks, weights, present)


@without_autocast
def _solve_landmarks(
    query_landmarks: Tensor, key_landmarks: Tensor, gathered: Tensor, iterations: int, present: Tensor | None
) -> Tensor:
    """Return ``softmax(l_q l_k^T)^+ gathered`` in the dtype of ``gathered``, computed in float32 or wider."""
    dtype = compute_dtype(gathered)
    query_landmarks, key_landmarks = query_landmarks.to(dtype), key_landmarks.to(dtype)
    scale = query_landmarks.shape[-1] ** -0.5
    logits = query_landmarks @ key_landmarks.transpose(-2, -1) * scale
    if present is not None:
        # Absent landmarks get the rows and columns of the identity, so they change no other landmark.
        pairs = present[:, None, :, None] & present[:, None, None, :]
        index = torch.arange(present.shape[-1], device=present.device)
        # onnxruntime has no identity matrix of this dtype.
        identity = index[:, None] == index
        logits = logits.masked_fill(~(pairs | identity), -torch.inf)
    middle = torch.softmax(logits, dim=-1)
    return (iterative_pinv(middle, iterations) @ gathered.to(dtype)).to(gathered.dtype)


@without_autocast
def gaussian_attention(q: Tensor, v: Tensor) -> Tensor:
    """Compute ``g(q, q) v``: the Gaussian kernel between all tokens, without decomposition (SOFT, section 3.1).

    Args:
        q (Tensor): Scaled queries, which are also the keys, ``(B, h, n, d)``.
        v (Tensor): Values ``(B, h, n, d)``.

    Returns:
        Tensor: ``(B, h, n, d)``. The computation holds ``n x n`` numbers per head.
    """
    kernel = gaussian_kernel(q, q)
    return (kernel @ v.to(kernel.dtype)).to(v.dtype)
