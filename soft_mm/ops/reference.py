"""Every formula of the attention, written plainly. The tests compare the fast forms with it.

Nothing here is fast. Each function follows the papers step by step in the dtype of its input and forms every matrix of
its formula. The module imports torch and nothing else.

Symbols: ``B`` images, ``h`` heads, ``n = H * W`` tokens on a grid ``(H, W)``, ``d`` channels per head, ``m`` landmarks.

SOFT: *Softmax-free Transformer with Linear Complexity*, NeurIPS 2021, arXiv:2110.11945.
SOFT++: *Softmax-free Linear Transformers*, IJCV 2024, arXiv:2207.03341.
"""

import torch
import torch.nn.functional as F


def gaussian_kernel(a, b):
    """Compute ``exp(-||a_i - b_j||^2 / 2)`` for ``(..., n, d)`` and ``(..., m, d)`` (SOFT, section 3.1)."""
    return torch.exp(-(a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1) / 2)


def conv_landmarks(q, grid, weight, norm_weight, norm_bias, eps=1e-5):
    """Compute landmarks ``GELU(LayerNorm(conv(q)))`` from queries ``(B, h, n, d)`` (SOFT, section 3.2).

    ``weight`` is ``(d, d, r, r)``: a convolution with kernel and stride ``r``, shared by the heads. A side of the grid
    that is shorter than ``r`` is first stretched to ``r`` by nearest neighbours. Returns ``(B, h, m, d)`` with
    ``m = floor(H / r) * floor(W / r)``.
    """
    (B, h, _, d), (H, W), r = q.shape, grid, weight.shape[-1]
    maps = q.reshape(B * h, H, W, d).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size=(max(H, r), max(W, r)), mode='nearest')
    tokens = F.conv2d(maps, weight, stride=r).flatten(2).transpose(1, 2)
    return F.gelu(F.layer_norm(tokens, (d,), norm_weight, norm_bias, eps)).reshape(B, h, -1, d)


def pool_landmarks(landmarks, grid, out_grid):
    """Average landmarks ``(B, h, H * W, d)`` over the cells of ``out_grid``. Neighbour cells may share a row or column.

    Cell ``i`` of ``k`` along a side of length ``s`` spans ``floor(i s / k)`` to ``ceil((i + 1) s / k)``.
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
    """Compute the truncated Newton inverse of each ``(..., m, m)`` matrix plus ``ridge * I`` (SOFT, section 3.2)."""
    alpha = 1.8 / kernel.sum(-1).amax(-1)[..., None, None] ** 2
    kernel = kernel + ridge * torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    inverse = alpha * kernel
    for _ in range(iterations):
        inverse = 2 * inverse - inverse @ kernel @ inverse
    return inverse


def newton_inverse_per_image(kernel, iterations=20):
    """Compute the truncated Newton inverse without a ridge, with one step size per image (SOFT++, the authors' code).

    ``kernel`` is ``(B, h, m, m)``. The step size is ``2 / (largest row sum)^2``. It is halved up to ten times while the
    largest column sum of ``|I - A V_0|`` exceeds 1.01. Both maxima are taken over the heads of one image.
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
    """Compute ``(A + ridge * I)^-1`` for each ``(..., m, m)`` matrix."""
    return torch.linalg.inv(kernel + ridge * torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device))


def softmax_free_attention(q, landmarks, v, inverse, normalized=False, degree_scale=1.0):
    """Compute ``P A_inv P^T v``, or with ``normalized`` ``P D^-1/2 A_inv D^-1/2 P^T v``.

    Sources: SOFT, section 3.2; SOFT++, attention normalisation.

    Args:
        q: Scaled queries, which are also the keys, ``(B, h, n, d)``.
        landmarks: ``(B, h, m, d)``.
        v: Values ``(B, h, n, d)``.
        inverse: Function that maps ``A``, ``(B, h, m, m)``, to its inverse.
        normalized: Whether to use the degrees ``D = degree_scale * diag(A 1)``.
        degree_scale: Number of landmarks that each given landmark was pooled from.
    """
    P, A = gaussian_kernel(q, landmarks), gaussian_kernel(landmarks, landmarks)
    middle = inverse(A)
    if normalized:
        degree = degree_scale * A.sum(-1)
        middle = middle / torch.sqrt(degree.unsqueeze(-1) * degree.unsqueeze(-2))
    return P @ middle @ P.transpose(-2, -1) @ v


def local_branch(v, grid, weight):
    """Convolve values ``(B, h, n, d)`` depthwise with one filter per head, ``weight`` ``(h, 1, c, c)``."""
    (B, h, n, d), (H, W) = v.shape, grid
    maps = v.permute(0, 3, 1, 2).reshape(B * d, h, H, W)
    out = F.conv2d(maps, weight, padding=weight.shape[-1] // 2, groups=h)
    return out.reshape(B, d, h, n).permute(0, 2, 3, 1)
