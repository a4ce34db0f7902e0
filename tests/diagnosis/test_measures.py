"""Every quantity against its closed form, a dense matrix, or the same number computed from the raw tensors."""

import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from runs import batches, blobs, case, classify, fit, mlp, of_losses, recorded, train
from sklearn.neighbors import NearestNeighbors
from tests import oracles
from torch import nn

from unstuck.diagnosis import _motion as motion
from unstuck.diagnosis._hypothesis import STUCK, symptom
from unstuck.record import Run
from unstuck.record._log import Log


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def descend(folder, rate, *, curvature=2.0, steps=4, start=1.0, **options):
    """Gradient descent on ½aw², recorded."""
    w = torch.tensor([start], dtype=torch.float64, requires_grad=True)
    a = torch.tensor([curvature], dtype=torch.float64)
    optimizer = torch.optim.SGD([w], lr=rate, **options)

    def loop():
        for _ in range(steps):
            optimizer.zero_grad()
            (0.5 * a * w * w).sum().backward()
            optimizer.step()

    return case(recorded(folder, loop))


class TestHeadRoom:
    @pytest.mark.parametrize("product", [0.01, 0.3, 0.9, 1.9, 4.0])
    def test_on_a_parabola_it_is_two_over_rate_times_curvature(self, tmp_path, product):
        found = descend(tmp_path, product / 2.0)["head-room"]
        assert found.value == pytest.approx(2 / product, rel=0.1)

    def test_it_does_not_depend_on_the_scale_of_the_loss_or_the_weights(self, tmp_path):
        values = [
            descend(tmp_path / str(k), 0.5 / a, curvature=a, start=w)["head-room"].value
            for k, (a, w) in enumerate([(1e-3, 1.0), (1.0, 1e4), (1e5, 1e-3)])
        ]
        assert values == pytest.approx([4.0] * 3, rel=0.1)

    def test_tiny_steps_meet_the_cap(self, tmp_path):
        assert descend(tmp_path, 1e-12)["head-room"].value == motion.CAP

    def test_steps_that_change_the_loss_by_less_than_its_last_digit_still_have_it(self, tmp_path):
        """In single precision the gain of a tiny step is rounded away: that is not a loss that rises."""
        w = torch.tensor([1.0], requires_grad=True)
        optimizer = torch.optim.SGD([w], lr=1e-9)

        def loop():
            for _ in range(4):
                optimizer.zero_grad()
                (100 + w * w).sum().backward()
                optimizer.step()

        two_over_rate_times_curvature = pytest.approx(1e9, rel=0.1)
        assert case(recorded(tmp_path, loop))["head-room"].value == two_over_rate_times_curvature

    def test_steps_sixteen_times_too_long_have_none(self, tmp_path):
        assert descend(tmp_path, 20.0)["head-room"].value == 0

    def test_without_an_optimiser_it_is_unknown(self, tmp_path):
        w = torch.ones(1, requires_grad=True)
        v = torch.ones(1, requires_grad=True)
        one, two = torch.optim.SGD([w], lr=0.1), torch.optim.SGD([v], lr=0.1)

        def loop():
            for _ in range(3):
                (w * w + v * v).sum().backward()
                one.step()
                two.step()
                one.zero_grad()
                two.zero_grad()

        assert case(recorded(tmp_path, loop))["head-room"] is None


