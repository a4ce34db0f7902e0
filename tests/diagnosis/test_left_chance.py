"""Causes that a run has left behind, or that only a part of a network suffers from: named from how the run began."""

import math
from dataclasses import replace

import pytest
import torch
from runs import batches, blobs, case, classify, codes, fit, mlp, of_losses, recorded, train
from torch import nn
from torch.nn import functional as F

from unstuck.diagnosis import MEASURES, PROVED, SHOWN, Case, Evidence, diagnose
from unstuck.diagnosis import _remedies as remedies
from unstuck.diagnosis._hypothesis import symptom
from unstuck.diagnosis._structure import dead_rows, squashing
from unstuck.diagnosis._trial import fork
from unstuck.record import Run
from unstuck.record._log import Log


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def deep(depth, act, *, gain=None, width=32):
    """Layers of one width; with a gain their weights are drawn anew and their biases are 0."""
    layers = []
    for k in range(depth):
        layers += [nn.Linear(width if k else 8, width), act()]
    model = nn.Sequential(*layers, nn.Linear(width, 4))
    for m in model if gain is not None else ():
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, std=gain / m.in_features**0.5)
            nn.init.zeros_(m.bias)
    return model


def scaled_blobs():
    x, y = blobs(1984)
    return batches(x / x.std(), y, 32)


def tried(found):
    """The arms of the first finding's trial that are remedies, by name."""
    return {a.remedy: a for a in found.findings[0].trial.arms if a.role == "remedy"}


class TestSpikesOfTheRate:
    def spiked(self, hot):
        """The rate is `hot` times as high for the first twenty steps."""
        model = deep(5, nn.ReLU)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        parts = batches(*blobs(2048), 32)

        def loop():
            for k in range(120):
                optimizer.param_groups[0]["lr"] = 3e-3 * (hot if k < 20 else 1)
                optimizer.zero_grad()
                classify(model, *parts[k % len(parts)]).backward()
                optimizer.step()

        return loop

    def test_a_network_that_they_destroyed_does_not_diverge_any_more(self, tmp_path):
        run = recorded(tmp_path, self.spiked(400))
        found = diagnose(run)
        assert codes(found)[:1] == ["killed"]
        c = case(run)
        assert c["rise of the loss"].value > 10
        assert c["loss over chance"].value > 2.5  # it has not come back: the rate has
        assert c["fall of the rate"].value == pytest.approx(400)

    @pytest.mark.parametrize(
        ("level", "high", "fall", "diverged"),
        [
            (2.4, 3.0, 1.0, False),
            (2.6, 3.0, 1.0, True),
            (9.0, 2.4, 1.0, False),
            (9.0, 9.0, 9.9, True),
            (9.0, 9.0, 10.0, False),
        ],
    )
    def test_a_loss_that_blew_up_is_back_by_its_level_or_by_its_rate(self, tmp_path, level, high, fall, diverged):
        """By the mean of the recent losses, or by the upper end of most of them where a few lie far off."""
        model = mlp()
        run = recorded(tmp_path, train(model, torch.optim.SGD(model.parameters(), lr=0.1), scaled_blobs()[:8], 8))
        known = {
            "rise of the loss": Evidence.exact("rise of the loss", 100.0, ""),
            "loss over chance": Evidence("loss over chance", level, 1.0, high, 50, ""),
            "fall of the rate": Evidence.exact("fall of the rate", fall, ""),
        }
        c = Case(run, {**MEASURES, **{name: lambda _, e=e: e for name, e in known.items()}})
        assert (symptom(c) == "diverged") is diverged

    def course(self, folder, losses, rates):
        log = Log(folder)
        log.write("start", version=1, script="x.py", argv=[])
        for k, (loss, rate) in enumerate(zip(losses, rates, strict=True), 1):
            log.write("step", step=k, time=0.01 * k, loss=loss, lr=rate)
        log.close()
        return case(Run(folder))["fall of the rate"]

    def test_the_fall_of_the_rate_is_that_since_the_worst_loss(self, tmp_path):
        rates = [0.1] * 5 + [0.4] * 5 + [0.002] * 10
        assert self.course(tmp_path / "a", [1.0] * 6 + [50.0] + [2.0] * 13, rates).value == pytest.approx(200)
        assert self.course(tmp_path / "b", [50.0] + [2.0] * 19, rates).value == pytest.approx(50)
        assert self.course(tmp_path / "c", [1.0] * 6 + [50.0] + [2.0] * 13, rates[:10] + [0.0] * 10).value == math.inf
        late = [1.0] * 10 + [50.0] + [2.0] * 9  # the last step at the high rate shows in the loss of the next
        assert self.course(tmp_path / "late", late, rates).value == pytest.approx(200)
        assert self.course(tmp_path / "d", [1.0] * 6 + [math.nan] + [2.0] * 13, rates) is None
        assert case(of_losses(tmp_path / "e", [1.0, 2.0]))["fall of the rate"] is None


