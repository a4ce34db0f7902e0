"""What the lectures print, run as printed, beside what they mean (docs/errata.md tells it)."""

import itertools
import math

import pytest
import torch
from tests.optim.encoder import literal_rprop

from unstuck.objective import Objective, Term
from unstuck.optim import Quickprop, RMSAdagrad, RpropPlus


def on_quadratic(A, start, step_of, steps):
    """Where ½wᵀAw has led after some steps; `step_of` makes a step function of the weights."""
    A = torch.tensor(A, dtype=torch.float64)
    w = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    step = step_of([w])
    for _ in range(steps):
        w.grad = A @ w.detach()
        step()
    return w.detach()


# 004, slides 113-114: Rprop


def test_literal_rprop_ends_far_from_the_minimum_where_weights_are_coupled():
    coupled, start = [[1.0, 0.9], [0.9, 1.0]], [1.0, 2.0]
    assert on_quadratic(coupled, start, literal_rprop, 2000).tolist() == pytest.approx([-0.47, 0.42], abs=5e-3)
    right = on_quadratic(coupled, start, lambda w: RpropPlus(w, lr=0.1).step, 2000)
    torches = on_quadratic(coupled, start, lambda w: torch.optim.Rprop(w, lr=0.1).step, 2000)
    assert max(right.norm(), torches.norm()) < 2e-5


def test_literal_rprop_is_right_where_they_are_not_coupled():
    assert on_quadratic([[1.0, 0.0], [0.0, 3.0]], [1.0, 2.0], literal_rprop, 2000).norm() < 1e-5


def test_a_loop_to_convergence_inside_that_over_the_weights_trains_each_against_the_others_first_values():
    def printed(A, w):
        for i in range(2):  # for each weight: ... while not converged: ...
            last = A[i][0] * w[0] + A[i][1] * w[1]
            move = math.copysign(0.1, last)
            for _ in range(500):
                w[i] -= move
                slope = A[i][0] * w[0] + A[i][1] * w[1]
                if slope * last > 0:
                    move, last = min(1.2 * move, 50.0), slope
                else:
                    w[i] += move
                    move *= 0.5
        return w

    assert printed([[1.0, 0.0], [0.0, 3.0]], [1.0, 2.0]) == pytest.approx([0, 0], abs=1e-9)
    # the first weight settles at −0.9·2, the second at 0.9·1.8, and nobody looks at the first again
    assert printed([[1.0, 0.9], [0.9, 1.0]], [1.0, 2.0]) == pytest.approx([-1.8, 1.62], abs=1e-9)


def test_limits_on_a_signed_step_neither_limit_nor_keep_its_direction():
    assert min(1.2 * -60, 50) == -72
    assert max(0.5 * -1e-6, 1e-6) == 1e-6  # the step turns round
    w = torch.nn.Parameter(torch.zeros(1))
    optimizer = RpropPlus([w], lr=60.0, step_sizes=(1e-6, 50.0))
    for _ in range(3):
        before, w.grad = w.detach().clone(), torch.ones(1)
        optimizer.step()
        assert 0 < float(before - w.detach()) <= 50.0


# 004, slides 117-120: Quickprop


def test_quickprop_as_printed_goes_back_up_and_fahlmans_lands_on_the_minimum():
    w0, w1 = 1.0, 0.5  # on ½w², whose slope at w is w
    printed_move = (w0 - w1) / (w1 - w0) * w1  # Δw₋ = w₀ − w₁, as in w₁ = w₀ − Δw₋
    assert w1 - printed_move == 1.0
    fahlmans_move = w1 / (w0 - w1) * (w1 - w0)
    assert w1 + fahlmans_move == 0.0
    # past the minimum ours takes this step and nothing else
    assert float(on_quadratic([[1.0]], [1.0], lambda w: Quickprop(w, lr=1.5).step, 2)) == pytest.approx(0, abs=1e-15)


# 001: Taylor's formula, the step, "Adam"


def small_net():
    """The loss of a 15-parameter tanh net, a random point and a random unit direction."""
    own = torch.Generator().manual_seed(0)
    x, y, at, way = (torch.randn(*s, generator=own, dtype=torch.float64) for s in ((8, 2), (8, 1), (15,), (15,)))

    def loss(w):
        return ((torch.tanh(x @ w[:8].view(2, 4) + w[8:12]) @ w[11:15, None] - y) ** 2).mean()

    return loss, at, way / way.norm()


def test_taylors_formula_needs_its_half():
    loss, at, way = small_net()
    objective = Objective.of_terms([Term(lambda values: loss(values[0]), 1)], {"w": at})
    value, g = objective.value_and_gradient()
    curvature = way @ objective.product(way)
    radii = [1e-2, 1e-3]
    slopes = []
    for half in (0.5, 1.0):
        errors = [float((loss(at + r * way) - value - r * (g @ way) - half * r**2 * curvature).abs()) for r in radii]
        slopes.append(math.log(errors[0] / errors[1]) / math.log(radii[0] / radii[1]))
    assert slopes == pytest.approx([3, 2], abs=0.1)


def test_a_step_by_the_gradient_itself_diverges_where_curvature_exceeds_two():
    def descent(lr):
        return lambda w: torch.optim.SGD(w, lr=lr).step

    assert on_quadratic([[3.0]], [1.0], descent(1.0), 50).abs() > 1e10
    assert on_quadratic([[3.0]], [1.0], descent(0.3), 50).abs() < 1e-10


