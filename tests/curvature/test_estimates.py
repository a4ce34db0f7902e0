"""Density, trace, diagonal and solutions against matrices and closed forms, and their own claims about errors."""

import math

import pytest
import torch

from unstuck.curvature import (
    Operator,
    density,
    diagonal,
    eigenpairs,
    identity,
    solve,
    trace,
    xtrace,
)

DOUBLE = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def operator(matrix):
    return Operator(lambda v: matrix @ v, len(matrix), dtype=matrix.dtype)


def rotated(values, seed=0, dtype=DOUBLE):
    """A dense matrix with these eigenvalues."""
    values = torch.as_tensor(values, dtype=DOUBLE)
    Q = torch.linalg.qr(torch.randn(len(values), len(values), generator=seeded(seed), dtype=DOUBLE)).Q
    return ((Q * values) @ Q.T).to(dtype)


def wigner(size, seed=0):
    matrix = torch.randn(size, size, generator=seeded(seed), dtype=DOUBLE)
    return (matrix + matrix.T) / math.sqrt(2 * size)  # the spectrum tends to the half circle over [−2, 2]


OUTLIERS = torch.cat([torch.tensor([44.0, 24, 20, 17, 16, 14, -2.6]), torch.linspace(-0.3, 0.3, 293)]).to(DOUBLE)


# trace


def test_signs_give_the_exact_trace_of_a_diagonal():
    d = torch.tensor([3.0, -1.0, 2.0])
    found = trace(Operator(lambda v: d * v, 3), generator=seeded())
    assert (found.estimate, found.stderr, found.converged, found.products) == (4.0, 0.0, True, 8)


def coverage(estimates, true, width=2.0):
    return sum(abs(e.estimate - true) <= width * e.stderr + 1e-9 * abs(true) for e in estimates) / len(estimates)


def test_the_trace_is_unbiased_with_the_spread_that_theory_gives():
    A = rotated(OUTLIERS)
    variance = 2 * float(A.square().sum() - A.diagonal().square().sum())
    drawn = [trace(operator(A), tol=0, max_products=30, generator=seeded(s)) for s in range(100)]
    samples = torch.cat([t.samples for t in drawn])
    true = float(OUTLIERS.sum())
    assert float(samples.mean()) == pytest.approx(true, abs=4 * math.sqrt(variance / 3000))
    assert float(samples.var()) == pytest.approx(variance, rel=0.25)
    assert not any(t.converged for t in drawn)
    assert coverage(drawn, true) >= 0.85  # 95 % for normal samples; these are skewed


def test_known_outliers_save_most_of_the_samples():
    A = operator(rotated(OUTLIERS))
    pairs = eigenpairs(A, largest=6, smallest=1, generator=seeded())
    plain = trace(A, tol=0, max_products=60, generator=seeded(1))
    deflated = trace(A, tol=0, max_products=60, known=pairs, generator=seeded(1))
    assert float(plain.samples.var()) > 50 * float(deflated.samples.var())
    assert deflated.estimate == pytest.approx(float(OUTLIERS.sum()), abs=4 * deflated.stderr)


def test_pairs_that_are_not_converged_spoil_nothing_but_the_variance():
    A = operator(rotated(OUTLIERS))
    rough = eigenpairs(A, largest=2, smallest=1, max_products=4, generator=seeded())
    assert not rough.converged
    drawn = [trace(A, tol=0, max_products=10, known=rough, generator=seeded(s)) for s in range(60)]
    assert coverage(drawn, float(OUTLIERS.sum())) >= 0.8


def test_a_trace_stops_at_the_error_that_was_asked_for():
    found = trace(operator(rotated(torch.linspace(1, 2, 200))), tol=0.01, generator=seeded())
    assert found.converged
    assert found.stderr <= 0.01 * abs(found.estimate)
    assert found.products < 100


def test_the_sketch_is_exact_below_its_rank():
    A = rotated([5.0, -3.0, 2.0, 1.0] + [0.0] * 60)
    found = xtrace(operator(A), products=20, generator=seeded())
    assert found.estimate == pytest.approx(5, abs=1e-9)
    assert found.converged
    assert found.products == 14  # ten for the sketch, four for its range


def test_the_sketch_beats_plain_samples_where_eigenvalues_fall_off_and_its_error_holds():
    values = 0.7 ** torch.arange(120, dtype=DOUBLE) * 10
    A, true = operator(rotated(values)), float(values.sum())
    sketched = [xtrace(A, products=24, generator=seeded(s)) for s in range(60)]
    plain = [trace(A, tol=0, max_products=24, generator=seeded(s)) for s in range(60)]

    def rms(found):
        return math.sqrt(sum((f.estimate - true) ** 2 for f in found) / len(found))

    assert rms(plain) > 8 * rms(sketched)
    assert coverage(sketched, true) >= 0.85