def regression(n=40, d=5):
    X = torch.randn(n, d, dtype=torch.float64) * torch.tensor([3.0, 1.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    return X, X @ torch.randn(d, dtype=torch.float64) + 0.1 * torch.randn(n, dtype=torch.float64)


def regress(folder, X, y, make, steps=30):
    w = torch.zeros(X.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = make([w])

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            F.mse_loss(X @ w, y).backward()
            optimizer.step()

    return case(recorded(folder, lambda: train(steps))), w, optimizer, train


class TestCurvatureTimesRate:
    @pytest.mark.parametrize(
        ("make", "effective"),
        [
            (lambda p: torch.optim.SGD(p, lr=0.01), 0.01),
            (lambda p: torch.optim.SGD(p, lr=0.004, momentum=0.9), 0.04),
            (lambda p: torch.optim.SGD(p, lr=0.004, momentum=0.9, nesterov=True), 0.04),
        ],
        ids=["sgd", "momentum", "nesterov"],
    )
    def test_of_gradient_descent_it_is_the_effective_rate_times_the_largest_eigenvalue(self, tmp_path, make, effective):
        X, y = regression()
        found = regress(tmp_path, X, y, make)[0]["curvature × rate"]
        H = oracles.linear_regression(X, y, torch.zeros(5, dtype=torch.float64))[2]
        assert found.value == pytest.approx(effective * float(torch.linalg.eigvalsh(H)[-1]), rel=0.05)

    @pytest.mark.parametrize(
        ("make", "second_moment", "correction"),
        [
            (lambda p: torch.optim.Adam(p, lr=0.02), "exp_avg_sq", lambda t: 1 - 0.999**t),
            (lambda p: torch.optim.AdamW(p, lr=0.02, betas=(0.9, 0.9)), "exp_avg_sq", lambda t: 1 - 0.9**t),
            (lambda p: torch.optim.RMSprop(p, lr=0.02), "square_avg", lambda t: 1),
            (lambda p: torch.optim.Adagrad(p, lr=0.2), "sum", lambda t: 1),
        ],
        ids=["adam", "adamw", "rmsprop", "adagrad"],
    )
    def test_of_adaptive_optimisers_it_is_that_of_the_preconditioned_matrix(
        self, tmp_path, make, second_moment, correction
    ):
        X, y = regression()
        known, w, optimizer, train = regress(tmp_path, X, y, make)
        H = oracles.linear_regression(X, y, w.detach())[2]
        group = optimizer.param_groups[0]

        def dense(steps):
            moment = optimizer.state[w][second_moment] / correction(steps)
            root = (group["lr"] / (moment.sqrt() + group["eps"])).sqrt()
            return float(torch.linalg.eigvalsh(root[:, None] * H * root)[-1])

        moments = [dense(30)]
        for k in range(35, 55, 5):  # the run itself goes on, where the measure takes the next steps on a copy
            train(5)
            moments.append(dense(k))
        found = known["curvature × rate"]
        assert found.value == pytest.approx(statistics.median(moments), rel=0.05)
        assert found.n == 5
        assert found.low <= min(moments) * 1.05
        assert found.high >= max(moments) * 0.95

    def test_where_the_next_steps_blow_up_it_is_that_of_those_before(self, tmp_path):
        X, y = regression()
        found = regress(tmp_path, X, y, lambda p: torch.optim.SGD(p, lr=1e40), steps=3)[0]["curvature × rate"]
        H = oracles.linear_regression(X, y, torch.zeros(5, dtype=torch.float64))[2]
        assert found.value == pytest.approx(1e40 * float(torch.linalg.eigvalsh(H)[-1]), rel=0.05)
        assert found.n == 1

    def test_a_frozen_parameter_adds_nothing(self, tmp_path):
        X, y = regression()
        w = torch.zeros(5, dtype=torch.float64, requires_grad=True)
        steep = torch.full((1,), 100.0, dtype=torch.float64)  # not optimised
        optimizer = torch.optim.SGD([w], lr=0.01 / 100)

        def loop():
            for _ in range(10):
                optimizer.zero_grad()
                (F.mse_loss(X @ w, y) * steep).sum().backward()
                optimizer.step()

        H = oracles.linear_regression(X, y, w.detach())[2]
        expected = 0.01 * float(torch.linalg.eigvalsh(H)[-1])
        assert case(recorded(tmp_path, loop))["curvature × rate"].value == pytest.approx(expected, rel=0.05)


class TestUnderEpsilon:
    @pytest.mark.parametrize("eps", [1e-8, 0.3, 1e3])
    @pytest.mark.parametrize("amsgrad", [False, True])
    def test_it_is_the_share_of_the_optimisers_own_second_moments(self, tmp_path, eps, amsgrad):
        X, y = regression()
        known, w, optimizer, _ = regress(
            tmp_path, X, y, lambda p: torch.optim.Adam(p, lr=0.01, eps=eps, amsgrad=amsgrad)
        )
        kept = optimizer.state[w]["max_exp_avg_sq" if amsgrad else "exp_avg_sq"]
        assert known["under ε"].value == ((kept / (1 - 0.999**30)).sqrt() < eps).double().mean()

    def test_under_an_optimiser_without_one_there_is_nothing(self, tmp_path):
        X, y = regression()
        found = regress(tmp_path, X, y, lambda p: torch.optim.SGD(p, lr=0.01))[0]["under ε"]
        assert (found.value, found.n) == (0, 1)
        assert "there is none" in found.meaning


class TestDriftGain:
    def test_on_a_line_it_is_the_best_of_its_multiples(self, tmp_path):
        w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        goal = torch.tensor([10.0], dtype=torch.float64)
        optimizer = torch.optim.SGD([w], lr=1e-3)

        def loop():
            for _ in range(60):
                optimizer.zero_grad()
                (w - goal).square().sum().backward()
                optimizer.step()

        found = case(recorded(tmp_path, loop))["drift gain"]
        here = 10 * (1 - 0.998**60)
        ends = [(here + 2.0**k / 4 * here - 10) ** 2 / (here - 10) ** 2 for k in range(12)]
        assert found.value == pytest.approx(1 - min(ends))
        assert found.n == 60

    def test_at_the_bottom_nothing_is_left(self, tmp_path):
        assert descend(tmp_path, 0.5, steps=60)["drift gain"].value == 0


class TestInputDependence:
    """lr = 0 keeps the weights where they are put."""

    def of(self, folder, model, x, y, loss=classify):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        return case(recorded(folder, train(model, optimizer, batches(x, y, 8), 8, loss)))["input dependence"]

    def linear(self, weight, bias):
        model = nn.Linear(1, len(weight))
        model.weight.data[:, 0], model.bias.data[:] = torch.tensor(weight), torch.tensor(bias)
        return model

    @pytest.mark.parametrize("offset", [0.0, 1.0, 3.0])
    def test_it_is_the_share_of_the_variance_that_is_not_the_outputs_own_offset(self, tmp_path, offset):
        x = torch.tensor([1.0, -1.0]).repeat(16)[:, None]
        model = self.linear([1.0, -1.0], [offset, -offset])
        found = self.of(tmp_path, model, x, (x[:, 0] > 0).long())
        assert found.value == pytest.approx(1 / (1 + offset**2))

    def test_constant_outputs_have_none(self, tmp_path):
        x = torch.randn(32, 1)
        assert self.of(tmp_path, self.linear([0.0, 0.0], [1.0, -1.0]), x, (x[:, 0] > 0).long()).value == 0

    def test_of_a_single_output_it_is_measured_by_the_spread_of_the_targets(self, tmp_path):
        x = torch.tensor([1.0, -1.0]).repeat(16)[:, None]
        found = self.of(tmp_path, self.linear([0.5], [7.0]), x, 2 * x, fit)
        assert found.value == pytest.approx(0.5**2 / 2**2)

    def test_a_single_output_whose_targets_never_differ_has_none_to_show(self, tmp_path):
        x = torch.randn(32, 1)
        assert self.of(tmp_path, self.linear([0.5], [7.0]), x, torch.ones(32, 1), fit) is None

    def test_a_single_output_wider_than_its_targets_counts_as_one(self, tmp_path):
        x = torch.tensor([1.0, -1.0]).repeat(16)[:, None]
        assert self.of(tmp_path, self.linear([9.0], [0.0]), x, x, fit).value == 1


class TestUnits:
    def still(self, folder, model, x, y):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        return case(recorded(folder, train(model, optimizer, batches(x, y, 16), 8)))

    def test_dead_units_are_those_that_never_fire(self, tmp_path):
        model = mlp(width=8)
        model[0].bias.data[:3] = -100.0
        assert self.still(tmp_path, model, *blobs(64))["dead units"].value == 3 / 8

    def test_a_channel_of_a_convolution_is_a_unit(self, tmp_path):
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        model[0].bias.data[:] = torch.tensor([5.0, -100.0, 5.0, -100.0])
        x = torch.randn(64, 1, 4, 4)
        assert self.still(tmp_path, model, x, (x.sum((1, 2, 3)) > 0).long())["dead units"].value == 0.5

    def test_saturation_is_the_share_of_activations_with_less_than_a_hundredth_of_the_slope(self, tmp_path):
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        model[0].weight.data *= 8
        x, y = blobs(64)
        here = model[0](x[-64:])
        slope = torch.autograd.grad(here.tanh().sum(), here)[0]
        assert self.still(tmp_path, model, x, y)["saturation"].value == pytest.approx(
            float((slope < 0.01).float().mean())
        )

    @pytest.mark.parametrize(("weight", "share"), [(8.0, 0.0), (0.0, 1.0)], ids=["seeing", "blind"])
    def test_saturated_units_are_at_rest_only_in_a_network_that_sees_nothing(self, tmp_path, weight, share):
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        model[0].weight.data *= weight
        model[0].bias.data[:] = 20.0 if not weight else 0.0
        known = self.still(tmp_path, model, *blobs(64))
        assert known["units at rest"].value == share

    def test_the_signal_is_the_rms_before_an_activation(self, tmp_path):
        model, (x, y) = mlp(), blobs(64)
        rms = [float(model[0](part).detach().square().mean().sqrt()) for part in x.split(16)]
        assert self.still(tmp_path, model, x, y)["smallest signal"].value == pytest.approx(sum(rms) / 4, rel=1e-5)

    def test_the_signal_into_a_dead_layer_is_measured_only_where_a_layer_is_dead(self, tmp_path):
        x, y = blobs(64)
        assert self.still(tmp_path / "alive", mlp(), x, y)["signal into the dead layer"] is None
        model = mlp()
        nn.init.zeros_(model[0].weight)
        nn.init.constant_(model[0].bias, -3.0)
        found = self.still(tmp_path / "dead", model, x, y)["signal into the dead layer"]
        assert found.value == pytest.approx(3.0)

    def test_zero_gradients_are_counted_by_parameter(self, tmp_path):
        model = mlp()
        model[0].bias.data[:] = -100.0  # the layer's two parameters, and the weights after it, get none
        assert self.still(tmp_path, model, *blobs(64))["zero gradients"].value == 3 / 4

    def test_the_relative_gradient_is_that_of_the_weight_matrices(self, tmp_path):
        model, (x, y) = mlp(), blobs(64)
        loss = sum(classify(model, a, b) for a, b in batches(x, y, 16)) / 4
        W = [model[0].weight, model[2].weight]
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, W)])
        size = torch.cat([w.detach().flatten() for w in W]).norm()
        expected = float(flat.norm() * size / loss.detach())
        assert self.still(tmp_path, model, x, y)["relative gradient"].value == pytest.approx(expected, rel=1e-4)


