"""What the papers state of the kernel, its decomposition, its inverse and its normalisation, in float64.

SOFT: arXiv:2110.11945, sections 3.1 and 3.2. SOFT++: arXiv:2207.03341, attention normalisation.
"""

import pytest
import torch

from soft_mm import ops
from soft_mm.ops import reference
from soft_mm.ops.inverse import _iterate

D = 8


def tokens(n, spread=1.0, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(batch, 2, n, D, generator=generator, dtype=torch.float64)


def kernel_with(eigenvalues, seed=0):
    """A symmetric matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    return basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T


def spectral_norm(matrix):
    return torch.linalg.matrix_norm(matrix, ord=2)


# --- the kernel and its decomposition


@pytest.mark.parametrize('spread', [0.1, 1.0, 5.0])
def test_kernel_is_symmetric_positive_and_bounded(spread):
    q = tokens(40, spread)
    kernel = ops.gaussian_kernel(q, q)
    assert torch.allclose(kernel, kernel.mT, atol=1e-14)
    assert kernel.min() >= 0 and kernel.max() <= 1
    assert torch.allclose(kernel.diagonal(dim1=-2, dim2=-1), torch.ones(1, 2, 40, dtype=torch.float64), atol=1e-12)
    assert torch.linalg.eigvalsh(kernel).min() > -1e-12


def approximation_errors(q, counts):
    """Nuclear norm of the full kernel minus its decomposition over the first ``m`` tokens as landmarks."""
    full = ops.gaussian_kernel(q, q)
    eye = torch.eye(q.shape[2], dtype=q.dtype).expand(1, 2, -1, -1)
    errors = []
    for m in counts:
        found = ops.softmax_free_attention(q, q[:, :, :m], eye, solver='svd')
        rest = full - found
        errors.append(torch.linalg.matrix_norm(rest, ord='nuc').sum().item())
        # What is left out is positive semidefinite: the decomposition stays below the kernel.
        assert torch.linalg.eigvalsh((rest + rest.mT) / 2).min() > -1e-8
    return errors


@pytest.mark.parametrize('spread', [0.3, 1.0])
def test_approximation_falls_with_the_landmarks_and_is_exact_with_every_token(spread):
    errors = approximation_errors(tokens(48, spread), [1, 3, 6, 12, 24, 36, 48])
    assert errors == sorted(errors, reverse=True) and errors[0] > 1e-2
    assert errors[-1] < 1e-6


def test_fast_solvers_near_the_exact_one_where_landmarks_are_apart():
    q, v = tokens(60, 3.0), tokens(60, seed=1)
    exact = ops.softmax_free_attention(q, q[:, :, :12], v, solver='svd')
    for solver in ('newton', 'cholesky'):
        ridges = [
            (ops.softmax_free_attention(q, q[:, :, :12], v, solver=solver, ridge=ridge) - exact).abs().max().item()
            for ridge in (1e-1, 1e-2, 1e-6)
        ]
        assert ridges == sorted(ridges, reverse=True) and ridges[-1] < 1e-4, solver


@pytest.mark.parametrize('normalized', [False, True])
def test_exact_solver_takes_singular_kernels(normalized):
    """Landmarks that are all there twice decompose the kernel as they do once."""
    q, v = tokens(30), tokens(30, seed=1)
    attention = ops.normalized_softmax_free_attention if normalized else ops.softmax_free_attention
    once, twice = q[:, :, :6], q[:, :, :6].repeat(1, 1, 2, 1)
    factor = 2 if normalized else 1
    found = factor * attention(q, twice, v, solver='svd')
    assert torch.allclose(found, attention(q, once, v, solver='svd'), atol=1e-8)


# --- Newton's iterations


def newton_iterates(matrix, count, step=None):
    """``V_0`` to ``V_count`` of the package's iteration, with the authors' step size or another."""
    step = 1.8 / matrix.sum(-1).max() ** 2 if step is None else step
    for iterations in range(count + 1):
        yield _iterate(matrix, step * matrix, iterations)


@pytest.mark.parametrize('spread', [0.3, 1.0, 3.0])
def test_residual_of_newton_falls_monotonously(spread):
    q = tokens(16, spread)[0, 0]
    matrix = ops.gaussian_kernel(q, q) + 0.01 * torch.eye(16, dtype=torch.float64)
    eye = torch.eye(16, dtype=torch.float64)
    residuals = [spectral_norm(eye - matrix @ inverse).item() for inverse in newton_iterates(matrix, 25)]
    # The step size makes the first one smaller than one, and each is the square of the one before.
    assert residuals[0] < 1
    for before, after in zip(residuals, residuals[1:]):
        assert after <= before + 1e-12
        assert after == pytest.approx(before**2, abs=1e-9)
    assert reference.newton_inverse(ops.gaussian_kernel(q, q), 25).allclose(
        ops.newton_inverse(ops.gaussian_kernel(q, q)[None], 25)[0], atol=1e-9
    )


def test_newton_is_quadratic_once_the_residual_is_small():
    matrix = kernel_with([2.0, 1.0, 0.5, 0.25])
    eye = torch.eye(4, dtype=torch.float64)
    residuals = [spectral_norm(eye - matrix @ inverse).item() for inverse in newton_iterates(matrix, 12, 0.2)]
    digits = [-torch.log10(torch.tensor(residual)).item() for residual in residuals if 1e-10 < residual < 0.5]
    assert len(digits) > 3
    for before, after in zip(digits, digits[1:]):
        assert after == pytest.approx(2 * before, rel=1e-3)


def test_newton_diverges_beyond_the_stated_step_size():
    matrix = kernel_with([2.0, 1.0, 0.5])
    largest = 2 / 2.0**2
    *_, within = newton_iterates(matrix, 40, 0.99 * largest)
    *_, beyond = newton_iterates(matrix, 6, 1.1 * largest)
    assert torch.allclose(within, torch.linalg.inv(matrix), atol=1e-9)
    assert spectral_norm(beyond) > 1e4


@pytest.mark.parametrize('eigenvalues', [[3.0, 1.0, 0.4], [3.0, 1.0, 0.0], [2.0, 0.0, 0.0]])
def test_limit_of_newton_is_the_pseudo_inverse_singular_or_not(eigenvalues):
    matrix = kernel_with(eigenvalues)
    *_, limit = newton_iterates(matrix, 14, 1.8 / max(eigenvalues) ** 2)
    assert torch.allclose(limit, torch.linalg.pinv(matrix, hermitian=True), atol=1e-8)


@pytest.mark.parametrize('iterations', [1, 3, 8, 20])
@pytest.mark.parametrize('spread', [0.3, 2.0])
def test_closed_form_of_the_iterations_on_the_eigenvalues(iterations, spread):
    """``k`` iterations from ``alpha A'`` take an eigenvalue ``s`` of ``A'`` to ``(1 - (1 - alpha s^2)^(2^k)) / s``."""
    q = tokens(12, spread)
    kernel = ops.gaussian_kernel(q, q)
    alpha = 1.8 / kernel.sum(-1).amax(-1)[..., None] ** 2
    values, vectors = torch.linalg.eigh(kernel + 0.01 * torch.eye(12, dtype=torch.float64))
    taken = (1 - (1 - alpha * values**2) ** (2**iterations)) / values
    expected = vectors @ torch.diag_embed(taken) @ vectors.mT
    assert torch.allclose(ops.newton_inverse(kernel, iterations), expected, atol=1e-7, rtol=1e-7)


def gradients(spread, iterations):
    """Of a linear function of the inverse: the authors' one-step rule, the truth, and the inverse's own."""
    q = tokens(10, spread)
    weight = tokens(10, seed=3)[..., :1] * tokens(10, seed=4)[..., :1].mT
    found = []
    for inverse in (
        lambda kernel: ops.newton_inverse(kernel, iterations, backward='one_step'),
        lambda kernel: ops.newton_inverse(kernel, iterations, backward='exact'),
        lambda kernel: torch.linalg.inv(kernel + 0.01 * torch.eye(10, dtype=torch.float64)),
    ):
        kernel = ops.gaussian_kernel(q, q).requires_grad_()
        (inverse(kernel) * weight).sum().backward()
        # The exact gradient is that of symmetric changes of the kernel.
        found.append((kernel.grad + kernel.grad.mT) / 2)
    return found


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def test_one_step_backward_is_the_gradient_exactly_when_converged():
    one_step, exact, own = gradients(spread=3.0, iterations=20)
    assert relative(one_step, own) < 1e-9 and relative(exact, own) < 1e-9


def test_how_far_the_one_step_backward_is_off_when_not_converged():
    """The fewer the iterations, the farther; with landmarks alike, twenty are few."""
    off = [relative(*gradients(spread=3.0, iterations=iterations)[:2]) for iterations in (1, 2, 4, 8)]
    assert off == sorted(off, reverse=True) and off[0] > 0.3 and off[-1] < 1e-2
    alike = gradients(spread=0.1, iterations=20)
    assert relative(*alike[:2]) > 0.1
    # The exact gradient is that of what was computed, wherever it stands.
    kernel = ops.gaussian_kernel(tokens(5, 0.1), tokens(5, 0.1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda k: ops.newton_inverse((k + k.mT) / 2, 6, backward='exact'), kernel)


@pytest.mark.parametrize(('dtype', 'bar'), [(torch.float32, 1e-3), (torch.float64, 1e-11)])
def test_exact_newton_gradient_of_matrices_of_any_scale(dtype, bar):
    """The backward pass stops early on a CPU, but not before all matrices are done, however small their gradients."""
    found = []
    scales = torch.tensor([1.0, 1e-20], dtype=torch.float64).view(-1, 1, 1)
    q = torch.cat([tokens(10, spread, seed=seed)[:, 0] for seed, spread in enumerate((3.0, 0.1))])
    weight = scales * tokens(10, seed=5)[0, :1, :, :1] * tokens(10, seed=6)[0, :1, :, :1].mT

    def iterate(kernel):
        matrix = kernel + 0.01 * torch.eye(10, dtype=kernel.dtype)
        inverse = 1.8 / kernel.sum(-1).amax(-1)[:, None, None].square() * matrix
        for _ in range(20):
            inverse = 2 * inverse - inverse @ matrix @ inverse
        return inverse

    for inverse, kind in ((iterate, torch.float64), (lambda k: ops.newton_inverse(k, backward='exact'), dtype)):
        kernel = ops.gaussian_kernel(q, q).to(kind).requires_grad_()
        (inverse(kernel) * weight.to(kind)).sum().backward()
        found.append((kernel.grad + kernel.grad.mT).double() / 2)
    wanted, computed = found
    errors = (computed - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    assert (errors < bar).all(), errors


def test_exact_newton_gradient_in_batches_of_gradients_and_with_infinite_ones():
    q = tokens(4, spread=3.0)[0]
    kernel = ops.gaussian_kernel(q, q).requires_grad_()
    inverse = ops.newton_inverse(kernel, 8, backward='exact')
    grads = torch.randn(3, *inverse.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (batched,) = torch.autograd.grad(inverse, kernel, grads, is_grads_batched=True, retain_graph=True)
    for grad, found in zip(grads, batched):
        torch.testing.assert_close(found, torch.autograd.grad(inverse, kernel, grad, retain_graph=True)[0])
    infinite = torch.autograd.grad(inverse, kernel, torch.full_like(inverse, float('inf')))[0]
    assert not infinite.isfinite().any()


# --- normalisation


@pytest.mark.parametrize('spread', [0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize('m', [4, 16, 40])
def test_normalised_attention_has_a_bounded_spectral_norm(spread, m):
    """``D^-1/2 A D^-1/2`` has no eigenvalue above one, for ``D^-1 A`` is a stochastic matrix; ``D`` is at least one, so
    that normalising never enlarges the inverse, nor the attention, whose plain form grows with tokens that are alike.
    """
    q = tokens(40, spread)
    landmarks = q[:, :, :m]
    kernel = ops.gaussian_kernel(landmarks, landmarks)
    root = kernel.sum(-1, keepdim=True).sqrt()
    assert root.min() >= 1 - 1e-12
    assert spectral_norm(kernel / root / root.mT).max() <= 1 + 1e-12
    inverse = torch.linalg.pinv(kernel, hermitian=True)
    smallest = root.min(-2).values.squeeze(-1) ** 2
    assert (spectral_norm(inverse / root / root.mT) <= spectral_norm(inverse) / smallest * (1 + 1e-9)).all()
    eye = torch.eye(40, dtype=torch.float64).expand(1, 2, -1, -1)
    plain = ops.softmax_free_attention(q, landmarks, eye, solver='svd')
    normalised = ops.normalized_softmax_free_attention(q, landmarks, eye, solver='svd')
    assert (spectral_norm(normalised) <= spectral_norm(plain) * (1 + 1e-9)).all()
    if spread == 0.1:
        assert (spectral_norm(plain) > 30).all() and (spectral_norm(normalised) < 1.5 * 40 / m + 1).all()