def test_the_sketch_is_unbiased_on_a_flat_spectrum():
    A = wigner(80)
    drawn = [xtrace(operator(A), products=12, generator=seeded(s)) for s in range(200)]
    mean = sum(t.estimate for t in drawn) / len(drawn)
    spread = torch.tensor([t.estimate for t in drawn]).std() / len(drawn) ** 0.5
    assert mean == pytest.approx(float(A.trace()), abs=4 * float(spread))


# diagonal


def test_the_diagonal_is_unbiased_with_the_spread_that_theory_gives():
    A = rotated(OUTLIERS)
    found = diagonal(operator(A), tol=0, max_products=400, generator=seeded())
    theory = (A.square().sum(1) - A.diagonal().square()).div(400).sqrt()
    torch.testing.assert_close(found.stderr, theory, rtol=0.25, atol=0)
    misses = (found.estimate - A.diagonal()).abs() / found.stderr
    assert float((misses <= 2).double().mean()) >= 0.9
    assert not found.converged


def test_known_outliers_make_the_diagonal_sharper():
    A = rotated(OUTLIERS)
    pairs = eigenpairs(operator(A), largest=6, smallest=1, generator=seeded())
    plain = diagonal(operator(A), tol=0, max_products=30, generator=seeded())
    deflated = diagonal(operator(A), tol=0, max_products=30, known=pairs, generator=seeded())
    assert plain.stderr.norm() > 5 * deflated.stderr.norm()
    assert (deflated.estimate - A.diagonal()).norm() < 1.5 * deflated.stderr.norm()


def test_a_diagonal_operator_is_found_at_once():
    found = diagonal(Operator(lambda v: torch.arange(5.0) * v, 5))
    assert torch.equal(found.estimate, torch.arange(5.0))
    assert (found.converged, found.products) == (True, 4)
    assert diagonal(0 * identity(3)).converged


# density


def test_the_density_of_a_wigner_matrix_is_the_half_circle():
    found = density(operator(wigner(600)), steps=40, samples=6, width=0.15, generator=seeded())
    circle = (4 - found.grid.square()).clamp(min=0).sqrt() / (2 * math.pi)
    kernel = torch.exp(-((found.grid[:, None] - found.grid) / 0.15).square() / 2)
    smoothed = kernel @ circle * (found.grid[1] - found.grid[0]) / (0.15 * math.sqrt(2 * math.pi))
    inside = (found.heights - smoothed).abs() <= 3 * found.stderr + 0.01  # the matrix has finite size
    assert float(inside.double().mean()) >= 0.95
    assert float(found.stderr.max()) < 0.06
    assert found.converged
    half = found.above(0.0)
    assert abs(half.estimate - 0.5) <= half.error
    assert half.error < 0.1


def test_the_curve_has_area_one_and_shows_what_the_samples_leave_open():
    A = rotated(torch.linspace(0, 1, 300).square())
    found = density(operator(A), samples=8, width=0.05, generator=seeded())
    assert float(found.heights.sum() * (found.grid[1] - found.grid[0])) == pytest.approx(1, abs=1e-3)
    values = torch.linspace(0, 1, 300, dtype=DOUBLE).square()
    kernel = torch.exp(-((found.grid[:, None] - values) / 0.05).square() / 2)
    true = kernel.mean(1) / (0.05 * math.sqrt(2 * math.pi))
    inside = (found.heights - true).abs() <= 3 * found.stderr + 0.02 * float(true.max())
    assert float(inside.double().mean()) >= 0.95


@pytest.mark.parametrize("threshold", [-1.0, -0.2, 0.0, 0.31, 2.0, 15.0, 100.0])
def test_the_share_above_a_threshold_is_that_of_the_spectrum_within_its_error(threshold):
    true = float((threshold < OUTLIERS).double().mean())
    shares = [density(operator(rotated(OUTLIERS)), samples=6, generator=seeded(s)).above(threshold) for s in range(8)]
    assert sum(abs(s.estimate - true) <= s.error for s in shares) >= 7


def test_moments_of_the_quadrature_are_those_of_the_matrix():
    A = wigner(50)
    found = density(operator(A), steps=10, samples=400, generator=seeded())
    for power in (1, 2, 4):
        true = float(torch.linalg.matrix_power(A, power).trace()) / 50
        drawn = (found.weights * found.nodes**power).sum(1)
        assert float(drawn.mean()) == pytest.approx(true, abs=4 * float(drawn.std()) / 20)