class TestFlatActivations:
    def with_bias(self, folder, bias, *, outs=4, steps=200, act=nn.ReLU):
        model = nn.Sequential(nn.Linear(4, 8), act(), nn.Linear(8, outs), nn.Sigmoid())
        nn.init.constant_(model[2].bias, bias)
        x = torch.randn(512, 4)
        y = (x @ torch.randn(4, outs) > 0).float()
        return recorded(
            folder, train(model, torch.optim.SGD(model.parameters(), lr=0.05), batches(x, y, 32), steps, fit)
        )

    def test_one_flat_output_is_no_saddle(self, tmp_path):
        assert "saddle" not in codes(diagnose(self.with_bias(tmp_path, 5.0, outs=1, act=nn.Tanh)))

    def test_a_sigmoid_whose_bias_began_far_up_is_on_a_plateau(self, tmp_path):
        run = self.with_bias(tmp_path, 5.0)
        assert case(run)["saturation"].value < 0.1  # its slope is small, and not yet nothing
        found = diagnose(run)
        assert codes(found)[:1] == ["plateau"]
        assert found.findings[0].word == PROVED

    @pytest.mark.parametrize("act", [nn.Sigmoid, nn.Tanh])
    def test_they_are_those_whose_slope_is_below_a_tenth_of_the_largest(self, tmp_path, act):
        model = nn.Sequential(nn.Linear(8, 16), act(), nn.Linear(16, 4))
        nn.init.normal_(model[0].weight)
        parts = scaled_blobs()[:6]
        c = case(recorded(tmp_path, train(model, torch.optim.SGD(model.parameters(), lr=0.0), parts, 6)))
        z = model[0](torch.cat([t.constants[0] for t in c.fixed])).detach().requires_grad_()
        (slope,) = torch.autograd.grad(model[1](z).sum(), z)
        (largest,) = torch.autograd.grad(model[1](zero := torch.zeros(1, requires_grad=True)), zero)
        assert c["flat activations"].value == pytest.approx(float((slope < 0.1 * largest).double().mean()), abs=1e-6)
        assert 0.1 < c["flat activations"].value < 0.9

    def test_a_layer_that_began_saturated_is_no_exploding_gradient(self, tmp_path):
        model = deep(2, nn.Tanh)
        for m, gain in zip((model[0], model[2], model[4]), (1, 40, 8), strict=True):
            nn.init.normal_(m.weight, std=gain / m.in_features**0.5)
        run = recorded(tmp_path, train(model, torch.optim.SGD(model.parameters(), lr=0.05), scaled_blobs(), 60))
        c = case(run)
        assert c["loss at the start"].value > 2.8
        assert c["signal at the start"].value > 11
        assert c["gain of the first layer"].value < 4
        found = diagnose(run)
        assert codes(found)[:1] == ["saturated"]
        assert found.findings[0].word in (PROVED, SHOWN)


