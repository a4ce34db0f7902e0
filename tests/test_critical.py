"""Kinds of points that pen and paper know, and the ways out of their saddles."""

import itertools
import math

import pytest
import torch
from tests import oracles
from torch import nn

from unstuck.critical import classify, escape, examine, gradient_noise
from unstuck.objective._objective import Objective, Term

both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def surface(f, *point, dtype=torch.float64):
    return Objective.of_terms([Term(lambda values: f(values[0]), 1)], {"w": torch.tensor(point, dtype=dtype)})


def test_the_signs_of_the_eigenvalues_name_the_kind():
    kinds = {(1, 2): "minimum", (-1, -2): "maximum", (-1, 1): "saddle", (0, 0): "degenerate", (0, 3): "degenerate"}
    kinds |= {(-3, 0): "degenerate", (-1, 0, 2): "saddle"}
    for values, kind in kinds.items():
        assert classify(torch.tensor(values, dtype=torch.float64)) == kind


def test_an_eigenvalue_within_its_error_or_below_zero_s_width_has_no_sign():
    values = torch.tensor([0.1, 2.0])
    assert classify(values) == "minimum"
    assert classify(values, torch.tensor([0.2, 0.2])) == "degenerate"
    assert classify(values, zero=0.15) == "degenerate"
    assert classify(-values.flip(0), torch.tensor([0.2, 0.2])) == "degenerate"


@both_precisions
def test_the_product_pair_has_its_saddle_at_the_origin(dtype):
    point = examine(surface(oracles.product_pair, 0, 0, dtype=dtype))
    assert point.kind == "saddle"
    assert point.complete
    assert (point.loss, point.gradient_norm, point.promise) == (1, 0, 0)
    torch.testing.assert_close(point.values, torch.tensor([-2.0, 2.0], dtype=dtype))
    assert (point.negative, point.flat) == (1, 0)
    assert point.rate_limit() == pytest.approx(1)
    torch.testing.assert_close(point.direction.abs(), torch.full((2,), 0.5**0.5, dtype=dtype))
    assert str(point).startswith("The weights stand at a saddle")
    assert "1 negative, 0 zero" in str(point)


def test_the_valley_of_the_product_pair_is_flat_along_one_direction():
    point = examine(surface(oracles.product_pair, 1, 1))
    assert point.name == "minimum (1 flat direction)"
    assert (point.negative, point.flat) == (0, 1)
    assert point.condition == math.inf
    assert "a minimum (1 flat direction): flat to second order" in str(point)
    assert point.largest == pytest.approx(4)
    assert point.rate_limit() == pytest.approx(0.5)
    sharper = examine(surface(oracles.product_pair, 2, 0.5))
    assert sharper.name == "minimum (1 flat direction)"
    torch.testing.assert_close(sharper.values, torch.tensor([0, 8.5], dtype=torch.float64))


def test_a_slope_is_not_critical_and_the_promise_says_how_steep_it_is():
    w1, w2 = 0.3, 0.1
    point = examine(surface(oracles.product_pair, w1, w2))
    g = -2 * (1 - w1 * w2) * torch.tensor([w2, w1], dtype=torch.float64)
    H = oracles.product_pair_hessian(w1, w2)
    best_step = (g @ g) ** 2 / (2 * (g @ H @ g).abs())
    assert point.kind == "not critical"
    assert point.promise == pytest.approx(float(best_step) / (1 - w1 * w2) ** 2)
    assert point.relative_gradient == pytest.approx(float(g.norm()) * math.hypot(w1, w2) / (1 - w1 * w2) ** 2)
    assert "gradient is still large" in str(point)


def test_a_gradient_at_the_origin_is_not_overlooked():
    # ‖g‖‖θ‖/L is zero here, whatever the gradient
    point = examine(surface(lambda w: (w - 1).square().sum(), 0, 0))
    assert point.kind == "not critical"
    assert point.promise == pytest.approx(1)