def test_the_growth_of_the_weights_is_the_ratio_of_their_lengths(tmp_path):
    w = torch.tensor([1.0, 0.0], requires_grad=True)
    slope = torch.tensor([0.0, -1.0])
    optimizer = torch.optim.SGD([w], lr=0.5)

    def loop():
        for _ in range(8):
            optimizer.zero_grad()
            (slope * w).sum().backward()
            optimizer.step()

    assert case(recorded(tmp_path, loop))["growth of the weights"].value == pytest.approx(math.sqrt(17))


def test_zero_weights_at_the_start_are_counted_by_matrix(tmp_path):
    model = mlp()
    nn.init.zeros_(model[2].weight)
    run = recorded(tmp_path, train(model, torch.optim.SGD(model.parameters(), lr=0.1), [blobs(16)], 4))
    assert case(run)["zero weights at the start"].value == 0.5


class TestTrend:
    @pytest.mark.parametrize("slope", [0.0, -1e-3, -0.02, 5e-3])
    @pytest.mark.parametrize("noise", [0.0, 0.3])
    def test_it_is_the_slope_of_the_logarithm_over_the_last_third(self, tmp_path, slope, noise):
        t = torch.arange(600, dtype=torch.float64)
        losses = torch.exp(slope * t + noise * torch.randn(600, dtype=torch.float64)).tolist()
        found = case(of_losses(tmp_path, losses))["trend"]
        assert found.value == pytest.approx(200 * slope, abs=1e-6 if not noise else 4 * noise / math.sqrt(200 / 12))
        assert found.low <= found.value <= found.high
        assert found.n == 200

    def test_a_short_run_is_judged_by_its_last_sixty_steps(self, tmp_path):
        """It fell for sixty steps and was noisy for the last twenty of them: no standstill."""
        losses = [math.exp(-0.02 * min(k, 40)) for k in range(60)]
        found = case(of_losses(tmp_path, losses))["trend"]
        assert found.n == 60
        assert found.value < -0.5

    def test_one_spike_does_not_move_it(self, tmp_path):
        losses = [1.0] * 300
        losses[250] = 1e4
        assert case(of_losses(tmp_path, losses))["trend"].value == 0

    @pytest.mark.parametrize(
        ("losses", "because"),
        [([1.0] * 59, "over 60 steps, and this run has 59"), ([0.0] * 100, "above 0"), ([-1.0] * 100, "above 0")],
    )
    def test_too_few_or_not_positive_losses_have_none_and_it_is_said_why(self, tmp_path, losses, because):
        known = case(of_losses(tmp_path, losses))
        assert known["trend"] is None
        assert because in known.reasons["trend"]


