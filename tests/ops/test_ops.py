"""The fast forms against the plain reference: outputs, every gradient, odd grids, float64 and float32."""

import pytest
import torch

from soft_mm import ops
from soft_mm.ops import blockwise, checks, reference
from soft_mm.ops.inverse import converged_newton_inverse, scales_to_converge

D = 8
# Grid and ratio: remainders, a side shorter than the ratio, one landmark, a single row.
ONE_LANDMARK = ((2, 3), 4)
GRIDS = [((6, 10), 2), ((7, 5), 2), ((9, 14), 4), ((3, 13), 4), ONE_LANDMARK, ((1, 17), 3)]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}


def make_inputs(grid, ratio, dtype, spread=1.0, heads=2, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n = grid[0] * grid[1]
    return [
        tensor.to(dtype).requires_grad_()
        for tensor in (
            spread * normal(batch, heads, n, D),
            normal(batch, heads, n, D),
            normal(D, D, ratio, ratio) / (D * ratio**2) ** 0.5,
            spread * (1 + 0.1 * normal(D)),
            0.1 * normal(D),
        )
    ]


def assert_same(fast, plain, inputs, tolerance):
    """Compare outputs, and the gradients of one random weighting of them, relative to the largest entry."""
    grad = torch.randn(plain.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(plain.dtype)
    wanted = [plain, *torch.autograd.grad(plain, inputs, grad, allow_unused=True)]
    found = [fast, *torch.autograd.grad(fast, inputs, grad.to(fast.dtype), allow_unused=True)]
    for mine, theirs in zip(found, wanted):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert torch.isfinite(mine).all()
            scale = theirs.abs().max().clamp(min=1e-12)
            torch.testing.assert_close(mine / scale, theirs / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize(('n', 'm'), [(1, 1), (13, 5), (40, 40)])
def test_gaussian_kernel(n, m, dtype):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, 3, n, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    b = torch.randn(2, 3, m, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    assert_same(ops.gaussian_kernel(a, b), reference.gaussian_kernel(a, b), [a, b], TOLERANCE[dtype])


def test_gaussian_kernel_is_a_kernel():
    tokens = torch.randn(2, 50, D, generator=torch.Generator().manual_seed(0))
    kernel = ops.gaussian_kernel(tokens, tokens)
    assert kernel.min() >= 0 and kernel.max() <= 1
    torch.testing.assert_close(kernel, kernel.mT, rtol=0, atol=1e-5)
    torch.testing.assert_close(kernel.diagonal(dim1=-2, dim2=-1), torch.ones(2, 50), rtol=0, atol=1e-5)


@pytest.mark.parametrize('half', [torch.bfloat16, torch.float16])
def test_kernel_and_attention_leave_half_precision(half):
    q, v, *conv = (tensor.detach() for tensor in make_inputs((6, 7), 2, torch.float32))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        landmarks, _ = ops.conv_landmarks(q.to(half), (6, 7), *conv)
        kernel = ops.gaussian_kernel(q.to(half), landmarks)
        out = ops.softmax_free_attention(q.to(half), landmarks, v.to(half))
    assert landmarks.dtype == kernel.dtype == torch.float32 and out.dtype == half
    torch.testing.assert_close(kernel, reference.gaussian_kernel(q.to(half).float(), landmarks), rtol=0, atol=1e-5)
    wide = ops.softmax_free_attention(q.to(half).float(), landmarks, v.to(half).float())
    torch.testing.assert_close(out, wide.to(half))


def test_arguments_have_their_documented_names():
    a, b = torch.randn(2, 1, 2, 5, 3)
    kernel = ops.gaussian_kernel(b=b, a=a)
    assert torch.equal(kernel, ops.gaussian_kernel(a, b))
    kernel = ops.gaussian_kernel(a, a)
    assert torch.equal(ops.newton_inverse(iterations=5, kernel=kernel), ops.newton_inverse(kernel, 5))


@pytest.mark.parametrize('solver', ['newton', 'cholesky'])
def test_backward_of_attention_does_not_see_autocast(solver):
    q, v, *conv = make_inputs((6, 7), 2, torch.float32)
    landmarks = ops.conv_landmarks(q, (6, 7), *conv)[0].detach().requires_grad_()
    inputs, results = (q, landmarks, v), []
    for enabled in (False, True):
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=enabled):
            out = ops.softmax_free_attention(*inputs, solver=solver)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for one, other in zip(*results):
        assert torch.equal(one, other)


INVERSES = {
    'one_step': ops.newton_inverse,
    'exact': lambda kernel: ops.newton_inverse(kernel, backward='exact'),
    'per_image': ops.newton_inverse_per_image,
    'ridge': ops.ridge_matrix,
}


@pytest.mark.parametrize('inverse', INVERSES.values(), ids=INVERSES)
def test_inverses_and_their_gradients_do_not_see_autocast(inverse):
    tokens = 0.5 * torch.randn(1, 2, 20, D, generator=torch.Generator().manual_seed(0))
    results = []
    for enabled in (False, True):
        kernel = reference.gaussian_kernel(tokens, tokens).requires_grad_()
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=enabled):
            out = inverse(kernel)
        out.square().sum().backward()
        results.append((out, kernel.grad))
    for one, other in zip(*results):
        assert torch.equal(one, other)
    assert inverse(kernel.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize(('grid', 'ratio'), GRIDS)
def test_conv_landmarks(grid, ratio, dtype):
    q, _, *conv = make_inputs(grid, ratio, dtype)
    fast, out_grid = ops.conv_landmarks(q, grid, *conv)
    assert out_grid == (max(grid[0] // ratio, 1), max(grid[1] // ratio, 1))
    assert fast.shape[2] == out_grid[0] * out_grid[1]
    assert_same(fast, reference.conv_landmarks(q, grid, *conv), [q, *conv], TOLERANCE[dtype])


def plain_attention(q, v, conv, grid, solver, backward, normalized):
    landmarks = reference.conv_landmarks(q, grid, *conv)
    if solver == 'cholesky':
        inverse = reference.ridge_inverse
    else:
        inverse = reference.newton_inverse_per_image if normalized else reference.newton_inverse
    return reference.softmax_free_attention(q, landmarks, v, inverse, normalized)


def fast_attention(q, v, conv, grid, solver, backward, normalized):
    landmarks, _ = ops.conv_landmarks(q, grid, *conv)
    if normalized:
        return ops.normalized_softmax_free_attention(q, landmarks, v, solver=solver)
    options = dict(newton_backward=backward) if solver == 'newton' else {}
    return ops.softmax_free_attention(q, landmarks, v, solver=solver, **options)


@pytest.fixture(params=[1, 60, None], ids=['one_token', 'some_tokens', 'default'])
def chunk_entries(request, monkeypatch):
    """Entries of P in a chunk: one token, an uneven number of tokens, and all tokens of these small cases."""
    if request.param:
        monkeypatch.setitem(blockwise._CHUNK_ENTRIES, 'cpu', request.param)


@pytest.mark.usefixtures('chunk_entries')
@pytest.mark.parametrize('spread', [0.6, 1.5], ids=['flat', 'sharp'])
@pytest.mark.parametrize('normalized', [False, True], ids=['plain', 'normalized'])
@pytest.mark.parametrize('solver', ['newton', 'cholesky'])
@pytest.mark.parametrize(('grid', 'ratio'), [case for case in GRIDS if case != ONE_LANDMARK])
def test_attention_equals_reference(grid, ratio, solver, normalized, spread):
    q, v, *conv = make_inputs(grid, ratio, torch.float64, spread)
    settings = (conv, grid, solver, 'exact', normalized)
    assert_same(fast_attention(q, v, *settings), plain_attention(q, v, *settings), [q, v, *conv], 1e-8)


@pytest.mark.parametrize(
    ('solver', 'normalized'), [('newton', False), ('cholesky', False), ('cholesky', True)], ids=str
)
def test_attention_equals_reference_with_one_landmark(solver, normalized):
    q, v, *conv = make_inputs(ONE_LANDMARK[0], ONE_LANDMARK[1], torch.float64)
    settings = (conv, ONE_LANDMARK[0], solver, 'exact', normalized)
    assert_same(fast_attention(q, v, *settings), plain_attention(q, v, *settings), [q, v, *conv], 1e-8)


def test_normalized_newton_of_one_landmark_is_zero():
    """The authors' step size, 2 / 1, takes the first iteration from 2 to 0, where it stays."""
    kernel = torch.ones(2, 3, 1, 1)
    assert not ops.newton_inverse_per_image(kernel).any() and not reference.newton_inverse_per_image(kernel).any()


@pytest.mark.parametrize('normalized', [False, True], ids=['plain', 'normalized'])
@pytest.mark.parametrize('solver', ['newton', 'cholesky'])
def test_attention_in_float32_is_near_float64(solver, normalized):
    grid, ratio = (9, 14), 4
    q, v, *conv = make_inputs(grid, ratio, torch.float32)
    wide = [tensor.detach().double().requires_grad_() for tensor in (q, v, *conv)]
    settings = (grid, solver, 'exact', normalized)
    fast = fast_attention(q, v, conv, *settings)
    plain = plain_attention(wide[0], wide[1], wide[2:], *settings)
    grad = torch.randn(plain.shape, generator=torch.Generator().manual_seed(5))
    found = [fast, *torch.autograd.grad(fast, [q, v, *conv], grad)]
    wanted = [plain, *torch.autograd.grad(plain, wide, grad.double())]
    for mine, theirs in zip(found, wanted):
        scale = theirs.abs().max()
        torch.testing.assert_close(mine.double() / scale, theirs / scale, rtol=0, atol=1e-3)


# A token at a time takes long here, and its gradients are compared above.
@pytest.mark.parametrize('chunk_entries', [60, None], ids=['some_tokens', 'default'], indirect=True)
@pytest.mark.usefixtures('chunk_entries')
@pytest.mark.parametrize('normalized', [False, True], ids=['plain', 'normalized'])
@pytest.mark.parametrize('solver', ['newton', 'cholesky'])
def test_gradcheck(solver, normalized):
    q, v, *conv = make_inputs((5, 4), 2, torch.float64, batch=1)

    def attention(q, v, *conv):
        return fast_attention(q, v, conv, (5, 4), solver, 'exact', normalized)

    assert torch.autograd.gradcheck(attention, (q, v, *conv), atol=1e-6)


@pytest.mark.parametrize('solver', ['newton', 'cholesky'])
def test_memory_does_not_grow_with_tokens_times_landmarks(solver):
    """Nothing kept for the backward is larger than the tokens, though there are more landmarks than channels."""
    q, landmarks, v = (torch.randn(1, 2, n, D).requires_grad_() for n in (3000, 5 * D, 3000))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda tensor: tensor):
        ops.softmax_free_attention(q, landmarks, v, solver)
    assert q.numel() in kept and max(kept) == q.numel()


def test_one_step_backward_is_the_gradient_once_converged():
    tokens = 3 * torch.randn(3, 6, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kernel = reference.gaussian_kernel(tokens, tokens).requires_grad_()
    grad = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = torch.autograd.grad(reference.ridge_inverse(kernel), kernel, grad)[0]
    one_step = torch.autograd.grad(ops.newton_inverse(kernel, 20), kernel, grad)[0]
    torch.testing.assert_close(one_step, exact, rtol=1e-9, atol=1e-9)


def test_one_step_backward_is_another_gradient_when_truncated():
    kernel = reference.gaussian_kernel(
        *[0.05 * torch.randn(1, 20, D, generator=torch.Generator().manual_seed(0)).double()] * 2
    )
    kernel.requires_grad_()
    inverse = ops.newton_inverse(kernel, 5)
    grad = torch.ones_like(inverse)
    one_step = torch.autograd.grad(inverse, kernel, grad)[0]
    torch.testing.assert_close(one_step, -inverse.detach().mT @ grad @ inverse.detach().mT)
    exact = torch.autograd.grad(ops.newton_inverse(kernel, 5, backward='exact'), kernel, grad)[0]
    assert (one_step - exact).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize('spread', [0.05, 0.5, 2.0])
def test_step_size_of_the_normalized_inverse(spread):
    """The step is halved as often as the plain loop halves it, eight times, seven or eight, and not at all."""
    tokens = spread * torch.randn(3, 2, 30, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kernel = reference.gaussian_kernel(tokens, tokens)
    torch.testing.assert_close(ops.newton_inverse_per_image(kernel, 0), reference.newton_inverse_per_image(kernel, 0))
    torch.testing.assert_close(ops.newton_inverse_per_image(kernel), reference.newton_inverse_per_image(kernel))


def test_step_size_is_halved_ten_times_at_most():
    """No Gaussian kernel needs so many; a matrix with one large column asks for more."""
    kernel = torch.eye(6, dtype=torch.float64).repeat(1, 2, 1, 1)
    kernel[0, 1, :, 5] = 3e4
    unhalved = 2 / kernel.sum(-1).amax() ** 2
    step = ops.newton_inverse_per_image(kernel, 0)[0, 0, 0, 0]
    torch.testing.assert_close(step, reference.newton_inverse_per_image(kernel, 0)[0, 0, 0, 0])
    torch.testing.assert_close(step, unhalved / 2**10)


@pytest.mark.parametrize('normalized', [False, True], ids=['plain', 'normalized'])
@pytest.mark.parametrize('solver', ['newton', 'cholesky'])
def test_an_image_does_not_depend_on_its_batch(solver, normalized):
    q, v, *conv = make_inputs((8, 6), 2, torch.float64)
    with torch.no_grad():
        q[1] = q[1, 0, 0]
    settings = ((8, 6), solver, 'exact', normalized)
    together = fast_attention(q, v, conv, *settings)
    alone = fast_attention(q[:1], v[:1], conv, *settings)
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize('attention', [ops.softmax_free_attention, ops.normalized_softmax_free_attention])
@pytest.mark.parametrize('count', [64, 1024])
def test_cholesky_survives_landmarks_that_are_all_alike(count, attention):
    landmarks = torch.zeros(1, 1, count, D).requires_grad_()
    q, v = torch.randn(2, 1, 1, 50, D, generator=torch.Generator().manual_seed(0))
    out = attention(q, landmarks, v, solver='cholesky', ridge=1e-9)
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(landmarks.grad).all()


@pytest.mark.parametrize('attention', [ops.softmax_free_attention, ops.normalized_softmax_free_attention])
@pytest.mark.parametrize('norm', [10.0, 100.0, 300.0])
@pytest.mark.parametrize('noise', [1e-4, 1e-2])
def test_cholesky_survives_clusters_of_landmarks_that_are_almost_alike(noise, norm, attention):
    """Distances within a cluster are small differences of large numbers, and the kernel is not what it should be."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(1, 1, 4, D, generator=generator)
    centres = norm * centres / centres.norm(dim=-1, keepdim=True)
    landmarks = centres.repeat_interleave(256, dim=2)
    landmarks = (landmarks + noise * torch.randn(landmarks.shape, generator=generator)).requires_grad_()
    v = torch.randn(1, 1, 64, D, generator=generator)
    kernel, matrix = ops.attention._kernel_and_ridge_matrix(landmarks, 0.01)
    assert torch.linalg.cholesky_ex(matrix).info.item() == 0
    out = attention(landmarks.detach()[:, :, ::16], landmarks, v, solver='cholesky')
    out.square().sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(landmarks.grad).all()
    # The values are interpolated, not amplified.
    assert out.abs().max() < 100 * v.abs().max()


def test_ridge_is_raised_only_where_the_dtype_asks_for_it():
    kernel = torch.eye(4, dtype=torch.float32)
    assert ops.safe_ridge(kernel, 0.01) == pytest.approx(0.01)
    assert ops.safe_ridge(kernel, 0.0) == pytest.approx(8 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize(
    ('grid', 'bound', 'wanted'),
    [
        ((7, 7), 49, (7, 7)),
        ((28, 28), 49, (7, 7)),
        ((25, 42), 49, (5, 9)),
        ((42, 25), 49, (9, 5)),
        ((32, 64), 49, (5, 9)),
        ((30, 31), 49, (7, 7)),
        ((1, 100), 8, (1, 8)),
        ((9, 9), 1, (1, 1)),
    ],
)
def test_pooled_grid(grid, bound, wanted):
    assert ops.pooled_grid(grid, bound) == wanted


def test_pooled_grids_of_squares_are_squares():
    assert {ops.pooled_grid((side, side), 49) for side in range(7, 201)} == {(7, 7)}


@pytest.mark.parametrize('grid', [(h, w) for h in (1, 2, 5, 31) for w in (1, 3, 8, 50)])
@pytest.mark.parametrize('bound', [1, 7, 16, 49])
def test_pooled_grid_is_within_its_bounds(grid, bound):
    h, w = ops.pooled_grid(grid, bound)
    assert 1 <= h <= grid[0] and 1 <= w <= grid[1]
    assert h * w <= bound or (h, w) == grid


@pytest.mark.parametrize(('grid', 'bound'), [((7, 5), 12), ((4, 9), 7), ((1, 11), 4), ((6, 6), 1)])
def test_pool_landmarks(grid, bound):
    generator = torch.Generator().manual_seed(0)
    landmarks = torch.randn(2, 2, grid[0] * grid[1], D, generator=generator, dtype=torch.float64).requires_grad_()
    pooled, pool_factor = ops.pool_landmarks(landmarks, grid, bound)
    out_grid = ops.pooled_grid(grid, bound)
    assert pool_factor == grid[0] * grid[1] / (out_grid[0] * out_grid[1])
    assert_same(pooled, reference.pool_landmarks(landmarks, grid, out_grid), [landmarks], 1e-12)


def test_pooling_within_the_bound_is_the_identity():
    landmarks = torch.randn(2, 2, 12, D)
    pooled, pool_factor = ops.pool_landmarks(landmarks, (3, 4), 12)
    assert pooled is landmarks and pool_factor == 1


@pytest.mark.parametrize('normalized', [False, True], ids=['plain', 'normalized'])
def test_bounding_repeated_landmarks_changes_nothing(normalized):
    """Landmarks repeated k times and pooled back give the same output; the ridge e of the many is e / k of the few."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(2, 2, 2, 3, D, generator=generator, dtype=torch.float64)
    many = few.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3).reshape(2, 2, -1, D)
    q, v = (torch.randn(2, 2, 20, D, generator=generator, dtype=torch.float64) for _ in range(2))
    pooled, pool_factor = ops.pool_landmarks(many, (4, 6), 6)
    torch.testing.assert_close(pooled, few.reshape(2, 2, 6, D))
    assert pool_factor == 4
    if normalized:
        unbounded = ops.normalized_softmax_free_attention(q, many, v, 'cholesky', ridge=0.04)
        bounded = ops.normalized_softmax_free_attention(q, pooled, v, 'cholesky', ridge=0.01, degree_scale=pool_factor)
    else:
        unbounded = ops.softmax_free_attention(q, many, v, 'cholesky', ridge=0.04)
        bounded = ops.softmax_free_attention(q, pooled, v, 'cholesky', ridge=0.01)
    torch.testing.assert_close(bounded, unbounded, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize(('grid', 'size'), [((6, 9), 3), ((5, 4), 9), ((1, 3), 5)])
def test_local_branch(grid, size, dtype):
    generator = torch.Generator().manual_seed(0)
    heads, n = 3, grid[0] * grid[1]
    tokens = torch.randn(2, n, heads * D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(heads, 1, size, size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    plain = reference.local_branch(tokens.reshape(2, n, heads, D).transpose(1, 2), grid, weight)
    plain = plain.transpose(1, 2).reshape(2, n, heads * D)
    assert_same(ops.local_branch(tokens, grid, weight), plain, [tokens, weight], TOLERANCE[dtype])


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(solver='svd2'), r"solver='svd2' is unknown; choose one of \('newton', 'cholesky', 'svd'\)"),
        (dict(newton_backward='two_step'), r"newton_backward='two_step' is unknown"),
        (dict(newton_iterations=0), 'newton_iterations=0: expected an integer >= 1'),
    ],
)
def test_unknown_options_are_named(options, message):
    q = torch.zeros(1, 1, 4, D)
    with pytest.raises(ValueError, match=message):
        ops.softmax_free_attention(q, q, q, **options)


def test_middle_matrix_checks_its_options():
    landmarks = torch.zeros(1, 1, 4, D)
    with pytest.raises(ValueError, match="solver='choleski' is unknown"):
        ops.middle_matrix(landmarks, solver='choleski')
    with pytest.raises(ValueError, match='ridge=5.0 has no effect'):
        ops.middle_matrix(landmarks, solver='svd', ridge=5.0)


def test_gradients_with_a_matrix_that_is_not_symmetric():
    generator = torch.Generator().manual_seed(0)
    q, landmarks, v, matrix = (
        torch.randn(2, 2, rows, columns, generator=generator, dtype=torch.float64).requires_grad_()
        for rows, columns in ((7, 4), (3, 4), (7, 5), (3, 3))
    )
    plain = reference.gaussian_kernel(q, landmarks) @ matrix @ reference.gaussian_kernel(landmarks, q) @ v
    fast = ops.blockwise_attention(q, landmarks, v, matrix)
    assert_same(fast, plain, [q, landmarks, v, matrix], TOLERANCE[torch.float64])


def test_converged_inverse_of_several_heads_does_not_see_autocast():
    generator = torch.Generator().manual_seed(0)
    # Each head has another largest row sum.
    landmarks = torch.randn(2, 3, 6, D, generator=generator) * torch.tensor([0.1, 0.5, 2.0]).view(3, 1, 1)
    matrix = ops.gaussian_kernel(landmarks, landmarks) + 0.01 * torch.eye(6)
    with torch.autocast('cpu', torch.bfloat16):
        inverse = converged_newton_inverse(matrix, 0.01, scales_to_converge(6, 0.01))
    assert inverse.dtype == torch.float32
    torch.testing.assert_close(inverse.double(), torch.linalg.inv(matrix.double()), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize('normalized', [False, True])
def test_masked_landmarks_far_from_the_origin_keep_their_digits(normalized):
    """Only the mean of the present landmarks, subtracted from them, keeps the distances exact in float32."""
    generator = torch.Generator().manual_seed(0)
    landmarks = 1000 + torch.randn(2, 1, 6, D, generator=generator)
    present = torch.tensor([1.0, 1, 0, 1, 1, 0])
    options = dict(normalized=normalized, solver='cholesky')
    matrix, _ = ops.middle_matrix(landmarks, present=present.expand(2, 1, 6), **options)
    kept = present.bool()
    exact, _ = ops.middle_matrix(landmarks[:, :, kept].double(), **options)
    torch.testing.assert_close(matrix[:, :, kept][..., kept].double(), exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize('normalized', [False, True])
def test_middle_matrix_of_an_onnx_export_is_the_same(normalized, monkeypatch):
    """ONNX has no Cholesky factorisation, so an export computes the inverse itself."""
    landmarks = torch.randn(2, 3, 6, D, generator=torch.Generator().manual_seed(0))
    options = dict(normalized=normalized, solver='cholesky', degree_scale=1.7)
    matrix, inverted = ops.middle_matrix(landmarks, **options)
    assert inverted
    monkeypatch.setattr(torch.onnx, 'is_in_onnx_export', lambda: True)
    exported, inverted = ops.middle_matrix(landmarks, **options)
    assert not inverted
    torch.testing.assert_close(exported.double(), torch.linalg.inv(matrix.double()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('value', [-0.1, 1, 1.5, float('nan'), True, '0.5', None])
def test_rates_are_checked(value):
    with pytest.raises(ValueError, match='rate=.*: expected a number >= 0 and < 1'):
        checks.check_rate('rate', value)


def test_rates_within_the_range_pass():
    for value in (0, 0.0, 0.5, 0.999):
        checks.check_rate('rate', value)