def test_a_plane_is_gradient_flat():
    point = examine(surface(lambda w: 1 + w.sum(), 0, 0))
    assert point.kind == "gradient-flat"
    assert "the loss still falls" in str(point)


def test_flat_directions_along_which_the_loss_falls_make_no_minimum():
    def hidden(w):  # x² + (y − z)³: the eigenvectors of the flat plane need not be the way down
        return 1 + w[0] ** 2 + (w[1] - w[2]) ** 3

    assert examine(surface(hidden, 0, 0, 0)).kind == "degenerate"
    assert examine(surface(lambda w: 1 + w[0] ** 2 - w[1] ** 4, 0, 0)).kind == "degenerate"
    assert examine(surface(lambda w: 1 + w[0] ** 2 + w[1] ** 4, 0, 0)).name == "minimum (1 flat direction)"
    assert examine(surface(lambda w: 1 - w[0] ** 2 - w[1] ** 4, 0, 0)).name == "maximum (1 flat direction)"


def test_a_slope_without_curvature_is_gradient_flat_and_one_with_curvature_is_not():
    assert examine(surface(lambda w: 1 + w[0] + 3 * w[1] ** 2, 0, 0)).kind == "gradient-flat"
    bent = examine(surface(lambda w: 1 + w[0] + w[0] ** 2 + 3 * w[1] ** 2, 0, 0))
    assert bent.kind == "not critical"
    assert bent.flatness == pytest.approx(2 / 6)


def test_rate_limit_and_condition_are_those_of_the_quadratic():
    point = examine(surface(lambda w: 1 + w[0] ** 2 + 5 * w[1] ** 2, 0, 0))
    assert point.condition == pytest.approx(5)
    assert point.rate_limit() == pytest.approx(0.2)
    assert point.rate_limit(momentum=0.9) == pytest.approx(0.38)
    assert math.isnan(examine(surface(oracles.product_pair, 0, 0)).condition)


def gaussian_matrices(size, count):
    drawn = torch.randn(count, size, size, generator=seeded(), dtype=torch.float64)
    return drawn + drawn.mT


@pytest.mark.parametrize(
    ("size", "share", "tolerance"),  # ½, (2 − √2)/4, (π − 2√2)/4π, and what lies below
    [(1, 0.5, 0.005), (2, 0.1464, 0.004), (3, 0.0249, 0.002), (4, 0.0026, 0.0005), (5, 0.00014, 0.0001), (6, 0, 2e-5)],
)
def test_random_symmetric_matrices_are_minima_as_rarely_as_theory_says(size, share, tolerance):
    # the tolerances are about four standard errors of 160000 draws, or more
    spectra = torch.linalg.eigvalsh(gaussian_matrices(size, 160_000))
    assert float((spectra > 0).all(1).double().mean()) == pytest.approx(share, abs=tolerance)
    assert float((spectra > 0).double().mean()) == pytest.approx(0.5, abs=0.005)
    kinds = [classify(values) for values in spectra[:2000]]
    assert kinds.count("minimum") == int((spectra[:2000] > 0).all(1).sum())
    assert kinds.count("maximum") == int((spectra[:2000] < 0).all(1).sum())
    assert kinds.count("saddle") + kinds.count("minimum") + kinds.count("maximum") == 2000


@pytest.mark.parametrize("size", [2, 3, 6])
def test_the_origin_of_a_random_quadratic_has_the_index_of_its_matrix(size):
    for matrix in gaussian_matrices(size, 30):
        values = torch.linalg.eigvalsh(matrix)
        point = examine(surface(lambda w, matrix=matrix: 1 + w @ matrix @ w / 2, *[0.0] * size))
        assert point.negative == int((values < 0).sum())
        assert point.positive.estimate == pytest.approx(float((values > 0).double().mean()))
        torch.testing.assert_close(point.values, values)


