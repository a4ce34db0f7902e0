"""The theory of quadratics against the lectures' numbers, dense matrices and torch.optim.SGD itself."""

import math

import pytest
import torch

from unstuck.critical import CriticalPoint, examine
from unstuck.curvature import Operator, eigenpairs
from unstuck.objective import Objective, Term
from unstuck.optim import quadratics as q


def descend(eigenvalues, start, steps, *, dtype=torch.float64, **sgd):
    """(steps + 1, n): the points of torch.optim.SGD on ½Σλw²."""
    values = torch.tensor(eigenvalues, dtype=dtype)
    w = torch.tensor(start, dtype=dtype, requires_grad=True)
    optimizer = torch.optim.SGD([w], **sgd)
    path = [w.detach().clone()]
    for _ in range(steps):
        w.grad = values * w.detach()
        optimizer.step()
        path.append(w.detach().clone())
    return torch.stack(path)


def steps_to(error, eigenvalues, **sgd):
    path = descend(eigenvalues, [1.0] * len(eigenvalues), 10000 if eigenvalues[0] < 2e-3 else 1500, **sgd)
    return int((path.abs().amax(1) <= error).nonzero()[0])  # momentum may lift it above the error again


# Regimes


@pytest.mark.parametrize(
    ("share", "regime", "changes", "left"),  # lecture 004, slides 41-43
    [
        (0.5, "monotone", 0, 9e-16),
        (1.0, "optimal", 0, 0),
        (1.5, "oscillating", 50, 9e-16),
        (1.9, "oscillating", 50, 5e-3),
        (2.0, "cycling", 50, 1),
        (2.1, "divergent", 50, 117),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rate_is_monotone_optimal_oscillating_or_divergent(share, regime, changes, left, dtype):
    curvature = 4.0
    found = q.regimes(torch.tensor([curvature], dtype=dtype), share / curvature)
    assert found.names == (regime,)
    assert found.factors.dtype == dtype
    path = descend([curvature], [1.0], 50, lr=share / curvature, dtype=dtype)[:, 0]
    assert int((path[1:] * path[:-1] < 0).sum()) == changes
    slack = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found.after(50)[0], path[-1], rtol=50 * slack, atol=slack)
    assert abs(path[-1]) == pytest.approx(left, rel=0.06, abs=1e-14)
    assert found.converges == (abs(1 - share) < 1 - 1e-9)


@pytest.mark.parametrize(
    # slides 52-53: η* = 1 and .33, then 1 and .91; |w₂| after 100 steps, and the steps to 10⁻⁶
    ("second", "rate", "factors", "left", "steps"),
    [
        (1 / 0.33, 2.1 * 0.33, (0.307, -1.1), 1.4e4, math.inf),
        (1 / 0.33, 2.0 * 0.33, (0.34, -1.0), 1, math.inf),
        (1 / 0.33, 1.5 * 0.33, (0.505, -0.5), 8e-31, 20.2),
        (1 / 0.33, 1.0 * 0.33, (0.67, 0.0), 0, 34.5),
        (1 / 0.33, 0.75 * 0.33, (0.7525, 0.25), 6e-61, 48.6),
        (1 / 0.91, 1.9 * 0.91, (-0.729, -0.9), 2.7e-5, 131),
    ],
)
def test_the_six_cases_of_the_slides_have_their_factors(second, rate, factors, left, steps):
    found = q.regimes([1.0, second], rate)
    assert found.factors.tolist() == pytest.approx(factors, abs=1e-12)
    assert abs(float(found.after(100)[1])) == pytest.approx(left, rel=0.06, abs=1e-99)
    slowest = float(q.spectral_radius([1.0, second], rate).max())
    assert found.converges == (steps < math.inf)
    if found.converges:
        assert math.log(1e-6) / math.log(slowest) == pytest.approx(steps, abs=0.2)


def test_flat_and_rising_directions_have_a_word():
    assert q.regimes([-1.0, 0.0, 1.0], 0.1).names == ("divergent", "flat", "monotone")
    assert not q.regimes([0.0, 1.0], 0.1).converges


def test_a_coordinates_best_rate_is_one_over_its_curvature():
    values = torch.tensor([0.5, 2.0, 8.0], dtype=torch.float64)
    assert q.optimal_rates(values).tolist() == [2.0, 0.5, 0.125]
    for k, rate in enumerate(q.optimal_rates(values)):
        assert descend(values.tolist(), [1.0] * 3, 1, lr=float(rate))[1, k] == 0
    assert q.optimal_rates([0.0, 1.0]).tolist() == [math.inf, 1]


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True), (0.5, True)])
def test_torch_converges_up_to_the_limit_of_the_rate_and_not_beyond(momentum, nesterov):
    values = [1.0, 4.0, 10.0]
    limit = q.rate_limit(values, momentum=momentum, nesterov=nesterov)
    assert momentum or limit == pytest.approx(2 * q.optimal_rates(values).min().item())
    for share, converges in ((0.99, True), (1.01, False)):
        assert (q.spectral_radius(values, share * limit, momentum=momentum, nesterov=nesterov).max() < 1) == converges
        path = descend(values, [1.0] * 3, 3000, lr=share * limit, momentum=momentum, nesterov=nesterov)
        assert (path[-1].norm() < 1e-5) == converges


