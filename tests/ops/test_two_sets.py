"""Attention between two sets of tokens, and landmarks that are absent: the engine against the plain reference."""

import functools

import pytest
import torch

from soft_mm import ops
from soft_mm.ops import blockwise, reference

D = 5
# Queries, keys, landmarks.
SIZES = [(7, 13, 4), (13, 7, 4), (1, 11, 3), (9, 1, 1), (6, 6, 6), (5, 4, 9)]
# The exact gradient of Newton's iterations, and the ridge inverse.
INVERSES = {
    ('newton', False): reference.newton_inverse,
    ('newton', True): reference.newton_inverse_per_image,
    ('cholesky', False): reference.ridge_inverse,
    ('cholesky', True): reference.ridge_inverse,
}

# With one landmark, the authors' normalised Newton form is zero, and rounding errors remain.
CASES = [(sizes, *inverse) for sizes in SIZES for inverse in INVERSES if sizes[2] > 1 or inverse != ('newton', True)]


def make_inputs(sizes, dtype=torch.float64, batch=2, heads=3, spread=0.8):
    """Queries, landmarks, values of another width than the queries, and keys."""
    generator = torch.Generator().manual_seed(0)
    n, n_k, m = sizes
    return [
        (spread * torch.randn(batch, heads, count, width, generator=generator, dtype=torch.float64))
        .to(dtype)
        .requires_grad_()
        for count, width in ((n, D), (m, D), (n_k, D + 2), (n_k, D))
    ]


def fast(q, landmarks, v, k, solver='cholesky', normalized=False, **options):
    if normalized:
        return ops.normalized_softmax_free_attention(q, landmarks, v, solver, k=k, **options)
    if solver == 'newton':
        options['newton_backward'] = 'exact'
    return ops.softmax_free_attention(q, landmarks, v, solver, k=k, **options)


