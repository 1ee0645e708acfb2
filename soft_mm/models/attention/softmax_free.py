"""Softmax-free attention, by default the attention of stages 1 to 3."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from soft_mm import ops
from soft_mm.ops.attention import check_solver
from soft_mm.ops.checks import check_bool, check_choice, check_integer, is_integer
from soft_mm.ops.kernel import compute_dtype
from soft_mm.ops.recording import has_dynamic_side, needs_standard_operators
from soft_mm.registry import MODELS

from .base import MAX_SEED, InitCfg, LocalBranch, SharedQKAttention, patch_sides

SAMPLERS = ('conv', 'mean', 'random')


class LandmarkConv(nn.Conv2d):
    """Convolution whose kernel equals its stride, applied to the queries of each head.

    Args:
        head_dims (int): Channels ``d`` of a head.
        ratio (int): Side of the kernel, and stride.
        grid_dims (int): 2 for maps, 1 for sequences.
    """

    def __init__(self, head_dims: int, ratio: int, grid_dims: int) -> None:
        kernel = patch_sides(ratio, grid_dims)
        super().__init__(head_dims, head_dims, kernel, stride=kernel, bias=False)

    def forward(self, q: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Convolve queries, see :func:`soft_mm.ops.project_patches`."""
        return ops.project_patches(q, grid, self.weight)


class LandmarkNorm(nn.LayerNorm):
    """LayerNorm followed by GELU for landmarks, in float32 or wider."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Normalise and activate tokens ``(B, h, m, d)``."""
        return ops.activate_landmarks(tokens, self.weight, self.bias, self.eps)