def autoencoder(kept):
    """Σ = diag(5, 4, 3, 2, 1), 5-2-5 linear: a critical point for each subset of at most two axes (Baldi, Hornik)."""
    decoder = torch.zeros(5, 2, dtype=torch.float64)
    for column, axis in enumerate(kept):
        decoder[axis, column] = 1
    spread = torch.arange(5.0, 0.0, -1.0, dtype=torch.float64)

    def loss(values):
        A, B = values
        return ((torch.eye(5, dtype=torch.float64) - A @ B).square() * spread).sum()

    return Objective.of_terms([Term(loss, 1)], {"decoder": decoder, "encoder": decoder.T.clone()})


def test_of_the_sixteen_critical_points_of_a_linear_autoencoder_one_is_a_minimum():
    points = {kept: examine(autoencoder(kept)) for rank in range(3) for kept in itertools.combinations(range(5), rank)}
    assert len(points) == 16
    assert all(point.gradient_norm <= 1e-12 for point in points.values())
    for kept, point in points.items():
        assert point.loss == pytest.approx(15 - sum(5 - axis for axis in kept))
        assert point.name == ("minimum (4 flat directions)" if kept == (0, 1) else "saddle")
        if len(kept) == 2:  # an axis outside with a larger variance is one way down for each axis inside
            assert point.negative == sum(kept) - 1 == round(point.loss - 6)
        assert point.negative == 0 if kept == (0, 1) else point.negative > 0
        assert point.positive.estimate == pytest.approx((20 - point.negative - point.flat) / 20)


def test_a_gradient_within_its_sampling_noise_is_called_so():
    x = torch.randn(400, generator=seeded(), dtype=torch.float64)

    def objective(offset, data=x):
        model = nn.Linear(1, 1, bias=False).double()
        nn.init.constant_(model.weight, float(data.mean()) + offset)
        return Objective(
            model, lambda m, b: (m(torch.ones_like(b)[:, None])[:, 0] - b).square().mean(), list(data.split(50))
        )

    near = examine(objective(0.5 * 1 / 20), promise_limit=1e-6)  # half a standard error of the mean beside it
    assert near.kind == "not critical"
    assert near.name == "critical within noise"
    assert "no larger than its sampling error" in str(near)
    # the gradient is 2(w − mean): its standard error twice that of the mean
    assert near.noise.stderr == pytest.approx(2 / 20, rel=0.6)
    assert examine(objective(5 / 20), promise_limit=1e-6).name == "not critical"
    weighted = gradient_noise(objective(0, x[:399]))
    parts = torch.stack([part.mean() for part in x[:399].split(50)])
    weights = torch.tensor([50.0] * 7 + [49.0], dtype=torch.float64) / 399
    theory = ((weights * 2 * (parts - x[:399].mean())).square().sum() * 8 / 7).sqrt()
    assert weighted.stderr == pytest.approx(float(theory))


def test_the_share_of_positive_eigenvalues_of_a_large_point_is_that_of_the_matrix():
    values = torch.cat([torch.linspace(-1, -0.1, 300), torch.linspace(0.1, 3, 600)]).double()
    found = examine(surface(lambda w: 1 + (values * w**2).sum(), *[0.0] * 900), samples=4, generator=seeded())
    assert not found.complete
    assert abs(found.positive.estimate - 2 / 3) <= found.positive.error
    assert found.positive.error < 0.12
    assert "are positive" in str(found)
    assert examine(surface(lambda w: 1 + (values * w**2).sum(), *[0.0] * 900), samples=0).positive is None


def test_units_of_the_loss_and_of_the_weights_do_not_matter():
    def stretched(w):
        return 1e6 * oracles.product_pair(1e-4 * w)

    for near in (1e-3, 1e-1):
        plain, scaled = (
            examine(surface(oracles.product_pair, near, near)),
            examine(surface(stretched, near * 1e4, near * 1e4)),
        )
        assert plain.kind == scaled.kind
        assert plain.promise == pytest.approx(scaled.promise)


