"""What the lectures say of rates, bounds and decays beyond a formula, with torch's own descent."""

import math

import pytest
import torch
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler, StepLR

from unstuck.optim import InverseTime, describe
from unstuck.optim import quadratics as q


def descend(loss, start, steps, rate):
    """(steps + 1,): the points of one weight under torch's gradient descent."""
    w = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=rate)
    path = [w.item()]
    for _ in range(steps):
        optimizer.zero_grad()
        loss(w).backward()
        optimizer.step()
        path.append(w.item())
    return torch.tensor(path, dtype=torch.float64)


# Rates (004, slides 41-56)


@pytest.mark.parametrize(
    ("loss", "curvature"),
    [
        (lambda w: torch.log(torch.cosh(w)), 1.0),
        (lambda w: w.exp() - w, 1.0),
        (lambda w: 2 * (1 + w**2).sqrt(), 2.0),
    ],
)
def test_a_convex_function_has_the_regimes_of_its_curvature_at_the_minimum(loss, curvature):
    for share in (0.5, 1.5, 1.9, 2.1):
        path = descend(loss, 1e-3, 40, share / curvature)
        assert (q.regimes([curvature], share / curvature).names == ("monotone",)) == bool((path > 0).all())
        assert int((path[1:] * path[:-1] < 0).sum()) == (0 if share < 1 else 40)
        assert (abs(path[-1]) < 1e-3) == (share < 2)
        shrink = float(path[1:21].div(path[:20]).mean())
        assert shrink == pytest.approx(1 - share, abs=5e-3)


def test_one_rate_makes_a_coordinate_oscillate_from_its_best_rate_to_twice_it():
    values = [1.0, 4.0, 10.0]  # best rates 1, 0.25 and 0.1
    words = ("monotone", "oscillating", "divergent")
    for rate, found in ((0.09, (0, 0, 0)), (0.19, (0, 0, 1)), (0.3, (0, 1, 2)), (0.9, (0, 2, 2)), (1.9, (1, 2, 2))):
        assert q.regimes(values, rate).names == tuple(words[k] for k in found)
        assert q.regimes(values, rate).converges == (rate < 2 * float(q.optimal_rates(values).min()))


@pytest.mark.parametrize("kappa", [3, 10, 100])
def test_steps_are_linear_in_the_log_of_the_accuracy(kappa):
    tuned = q.gradient_descent([1 / kappa, 1.0])
    path = descend(lambda w: w**2 / kappa / 2, 1.0, 1200, tuned.rate).abs()  # both ends shrink alike
    logs = torch.arange(1, 11, dtype=torch.float64) * math.log(10)
    counts = torch.tensor([float((path <= math.exp(-x)).nonzero()[0]) for x in logs.tolist()], dtype=torch.float64)
    assert torch.corrcoef(torch.stack([logs, counts]))[0, 1] ** 2 > 0.999
    per_digit = float((counts[-1] - counts[0]) / (logs[-1] - logs[0]))
    assert per_digit == pytest.approx(-1 / math.log(tuned.factor), rel=0.05)


# Lipschitz functions and Lipschitz slopes (004, slides 59-63)


@pytest.mark.parametrize(
    # f, the bound on its slope, the bound on its curvature; infinite where there is none
    ("f", "steepest", "most_curved"),
    [
        (lambda w: (1 + w**2).sqrt(), 1.0, 1.0),  # both
        (lambda w: torch.nn.functional.softplus(w, threshold=100), 1.0, 0.25),
        (lambda w: w.abs(), 1.0, math.inf),  # Lipschitz only
        (lambda w: 3 * w**2 / 2, math.inf, 3.0),  # smooth only
    ],
)
def test_no_two_points_differ_by_more_than_lipschitzs_constant_times_their_distance(f, steepest, most_curved):
    def largest_ratio(reach, of_slopes):
        w = torch.linspace(-reach, reach, 1001, dtype=torch.float64).requires_grad_()
        values = f(w)
        if of_slopes:
            (values,) = torch.autograd.grad(values.sum(), w)
        apart = (w[:, None] - w).abs().fill_diagonal_(1)
        return float(((values[:, None] - values).abs() / apart).max().detach())

    for of_slopes, bound, reach, worse in ((False, steepest, 50.0, 500.0), (True, most_curved, 1.0, 1e-3)):
        if math.isfinite(bound):
            assert 0.97 * bound <= largest_ratio(reach, of_slopes) <= bound * (1 + 1e-9)
        else:  # it grows as the points go apart, or as they come together at a kink
            assert largest_ratio(worse, of_slopes) > 9 * largest_ratio(reach, of_slopes)


# Decays under noise (004, slide 99)

CURVATURES = torch.tensor([0.05, 4.0], dtype=torch.float64)
NOISE, START, STEPS = 0.76, 3.4, 2000

DECAYS = {
    "constant": lambda o: StepLR(o, STEPS + 1),
    "1/(k+1)": lambda o: InverseTime(o, rate=1),
    "1/(k+1)²": lambda o: InverseTime(o, rate=1, power=2),
    "1/(1+k/50)": lambda o: InverseTime(o, rate=1 / 50),
    "exponential": lambda o: ExponentialLR(o, gamma=math.exp(-0.002)),
}


def noisy_run(make):
    """The mean loss of 500 runs on a noisy bowl and its expectation; the last (1000, 500, 2) points."""
    own = torch.Generator().manual_seed(0)
    w = torch.full((500, 2), START, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.2)
    schedule: LRScheduler = make(optimizer)
    mean, variance = torch.full((2,), START, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    rates, late = describe(schedule, STEPS).rates.tolist(), []
    for k, rate in enumerate(rates):
        w.grad = CURVATURES * w.detach() + NOISE * torch.randn(500, 2, generator=own, dtype=torch.float64)
        optimizer.step()
        schedule.step()
        kept = 1 - rate * CURVATURES
        mean, variance = kept * mean, kept**2 * variance + (rate * NOISE) ** 2
        if k >= STEPS - 1000:
            late.append(w.detach().clone())
    found = (CURVATURES * w.detach() ** 2 / 2).sum(1).mean()
    return float(found), float((CURVATURES * (mean**2 + variance) / 2).sum()), torch.stack(late)


def test_each_decay_costs_what_its_rates_say_and_the_quadratic_one_stalls():
    ends = {}
    for name, make in DECAYS.items():
        ends[name], expected, _ = noisy_run(make)
        assert ends[name] == pytest.approx(expected, rel=0.2), name
    in_order = ["1/(k+1)²", "1/(k+1)", "constant", "1/(1+k/50)", "exponential"]  # as in the lecture's experiment
    assert sorted(ends, key=lambda name: -ends[name]) == in_order
    assert ends["1/(k+1)²"] > 5 * ends["1/(1+k/50)"]


def test_at_a_constant_rate_the_weights_keep_a_variance_of_the_rate_times_that_of_the_noise():
    _, _, late = noisy_run(DECAYS["constant"])
    stationary = 0.2 * NOISE**2 / (CURVATURES * (2 - 0.2 * CURVATURES))  # ησ²/(λ(2 − ηλ))
    torch.testing.assert_close(late.square().mean((0, 1)), stationary, rtol=0.05, atol=0)