@MODELS.register_module()
class SoftmaxFreeAttention(SharedQKAttention):
    """Attention with a Gaussian kernel instead of softmax. With bounded landmarks, the cost is linear in the tokens.

    Queries and keys share one projection, so the kernel is symmetric. A local branch, which is a depthwise convolution
    of the values, is added to the output.

    Sources: SOFT (arXiv:2110.11945, section 3), SOFT++ (arXiv:2207.03341, section 3). See
    :func:`soft_mm.ops.softmax_free_attention` and :func:`soft_mm.ops.normalized_softmax_free_attention`.

    Args:
        embed_dims (int): Channels ``C`` of the tokens.
        num_heads (int): Number of heads, a divisor of ``embed_dims``.
        ratio (int): Side of the patch of tokens that becomes one landmark.
        conv_size (int): Side of the filters of the local branch, odd.
        normalized (bool): Use the symmetrically normalised attention of SOFT++. Defaults to False.
        solver (str): ``'newton'``: the authors' truncated Newton inverse. ``'cholesky'``: the inverse with a ridge,
            computed by a Cholesky factorisation. ``'svd'``: the exact pseudo-inverse, slow. Defaults to ``'newton'``.
        newton_iterations (int): Number of iterations of ``'newton'``. Defaults to 20.
        newton_backward (str): Gradient of ``'newton'`` with ``normalized=False``: ``'one_step'``, the authors'
            gradient, or ``'exact'``. All other combinations use the exact gradient. Defaults to ``'one_step'``.
        max_landmarks (int | None): Largest number of landmarks. If there are more, they are average-pooled on their
            grid. Defaults to None: no bound, as in the authors' code, so the number of landmarks grows with the tokens.
        ridge (float): Added to the diagonal of the landmark kernel. ``'svd'``, and ``'newton'`` with
            ``normalized=True``, have no ridge. At most 1000. Defaults to 0.01, as in the authors' code.
        sampler (str): How landmarks are sampled, one per patch. ``'conv'``: strided convolution, LayerNorm and GELU.
            ``'mean'``: mean of the queries. ``'random'``: random queries, drawn in each forward pass in training and
            fixed in evaluation. Defaults to ``'conv'``.
        seed (int): Seed of ``'random'`` in evaluation. Defaults to 0.
        grid_dims (int): 2 for maps, 1 for sequences. Defaults to 2.
        init_cfg (dict | None): See mmengine's ``BaseModule``. Defaults to None.

    Raises:
        ValueError: If an option is out of its range, or has no effect with the other options and differs from its
            default.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        ratio: int,
        conv_size: int,
        normalized: bool = False,
        solver: str = 'newton',
        newton_iterations: int = 20,
        newton_backward: str = 'one_step',
        max_landmarks: int | None = None,
        ridge: float = 0.01,
        sampler: str = 'conv',
        seed: int = 0,
        grid_dims: int = 2,
        init_cfg: InitCfg = None,
    ) -> None:
        super().__init__(embed_dims, num_heads, ratio, conv_size, grid_dims, init_cfg)
        check_bool('normalized', normalized)
        check_solver(
            solver, normalized, newton_iterations=newton_iterations, newton_backward=newton_backward, ridge=ridge
        )
        check_choice('sampler', sampler, SAMPLERS)
        if max_landmarks is not None and not is_integer(max_landmarks):
            raise ValueError(f'max_landmarks={max_landmarks!r}: expected None or an integer >= 1')
        check_integer('seed', seed, minimum=0, maximum=MAX_SEED)
        if seed and sampler != 'random':
            raise ValueError(
                f"seed={seed} has no effect with sampler={sampler!r}: leave it out, or set sampler='random'"
            )
        self.normalized = normalized
        self.solver = solver
        self.newton_iterations = newton_iterations
        self.newton_backward = newton_backward
        self.ridge = ridge
        self.max_landmarks = max_landmarks
        self.sampler = sampler
        self.seed = seed
        self.ratio = ratio
        if sampler == 'conv':
            self.landmark = LandmarkConv(self.head_dims, ratio, grid_dims)
            self.landmark_norm = LandmarkNorm(self.head_dims)
        self.local = LocalBranch(num_heads, conv_size, grid_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)

    @property
    def exports_any_size(self) -> bool:
        """bool: Whether an export may have variable image sides."""
        return self.sampler == 'conv' and self.solver != 'svd'

    def attend(self, q: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """Compute ``P M (P^T v)``.

        Args:
            q (Tensor): Scaled queries ``(B, h, n, d)``.
            v (Tensor): Values ``(B, h, n, d)``.
            grid (tuple[int, int]): ``(H, W)``, or ``(1, n)`` for a sequence.

        Returns:
            Tensor: ``(B, h, n, d)``.
        """
        landmarks, pool_factor, present = self.landmarks(q, grid)
        matrix, inverted = self.middle(landmarks, pool_factor, present)
        if present is not None:
            return ops.whole_attention(q, landmarks, v, matrix, inverted, present)
        return ops.blockwise_attention(q, landmarks, v, matrix, inverted)

    def landmarks(self, q: Tensor, grid: tuple[int, int]) -> tuple[Tensor, float | Tensor, Tensor | None]:
        """Sample landmarks.

        Args:
            q (Tensor): Scaled queries ``(B, h, n, d)``.
            grid (tuple[int, int]): ``(H, W)``, or ``(1, n)`` for a sequence.

        Returns:
            tuple[Tensor, float | Tensor, Tensor | None]: Landmarks ``(B, h, m, d)``; the pool factor ``M / m``, where
            ``M`` is the number of landmarks without a bound; and None. In an export with variable sides, the third item
            is the mask of :func:`soft_mm.ops.pool_to_slots`.

        Raises:
            NotImplementedError: If random landmarks are exported or traced.
        """
        if self.sampler == 'conv':
            sampled, sampled_grid = self.landmark(q, grid)
            return self._bound(self.landmark_norm(sampled), sampled_grid)
        sampled_grid = tuple(max(side // r, 1) for side, r in zip(grid, patch_sides(self.ratio, self.grid_dims)))
        wide = q.to(compute_dtype(q))
        if self.sampler == 'mean':
            return self._bound(ops.mean_landmarks(wide, grid, sampled_grid), sampled_grid)
        if needs_standard_operators():
            raise NotImplementedError(
                "sampler='random' cannot be exported, traced or transformed, because it draws landmarks in Python: set "
                "sampler='conv' or sampler='mean'"
            )
        unbounded = sampled_grid[0] * sampled_grid[1]
        count = unbounded if self.max_landmarks is None else min(unbounded, self.max_landmarks)
        generator = None if self.training else torch.Generator().manual_seed(self.seed)
        return ops.random_landmarks(wide, count, generator), unbounded / count, None

    def _bound(self, landmarks: Tensor, grid: tuple[int, int]) -> tuple[Tensor, float | Tensor, Tensor | None]:
        """Pool landmarks to at most ``max_landmarks``, see :meth:`landmarks`."""
        if self.max_landmarks is not None and has_dynamic_side(grid):
            return ops.pool_to_slots(landmarks, grid, self.max_landmarks)
        return *ops.pool_landmarks(landmarks, grid, self.max_landmarks), None

    def middle(
        self, landmarks: Tensor, pool_factor: float | Tensor, present: Tensor | None = None
    ) -> tuple[Tensor, bool]:
        """Compute the matrix ``M`` or its inverse, see :func:`soft_mm.ops.middle_matrix`.

        Args:
            landmarks (Tensor): ``(B, h, m, d)``.
            pool_factor (float | Tensor): See :meth:`landmarks`.
            present (Tensor | None): See :meth:`landmarks`. Defaults to None.

        Returns:
            tuple[Tensor, bool]: Matrix ``(B, h, m, m)``, and whether it is the inverse of ``M``.
        """
        return ops.middle_matrix(
            landmarks,
            normalized=self.normalized,
            solver=self.solver,
            newton_iterations=self.newton_iterations,
            newton_backward=self.newton_backward,
            ridge=self.ridge,
            # Pooling k landmarks to one divides the row sums of A by k.
            degree_scale=pool_factor,
            present=present,
        )

    def extra_repr(self) -> str:
        names = ('num_heads', 'normalized', 'solver', 'newton_iterations', 'newton_backward', 'max_landmarks', 'ridge')
        return ', '.join(f'{name}={getattr(self, name)!r}' for name in (*names, 'sampler', 'seed', 'grid_dims'))


def normalized_options(module: nn.Module, skip: Collection[str] = ()) -> list[bool]:
    """Return the option ``normalized`` of each softmax-free attention in a module.

    Args:
        module (nn.Module): Backbone or whole model.
        skip (Collection[str]): Names of attentions to leave out. Defaults to ().

    Returns:
        list[bool]: One value per attention, empty if there is none.
    """
    attentions = ((name, part) for name, part in module.named_modules() if isinstance(part, SoftmaxFreeAttention))
    return [part.normalized for name, part in attentions if name not in skip]