class TestChance:
    def test_of_labels_it_is_their_entropy(self, tmp_path):
        x = torch.randn(40, 8)
        y = torch.tensor([0] * 20 + [1] * 10 + [2] * 10)[torch.randperm(40)]
        model = mlp(classes=3)
        run = recorded(tmp_path, train(model, torch.optim.SGD(model.parameters(), lr=0.1), batches(x, y, 10), 8))
        assert case(run).chance == pytest.approx(1.5 * math.log(2))

    def test_of_squared_errors_it_is_the_variance_of_the_targets(self, tmp_path):
        x, y = torch.randn(40, 8), 3 + 2 * torch.randn(40, 1)
        model = mlp(classes=1)
        run = recorded(tmp_path, train(model, torch.optim.SGD(model.parameters(), lr=1e-3), batches(x, y, 10), 8, fit))
        assert case(run).chance == pytest.approx(float(y.double().var(correction=0)), rel=1e-6)

    def test_of_many_targets_each_is_guessed_by_its_own_mean(self, tmp_path):
        x, y = torch.randn(40, 8), torch.randn(40, 4) + torch.tensor([0.0, 10.0, 20.0, 30.0])
        model = mlp()
        run = recorded(tmp_path, train(model, torch.optim.SGD(model.parameters(), lr=1e-4), batches(x, y, 10), 8, fit))
        assert case(run).chance == pytest.approx(float(y.double().var(0, correction=0).mean()), rel=1e-6)

    def test_of_other_losses_it_is_where_they_began(self, tmp_path):
        assert case(of_losses(tmp_path, [2.0, 3.0, 1.0])).chance == 3.0

    def test_the_level_is_the_recent_loss_over_it(self, tmp_path):
        assert case(of_losses(tmp_path, [2.0] * 10 + [0.5] * 50))["loss over chance"].value == 0.25


