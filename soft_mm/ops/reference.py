"""Plain implementation of every formula of the attention. The tests compare the fast functions with it.

Nothing here is fast. Each function follows the papers step by step in the dtype of its input and forms every matrix of
its formula. The module imports torch and nothing else.

Symbols: ``B`` images, ``h`` heads, ``n = H * W`` tokens on a grid ``(H, W)``, ``d`` channels per head, ``m`` landmarks.

SOFT: *Softmax-free Transformer with Linear Complexity*, NeurIPS 2021, arXiv:2110.11945.
SOFT++: *Softmax-free Linear Transformers*, IJCV 2024, arXiv:2207.03341.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def gaussian_kernel(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``exp(-||a_i - b_j||^2 / 2)`` for all pairs (SOFT, section 3.1).

    Args:
        a (Tensor): ``(..., n, d)``.
        b (Tensor): ``(..., m, d)``.

    Returns:
        Tensor: ``(..., n, m)``.
    """
    return torch.exp(-(a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1) / 2)


def conv_landmarks(
    q: Tensor, grid: tuple[int, int], weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float = 1e-5
) -> Tensor:
    """Compute landmarks ``GELU(LayerNorm(conv(q)))`` (SOFT, section 3.2).

    A side of the grid that is shorter than ``r`` is first stretched to ``r`` by nearest neighbours.

    Args:
        q (Tensor): Queries ``(B, h, n, d)``.
        grid (tuple[int, int]): ``(H, W)`` with ``n = H * W``.
        weight (Tensor): ``(d, d, r, r)``, a convolution with kernel and stride ``r``, shared by the heads.
        norm_weight (Tensor): ``(d,)``.
        norm_bias (Tensor): ``(d,)``.
        eps (float): Epsilon of the LayerNorm. Defaults to 1e-5.

    Returns:
        Tensor: ``(B, h, m, d)`` with ``m = max(H // r, 1) * max(W // r, 1)``.
    """
    (B, h, _, d), (H, W), r = q.shape, grid, weight.shape[-1]
    maps = q.reshape(B * h, H, W, d).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size=(max(H, r), max(W, r)), mode='nearest')
    tokens = F.conv2d(maps, weight, stride=r).flatten(2).transpose(1, 2)
    return F.gelu(F.layer_norm(tokens, (d,), norm_weight, norm_bias, eps)).reshape(B, h, -1, d)


