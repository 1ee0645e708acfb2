"""The baselines against plain formulae, and against the exact attention that they approximate."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics.pairwise import rbf_kernel

from soft_mm import ops

GRIDS = [(6, 7), (9, 4), (1, 31)]


def softmax_attention(q, k, v):
    """The definition, in the dtype given."""
    weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)
    return weights @ v


def qkv(n, d=8, heads=2, batch=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, n, d, generator=generator, dtype=dtype) for _ in range(3)]


def error(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize('grid', GRIDS)
def test_linformer_is_its_formula(grid):
    q, k, v = qkv(math.prod(grid))
    weights = torch.randn(2, 5, q.shape[2], dtype=torch.float64)
    expected = softmax_attention(q, weights[0] @ k, weights[1] @ v)
    assert torch.allclose(ops.linformer_attention(q, k, v, *weights), expected, atol=1e-12)
    eye = torch.eye(q.shape[2], dtype=torch.float64)
    assert torch.allclose(ops.linformer_attention(q, k, v, eye, eye), softmax_attention(q, k, v), atol=1e-12)


def smooth_qkv():
    """On a grid of 16x16; neighbours are alike, as in images: of independent tokens a mean stands for none."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(3, 2 * 8, 4, 4, generator=generator, dtype=torch.float64)
    return F.interpolate(coarse, size=(16, 16), mode='bicubic').reshape(3, 1, 2, 8, 256).transpose(-2, -1)


def test_linformer_comes_nearer_with_its_budget():
    """Keys and values are the means of ``p`` cells, which is a projection that it can learn."""
    q, k, v = smooth_qkv()
    exact, eye = softmax_attention(q, k, v), torch.eye(256, dtype=torch.float64)
    errors = []
    for side in (2, 4, 8, 16):
        means = ops.mean_landmarks(eye[None, None], (16, 16), (side, side))[0, 0]
        assert means.shape == (side**2, 256)
        errors.append(error(ops.linformer_attention(q, k, v, means, means), exact))
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.1 and errors[-1] < 1e-12


@pytest.mark.parametrize('grid', [(16, 12), (5, 7), (1, 33), (1, 7)])
def test_resized_projection_keeps_what_its_rows_sum(grid):
    learned = (1, 20) if grid[0] == 1 else (8, 8)
    weight = torch.randn(3, *learned, dtype=torch.float64)
    assert torch.equal(ops.resize_sequence_projection(weight, learned), weight.flatten(1))
    # Of constant rows, the means that they take stay means.
    constant = torch.ones_like(weight) / math.prod(learned)
    resized = ops.resize_sequence_projection(constant, grid)
    assert resized.shape == (3, math.prod(grid)) and torch.allclose(resized.sum(1), torch.ones(3, dtype=torch.float64))