def test_the_rate_has_no_limit_where_nothing_is_curved():
    assert q.rate_limit([0.0, 0.0]) == math.inf


# What may be given


def test_eigenvalues_come_from_tensors_ends_eigenpairs_and_critical_points():
    values = torch.tensor([1.0, 3.0, 9.0], dtype=torch.float64)
    pairs = eigenpairs(
        Operator(lambda v: values * v, 3, dtype=torch.float64),
        largest=2,
        smallest=1,
        tol=1e-8,
        generator=torch.Generator().manual_seed(0),
    )
    bowl = Term(lambda given: 0.5 * (values * given[0] ** 2).sum(), weight=1)
    point = examine(Objective.of_terms([bowl], {"w": torch.zeros(3, dtype=torch.float64)}))
    assert isinstance(point, CriticalPoint)
    for spectrum in (values, values.tolist(), values.numpy(), (1, 9), pairs, point):
        assert q.condition(spectrum) == pytest.approx(9)
        assert q.gradient_descent(spectrum).rate == pytest.approx(0.2)


def test_the_condition_number_is_at_least_one_and_infinite_with_a_flat_direction():
    assert q.condition([2.0, 2.0]) == 1
    assert q.condition([0.0, 2.0]) == math.inf
    assert q.condition([-1e-16, 2.0]) == math.inf  # rounding


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: q.condition([-1.0, 1.0]), "at least 0, got λmin=-1"),
        (lambda: q.gradient_descent([0.0, 1.0]), "leave the flat directions out"),
        (lambda: q.condition(torch.eye(2)), r"got torch.float32 \(2, 2\)"),
        (lambda: q.condition(torch.tensor([math.nan])), "finite"),
        (lambda: q.regimes([1.0], -1.0), "a rate is positive"),
        (lambda: q.spectral_radius([1.0], 1.0, momentum=1.0), "between 0 and 1, got 1"),
        (lambda: q.momentum_weights(0, 1.0, 0.5), "at least one step"),
        (lambda: q.heavy_ball([1.0, 2.0]).steps(1.5), "share"),
        (lambda: q.whiten(torch.tensor([[1.0, 2.0], [0.0, 1.0]])), "symmetric"),
        (lambda: q.whiten(torch.diag(torch.tensor([1.0, -1.0]))), "got -1 beside 1"),
        (lambda: q.whiten(torch.ones(3)), "square"),
        (lambda: q.semi_axes([1.0], 0.0), "above the minimum"),
        (lambda: q.smooth_bound(1.0, 0.3, 1, smoothness=5.0), "up to 1/L = 0.2, got 0.3"),
        (lambda: q.strongly_convex_bound(1.0, 0.1, 1, convexity=3.0, smoothness=2.0), "swap"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# The best rates


@pytest.mark.parametrize(
    ("kappa", "counts"),  # steps to 1e-6: gradient descent, heavy ball, Nesterov as it is usually tuned
    [(3, (20, 13, 19)), (10, (69, 27, 44)), (100, (691, 95, 158)), (1000, (6908, 321, 519))],
)
def test_gradient_descent_heavy_ball_and_nesterov_take_the_steps_that_their_rates_say(kappa, counts):
    ends = [1 / kappa, 1.0]
    plain, ball = q.gradient_descent(ends), q.heavy_ball(ends)
    assert plain.factor == pytest.approx((kappa - 1) / (kappa + 1))
    assert ball.factor == pytest.approx((kappa**0.5 - 1) / (kappa**0.5 + 1))
    assert plain.steps(1e-6) == counts[0]
    assert steps_to(1e-6, ends, **plain.sgd) == counts[0]
    assert steps_to(1e-6, ends, **ball.sgd) == counts[1]
    usual = {"lr": 1.0, "momentum": (kappa**0.5 - 1) / (kappa**0.5 + 1), "nesterov": True}
    assert steps_to(1e-6, ends, **usual) == pytest.approx(counts[2], abs=1)  # torch keeps the point that looks ahead
    radius = q.spectral_radius(ends, 1.0, momentum=usual["momentum"], nesterov=True).max()
    assert float(radius) == pytest.approx(1 - kappa**-0.5, abs=1e-7)
    best = q.nesterov(ends)
    assert best.factor < radius
    assert steps_to(1e-6, ends, **best.sgd) < counts[2]


@pytest.mark.parametrize("tune", [q.gradient_descent, q.heavy_ball, q.nesterov])
def test_a_tuned_factor_is_the_spectral_radius_and_no_neighbour_has_a_smaller_one(tune):
    values = torch.logspace(-2, 0, 30, dtype=torch.float64) * 7

    def radius(rate, momentum):
        return float(q.spectral_radius(values, rate, momentum=momentum, nesterov=tuned.nesterov).max())

    tuned = tune(values)
    assert radius(tuned.rate, tuned.momentum) == pytest.approx(tuned.factor, abs=1e-7)  # a double root: √ of rounding
    for rate in (0.999, 1, 1.001):
        for momentum in (0.999, 1, 1.001) if tuned.momentum else (1,):
            assert radius(rate * tuned.rate, momentum * tuned.momentum) >= tuned.factor - 1e-7


@pytest.mark.parametrize("tune", [q.gradient_descent, q.heavy_ball, q.nesterov])
def test_a_round_bowl_is_solved_in_one_step(tune):
    tuned = tune([4.0, 4.0])
    assert (tuned.factor, tuned.momentum, tuned.steps(1e-6)) == (0, 0, 1)
    assert descend([4.0, 4.0], [1.0, -2.0], 1, **tuned.sgd)[1].tolist() == [0, 0]


@pytest.mark.parametrize(("nesterov", "momentum"), [(False, 0.0), (False, 0.9), (True, 0.9), (True, 0.3)])
def test_the_spectral_radius_is_that_of_the_matrix_of_two_steps(nesterov, momentum):
    values, rate = torch.tensor([-0.5, 0.0, 0.01, 0.3, 1.0, 2.5], dtype=torch.float64), 0.9
    for value, found in zip(values, q.spectral_radius(values, rate, momentum=momentum, nesterov=nesterov), strict=True):
        kept = 1 - rate * value
        first, last = ((1 + momentum) * kept, momentum * kept) if nesterov else (kept + momentum, momentum)
        matrix = torch.tensor([[first, -last], [1.0, 0.0]], dtype=torch.float64)
        # a double root is found to √ulp by the matrix
        assert float(torch.linalg.eigvals(matrix).abs().max()) == pytest.approx(float(found), abs=3e-8)


def test_a_path_of_torch_shrinks_by_the_spectral_radius():
    for nesterov in (False, True):
        sgd = {"lr": 0.3, "momentum": 0.6, "nesterov": nesterov}
        path = descend([0.05], [1.0], 400, **sgd)[:, 0]
        measured = (path[400] / path[300]).abs() ** 0.01
        found = q.spectral_radius([0.05], 0.3, momentum=0.6, nesterov=nesterov)
        assert float(measured) == pytest.approx(float(found), abs=1e-10)


@pytest.mark.parametrize(
    ("kappa", "heavy", "ahead"), [(3, 243, 49), (10, 249, 114), (100, 263, 208), (1000, 1246, 1260)]
)
def test_nesterov_at_ninety_percent_momentum_helps_up_to_a_condition_of_a_hundred(kappa, heavy, ahead):
    ends = [1 / kappa, 1.0]
    assert steps_to(1e-6, ends, lr=1.0, momentum=0.9) == heavy
    assert steps_to(1e-6, ends, lr=1.0, momentum=0.9, nesterov=True) == pytest.approx(ahead, abs=1)


def test_best_steps_grow_as_the_condition_and_with_momentum_as_its_root():
    for tune, power in ((q.gradient_descent, 1), (q.heavy_ball, 0.5), (q.nesterov, 0.5)):
        few, many = (tune([1.0, kappa]).steps(1e-6) for kappa in (1e3, 1e5))
        assert math.log(many / few) / math.log(100) == pytest.approx(power, abs=0.02)


def test_the_safe_rate_takes_twice_the_steps_of_the_best():
    # 003: η = 1/λmax on a condition of 1000
    slow = float(q.spectral_radius([1e-3, 1.0], 1.0).max())
    assert math.ceil(math.log(1e-6) / math.log(slow)) == 13809


def test_steps_grow_as_the_log_of_the_accuracy():
    tuned = q.gradient_descent([0.01, 1.0])
    counts = [tuned.steps(10.0**-k) for k in (3, 6, 9)]
    assert counts[1] - counts[0] == pytest.approx(counts[2] - counts[1], abs=1)


# Momentum


def test_a_movement_is_the_weighted_sum_of_past_gradients():
    given = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    for step, expected in enumerate([-0.1, -0.19, -0.271, -0.2439], start=1):
        before = w.item()
        w.grad = given[step - 1 : step].clone()
        optimizer.step()
        movement = float(q.momentum_weights(step, 0.1, 0.9) @ given[:step])
        assert movement == pytest.approx(expected, abs=1e-15)
        assert w.item() - before == pytest.approx(expected, abs=1e-15)


def test_momentum_gains_ten_on_a_constant_gradient_and_loses_half_on_one_that_alternates():
    weights = -q.momentum_weights(500, 1.0, 0.9)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(250)
    assert float(weights.sum()) == pytest.approx(10.000, abs=1e-12)
    assert abs(float(weights @ signs)) == pytest.approx(1 / 1.9, abs=1e-12)


# Whitening


def bowl(condition):
    """A symmetric matrix (5, 5) and a linear term."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(-math.log10(condition), 0, 5, dtype=torch.float64)
    H = (basis * values) @ basis.T
    return (H + H.T) / 2, torch.randn(5, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("condition", "slack"), [(10, 1e-14), (1000, 1e-10)])
def test_whitened_descent_is_the_step_by_the_inverse_hessian(condition, slack):
    H, b = bowl(condition)
    round_ = q.whiten(H)
    torch.testing.assert_close(round_.root @ round_.root, H, rtol=0, atol=1e-14)
    w = torch.ones(5, dtype=torch.float64)
    whitened, b_hat = round_.whitened(w), round_.restored(b)
    for _ in range(20):
        w = w - 0.5 * torch.linalg.solve(H, H @ w + b)
        whitened = whitened - 0.5 * (whitened + b_hat)
    torch.testing.assert_close(round_.restored(whitened), w, rtol=slack, atol=slack)


@pytest.mark.parametrize(("rate", "left"), [(0.5, 9.5e-7), (1.5, 9.5e-7), (1.0, 0), (2.1, 6.7)])
def test_in_the_round_bowl_one_rate_does_for_all_coordinates(rate, left):
    H, b = bowl(10)
    round_ = q.whiten(H)
    minimum = -torch.linalg.solve(H, b)
    start = minimum + torch.ones(5, dtype=torch.float64)
    whitened = round_.whitened(start)
    for _ in range(20):
        whitened = whitened - rate * (whitened + round_.restored(b))
    error = (whitened - round_.whitened(minimum)).norm() / round_.whitened(start - minimum).norm()
    assert float(error) == pytest.approx(left, rel=0.006, abs=1e-14)
    identity = round_.inverse @ H @ round_.inverse
    torch.testing.assert_close(identity, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-14)


def test_whitening_keeps_float32():
    round_ = q.whiten(torch.diag(torch.tensor([1.0, 4.0])))
    assert round_.root.dtype == torch.float32
    assert round_.whitened(torch.ones(3, 2)).tolist() == [[1, 2]] * 3


def test_the_semi_axes_of_a_level_fall_as_the_root_of_the_curvature():
    assert q.semi_axes([1.0, 4.0], 1.0).tolist() == pytest.approx([1.4142135623730951, 0.7071067811865476])


# Bounds


def losses(f, slope, start, rate, steps):
    w = torch.tensor(start, dtype=torch.float64)
    found = []
    for _ in range(steps + 1):
        found.append(float(f(w)))
        w = w - rate * slope(w)
    return torch.tensor(found, dtype=torch.float64)


def chain(size, smoothness):
    """Nesterov's worst function (2004, §2.1.2): value, gradient and the distance of its minimum from 0."""
    A = 2 * torch.eye(size, dtype=torch.float64)
    A -= torch.diag(torch.ones(size - 1, dtype=torch.float64), 1) + torch.diag(
        torch.ones(size - 1, dtype=torch.float64), -1
    )
    e = torch.zeros(size, dtype=torch.float64)
    e[0] = 1
    lowest = 1 - torch.arange(1, size + 1, dtype=torch.float64) / (size + 1)

    def f(w):
        return smoothness / 4 * (0.5 * w @ (A @ w) - w[0])

    return (lambda w: f(w) - f(lowest)), (lambda w: smoothness / 4 * (A @ w - e)), float(lowest.norm())


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_smooth_convex_functions_stay_below_their_bound(share):
    worst, worst_slope, far = chain(200, 4.0)
    cases = [
        (lambda w: (1 + w**2).sqrt().sum() - 1, lambda w: w / (1 + w**2).sqrt(), [5.0], 5.0, 1.0, 2000),
        (lambda w: (w**4).sum(), lambda w: 4 * w**3, [1.0], 1.0, 12.0, 2000),
        (worst, worst_slope, [0.0] * 200, far, 4.0, 2000),
    ]
    for f, slope, start, distance, smoothness, steps in cases:
        rate = share / smoothness
        found = losses(f, slope, start, rate, steps)[1:]
        bound = q.smooth_bound(distance, rate, torch.arange(1, steps + 1), smoothness=smoothness)
        assert bool((found <= bound).all())
        enough = q.smooth_steps(distance, rate, 1e-1, smoothness=smoothness)
        assert enough > steps or found[enough - 1] <= 1e-1


def test_the_worst_function_falls_as_the_root_of_the_steps_and_a_quartic_as_their_square():
    worst, worst_slope, _ = chain(200, 4.0)
    found = losses(worst, worst_slope, [0.0] * 200, 0.25, 2000)
    assert math.log(found[2000] / found[1]) / math.log(2000) == pytest.approx(-0.51, abs=0.005)
    w, quartic = 1.0, []
    for _ in range(20_001):
        quartic.append(w**4)
        w -= 4 * w**3 / 12
    assert math.log(quartic[20_000] / quartic[10_000]) / math.log(2) == pytest.approx(-2.00, abs=0.005)


@pytest.mark.parametrize("share", [0.3, 1.0, 1.9])
def test_strongly_convex_functions_stay_below_their_bound(share):
    m, L = 0.5, 8.0
    values = torch.linspace(m, L, 6, dtype=torch.float64)
    cases = [
        (lambda w: 0.5 * (values * w**2).sum(), lambda w: values * w, [1.0] * 6),
        # √(1+w²) bends between 0 and 1, so that m = ½ and L = 8
        (
            lambda w: (0.25 * w**2 + 7.5 * ((1 + w**2).sqrt() - 1)).sum(),
            lambda w: 0.5 * w + 7.5 * w / (1 + w**2).sqrt(),
            [3.0],
        ),
    ]
    for f, slope, start in cases:
        found = losses(f, slope, start, share / L, 300)
        bound = q.strongly_convex_bound(float(found[0]), share / L, torch.arange(301), convexity=m, smoothness=L)
        assert bool((found <= bound * (1 + 1e-9) + 1e-30).all())
    assert q.strongly_convex_bound(1.0, 1 / L, 1, convexity=m, smoothness=L) == pytest.approx(1 - m / L)