def results(out, inputs):
    """The output, and the gradients of a weighting of it."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, weights)]


def assert_same(found, wanted, tolerance):
    for one, other in zip(found, wanted, strict=True):
        scale = other.abs().max().clamp(min=1e-12)
        torch.testing.assert_close(one.to(other.dtype) / scale, other / scale, rtol=0, atol=tolerance)


@pytest.fixture(params=[1, 60, None], ids=['one_token', 'some_tokens', 'default'])
def chunk_entries(request, monkeypatch):
    if request.param:
        monkeypatch.setitem(blockwise._CHUNK_ENTRIES, 'cpu', request.param)


@pytest.mark.usefixtures('chunk_entries')
@pytest.mark.parametrize(('sizes', 'solver', 'normalized'), CASES, ids=str)
def test_attention_equals_reference(sizes, solver, normalized):
    q, landmarks, v, k = inputs = make_inputs(sizes)
    plain = reference.softmax_free_attention(q, landmarks, v, INVERSES[solver, normalized], normalized, k=k)
    assert plain.shape == (2, 3, sizes[0], D + 2)
    assert_same(results(fast(q, landmarks, v, k, solver, normalized), inputs), results(plain, inputs), 1e-9)


@pytest.mark.parametrize(('solver', 'normalized'), INVERSES)
def test_attention_in_float32_is_near_float64(solver, normalized):
    inputs = make_inputs((30, 45, 7), torch.float32)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    q, landmarks, v, k = wide
    plain = reference.softmax_free_attention(q, landmarks, v, INVERSES[solver, normalized], normalized, k=k)
    q, landmarks, v, k = inputs
    assert_same(results(fast(q, landmarks, v, k, solver, normalized), inputs), results(plain, wide), 1e-3)


# A token at a time takes long here, and its gradients are compared above.
@pytest.mark.parametrize('chunk_entries', [60, None], ids=['some_tokens', 'default'], indirect=True)
@pytest.mark.usefixtures('chunk_entries')
@pytest.mark.parametrize(('solver', 'normalized'), INVERSES)
def test_gradcheck(solver, normalized):
    inputs = make_inputs((6, 9, 3), batch=1, heads=2)
    assert torch.autograd.gradcheck(functools.partial(fast, solver=solver, normalized=normalized), inputs, atol=1e-6)


@pytest.mark.usefixtures('chunk_entries')
def test_self_attention_is_the_case_of_equal_sets():
    q, landmarks, v, _ = make_inputs((11, 11, 4))
    inputs, keys = (q, landmarks, v), q.detach().clone().requires_grad_()
    own = results(ops.softmax_free_attention(*inputs), inputs)
    other = results(ops.softmax_free_attention(*inputs, k=keys), (*inputs, keys))
    other[1] = other[1] + other.pop()
    assert_same(other, own, 1e-12)


@pytest.mark.parametrize('solver', [dict(solver='cholesky', ridge=1e-13), dict(solver='svd')], ids=str)
@pytest.mark.parametrize('landmarks_are', ['keys', 'queries'])
def test_attention_is_exact_if_the_landmarks_are_one_of_the_sets(landmarks_are, solver):
    """The decomposition is the kernel itself then (SOFT, section 3.2)."""
    q, _, v, k = make_inputs((14, 9, 1), spread=1.5)
    exact = reference.gaussian_kernel(q, k) @ v
    found = ops.softmax_free_attention(q, k if landmarks_are == 'keys' else q, v, k=k, **solver)
    assert_same([found], [exact], 1e-8)


def test_error_falls_with_the_number_of_landmarks():
    """The landmarks are the first of the keys, so more of them never approximate the kernel worse."""
    q, _, v, k = (tensor.detach() for tensor in make_inputs((30, 40, 1), spread=0.5))
    eye = torch.eye(40, dtype=torch.float64).expand(2, 3, -1, -1)
    exact = reference.gaussian_kernel(q, k)
    errors = [
        (ops.softmax_free_attention(q, k[:, :, :m], eye, solver='svd', k=k) - exact).norm().item()
        for m in (1, 4, 10, 20, 40)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6 * errors[0], errors
    last = ops.softmax_free_attention(q, k, v, solver='svd', k=k)
    torch.testing.assert_close(last, exact @ v, rtol=0, atol=1e-6)


def test_attention_leaves_half_precision_and_does_not_see_autocast():
    inputs = [tensor.detach().bfloat16().requires_grad_() for tensor in make_inputs((12, 20, 5), torch.float32)]
    q, landmarks, v, k = inputs
    outcomes = []
    for enabled in (False, True):
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=enabled):
            out = fast(q, landmarks, v, k)
        outcomes.append(results(out, inputs))
    assert all(torch.equal(*pair) for pair in zip(*outcomes)) and outcomes[0][0].dtype == torch.bfloat16
    wide = fast(*(tensor.detach().float() for tensor in (q, landmarks, v, k)))
    torch.testing.assert_close(outcomes[0][0], wide.bfloat16())


@pytest.mark.parametrize('mask', [False, True])
def test_compiled_exported_and_transformed_attention_equal_eager(mask, monkeypatch):
    monkeypatch.setitem(blockwise._CHUNK_ENTRIES, 'cpu', 60)
    inputs = make_inputs((7, 13, 4))
    present = torch.tensor([[[1, 0, 1, 1]], [[1, 1, 1, 0]]]).double() if mask else None

    def attention(q, landmarks, v, k):
        middle = ops.middle_matrix(landmarks, solver='cholesky', present=present)
        return ops.blockwise_attention(q, landmarks, v, *middle, present, k)

    expected = results(attention(*inputs), inputs)
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend='aot_eager', fullgraph=True)
    assert_same(results(compiled(*inputs), inputs), expected, 1e-10)
    torch._dynamo.reset()
    exported = torch.export.export(Module(attention), tuple(inputs)).module()
    assert_same(results(exported(*inputs), inputs), expected, 1e-10)
    weights = torch.randn(expected[0].shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    plain = [tensor.detach() for tensor in inputs]
    transformed = torch.func.grad(lambda *tensors: (attention(*tensors) * weights).sum(), argnums=(0, 1, 2, 3))(*plain)
    assert_same(transformed, expected[1:], 1e-10)


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def test_memory_does_not_grow_with_tokens_times_landmarks():
    q, landmarks, v, k = (torch.randn(1, 2, n, D).requires_grad_() for n in (2000, 5 * D, 3000, 3000))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda tensor: tensor):
        ops.softmax_free_attention(q, landmarks, v, 'cholesky', k=k)
    assert k.numel() in kept and max(kept) == k.numel()


@pytest.mark.parametrize('count', [12, 14])
def test_values_without_a_key_are_refused(count):
    q, landmarks, _, k = make_inputs((7, 13, 4))
    v = torch.zeros(2, 3, count, D, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf'v of shape \(2, 3, {count}, 5\): expected 13 tokens, one for each key'):
        ops.softmax_free_attention(q, landmarks, v, k=k)
    with pytest.raises(ValueError, match='expected 7 tokens'):
        ops.softmax_free_attention(q, landmarks, v)


@pytest.mark.usefixtures('chunk_entries')
@pytest.mark.parametrize('two_sets', [False, True])
@pytest.mark.parametrize('normalized', [False, True])
@pytest.mark.parametrize('solver', ['newton', 'cholesky', 'svd'])
def test_absent_landmarks_change_nothing(solver, normalized, two_sets):
    """Each image gives what it gives with its present landmarks alone, outputs and gradients."""
    q, landmarks, v, k = inputs = make_inputs((13, 13, 6))
    present = torch.tensor([[[1, 0, 1, 1, 0, 1]], [[0, 1, 0, 0, 0, 1]]], dtype=torch.float64)
    scale = torch.tensor([2.0, 3.5], dtype=torch.float64)
    k = k if two_sets else None
    used = inputs if two_sets else inputs[:3]

    def attend(rows, landmarks, scale, present=None):
        middle = ops.middle_matrix(landmarks, normalized, solver, degree_scale=scale, present=present)
        keys = None if k is None else k[rows]
        return ops.blockwise_attention(q[rows], landmarks, v[rows], *middle, present, keys)

    together = attend(slice(None), landmarks, scale.view(2, 1, 1, 1), present)
    alone = [attend(slice(i, i + 1), landmarks[i : i + 1, :, present[i, 0] > 0], scale[i].item()) for i in range(2)]
    assert_same(results(together, used), results(torch.cat(alone), used), 1e-9)


@pytest.mark.parametrize('normalized', [False, True])
@pytest.mark.parametrize('solver', ['newton', 'cholesky', 'svd'])
def test_image_without_a_landmark_gives_zeros(solver, normalized):
    q, landmarks, v, k = inputs = make_inputs((5, 8, 4))
    present = torch.tensor([[[0, 0, 0, 0]], [[1, 1, 1, 1]]], dtype=torch.float64)
    middle = ops.middle_matrix(landmarks, normalized, solver, present=present)
    out = ops.blockwise_attention(q, landmarks, v, *middle, present, k)
    found = results(out, inputs)
    assert all(torch.isfinite(tensor).all() for tensor in found)
    assert not any(tensor[0].any() for tensor in found) and all(tensor[1].any() for tensor in found)


@pytest.mark.parametrize(('grid', 'patch'), [((5, 7), (2, 3)), ((1, 17), (1, 4)), ((2, 9), (4, 4))])
def test_patches_with_a_present_token(grid, patch):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(3, grid[0] * grid[1], generator=generator) < 0.2
    found = ops.present_patches(mask, grid, patch, torch.float32)
    maps = mask.view(3, *grid)
    counts = [max(side // r, 1) for side, r in zip(grid, patch)]
    expected = [
        maps[:, i * patch[0] : (i + 1) * patch[0], j * patch[1] : (j + 1) * patch[1]].flatten(1).any(1)
        for i in range(counts[0])
        for j in range(counts[1])
    ]
    assert found.shape == (3, 1, len(expected)) and found.dtype == torch.float32
    assert torch.equal(found[:, 0] > 0, torch.stack(expected, 1)) and 0 < found.mean() < 1


@pytest.mark.parametrize(('grid', 'bound'), [((7, 5), 12), ((4, 9), 7), ((1, 11), 4), ((3, 3), 20), ((3, 3), None)])
def test_pooled_cells_average_their_present_landmarks(grid, bound):
    generator = torch.Generator().manual_seed(0)
    count = grid[0] * grid[1]
    landmarks = torch.randn(2, 2, count, D, generator=generator, dtype=torch.float64)
    present = (torch.rand(2, 1, count, generator=generator) < 0.3).double()
    present[1] = 0
    pooled, factor, cells = ops.pool_present_landmarks(landmarks, present, grid, bound)
    out_grid = grid if bound is None else ops.pooled_grid(grid, bound)
    for i in range(2):
        filled = torch.where(present[i, 0] > 0, 0.0, torch.nan).view(1, 1, -1, 1)
        # A cell without a present landmark has only NaN.
        expected = [cell.nanmean(1) for cell in cells_of(landmarks[i : i + 1] + filled, grid, out_grid)]
        expected = torch.stack(expected, 1)
        assert torch.equal(cells[i, 0] > 0, ~expected[0].isnan().any(-1))
        torch.testing.assert_close(pooled[i], expected.nan_to_num(0))
    assert factor[0].item() == pytest.approx(present[0].sum().item() / cells[0].sum().item()) and factor[1] == 1


def cells_of(landmarks, grid, out_grid):
    """The landmarks ``(h, count, d)`` of every cell of a coarser grid."""
    (H, W), (rows, columns) = grid, out_grid
    maps = landmarks[0].unflatten(1, grid)
    for i in range(rows):
        for j in range(columns):
            cell = maps[:, i * H // rows : -(-(i + 1) * H // rows), j * W // columns : -(-(j + 1) * W // columns)]
            yield cell.flatten(1, 2)


def test_random_landmarks_are_present_tokens():
    q = torch.arange(24.0).view(2, 1, 12, 1)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, 3:6] = mask[1, ::2] = True
    drawn = ops.random_landmarks(q, 3, torch.Generator().manual_seed(0), mask)
    assert sorted(drawn[0].flatten().tolist()) == [3, 4, 5]
    assert set(drawn[1].flatten().tolist()) <= set(range(12, 24, 2)) and drawn[1].unique().numel() == 3
    both = [ops.random_landmarks(q, 5, torch.Generator().manual_seed(1), mask) for mask in (None, mask | True)]
    assert torch.equal(*both)


@pytest.mark.parametrize('two_sets', [False, True])
@pytest.mark.parametrize(('solver', 'normalized'), INVERSES)
def test_batches_of_gradients(solver, normalized, two_sets):
    q, landmarks, v, k = make_inputs((9, 9, 4))
    inputs = [q, landmarks, v, *([k] if two_sets else [])]
    out = fast(q, landmarks, v, k if two_sets else None, solver, normalized)
    batch = torch.randn(3, *out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(out, inputs, batch, is_grads_batched=True, retain_graph=True)
    wanted = [torch.autograd.grad(out, inputs, grad, retain_graph=True) for grad in batch]
    assert_same(found, [torch.stack(grads) for grads in zip(*wanted, strict=True)], 1e-9)


@pytest.mark.parametrize('attend', [ops.blockwise_attention, ops.whole_attention])
def test_matrix_that_is_not_positive_definite_gives_no_number(attend):
    """The other head, whose matrix has a factor, is not touched."""
    q, landmarks, v, _ = make_inputs((6, 6, 3), batch=1, heads=2)
    matrix = torch.eye(3, dtype=torch.float64).repeat(1, 2, 1, 1)
    expected = attend(q, landmarks, v, matrix, True)
    matrix[0, 1, 2, 2] = -1
    out = attend(q, landmarks, v, matrix, True)
    assert out[:, 1].isnan().all()
    assert torch.equal(out[:, 0], expected[:, 0])