def test_resized_projection_does_the_same_to_tokens_of_a_finer_grid():
    """Of a signal that varies slowly, the combinations are nearly those on the learned grid."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(3, 8, 8, generator=generator, dtype=torch.float64)
    signal = torch.linspace(0, 1, 8, dtype=torch.float64)[:, None] + torch.linspace(0, 2, 8, dtype=torch.float64)
    learned = weight.flatten(1) @ signal.flatten()
    for grid in ((16, 16), (13, 20), (5, 6)):
        finer = F.interpolate(signal[None, None], size=grid, mode='bilinear', antialias=True).flatten()
        assert torch.allclose(ops.resize_sequence_projection(weight, grid) @ finer, learned, rtol=0.05)
    # Every learned weight is heard on a coarser grid, too.
    weight.requires_grad_()
    ops.resize_sequence_projection(weight, (3, 3)).square().sum().backward()
    assert (weight.grad != 0).all()


def test_features_are_orthogonal_within_their_groups():
    features = ops.orthogonal_features(20, 8, torch.Generator().manual_seed(0))
    assert features.shape == (20, 8)
    gram = features[:8] @ features[:8].T
    assert torch.allclose(gram, torch.diag(gram.diagonal()), atol=1e-4)
    assert torch.equal(features, ops.orthogonal_features(20, 8, torch.Generator().manual_seed(0)))


def test_performer_is_its_formula():
    q, k, v = qkv(23)
    features = ops.orthogonal_features(11, 8, torch.Generator().manual_seed(0)).double()

    def phi(x):
        x = x / 8**0.25
        return torch.exp(x @ features.T - (x**2).sum(-1, keepdim=True) / 2)

    weights = phi(q) @ phi(k).transpose(-2, -1)
    expected = weights / weights.sum(-1, keepdim=True) @ v
    assert torch.allclose(ops.performer_attention(q, k, v, features, eps=0.0), expected, atol=1e-10)


def test_performer_comes_nearer_with_its_budget():
    q, k, v = qkv(40)
    q, k = q / 2, k / 2
    exact = softmax_attention(q, k, v)
    errors = []
    for count in (16, 256, 4096):
        drawn = (ops.orthogonal_features(count, 8, torch.Generator().manual_seed(seed)) for seed in range(5))
        errors.append(sum(error(ops.performer_attention(q, k, v, features), exact) for features in drawn) / 5)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.1 and errors[0] > 3 * errors[-1]


def test_directions_of_features_prefer_no_side():
    drawn = [ops.orthogonal_features(8, 8, torch.Generator().manual_seed(seed)) for seed in range(400)]
    directions = F.normalize(torch.stack(drawn), dim=-1)
    # The mean of 400 entries of variance 1/8 has a deviation of 0.018.
    assert directions.mean(0).abs().max() < 4.5 * 0.018


def test_performer_stays_finite_for_large_queries():
    q, k, v = (100 * tensor for tensor in qkv(30, dtype=torch.float32))
    out = ops.performer_attention(q, k, v, ops.orthogonal_features(16, 8, torch.Generator().manual_seed(0)))
    assert torch.isfinite(out).all() and out.abs().max() <= v.abs().max() * 1.01


def test_iterative_pinv_converges_to_the_pseudo_inverse():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.softmax(2 * torch.randn(2, 3, 12, 12, generator=generator, dtype=torch.float64), dim=-1)
    errors = [error(ops.iterative_pinv(matrix, steps), torch.linalg.pinv(matrix)) for steps in (2, 6, 12, 24)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-8


@pytest.mark.parametrize('grid', GRIDS)
def test_nystrom_is_its_formula_and_exact_with_every_token(grid):
    q, k, v = qkv(math.prod(grid))
    landmarks = [ops.mean_landmarks(tokens, grid, ops.pooled_grid(grid, 5)) for tokens in (q, k)]
    scale = 8**-0.5

    def kernel(a, b):
        return torch.softmax(a @ b.transpose(-2, -1) * scale, dim=-1)

    inverse = ops.iterative_pinv(kernel(*landmarks))
    expected = kernel(q, landmarks[1]) @ inverse @ kernel(landmarks[0], k) @ v
    assert torch.allclose(ops.nystrom_attention(q, k, v, *landmarks), expected, atol=1e-12)
    exact = softmax_attention(q, k, v)
    assert error(ops.nystrom_attention(q, k, v, q, k, iterations=40), exact) < 1e-8


def test_nystrom_comes_nearer_with_its_budget():
    q, k, v = smooth_qkv()
    exact = softmax_attention(q, k, v)
    errors = []
    for side in (2, 4, 8, 16):
        landmarks = [ops.mean_landmarks(tokens, (16, 16), (side, side)) for tokens in (q, k)]
        errors.append(error(ops.nystrom_attention(q, k, v, *landmarks, iterations=40), exact))
    assert errors == sorted(errors, reverse=True) and errors[0] > 10 * errors[-1]


def test_mean_landmarks_are_means():
    tokens = torch.randn(2, 3, 24, 4, dtype=torch.float64)
    found = ops.mean_landmarks(tokens, (4, 6), (2, 3))
    expected = tokens.reshape(2, 3, 2, 2, 3, 2, 4).mean((3, 5)).reshape(2, 3, 6, 4)
    assert torch.allclose(found, expected)
    segments = ops.mean_landmarks(tokens, (1, 24), (1, 8))
    assert torch.allclose(segments, tokens.reshape(2, 3, 8, 3, 4).mean(3))
    assert ops.mean_landmarks(tokens, (4, 6), (4, 6)) is tokens


def test_gaussian_is_its_formula():
    q, _, v = qkv(19)
    found = ops.gaussian_attention(q, v)
    for image, head in ((0, 0), (1, 1)):
        kernel = torch.from_numpy(rbf_kernel(q[image, head].numpy(), gamma=0.5))
        assert torch.allclose(found[image, head], kernel @ v[image, head], atol=1e-10)
    assert ops.gaussian_attention(q.half(), v.half()).dtype == torch.float16


@pytest.mark.parametrize('name', ['performer', 'nystrom', 'gaussian'])
def test_autocast_does_not_reach_inside(name):
    """Of half precision as well: products of a kernel or of an inverse are taken in float32."""
    q, k, v = qkv(35, dtype=torch.bfloat16)
    features = ops.orthogonal_features(6, 8, torch.Generator().manual_seed(0))
    landmarks = [ops.mean_landmarks(tokens, (5, 7), (2, 3)) for tokens in (q, k)]
    run = dict(
        performer=lambda: ops.performer_attention(q, k, v, features),
        nystrom=lambda: ops.nystrom_attention(q, k, v, *landmarks),
        gaussian=lambda: ops.gaussian_attention(q, v),
    )[name]
    plain = run()
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(run(), plain)
    assert plain.dtype == torch.bfloat16


@pytest.mark.parametrize('name', ['linformer', 'performer', 'nystrom', 'gaussian'])
def test_gradients(name):
    tokens = [tensor.requires_grad_() for tensor in qkv(10, d=4, heads=1, batch=1)]
    features = ops.orthogonal_features(6, 4, torch.Generator().manual_seed(0)).double()
    weights = torch.randn(2, 3, 10, dtype=torch.float64)
    run = dict(
        linformer=lambda q, k, v: ops.linformer_attention(q, k, v, *weights),
        # The largest exponents, which cancel, are taken as numbers: without eps they do so exactly.
        performer=lambda q, k, v: ops.performer_attention(q, k, v, features, eps=0.0),
        nystrom=lambda q, k, v: ops.nystrom_attention(
            q, k, v, ops.mean_landmarks(q, (5, 2), (2, 2)), ops.mean_landmarks(k, (5, 2), (2, 2))
        ),
        gaussian=lambda q, k, v: ops.gaussian_attention(q, v),
    )[name]
    assert torch.autograd.gradcheck(run, tokens)