class TestRisen:
    def test_it_is_the_last_quarter_over_the_lowest_twelfth_before(self, tmp_path):
        losses = [2.0] * 20 + [0.5] * 10 + [1.0] * 60 + [1.25] * 30
        assert case(of_losses(tmp_path, losses))["loss over its lowest"].value == pytest.approx(2.5)

    def test_one_that_has_been_much_lower_is_stuck_whatever_its_trend(self, tmp_path):
        losses = [2.0] * 20 + [0.2] * 20 + [1.5 * 0.99**k for k in range(80)]
        known = case(of_losses(tmp_path, losses))
        assert known["trend"].value < -0.15
        assert symptom(known) == STUCK
        falling = case(of_losses(tmp_path / "falling", [2.0] * 40 + losses[40:]))
        assert falling["trend"].value == known["trend"].value
        assert symptom(falling) != STUCK


class TestRise:
    def test_it_is_the_worst_loss_over_the_first(self, tmp_path):
        assert case(of_losses(tmp_path, [2.0, 30.0, 1.0]))["rise of the loss"].value == 15

    def test_it_is_infinite_where_the_loss_was_not_finite(self, tmp_path):
        assert case(of_losses(tmp_path, [2.0, math.nan, 1.0]))["rise of the loss"].value == math.inf

    @pytest.mark.parametrize("losses", [[1.0], [0.0, 1.0], [-1.0, 5.0]])
    def test_without_a_positive_start_there_is_none(self, tmp_path, losses):
        assert case(of_losses(tmp_path, losses))["rise of the loss"] is None