def pool_landmarks(landmarks: Tensor, grid: tuple[int, int], out_grid: tuple[int, int]) -> Tensor:
    """Average landmarks over the cells of a coarser grid.

    Cell ``i`` of ``k`` along a side of length ``s`` spans ``floor(i s / k)`` to ``ceil((i + 1) s / k)``. Neighbouring
    cells may therefore share a row or a column.

    Args:
        landmarks (Tensor): ``(B, h, H * W, d)``.
        grid (tuple[int, int]): ``(H, W)``.
        out_grid (tuple[int, int]): Rows and columns of the coarser grid.

    Returns:
        Tensor: ``(B, h, m, d)`` with one landmark per cell of ``out_grid``.
    """
    (B, h, _, d), (H, W), (rows, columns) = landmarks.shape, grid, out_grid
    maps = landmarks.reshape(B, h, H, W, d)
    cells = []
    for i in range(rows):
        for j in range(columns):
            cell = maps[:, :, i * H // rows : -(-(i + 1) * H // rows), j * W // columns : -(-(j + 1) * W // columns)]
            cells.append(cell.mean((2, 3)))
    return torch.stack(cells, dim=2)


def newton_inverse(kernel: Tensor, iterations: int = 20, ridge: float = 0.01) -> Tensor:
    """Compute the truncated Newton inverse of each matrix plus ``ridge * I`` (SOFT, section 3.2).

    The first step is bounded for ridges above 0.027 times the largest row sum, for which the authors' step diverges.

    Args:
        kernel (Tensor): ``(..., m, m)``.
        iterations (int): Number of iterations. Defaults to 20.
        ridge (float): Added to the diagonal. Defaults to 0.01.

    Returns:
        Tensor: ``(..., m, m)``.
    """
    bound = kernel.sum(-1).amax(-1)[..., None, None]
    alpha = torch.minimum(1.8 / bound**2, 1.9 / (bound + ridge) ** 2)
    kernel = kernel + ridge * torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    inverse = alpha * kernel
    for _ in range(iterations):
        inverse = 2 * inverse - inverse @ kernel @ inverse
    return inverse


def newton_inverse_per_image(kernel: Tensor, iterations: int = 20) -> Tensor:
    """Compute the truncated Newton inverse without a ridge, with one step size per image (SOFT++, the authors' code).

    The step size is ``2 / (largest row sum)^2``. It is halved up to ten times while the largest column sum of
    ``|I - A V_0|`` exceeds 1.01. Both maxima are taken over the heads of one image.

    Args:
        kernel (Tensor): ``(B, h, m, m)``.
        iterations (int): Number of iterations. Defaults to 20.

    Returns:
        Tensor: ``(B, h, m, m)``.
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


def ridge_inverse(kernel: Tensor, ridge: float = 0.01) -> Tensor:
    """Compute ``(A + ridge * I)^-1`` for each matrix.

    Args:
        kernel (Tensor): ``(..., m, m)``.
        ridge (float): Added to the diagonal. Defaults to 0.01.

    Returns:
        Tensor: ``(..., m, m)``.
    """
    return torch.linalg.inv(kernel + ridge * torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device))


def softmax_free_attention(
    q: Tensor,
    landmarks: Tensor,
    v: Tensor,
    inverse: Callable[[Tensor], Tensor],
    normalized: bool = False,
    degree_scale: float = 1.0,
    k: Tensor | None = None,
) -> Tensor:
    """Compute ``P_q A_inv P_k^T v``, or with ``normalized`` ``P_q D^-1/2 A_inv D^-1/2 P_k^T v``.

    ``P_q = g(q, l)`` and ``P_k = g(k, l)``. The papers have the case ``k = q``.

    Sources: SOFT, section 3.2; SOFT++, attention normalisation.

    Args:
        q (Tensor): Scaled queries ``(B, h, n, d)``.
        landmarks (Tensor): ``(B, h, m, d)``.
        v (Tensor): Values ``(B, h, n_k, d_v)``, one for each key.
        inverse (Callable[[Tensor], Tensor]): Function that maps ``A``, ``(B, h, m, m)``, to its inverse.
        normalized (bool): Whether to use the degrees ``D = degree_scale * diag(A 1)``. Defaults to False.
        degree_scale (float): Number of landmarks that were averaged to form each given landmark. Defaults to 1.
        k (Tensor | None): Scaled keys ``(B, h, n_k, d)``. Defaults to None: the queries.

    Returns:
        Tensor: ``(B, h, n, d_v)``.
    """
    P_q, P_k = gaussian_kernel(q, landmarks), gaussian_kernel(q if k is None else k, landmarks)
    A = gaussian_kernel(landmarks, landmarks)
    middle = inverse(A)
    if normalized:
        degree = degree_scale * A.sum(-1)
        middle = middle / torch.sqrt(degree.unsqueeze(-1) * degree.unsqueeze(-2))
    return P_q @ middle @ P_k.transpose(-2, -1) @ v


def local_branch(v: Tensor, grid: tuple[int, int], weight: Tensor) -> Tensor:
    """Convolve the values depthwise with one filter per head.

    Args:
        v (Tensor): Values ``(B, h, n, d)``.
        grid (tuple[int, int]): ``(H, W)`` with ``n = H * W``.
        weight (Tensor): ``(h, 1, c, c)`` with ``c`` odd.

    Returns:
        Tensor: ``(B, h, n, d)``.
    """
    (B, h, n, d), (H, W) = v.shape, grid
    maps = v.permute(0, 3, 1, 2).reshape(B * d, h, H, W)
    out = F.conv2d(maps, weight, padding=weight.shape[-1] // 2, groups=h)
    return out.reshape(B, d, h, n).permute(0, 2, 3, 1)


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, approximate: str = 'none') -> Tensor:
    """Compute ``W2 gelu(W1 x + b1) + b2`` for each token (arXiv:1706.03762, section 3.3, with the GELU of 1606.08415).

    Args:
        x (Tensor): Tokens ``(n, C)``.
        weight1 (Tensor): ``(H, C)``.
        bias1 (Tensor): ``(H,)``.
        weight2 (Tensor): ``(C', H)``.
        bias2 (Tensor): ``(C',)``.
        approximate (str): ``'none'``, or ``'tanh'`` for the GELU with tanh. Defaults to ``'none'``.

    Returns:
        Tensor: ``(n, C')``.
    """
    hidden = x @ weight1.T + bias1
    if approximate == 'tanh':
        share = (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3))) / 2
    else:
        share = (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return (hidden * share) @ weight2.T + bias2