def test_the_adam_of_001_climbs():
    def path(sign, steps=20):
        w, m, square = 1.0, 0.0, 1.0
        for _ in range(steps):
            m = 0.9 * m - 0.01 * w  # the lecture's momentum already points downhill
            square = 0.9 * square + 0.1 * w**2
            w += sign * 0.01 / math.sqrt(square) * m
        return w

    assert path(-1) > 1.0  # as printed: θ − (α/σ)m
    assert path(+1) < 1.0
    assert path(-1, steps=1) == 1 + 0.01**2  # the rate of 0.01 counts twice


def test_adam_without_epsilon_loses_a_weight_that_has_no_gradient_yet():
    assert torch.zeros(()).rsqrt().mul(0).isnan()  # α G^(−½) v, as printed
    w = torch.nn.Parameter(torch.ones(1))
    w.grad = torch.zeros(1)
    torch.optim.Adam([w], lr=1.0).step()
    assert w.item() == 1


def test_adam_without_correction_starts_with_three_times_the_rate_and_torchs_with_the_rate():
    v = square = 0.0
    raw = []
    for _ in range(4):
        v, square = 0.9 * v + 0.1, 0.999 * square + 0.001
        raw.append(v / math.sqrt(square))
    assert raw == pytest.approx([3.162, 4.250, 4.950, 5.441], abs=1e-3)
    w = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.Adam([w], lr=1.0)
    for step in range(1, 5):
        w.grad = torch.ones_like(w)
        optimizer.step()
        assert float(w.detach()) == pytest.approx(-step, rel=1e-6)


# 004, slides 54 and 65, 77, 34, 15


def test_descent_is_slow_where_the_condition_number_is_large_not_small():
    def steps(condition):
        w, lr, count = torch.ones(2, dtype=torch.float64), 2 / (1 + condition), 0
        while float(w.norm()) > 1e-6 * math.sqrt(2):
            w = w - lr * torch.tensor([1.0, condition]) * w
            count += 1
        return count

    assert [steps(k) for k in (10, 100, 1000)] == [69, 691, 6908]


def test_a_contours_half_axes_go_like_the_inverse_root_of_the_eigenvalues():
    values = torch.tensor([1.0, 4.0], dtype=torch.float64)
    half_axes = (2 / values).sqrt()  # where ½λx² = 1
    assert half_axes.tolist() == pytest.approx([1.414, 0.707], abs=1e-3)
    for way, length in zip(torch.eye(2, dtype=torch.float64), half_axes, strict=True):
        assert float((values * (length * way) ** 2).sum() / 2) == pytest.approx(1.0)


def test_a_net_with_one_hidden_layer_has_local_minima_that_are_not_global():
    x, y = torch.tensor([[0.0], [1.0]], dtype=torch.float64), torch.tensor([[0.0], [1.0]], dtype=torch.float64)

    def loss(w):  # one rectified unit
        return ((torch.relu(w[0] * x + w[1]) * w[2] + w[3] - y) ** 2).mean()

    stuck = torch.tensor([-1.0, -0.5, 1.0, 0.5], dtype=torch.float64)  # the unit is silent for both inputs
    own = torch.Generator().manual_seed(0)
    nearby = [loss(stuck + 0.1 * (2 * torch.rand(4, generator=own, dtype=torch.float64) - 1)) for _ in range(2000)]
    assert float(loss(stuck)) == 0.25
    assert min(map(float, nearby)) >= 0.25
    assert float(loss(torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64))) == 0


@pytest.mark.parametrize("t", [10, 50, 100])
def test_the_perceptron_takes_about_t_updates_on_the_four_points_not_t_squared(t):
    points = torch.tensor([[1.0, 0, 1], [0, 1, 1], [-1, 0, 1], [0, -t, 1]], dtype=torch.float64)
    labels = torch.tensor([1.0, 1, -1, 1], dtype=torch.float64)
    w, updates = torch.zeros(3, dtype=torch.float64), 0
    for x, y in itertools.cycle(zip(points, labels, strict=True)):
        if float(y * (w @ x)) <= 0:
            w, updates = w + y * x, updates + 1
        elif bool((labels * (points @ w) > 0).all()):
            break
    assert t / 2 <= updates < 3 * t + 10


# 002 and 003


def test_positive_eigenvalues_are_rarer_than_independent_coins():
    own = torch.Generator().manual_seed(0)
    for size, exact in ((2, (2 - math.sqrt(2)) / 4), (3, (math.pi - 2 * math.sqrt(2)) / (4 * math.pi))):
        G = torch.randn(40_000, size, size, generator=own, dtype=torch.float64)
        share = float((torch.linalg.eigvalsh(G + G.mT)[:, 0] > 0).double().mean())
        assert share == pytest.approx(exact, abs=4 * math.sqrt(exact / 40_000))
        assert share < 0.5**size


def test_the_mean_square_runs_over_time_and_not_over_weights():
    w = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = RMSAdagrad([w], lr=1.0)
    for g in ([1.0, 5.0], [3.0, 5.0]):
        before, w.grad = w.detach().clone(), torch.tensor(g, dtype=torch.float64)
        optimizer.step()
    over_time = torch.tensor([3 / math.sqrt((1 + 9) / 2), 1.0], dtype=torch.float64)
    torch.testing.assert_close(before - w.detach(), over_time)
    over_weights = torch.tensor([3.0, 5.0], dtype=torch.float64) / math.sqrt((9 + 25) / 2)  # as printed
    assert (over_weights - over_time).abs().min() > 0.2