class TestBegunTooSmall:
    def begun(self, folder, gain, depth, rate, steps=200):
        model = deep(depth, nn.ReLU, gain=gain)
        loop = train(model, torch.optim.SGD(model.parameters(), lr=rate), scaled_blobs(), steps)
        return recorded(folder, loop)

    @pytest.mark.parametrize(("code", "gain", "rate"), [("saddle", 1e-3, 0.1), ("init-too-small", 0.02, 0.04)])
    def test_what_a_run_has_left_late_is_named_by_how_it_began(self, tmp_path, code, gain, rate):
        run = self.begun(tmp_path, gain, 1, rate)
        found, c = diagnose(run), case(run)
        assert codes(found) == [code]
        assert found.findings[0].word == PROVED
        assert symptom(c) in ("slow", "stuck")
        assert c["input dependence"].value > 0.5
        assert c["signal at the start"].value == pytest.approx(gain, rel=0.2)
        assert "weights initialised afresh" in [a.remedy for a in found.findings[0].trial.accepted]

    @pytest.mark.parametrize(("gain", "rate"), [(1e-3, 0.5), (0.02, 0.25)])
    def test_a_run_that_left_it_at_once_is_silent_though_weights_afresh_would_gain(self, tmp_path, gain, rate):
        run = self.begun(tmp_path, gain, 1, rate, steps=60)
        c = case(run)
        assert 0 < c["steps at chance"].value < 40
        assert c["loss over chance"].value > 0.5
        assert codes(diagnose(run)) == []

    def test_a_rate_that_made_up_for_small_weights_is_lowered_with_weights_afresh(self, tmp_path):
        found = diagnose(self.begun(tmp_path, 0.15, 4, 1.0, steps=100))
        assert codes(found)[:1] == ["init-too-small"]
        assert found.findings[0].word == PROVED
        arms = tried(found)
        assert not arms["weights initialised afresh"].accepted
        assert arms["weights initialised afresh and learning rate 0.1 (÷ 10)"].accepted

    def test_the_steps_at_chance_are_those_before_the_loss_first_fell(self, tmp_path):
        run = self.begun(tmp_path, 1e-3, 1, 0.1)
        c = case(run)
        y = torch.cat([y for _, y in scaled_blobs()])
        p = torch.bincount(y) / len(y)
        chance = float(-(p * p.log()).sum())
        losses = torch.tensor(run.series("loss")[1]).view(-1, 5).mean(1)
        first = int((losses < 0.9 * chance).nonzero()[0])
        assert c["steps at chance"].value == pytest.approx(5 * first, abs=5)
        assert 40 < c["steps at chance"].value < 200
        assert (
            case(of_losses(tmp_path / "log", [1.0] * 50))["steps at chance"] is None
        )  # what guessing earns is not known

    def test_several_remedies_at_once_ask_for_as_much_as_the_first(self):
        seen = []
        one, two = (remedies.Remedy(name, lambda copy, name=name: seen.append(name)) for name in ("one", "two"))
        both = remedies.together(replace(one, least=-0.7), replace(two, least=-0.1))
        both.apply(None)
        assert (both.name, both.least, seen) == ("one and two", -0.7, ["one", "two"])