def test_batches_are_told_apart_by_their_contents(tmp_path):
    x, y = blobs(40)
    parts = [(a.clone(), b.clone()) for a, b in batches(x, y, 10)] + [(x[:10].clone(), y[:10].clone())]
    model = mlp()
    run = recorded(tmp_path, train(model, torch.optim.SGD(model.parameters(), lr=0.1), parts, 15))
    assert case(run)["different batches"].value == 4


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_batches_are_told_apart_by_their_contents(tmp_path, layout):
    """The graphs of a graph network: three of them, in turn."""
    eye, (x, y) = torch.eye(10), blobs(10)
    graphs = [(scale * eye.roll(shift, 1)).to_sparse(layout=layout) for scale, shift in ((1, 0), (1, 3), (2, 3))]
    model = mlp()

    def loss(model, graph, y):
        return classify(model, graph @ x, y)

    data = [(graph, y) for graph in graphs]
    run = recorded(tmp_path, train(model, torch.optim.SGD(model.parameters(), lr=0.1), data, 15, loss))
    assert case(run)["different batches"].value == 3


class TestSettings:
    """What the optimiser is set to, against the update written out."""

    def stepped(self, folder, *, clip=0.0, kind=torch.optim.SGD, steps=12, **options):
        model = nn.Linear(8, 4)
        x, y = blobs(320)

        def loop():
            optimizer = kind(model.parameters(), **options)
            for k in range(steps):
                part = slice(32 * (k % 10), 32 * (k % 10) + 32)
                optimizer.zero_grad()
                classify(model, x[part], y[part]).backward()
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()

        return case(recorded(folder, loop))

    def slope(self, c, tape, state):
        leaves = [w.clone().requires_grad_() for w in state.weights]
        return torch.autograd.grad(tape.replay(leaves), leaves)

    def test_what_clipping_leaves_is_its_norm_over_that_of_the_gradient(self, tmp_path):
        c = self.stepped(tmp_path, clip=0.01, lr=0.1)
        norms = [math.sqrt(sum(float(g.square().sum()) for g in self.slope(c, t, c.state))) for t in c.fixed]
        assert c["what clipping leaves"].value == pytest.approx(statistics.median(0.01 / n for n in norms), rel=1e-3)
        assert self.stepped(tmp_path / "not", lr=0.1)["what clipping leaves"].value == 1

    def test_the_share_of_decay_is_its_part_of_the_update(self, tmp_path):
        c = self.stepped(tmp_path, lr=0.1, weight_decay=0.3)
        shares = []
        for state in (c.start, c.state):
            each = []
            for tape in c.fixed[:3]:
                slopes = self.slope(c, tape, state)
                whole = torch.cat([(g + 0.3 * w).flatten() for g, w in zip(slopes, state.weights, strict=True)])
                each.append(float(0.3 * torch.cat([w.flatten() for w in state.weights]).norm() / whole.norm()))
            shares.append(statistics.median(each))
        assert c["share of weight decay"].value == pytest.approx(max(shares), rel=1e-4)
        assert self.stepped(tmp_path / "none", lr=0.1)["share of weight decay"].value == 0

    def test_decoupled_decay_counts_as_well(self, tmp_path):
        c = self.stepped(tmp_path, kind=torch.optim.AdamW, lr=1e-3, weight_decay=100.0)
        assert 0.5 < c["share of weight decay"].value <= 1.1

    def test_momentum_and_the_first_beta(self, tmp_path):
        assert self.stepped(tmp_path / "a", lr=0.1, momentum=0.7)["momentum"].value == 0.7
        found = self.stepped(tmp_path / "b", kind=torch.optim.Adam, betas=(0.8, 0.99))["momentum"]
        assert found.value == 0.8

    def test_a_rate_that_was_lost_and_one_that_rises(self, tmp_path):
        def course(folder, rates):
            log = Log(folder)
            log.write("start", version=1, script="x.py", argv=[])
            for k, rate in enumerate(rates, 1):
                log.write("step", step=k, time=0.01 * k, loss=1.0, lr=rate)
            log.close()
            return case(Run(folder))

        lost = course(tmp_path / "lost", [0.1] * 40 + [0.001] * 60)
        assert lost["steps at a lost rate"].value == 0.6
        assert lost["rise of the rate"].value == 1
        rising = course(tmp_path / "rising", [0.001 * k for k in range(1, 101)])
        assert rising["rise of the rate"].value == pytest.approx(100)
        assert rising["misuse of the schedule"].value == 1
        assert rising["steps at a lost rate"].value == 0
        cosine = course(tmp_path / "cosine", [0.5 + 0.5 * math.cos(math.pi * k / 100) for k in range(100)])
        assert cosine["steps at a lost rate"].value < 1 / 3
        assert cosine["misuse of the schedule"].value == 0


