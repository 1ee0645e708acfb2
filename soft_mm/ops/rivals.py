"""The attentions that the papers put beside SOFT, as functions of projected queries, keys and values.

All take ``(B, h, n, d)`` and approximate ``softmax(q k^T / sqrt(d)) v``, but for :func:`gaussian_attention`, which is
the kernel of SOFT without its decomposition. Softmax products are left to PyTorch's fused attention, so that nothing of
size ``n x n`` or ``n x m`` is held for them.
"""

import math

import torch
import torch.nn.functional as F

from .kernel import compute_dtype, gaussian_kernel, without_autocast


def linformer_attention(q, k, v, key_weight, value_weight):
    """Softmax attention over ``p`` learned combinations of keys and of values (Linformer, arXiv:2006.04768, eq. 7).

    Args:
        q (Tensor): queries ``(B, h, n, d)``.
        k (Tensor): keys ``(B, h, n, d)``.
        v (Tensor): values ``(B, h, n, d)``.
        key_weight (Tensor): ``(p, n)``, shared by the heads.
        value_weight (Tensor): ``(p, n)``.

    Returns:
        Tensor: ``(B, h, n, d)``.
    """
    return F.scaled_dot_product_attention(q, key_weight.to(k.dtype) @ k, value_weight.to(v.dtype) @ v)


def resize_sequence_projection(weight, grid):
    """Projection of the tokens of one grid, resized bilinearly, with antialiasing, to those of another.

    It is scaled by the quotient of the numbers of tokens, so that a row that takes a mean still does.

    Args:
        weight (Tensor): ``(p, H, W)``, learned on that grid.
        grid (tuple[int, int]): grid of the tokens.

    Returns:
        Tensor: ``(p, n)``.
    """
    learned, grid = tuple(weight.shape[1:]), tuple(grid)
    if learned == grid:
        return weight.flatten(1)
    wide = weight[None].to(compute_dtype(weight))
    resized = F.interpolate(wide, size=grid, mode='bilinear', align_corners=False, antialias=True)[0]
    return resized.flatten(1) * (math.prod(learned) / math.prod(grid))


def orthogonal_features(num_features, dims, generator=None, device=None):
    """Directions of FAVOR+: normal vectors, orthogonal to one another in groups of ``dims`` (Performer, section 2.4).

    Args:
        num_features (int): number of directions.
        dims (int): their dimension ``d``.
        generator (torch.Generator | None): source of the random numbers. Defaults to None, PyTorch's own.
        device (torch.device | None): of the generator and the result. Defaults to None, the CPU.

    Returns:
        Tensor: ``(num_features, d)``.
    """
    options = dict(generator=generator, device=device)
    groups = -(-num_features // dims)
    basis, upper = torch.linalg.qr(torch.randn(groups, dims, dims, **options))
    # With the signs that a factorisation by Gram and Schmidt would have, directions are uniform on the sphere.
    basis = basis * upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    basis = basis.flatten(0, 1)[:num_features]
    lengths = torch.randn(num_features, dims, **options).norm(dim=1, keepdim=True)
    return basis * lengths


@without_autocast
def performer_attention(q, k, v, features, eps=1e-6):
    """Softmax attention by positive random features, linear in the tokens (Performer, arXiv:2009.14794, lemma 1).

    Args:
        q (Tensor): queries ``(B, h, n, d)``.
        k (Tensor): keys ``(B, h, n, d)``.
        v (Tensor): values ``(B, h, n, d)``.
        features (Tensor): ``(m, d)``, see :func:`orthogonal_features`.
        eps (float): added to the features, so that no query is left without a key. Defaults to 1e-6.

    Returns:
        Tensor: ``(B, h, n, d)`` in the dtype of ``v``; computed in float32 or wider.
    """
    dtype = compute_dtype(q)
    q, k, values = (tensor.to(dtype) for tensor in (q, k, v))
    q, k = (tensor * q.shape[-1] ** -0.25 for tensor in (q, k))
    features = features.to(dtype)

    def logits(x):
        return x @ features.T - x.square().sum(-1, keepdim=True) / 2

    # A factor common to all keys, or to all features of a query, cancels in the quotient.
    q, k = logits(q), logits(k)
    q = (q - q.detach().amax(-1, keepdim=True)).exp() + eps
    k = (k - k.detach().amax((-2, -1), keepdim=True)).exp() + eps
    out = q @ (k.transpose(-2, -1) @ values)
    return (out / (q @ k.sum(-2).unsqueeze(-1))).to(v.dtype)


@without_autocast
def iterative_pinv(matrix, iterations=6):
    """Pseudo-inverse of row-stochastic matrices by a third-order iteration (Nystromformer, arXiv:2102.03902, eq. 11).

    Args:
        matrix (Tensor): ``(..., m, m)``.
        iterations (int): number of iterations. Defaults to 6, the paper's.

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


def nystrom_attention(q, k, v, query_landmarks, key_landmarks, iterations=6):
    """``softmax(q l_k^T) softmax(l_q l_k^T)^+ softmax(l_q k^T) v`` (Nystromformer, arXiv:2102.03902, eq. 13).

    Args:
        q (Tensor): queries ``(B, h, n, d)``.
        k (Tensor): keys ``(B, h, n, d)``.
        v (Tensor): values ``(B, h, n, d)``.
        query_landmarks (Tensor): ``(B, h, m, d)``.
        key_landmarks (Tensor): ``(B, h, m, d)``.
        iterations (int): of :func:`iterative_pinv`. Defaults to 6.

    Returns:
        Tensor: ``(B, h, n, d)``.
    """
    gathered = F.scaled_dot_product_attention(query_landmarks, k, v)
    spread = _spread_over_landmarks(query_landmarks, key_landmarks, gathered, iterations)
    return F.scaled_dot_product_attention(q, key_landmarks, spread)


@without_autocast
def _spread_over_landmarks(query_landmarks, key_landmarks, gathered, iterations):
    """``softmax(l_q l_k^T)^+`` times what the landmarks gathered, in its dtype, computed in float32 or wider."""
    dtype = compute_dtype(gathered)
    query_landmarks, key_landmarks = query_landmarks.to(dtype), key_landmarks.to(dtype)
    scale = query_landmarks.shape[-1] ** -0.5
    middle = torch.softmax(query_landmarks @ key_landmarks.transpose(-2, -1) * scale, dim=-1)
    return (iterative_pinv(middle, iterations) @ gathered.to(dtype)).to(gathered.dtype)


@without_autocast
def gaussian_attention(q, v):
    """``g(q, q) v``: the Gaussian kernel between all tokens, without decomposition (SOFT, section 3.1).

    Args:
        q (Tensor): scaled queries, which are the keys too, ``(B, h, n, d)``.
        v (Tensor): values ``(B, h, n, d)``.

    Returns:
        Tensor: ``(B, h, n, d)``; ``n x n`` numbers a head are held.
    """
    kernel = gaussian_kernel(q, q)
    return (kernel @ v.to(kernel.dtype)).to(v.dtype)