class TestPartlyDead:
    def dying(self, share, *, rate=0.02, steps=150):
        """The second layer's first units never fire."""
        model = deep(2, nn.ReLU)
        with torch.no_grad():
            model[2].bias[: int(share * 32)] = -50.0
        return model, train(model, torch.optim.SGD(model.parameters(), lr=rate), scaled_blobs(), steps)

    def test_a_layer_most_of_whose_units_are_dead_is_told(self, tmp_path):
        run = recorded(tmp_path, self.dying(0.75)[1])
        assert 0.6 < case(run)["dead units"].value < 0.9
        found = diagnose(run)
        assert codes(found)[:1] == ["dead-units"]
        assert found.findings[0].word == PROVED
        assert [a.remedy for a in found.findings[0].trial.accepted] == ["dead units initialised afresh"]

    def test_one_of_which_half_are_dead_is_not(self, tmp_path):
        run = recorded(tmp_path, self.dying(0.5)[1])
        assert 0.4 < case(run)["dead units"].value < 0.6
        assert "dead-units" not in codes(diagnose(run))

    def test_only_the_dead_units_are_drawn_anew(self, tmp_path):
        model, loop = self.dying(0.75, steps=8)
        c = case(recorded(tmp_path, loop))
        x = torch.cat([t.constants[0] for t in c.fixed])
        with torch.no_grad():
            hidden = model[:2](x)
            dead = {0: ~(hidden > 0).any(0), 2: ~(model[2:4](hidden) > 0).any(0)}
        found = dead_rows(c)
        assert {k: v.tolist() for k, v in found.items()} == {k + j: dead[k].tolist() for k in (0, 2) for j in range(2)}
        copy = fork(c.state)
        before = [w.detach().clone() for w in copy.weights]
        remedies.revive(found).apply(copy)
        for k, (old, new) in enumerate(zip(before, copy.weights, strict=True)):
            moved = (old != new).flatten(1).all(1) if old.dim() > 1 else old != new
            same = (old == new).flatten(1).all(1) if old.dim() > 1 else old == new
            assert torch.equal(moved, found.get(k, torch.zeros(len(old), dtype=torch.bool)))
            assert torch.equal(same, ~moved)
        fresh = copy.weights[2].detach()[found[2]]
        assert float(fresh.std()) == pytest.approx(math.sqrt(2 / 32), rel=0.1)
        assert not copy.weights[3].detach()[found[3]].any()


class TestVanishedGradients:
    def sunk(self, *, act=nn.Sigmoid, depth=4, last=None, loss=classify, steps=200):
        model = deep(depth, act, gain=1.0)
        if last is not None:
            model.append(last)
        return model, train(model, torch.optim.Adam(model.parameters(), lr=3e-3), scaled_blobs(), steps, loss)

    def test_a_run_that_has_left_chance_late_is_named_by_how_it_began(self, tmp_path):
        run = recorded(tmp_path, self.sunk()[1])
        found, c = diagnose(run), case(run)
        assert codes(found) == ["vanishing-gradient"]
        (first,) = found.findings
        assert first.word == PROVED
        assert [a.remedy for a in first.trial.accepted] == [
            "ReLU in the place of tanh or sigmoid and weights initialised afresh"
        ]
        assert c["input dependence"].value > 0.5
        assert c["squashing layers"].value == 4

    def test_the_gradient_at_the_start_is_that_of_the_first_weights(self, tmp_path):
        model, loop = self.sunk(steps=20)
        first = [p.detach().clone() for p in model.parameters()]
        c = case(recorded(tmp_path, loop))
        for p, w in zip(model.parameters(), first, strict=True):
            p.data.copy_(w)
        model.zero_grad()
        sum(classify(model, *t.constants) for t in c.fixed).backward()
        sizes = [float(model[k].weight.grad.square().mean().sqrt()) for k in (0, -1)]
        assert c["gradient of the first layer at the start"].value == pytest.approx(sizes[0] / sizes[1], rel=1e-3)

    def test_rectified_units_take_the_place_of_those_between_the_layers_alone(self, tmp_path):
        def loss(model, x, y):
            return F.mse_loss(model(x), F.one_hot(y, 4).float())

        _, loop = self.sunk(depth=2, act=nn.Tanh, last=nn.Sigmoid(), loss=loss, steps=8)
        c = case(recorded(tmp_path, loop))
        program = c.fixed[-1].program
        assert [program.instructions[k].name for k in squashing(program)] == ["tanh", "tanh"]
        copy = fork(c.state)
        remedies.rectified(c).apply(copy)
        tape = copy.altered(c.fixed[-1])
        x, y = next(p for p in scaled_blobs() if torch.equal(p[0], tape.constants[0]))
        w = [p.detach() for p in copy.weights]
        hidden = F.linear(F.linear(x, w[0], w[1]).relu(), w[2], w[3]).relu()
        by_hand = F.mse_loss(F.linear(hidden, w[4], w[5]).sigmoid(), F.one_hot(y, 4).float())
        torch.testing.assert_close(tape.replay(w), by_hand)
        for k in (0, 2, 4):
            assert float(w[k].std()) == pytest.approx(math.sqrt(2 / w[k].shape[1]), rel=0.25)
            assert not w[k + 1].any()