class TestStart:
    def begun(self, folder, model, x, y, loss=classify, steps=8):
        def loop():
            train(
                model, torch.optim.SGD(model.parameters(), lr=1e-3), [(x[k::4], y[k::4]) for k in range(4)], steps, loss
            )()

        return case(recorded(folder, loop))

    def test_the_first_loss_over_the_entropy_of_the_labels(self, tmp_path):
        x, y = blobs(400)
        model = nn.Linear(8, 4)
        with torch.no_grad():
            first = float(F.cross_entropy(model(x), y))
        p = torch.bincount(y) / len(y)
        found = self.begun(tmp_path, model, x, y)["loss at the start"]
        assert found.value == pytest.approx(first / float(-(p * p.log()).sum()), rel=1e-4)

    def test_guessing_yes_or_no_earns_the_entropy_of_their_odds(self, tmp_path):
        x, y = blobs(400)
        yes = (y == 0).float()[:, None]

        def loss(model, x, y):
            return F.binary_cross_entropy_with_logits(model(x), y)

        p = float(yes.mean())
        c = self.begun(tmp_path, nn.Linear(8, 1), x, yes, loss)
        assert c.guess == pytest.approx(-(p * math.log(p) + (1 - p) * math.log(1 - p)))
        assert self.begun(tmp_path / "one", nn.Linear(8, 1), x, torch.ones_like(yes), loss).guess is None

    def test_inputs_by_their_size_offset_and_spread(self, tmp_path):
        x, y = torch.randn(4000, 8) * torch.logspace(0, 3, 8) + 40, torch.randint(4, (4000,))
        c = self.begun(tmp_path, nn.Linear(8, 4), x, y)
        known = torch.cat([t.constants[0] for t in c.fixed]).double()
        std = known.std(0)
        assert c["size of the inputs"].value == pytest.approx(float(known.square().mean(1).sqrt().median()), rel=1e-6)
        assert c["offset of the inputs"].value == pytest.approx(float((known.mean(0).abs() / std).median()), rel=1e-6)
        spread = float(std.quantile(0.9) / std.quantile(0.1))
        assert c["spread of the inputs"].value == pytest.approx(spread, rel=1e-6)

    def test_tokens_have_no_size(self, tmp_path):
        x, y = torch.randint(30, (400, 6)), torch.randint(4, (400,))
        model = nn.Sequential(nn.Embedding(30, 8), nn.Flatten(), nn.Linear(48, 4))
        c = self.begun(tmp_path, model, x, y)
        assert c["size of the inputs"].value == 0
        assert c["scale of the inputs"].value < 1

    def test_the_constant_part_of_outputs(self, tmp_path):
        x, y = blobs(400)
        model = nn.Linear(8, 4)
        with torch.no_grad():
            model.bias[0] = 1e4
        assert self.begun(tmp_path, model, x, y)["constant part of the outputs"].value > 0.99