def test_too_few_steps_for_the_picture_are_noticed():
    ramp = rotated(torch.linspace(0, 1, 300))
    assert not density(operator(ramp), steps=6, width=0.02, generator=seeded()).converged
    assert density(operator(ramp), steps=40, width=0.05, generator=seeded()).converged


def test_a_multiple_of_the_identity_is_one_spike():
    found = density(3.0 * identity(40, dtype=DOUBLE), generator=seeded())
    assert found.products == 4
    assert (found.above(2.9).estimate, found.above(3.1).estimate) == (1, 0)


# solve


def test_systems_of_any_signs_are_solved():
    for values in (torch.linspace(1, 100, 60), torch.linspace(-5, 7, 60), -torch.linspace(1, 3, 60)):
        A = rotated(values)
        b = torch.randn(60, generator=seeded(3), dtype=DOUBLE)
        found = solve(operator(A), b, tol=1e-10)
        assert found.converged
        assert float((A @ found.x - b).norm() / b.norm()) == pytest.approx(found.residual)
        torch.testing.assert_close(found.x, torch.linalg.solve(A, b), rtol=0, atol=1e-8 * float(found.x.norm()))


def test_negative_curvature_is_noticed_and_shown():
    A = rotated([-0.5] + [1.0 + i / 10 for i in range(40)])
    found = solve(operator(A), torch.randn(41, generator=seeded(), dtype=DOUBLE), tol=1e-8)
    d = found.direction
    assert found.curvature == pytest.approx(float(d @ A @ d), rel=1e-6)
    assert float(d.norm()) == pytest.approx(1)
    assert -0.5 <= found.curvature < 0
    assert "not positive" in str(found)
    positive = solve(operator(rotated(torch.linspace(1, 2, 40))), torch.ones(40, dtype=DOUBLE))
    assert positive.direction is None
    assert 1 <= positive.curvature <= 2


def test_a_right_side_outside_the_range_is_not_called_solved():
    A = torch.diag(torch.tensor([1.0, 2.0, 3.0, 0.0], dtype=DOUBLE))
    found = solve(operator(A), torch.ones(4, dtype=DOUBLE))
    assert not found.converged
    assert found.residual == pytest.approx(0.5, rel=1e-6)  # the part along the null vector is left
    torch.testing.assert_close(found.x[:3], torch.tensor([1, 1 / 2, 1 / 3], dtype=DOUBLE))


def test_a_solution_that_is_cut_off_says_so():
    A = rotated(torch.logspace(-4, 2, 100))
    found = solve(operator(A), torch.ones(100, dtype=DOUBLE), max_products=10)
    assert (found.converged, found.products) == (False, 10)
    assert "NOT solved" in str(found)


def test_nothing_is_needed_for_a_right_side_of_zero():
    found = solve(identity(3), torch.zeros(3))
    assert (found.products, found.residual, found.converged) == (0, 0.0, True)


# borders


def test_wishes_that_cannot_be_met_are_refused():
    A = identity(10)
    with pytest.raises(ValueError, match="at least 8 products, got max_products=3"):
        trace(A, max_products=3)
    with pytest.raises(ValueError, match="at least 4 products"):
        diagonal(A, max_products=3)
    with pytest.raises(ValueError, match="steps=1, samples=4"):
        density(A, steps=1)
    with pytest.raises(ValueError, match="at least four products"):
        xtrace(A, products=3)
    with pytest.raises(ValueError, match=r"shape \(10,\)"):
        solve(A, torch.ones(9))


@pytest.mark.parametrize("of", [trace, xtrace, diagonal, density, lambda A: solve(A, torch.ones(A.size))])
def test_products_that_are_not_finite_are_refused(of):
    with pytest.raises(ValueError, match="finite products"):
        of(Operator(lambda v: v * float("nan"), 10))


def test_single_precision_and_the_global_generator_are_kept():
    A = operator(rotated(OUTLIERS, dtype=torch.float32))
    before = torch.get_rng_state()
    assert diagonal(A, generator=seeded()).estimate.dtype == torch.float32
    assert solve(A, torch.ones(A.size)).x.dtype == torch.float32
    assert xtrace(A, generator=seeded()).estimate == pytest.approx(float(OUTLIERS.sum()), rel=0.02)
    assert density(A, generator=seeded()).converged
    assert torch.equal(torch.get_rng_state(), before)
