"""Every formula of the attention once, plainly: the oracle of the tests.

Nothing here is meant to be fast. Each function follows the papers step by step in the dtype it is given and forms
every matrix it speaks of. The module needs torch alone and nothing else of this package.

Symbols: ``B`` images, ``h`` heads, ``n = H * W`` tokens on a grid ``(H, W)``, ``d`` channels a head, ``m`` landmarks.

SOFT: *Softmax-free Transformer with Linear Complexity*, NeurIPS 2021, arXiv:2110.11945.
SOFT++: *Softmax-free Linear Transformers*, IJCV 2024, arXiv:2207.03341.
"""

import torch
import torch.nn.functional as F


def gaussian_kernel(a, b):
    """``exp(-||a_i - b_j||^2 / 2)`` of ``(..., n, d)`` and ``(..., m, d)``: ``(..., n, m)`` (SOFT, section 3.1)."""
    return torch.exp(-(a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1) / 2)


def conv_landmarks(q, grid, weight, norm_weight, norm_bias, eps=1e-5):
    """Landmark tokens ``GELU(LayerNorm(conv(q)))`` of queries ``(B, h, n, d)`` (SOFT, section 3.2).

    ``weight`` is ``(d, d, r, r)``: a convolution of kernel and stride ``r`` that every head shares. A side of the
    grid shorter than ``r`` is first stretched to ``r`` by nearest neighbours. Returns ``(B, h, m, d)``,
    ``m = floor(H / r) * floor(W / r)``.
    """
    (B, h, _, d), (H, W), r = q.shape, grid, weight.shape[-1]
    maps = q.reshape(B * h, H, W, d).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size=(max(H, r), max(W, r)), mode='nearest')
    tokens = F.conv2d(maps, weight, stride=r).flatten(2).transpose(1, 2)
    return F.gelu(F.layer_norm(tokens, (d,), norm_weight, norm_bias, eps)).reshape(B, h, -1, d)


def pool_landmarks(landmarks, grid, out_grid):
    """Means of landmarks ``(B, h, H * W, d)`` over the cells of ``out_grid``, which may share a row or column.

    Cell ``i`` of ``k`` over a side of ``s`` spans ``floor(i s / k)`` to ``ceil((i + 1) s / k)``.
    """
    (B, h, _, d), (H, W), (rows, columns) = landmarks.shape, grid, out_grid
    maps = landmarks.reshape(B, h, H, W, d)
    cells = []
    for i in range(rows):
        for j in range(columns):
            cell = maps[:, :, i * H // rows : -(-(i + 1) * H // rows), j * W // columns : -(-(j + 1) * W // columns)]
            cells.append(cell.mean((2, 3)))
    return torch.stack(cells, dim=2)


def newton_inverse(kernel, iterations=20, ridge=0.01):
    """Truncated Newton inverse of each ``(..., m, m)`` matrix plus ``ridge * I`` (SOFT, section 3.2)."""
    alpha = 1.8 / kernel.sum(-1).amax(-1)[..., None, None] ** 2
    kernel = kernel + ridge * torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    inverse = alpha * kernel
    for _ in range(iterations):
        inverse = 2 * inverse - inverse @ kernel @ inverse
    return inverse


def newton_inverse_per_image(kernel, iterations=20):
    """Truncated Newton inverse without a ridge, one step size for all heads of an image (SOFT++ and the authors' code).

    ``kernel`` is ``(B, h, m, m)``. The step size is ``2 / (largest row sum)^2``, halved up to ten times while the
    largest column sum of ``|I - A V_0|`` exceeds 1.01, both maxima over the heads of one image.
    """
    eye = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    inverses = []
    for image in kernel:
        alpha = 2 / image.sum(-1).max() ** 2
        for _ in range(10):
            if (eye - image @ (alpha * image)).abs().sum(-2).max() <= 1.01:
                break
            alpha = alpha / 2
        inverse = alpha * image
        for _ in range(iterations):
            inverse = 2 * inverse - inverse @ image @ inverse
        inverses.append(inverse)
    return torch.stack(inverses)


def ridge_inverse(kernel, ridge=0.01):
    """``(A + ridge * I)^-1`` of each ``(..., m, m)`` matrix."""
    return torch.linalg.inv(kernel + ridge * torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device))


def softmax_free_attention(q, landmarks, v, inverse, normalized=False, degree_scale=1.0):
    """``P A_inv P^T v``, or with ``normalized`` ``P D^-1/2 A_inv D^-1/2 P^T v`` (SOFT, section 3.2; SOFT++,
    attention normalisation).

    Args:
        q: scaled queries, which are the keys too, ``(B, h, n, d)``.
        landmarks: ``(B, h, m, d)``.
        v: values ``(B, h, n, d)``.
        inverse: function from ``A``, ``(B, h, m, m)``, to its inverse.
        normalized: use the degrees ``D = degree_scale * diag(A 1)``.
        degree_scale: how many landmarks each of the given ones stands for.
    """
    P, A = gaussian_kernel(q, landmarks), gaussian_kernel(landmarks, landmarks)
    middle = inverse(A)
    if normalized:
        degree = degree_scale * A.sum(-1)
        middle = middle / torch.sqrt(degree.unsqueeze(-1) * degree.unsqueeze(-2))
    return P @ middle @ P.transpose(-2, -1) @ v


def local_branch(v, grid, weight):
    """Depthwise convolution of values ``(B, h, n, d)`` with one filter per head, ``weight`` being ``(h, 1, c, c)``."""
    (B, h, n, d), (H, W) = v.shape, grid
    maps = v.permute(0, 3, 1, 2).reshape(B * d, h, H, W)
    out = F.conv2d(maps, weight, padding=weight.shape[-1] // 2, groups=h)
    return out.reshape(B, d, h, n).permute(0, 2, 3, 1)