def test_close_to_the_saddle_is_close_enough():
    assert examine(surface(oracles.product_pair, 1e-3, 1e-3, dtype=torch.float32)).kind == "saddle"


@both_precisions
def test_the_monkey_saddle_is_degenerate_and_not_a_minimum(dtype):
    point = examine(surface(oracles.monkey_saddle, 0, 0, dtype=dtype))
    assert point.kind == "degenerate"
    assert point.flat == 2
    assert point.rate_limit() == math.inf


@both_precisions
def test_the_tanh_pair_has_its_saddle_at_the_origin(dtype):
    point = examine(surface(oracles.tanh_pair, 0, 0, dtype=dtype))
    assert point.kind == "saddle"
    assert point.loss == 0.25
    torch.testing.assert_close(point.values, torch.tensor([-0.5, 0.5], dtype=dtype))


def test_the_ravines_of_the_tanh_pair_are_minima_between_plateaus_of_known_height():
    for side in (1, -1):
        point = examine(surface(oracles.tanh_pair, side * math.log(3), side * math.log(3)))
        assert point.loss < 1e-30
        assert point.name == "minimum (1 flat direction)"
    for sign, height in ((1, 0.25), (-1, 2.25)):
        assert surface(oracles.tanh_pair, 9, sign * 40).value() == pytest.approx(height, abs=1e-6)


def test_a_minimum_becomes_a_saddle_where_another_dimension_leads_down():
    assert examine(surface(lambda w: 1 + (w[0] - 2) ** 2, 2)).kind == "minimum"
    lifted = examine(surface(lambda w: 1 + (w[0] - 2) ** 2 - w[1] ** 2, 2, 0))
    assert (lifted.kind, lifted.negative) == ("saddle", 1)


def test_bowls_and_domes_are_told_apart():
    assert examine(surface(lambda w: 1 + w[0] ** 2 + 1e-3 * w[1] ** 2, 0, 0)).kind == "minimum"
    assert examine(surface(lambda w: 1 - w[0] ** 2 - 1e-3 * w[1] ** 2, 0, 0)).kind == "maximum"


@both_precisions
def test_the_way_out_of_the_product_pair_leads_to_loss_zero(dtype):
    objective = surface(oracles.product_pair, 0, 0, dtype=dtype)
    way = escape(objective)
    torch.testing.assert_close(way.direction.abs(), torch.full((2,), 0.5**0.5, dtype=dtype))
    assert way.direction[0] * way.direction[1] > 0
    assert way.curvature == pytest.approx(-2)
    assert way.steps == pytest.approx((math.sqrt(2), math.sqrt(2)), rel=1e-5)
    assert max(way.losses) <= 1e-10
    assert objective.at(way.point).value() == min(way.losses)
    for side in (0.1, -0.1):
        assert objective.at(side * way.direction).value() == pytest.approx(0.990025)
    assert way.evaluations <= 60
    assert "falls from 1" in str(way)


def test_the_way_out_of_the_tanh_pair_leads_into_a_ravine():
    way = escape(surface(oracles.tanh_pair, 0, 0))
    w1, w2 = way.point.tolist()
    assert w1 * math.tanh(w2 / 2) == pytest.approx(oracles.TANH_RAVINE, abs=1e-5)
    assert min(way.losses) <= 1e-10


