"""Softmax-free attention: self-attention, by default of stages 1 to 3, and attention between two sets of tokens."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from soft_mm import ops
from soft_mm.ops.attention import check_solver
from soft_mm.ops.checks import check_bool, check_choice, check_integer, is_integer
from soft_mm.ops.kernel import compute_dtype
from soft_mm.ops.recording import has_dynamic_side, needs_standard_operators
from soft_mm.registry import MODELS

from ..fused_layers import call_linear
from .base import (
    MAX_SEED,
    InitCfg,
    LocalBranch,
    QueryProjection,
    QueryValueProjection,
    SharedQKAttention,
    TokenAttention,
    WideProjection,
    mask_heads,
    mask_tokens,
    merge_heads,
    patch_sides,
    scaled_queries,
    scaled_queries_and_values,
    split_heads,
)

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


class LandmarkAttention(TokenAttention):
    """Base class of the softmax-free attentions: their options, the landmarks, and the matrix between landmarks.

    A subclass calls :meth:`set_options` in its constructor, before any use of the other methods.
    """

    def set_options(
        self,
        ratio: int,
        normalized: bool,
        solver: str,
        newton_iterations: int,
        newton_backward: str,
        max_landmarks: int | None,
        ridge: float,
        sampler: str,
        seed: int,
    ) -> None:
        """Check and set the options, and build the layers that sample the landmarks.

        Args:
            ratio (int): See :class:`SoftmaxFreeAttention`, as for all options.
            normalized (bool): See there.
            solver (str): See there.
            newton_iterations (int): See there.
            newton_backward (str): See there.
            max_landmarks (int | None): See there.
            ridge (float): See there.
            sampler (str): See there.
            seed (int): See there.

        Raises:
            ValueError: If an option is out of its range, or has no effect with the other options and differs from its
                default.
        """
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
            self.landmark = LandmarkConv(self.head_dims, ratio, self.grid_dims)
            self.landmark_norm = LandmarkNorm(self.head_dims)

    @property
    def exports_any_size(self) -> bool:
        """bool: Whether an export may have variable image sides."""
        return self.sampler == 'conv' and self.solver != 'svd'

    def attend_landmarks(
        self, q: Tensor, v: Tensor, grid: tuple[int, int], mask: Tensor | None = None, k: Tensor | None = None
    ) -> Tensor:
        """Compute ``P_q M (P_k^T v)`` with landmarks of the keys.

        Args:
            q (Tensor): Scaled queries ``(B, h, n, d)``.
            v (Tensor): Values ``(B, h, n_k, d)``.
            grid (tuple[int, int]): Grid of the keys: ``(H, W)``, or ``(1, n_k)`` for a sequence.
            mask (Tensor | None): ``(B, n_k)``, True where a key takes part. Keys and values of the others must be 0.
                Defaults to None: all.
            k (Tensor | None): Scaled keys ``(B, h, n_k, d)``. Defaults to None: the queries.

        Returns:
            Tensor: ``(B, h, n, d)``, zero for an image without a landmark. In the dtype of ``v``, but float32 for plain
            attention of float16 values.
        """
        if not self.normalized and v.dtype == torch.float16:
            # Plain attention sums over all similar keys, so the sums grow with the image and can exceed 65504.
            v = v.float()
        landmarks, pool_factor, present = self.landmarks(q if k is None else k, grid, mask)
        matrix, inverted = self.middle(landmarks, pool_factor, present)
        return ops.blockwise_attention(q, landmarks, v, matrix, inverted, present, k)

    def landmarks(
        self, q: Tensor, grid: tuple[int, int], mask: Tensor | None = None
    ) -> tuple[Tensor, float | Tensor, Tensor | None]:
        """Sample landmarks.

        Args:
            q (Tensor): Scaled queries, or keys, ``(B, h, n, d)``.
            grid (tuple[int, int]): ``(H, W)``, or ``(1, n)`` for a sequence.
            mask (Tensor | None): ``(B, n)``, True where a token takes part. The queries of the others must be 0. A
                patch without a token that takes part gives no landmark. Defaults to None: all.

        Returns:
            tuple[Tensor, float | Tensor, Tensor | None]: Landmarks ``(B, h, m, d)``; the pool factor ``M / m``, where
            ``M`` is the number of landmarks without a bound; and None. In an export with variable sides, the third item
            is the mask of :func:`soft_mm.ops.pool_to_slots`. With a mask, the second item has one factor per image,
            ``(B, 1, 1, 1)``, and the third is the mask of the landmarks, ``(B, 1, m)`` with ones and zeros.

        Raises:
            NotImplementedError: If random landmarks are exported or traced.
        """
        patch = patch_sides(self.ratio, self.grid_dims)
        if self.sampler == 'conv':
            sampled, sampled_grid = self.landmark(q, grid)
            present = None if mask is None else ops.present_patches(mask, grid, patch, sampled.dtype)
            return self._bound(self.landmark_norm(sampled), sampled_grid, present)
        sampled_grid = (max(grid[0] // patch[0], 1), max(grid[1] // patch[1], 1))
        wide = q.to(compute_dtype(q))
        if self.sampler == 'mean':
            if mask is None:
                return self._bound(ops.mean_landmarks(wide, grid, sampled_grid), sampled_grid)
            takes_part = mask.unsqueeze(1).to(wide.dtype)
            means, present = ops.mean_present_landmarks(wide, takes_part, grid, sampled_grid)
            return self._bound(means, sampled_grid, present)
        if needs_standard_operators():
            raise NotImplementedError(
                "sampler='random' cannot be exported, traced or transformed, because it draws landmarks in Python: set "
                "sampler='conv' or sampler='mean'"
            )
        unbounded = sampled_grid[0] * sampled_grid[1]
        count = unbounded if self.max_landmarks is None else min(unbounded, self.max_landmarks)
        generator = None if self.training else torch.Generator().manual_seed(self.seed)
        drawn = ops.random_landmarks(wide, count, generator, mask)
        if mask is None:
            return drawn, unbounded / count, None
        # An image draws as many tokens as it has patches with a token that takes part, so it has enough of them.
        filled = ops.present_patches(mask, grid, patch, wide.dtype).sum(-1, keepdim=True)
        kept = filled.clamp(max=count)
        present = (torch.arange(count, device=q.device) < kept).to(wide.dtype)
        return drawn, (filled.clamp(min=1) / kept.clamp(min=1)).unsqueeze(-1), present

    def _bound(
        self, landmarks: Tensor, grid: tuple[int, int], present: Tensor | None = None
    ) -> tuple[Tensor, float | Tensor, Tensor | None]:
        """Pool landmarks to at most ``max_landmarks``, see :meth:`landmarks`."""
        if present is not None:
            return ops.pool_present_landmarks(landmarks, present, grid, self.max_landmarks)
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


@MODELS.register_module()
class SoftmaxFreeAttention(LandmarkAttention, SharedQKAttention):
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
        self.set_options(
            ratio, normalized, solver, newton_iterations, newton_backward, max_landmarks, ridge, sampler, seed
        )
        self.local = LocalBranch(num_heads, conv_size, grid_dims)
        self.proj = (nn.Linear if normalized else WideProjection)(embed_dims, embed_dims)

    def attend(self, q: Tensor, v: Tensor, grid: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        """Compute ``P M (P^T v)``.

        Args:
            q (Tensor): Scaled queries ``(B, h, n, d)``.
            v (Tensor): Values ``(B, h, n, d)``.
            grid (tuple[int, int]): ``(H, W)``, or ``(1, n)`` for a sequence.
            mask (Tensor | None): ``(B, n)``, True where a token takes part. The others must be 0. Defaults to None:
                all.

        Returns:
            Tensor: ``(B, h, n, d)``.
        """
        return self.attend_landmarks(q, v, grid, mask)


@MODELS.register_module()
class SoftmaxFreeCrossAttention(LandmarkAttention):
    """Softmax-free attention of one set of tokens to another: ``g(q, l) A^+ g(k, l)^T v``.

    Two linear layers map the queries ``(B, n, C)``, and the keys and values ``(B, m, C')``, to the same ``d`` channels
    per head with the same scale ``d^(-1/4)``, so that the Gaussian kernel compares queries, keys and landmarks. The
    landmarks are sampled from the keys on their grid. The queries need no grid, and there is no local branch. Time and
    memory are linear in ``n`` and in ``m``.

    It is a module for decoders and fusion, called as ``attention(query, key_value, grid)``. It cannot be the attention
    of the backbone's stages, which attend to their own tokens. See :func:`soft_mm.ops.softmax_free_attention` and
    :func:`soft_mm.ops.normalized_softmax_free_attention` with ``k``.

    Args:
        embed_dims (int): Channels ``C`` of the queries and of the output.
        num_heads (int): Number of heads, a divisor of ``embed_dims``.
        kv_dims (int | None): Channels ``C'`` of the keys and values. Defaults to None: ``embed_dims``.
        ratio (int): Side of the patch of keys that becomes one landmark. Defaults to 1.
        normalized (bool): See :class:`SoftmaxFreeAttention`. Defaults to False.
        solver (str): See :class:`SoftmaxFreeAttention`. Defaults to ``'newton'``.
        newton_iterations (int): See :class:`SoftmaxFreeAttention`. Defaults to 20.
        newton_backward (str): See :class:`SoftmaxFreeAttention`. Defaults to ``'one_step'``.
        max_landmarks (int | None): See :class:`SoftmaxFreeAttention`. Defaults to 49.
        ridge (float): See :class:`SoftmaxFreeAttention`. Defaults to 0.01.
        sampler (str): See :class:`SoftmaxFreeAttention`, with the keys instead of the queries. Defaults to ``'conv'``.
        seed (int): See :class:`SoftmaxFreeAttention`. Defaults to 0.
        grid_dims (int): 2 if the keys are a map, 1 if they are a sequence. Defaults to 2.
        init_cfg (dict | None): See mmengine's ``BaseModule``. Defaults to None.

    Raises:
        ValueError: If an option is out of its range, or has no effect with the other options and differs from its
            default.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        kv_dims: int | None = None,
        ratio: int = 1,
        normalized: bool = False,
        solver: str = 'newton',
        newton_iterations: int = 20,
        newton_backward: str = 'one_step',
        max_landmarks: int | None = 49,
        ridge: float = 0.01,
        sampler: str = 'conv',
        seed: int = 0,
        grid_dims: int = 2,
        init_cfg: InitCfg = None,
    ) -> None:
        super().__init__(embed_dims, num_heads, grid_dims, init_cfg)
        check_integer('ratio', ratio)
        kv_dims = embed_dims if kv_dims is None else kv_dims
        check_integer('kv_dims', kv_dims)
        self.embed_dims, self.kv_dims = embed_dims, kv_dims
        self.q = QueryProjection(embed_dims, self.head_dims)
        self.kv = QueryValueProjection(embed_dims, self.head_dims, kv_dims)
        self.set_options(
            ratio, normalized, solver, newton_iterations, newton_backward, max_landmarks, ridge, sampler, seed
        )
        self.proj = (nn.Linear if normalized else WideProjection)(embed_dims, embed_dims)

    def forward(self, query: Tensor, key_value: Tensor, grid: Sequence[int], mask: Tensor | None = None) -> Tensor:
        """Attend from ``query`` to ``key_value``.

        Args:
            query (Tensor): Tokens ``(B, n, C)``.
            key_value (Tensor): Tokens ``(B, m, C')``.
            grid (tuple[int, ...]): Grid of ``key_value``: ``(H, W)``, or ``(m,)`` with ``grid_dims=1``.
            mask (Tensor | None): ``(B, m)`` bool, True where a token of ``key_value`` takes part. The others may hold
                anything: they change no output and get no gradient. In an image without a token that takes part, all
                outputs are the bias of the output projection. Defaults to None: all take part.

        Returns:
            Tensor: Tokens ``(B, n, C)``.

        Raises:
            NotImplementedError: If the sides of the grid are variables of an export, and the options do not allow it.
            ValueError: If the shapes of ``query`` and ``key_value`` do not fit each other or the module, the grid does
                not fit ``key_value``, or the mask does not fit ``key_value``.
        """
        for name, tokens, dims in (('query', query, self.embed_dims), ('key_value', key_value, self.kv_dims)):
            if tokens.ndim != 3 or tokens.shape[-1] != dims:
                raise ValueError(f'{name} of shape {tuple(tokens.shape)}: expected (B, n, {dims})')
        if query.shape[0] != key_value.shape[0]:
            raise ValueError(
                f'query of {query.shape[0]} images and key_value of {key_value.shape[0]}: expected the same number'
            )
        grid = self.map_grid(grid, key_value.shape[1])
        if mask is not None:
            key_value = mask_tokens(key_value, mask)
        q = split_heads(scaled_queries(self.q, query, self.head_dims), self.num_heads)
        projected = scaled_queries_and_values(self.kv, key_value, self.head_dims)
        k, v = (split_heads(part, self.num_heads) for part in projected)
        if mask is not None:
            k, v = mask_heads(k, mask), mask_heads(v, mask)
        return call_linear(self.proj, merge_heads(self.attend_landmarks(q, v, grid, mask, k)))


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