class TestData:
    def of(self, folder, parts, model=None, loss=classify):
        model = model or nn.Linear(parts[0][0].shape[1], 4)
        return case(
            recorded(folder, train(model, torch.optim.SGD(model.parameters(), lr=1e-3), parts, len(parts), loss))
        )

    def test_batches_that_are_drawn_and_batches_that_are_sorted(self, tmp_path):
        x, y = blobs(640)
        drawn = [(x[k::20], y[k::20]) for k in range(20)]
        order = y.argsort()
        in_order = [(x[order][k : k + 32], y[order][k : k + 32]) for k in range(0, 640, 32)]
        assert self.of(tmp_path / "a", drawn)["mixture of a batch"].value == pytest.approx(1, abs=0.05)
        assert self.of(tmp_path / "b", in_order)["mixture of a batch"].value < 0.3

    def test_the_longest_row(self, tmp_path):
        x, y = torch.nn.functional.normalize(torch.randn(640, 8), dim=1), torch.randint(4, (640,))
        x[5] *= 50
        found = self.of(tmp_path, [(x[k::20], y[k::20]) for k in range(20)])["longest row"]
        assert found.value == pytest.approx(50, rel=1e-3)

    def test_neighbours_tell_what_a_nearest_neighbour_classifier_would(self, tmp_path):
        x, y = blobs(640, noise=2.0)
        parts = [(x[k::20], y[k::20]) for k in range(20)]
        c = self.of(tmp_path / "a", parts)
        rows = torch.cat([t.constants[0] for t in c.tapes[-30:]])
        labels = torch.cat([p[1] for p in parts])
        known = {
            tuple(row.tolist()): int(label) for row, label in zip(torch.cat([p[0] for p in parts]), labels, strict=True)
        }
        labels = torch.tensor([known[tuple(row.tolist())] for row in rows])
        scaled = ((rows - rows.mean(0)) / rows.std(0)).numpy()
        near = NearestNeighbors(n_neighbors=6).fit(scaled).kneighbors(scaled, return_distance=False)[:, 1:]
        agree = float((labels[torch.from_numpy(near)] == labels[:, None]).float().mean())
        p = torch.bincount(labels) / len(labels)
        chance = float(p.square().sum())
        assert c["what neighbours tell"].value == pytest.approx((agree - chance) / (1 - chance), abs=1e-3)
        mixed = [(x, y[torch.randperm(len(y))]) for x, y in parts]
        assert abs(self.of(tmp_path / "b", mixed)["what neighbours tell"].value) < 0.1

    def test_a_loss_that_is_summed(self, tmp_path):
        x, y = blobs(320)
        parts = [(x[k::10], y[k::10]) for k in range(10)]

        def summed(model, x, y):
            return F.cross_entropy(model(x), y, reduction="sum")

        def times(model, x, y):
            return F.cross_entropy(model(x), y) * len(y)

        for k, (loss, scale) in enumerate([(summed, 1), (times, 1), (classify, 1 / 32)]):
            found = self.of(tmp_path / str(k), parts, loss=loss)["scale of the loss"]
            assert found.value == pytest.approx(scale, rel=1e-5)
            assert found.n == 32


def test_the_gradient_of_the_first_layer_over_that_of_the_last(tmp_path):
    model = mlp()
    x, y = blobs(64)
    c = case(recorded(tmp_path, train(model, torch.optim.SGD(model.parameters(), lr=1e-9), [(x, y)], 4)))
    classify(model, x, y).backward()
    first, last = (m.weight.grad.square().mean().sqrt() for m in (model[0], model[-1]))
    assert c["gradient of the first layer"].value == pytest.approx(float(first / last), rel=1e-2)


def test_the_curvature_of_a_sparse_embedding(tmp_path):
    """Its gradient is sparse, and so may be what a Hessian product makes of it."""
    values = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(12, 4, sparse=sparse), nn.Flatten(), nn.Linear(12, 4))
        x, y = torch.randint(12, (64, 3)), torch.randint(4, (64,))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        values.append(
            case(recorded(tmp_path / str(sparse), train(model, optimizer, [(x, y)], 4)))["curvature × rate"].value
        )
    assert values[1] == pytest.approx(values[0], rel=1e-3)