def test_both_sides_are_tried_and_the_lower_end_is_taken():
    def tilted(w):  # along w0 the minima lie at −1 with −13/12 and at 2 with −8/3: w⁴/4 − w³/3 − w²
        return w[0] ** 4 / 4 - w[0] ** 3 / 3 - w[0] ** 2 + w[1] ** 2 + 5

    way = escape(surface(tilted, 0, 0))
    ends = sorted(zip(way.losses, way.steps, strict=True))
    assert [loss for loss, _ in ends] == pytest.approx([5 - 8 / 3, 5 - 5 / 12], rel=1e-9)
    assert [step for _, step in ends] == pytest.approx([2, 1], rel=1e-5)
    torch.testing.assert_close(way.point, torch.tensor([2.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-5)


def test_a_given_direction_is_followed_instead():
    along = torch.tensor([2.0, 2.0], dtype=torch.float64)
    way = escape(surface(oracles.product_pair, 0, 0), along=along)
    torch.testing.assert_close(way.point.abs(), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="got dᵀHd = 2"):
        escape(surface(oracles.product_pair, 0, 0), along=torch.tensor([1.0, -1.0], dtype=torch.float64))


def test_a_loss_without_lower_bound_ends_the_search():
    way = escape(surface(lambda w: -w.square().sum(), 0, 0))
    assert way.decrease > 1e6


def test_a_valley_narrower_than_the_first_step_is_found():
    # a wall of height w⁴·10¹² closes the way down at ±7e-7, far below the step that a loss of 1 suggests
    way = escape(surface(lambda w: 1 - w[0] ** 2 + 1e12 * w[0] ** 4 + w[1] ** 2, 0, 0))
    assert max(way.steps) == pytest.approx(math.sqrt(0.5e-12), rel=0.01)


def test_where_no_curvature_is_negative_there_is_no_way_out():
    with pytest.raises(ValueError, match="this point is not a saddle"):
        escape(surface(oracles.product_pair, 1, 1))


def test_a_loss_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="got loss nan"):
        examine(surface(lambda w: w.log().sum(), -1, 1))


def test_a_large_network_at_its_symmetric_start_is_a_saddle_with_a_way_out():
    # two linear layers of zeros: the gradient is 0, and the Hessian couples them by the correlation C of input and
    # target, so that its eigenvalues are ± the singular values of 2C/outputs
    x = torch.randn(64, 20, generator=seeded(1), dtype=torch.float64)
    y = x[:, :10] @ torch.randn(10, 10, generator=seeded(2), dtype=torch.float64)
    model = nn.Sequential(nn.Linear(20, 30, bias=False), nn.Linear(30, 10, bias=False)).double()
    for p in model.parameters():
        nn.init.zeros_(p)
    objective = Objective(
        model, lambda m, b: (m(b[0]) - b[1]).square().mean(), list(zip(x.split(50), y.split(50), strict=True))
    )
    point = examine(objective, generator=seeded())
    sigma = float(torch.linalg.matrix_norm(2 * x.T @ y / y.numel(), 2))
    assert point.kind == "saddle"
    assert not point.complete
    assert point.converged
    assert point.smallest == pytest.approx(-sigma, abs=float(point.errors[0]) + 1e-9)
    assert point.largest == pytest.approx(sigma, abs=float(point.errors[-1]) + 1e-9)
    way = escape(objective, along=point.direction)
    assert way.decrease > 0
    assert all(torch.equal(p, torch.zeros_like(p)) for p in model.parameters())
    # along the eigenvector both layers turn on one rank: the loss along it is a quartic with both ends alike
    assert way.losses[0] == pytest.approx(way.losses[1], rel=1e-6)


def test_dense_and_lanczos_agree_on_the_ends():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    batches = [(torch.randn(20, 6), torch.arange(20) % 3)]
    objective = Objective(model, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), batches)
    exact, ends = examine(objective), examine(objective, dense_up_to=0, generator=seeded())
    assert len(exact.values) == objective.size
    assert len(ends.values) == 2
    assert ends.products < exact.products
    assert abs(exact.smallest - ends.smallest) <= ends.errors[0]
    assert abs(exact.largest - ends.largest) <= ends.errors[1]


def test_a_spectrum_that_has_not_converged_says_so():
    objective = surface(lambda w: 1 + (torch.linspace(-1, 1, 50) * w**2).sum(), *[0.0] * 50)
    point = examine(objective, dense_up_to=10, max_products=3, generator=seeded())
    assert not point.converged
    assert "not converged" in str(point)
