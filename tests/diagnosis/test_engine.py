"""Whole diagnoses of the smallest loops that show a fault, and of healthy ones that only look like it."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from runs import batches, blobs, classify, codes, fit, mlp, of_losses, recorded, train, verdict
from torch import nn

from unstuck.diagnosis import (
    CANNOT_TELL,
    HYPOTHESES,
    PROVED,
    SHOWN,
    Diagnosis,
    Evidence,
    Hypothesis,
    Prediction,
    Remedy,
    diagnose,
    dumps,
)
from unstuck.diagnosis._validation import CHECKS


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def parts(n=160, size=16):
    return batches(*blobs(n), size)


class TestExactFaults:
    def test_gradients_that_are_never_cleared(self, tmp_path):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

        def loop():
            for x, y in parts() * 2:
                classify(model, x, y).backward()
                optimizer.step()

        found = verdict(tmp_path, loop)
        assert codes(found) == ["zero-grad-missing"]
        assert "test_engine.py" in found.findings[0].where

    def test_parameters_that_no_optimiser_has(self, tmp_path):
        model = mlp()
        found = verdict(tmp_path, train(model, torch.optim.SGD(model[2].parameters(), lr=0.1), parts(), 20))
        assert codes(found) == ["parameters-not-optimised"]
        assert "0.weight" in found.findings[0].where and "0.bias" in found.findings[0].where

    @pytest.mark.parametrize(
        "cut",
        [
            lambda h: h.detach(),
            lambda h: h.data,
            lambda h: torch.tensor(h.tolist()),
            lambda h: torch.from_numpy(h.detach().numpy()),
        ],
        ids=["detach", "data", "tolist", "numpy"],
    )
    def test_a_graph_that_is_cut(self, tmp_path, cut):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def loss(model, x, y):
            return F.cross_entropy(model[2](cut(model[:2](x))), y)

        found = verdict(tmp_path, train(model, optimizer, parts(), 20, loss))
        assert codes(found) == ["graph-cut"]
        assert found.findings[0].evidence[0].value == 2  # the weights and biases before it

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_data_that_are_not_finite(self, tmp_path, bad):
        x, y = blobs(160)
        x[37, 2] = bad
        model = mlp()
        found = verdict(tmp_path, train(model, torch.optim.SGD(model.parameters(), lr=0.1), batches(x, y, 16), 10))
        assert codes(found) == ["non-finite-data"]
        assert found.findings[0].step == 3
        assert "row 5" in found.findings[0].where  # 37 = 2 · 16 + 5

    def test_every_exact_fault_is_named_once(self, tmp_path):
        model = mlp()
        optimizer = torch.optim.SGD(model[2].parameters(), lr=1e-3)

        def loop():
            for x, y in parts() * 2:
                classify(model, x, y).backward()
                optimizer.step()

        found = verdict(tmp_path, loop)
        assert sorted(codes(found)) == ["parameters-not-optimised", "zero-grad-missing"]
        assert all(f.word == SHOWN for f in found.findings)
        assert all("mend that first" in why for why in found.not_checked.values())


class TestHealthyLoops:
    """What people write, and what must not be taken for a fault."""

    def test_two_players_whose_gradients_mix(self, tmp_path):
        """The generator's backward() fills the discriminator's gradients, which nobody uses."""
        G, D = nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
        g, d = torch.optim.Adam(G.parameters(), lr=1e-3), torch.optim.Adam(D.parameters(), lr=1e-3)
        one, zero = torch.ones(16, 1), torch.zeros(16, 1)
        bce = F.binary_cross_entropy_with_logits

        def loop():
            for _ in range(30):
                fake = G(torch.randn(16, 3))
                D.zero_grad()
                (bce(D(torch.randn(16, 2)), one) + bce(D(fake.detach()), zero)).backward()
                d.step()
                G.zero_grad()
                bce(D(fake), one).backward()
                g.step()

        assert codes(verdict(tmp_path, loop)) == []

    def test_a_discriminator_that_wins(self, tmp_path):
        """The generator's loss rises to many times what the discriminator's began with."""
        G, D = nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))
        g, d = torch.optim.SGD(G.parameters(), lr=1e-4), torch.optim.Adam(D.parameters(), lr=0.05)
        one, zero = torch.ones(16, 1), torch.zeros(16, 1)
        bce = F.binary_cross_entropy_with_logits
        last = []

        def loop():
            for _ in range(60):
                fake = G(torch.randn(16, 3))
                d.zero_grad()
                (bce(D(5 + torch.randn(16, 2)), one) + bce(D(fake.detach()), zero)).backward()
                d.step()
                g.zero_grad()
                loss = bce(D(fake), one)
                loss.backward()
                g.step()
                last.append(loss.item())

        assert codes(verdict(tmp_path, loop)) == []
        assert last[-1] > 7

    def test_two_optimisers_after_one_backward(self, tmp_path):
        model = mlp()
        both = [torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.Adam(model[2].parameters(), lr=0.01)]

        def loop():
            for x, y in parts() * 3:
                for optimizer in both:
                    optimizer.zero_grad()
                classify(model, x, y).backward()
                for optimizer in both:
                    optimizer.step()

        assert codes(verdict(tmp_path, loop)) == []

    def test_optimisers_that_take_turns(self, tmp_path):
        model = mlp()
        both = [torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.SGD(model[2].parameters(), lr=0.1)]

        def loop():
            for k, (x, y) in enumerate(parts() * 3):
                model.zero_grad()
                classify(model, x, y).backward()
                both[k % 2].step()

        assert codes(verdict(tmp_path, loop)) == []

    def test_gradient_accumulation(self, tmp_path):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def loop():
            for k, (x, y) in enumerate(parts() * 6, 1):
                (classify(model, x, y) / 4).backward()
                if k % 4 == 0:
                    optimizer.step()
                    optimizer.zero_grad()

        assert codes(verdict(tmp_path, loop)) == []

    @pytest.mark.parametrize("where", ["before", "after"])
    @pytest.mark.parametrize(
        "clear",
        [
            lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
            lambda model, optimizer: model.zero_grad(),
            lambda model, optimizer: [p.grad.zero_() for p in model.parameters() if p.grad is not None],
            lambda model, optimizer: [p.grad.fill_(0.0) for p in model.parameters() if p.grad is not None],
            lambda model, optimizer: [setattr(p, "grad", None) for p in model.parameters()],
        ],
        ids=["set_to_none=False", "model.zero_grad", "grad.zero_", "grad.fill_", "grad=None"],
    )
    def test_every_way_to_clear_gradients(self, tmp_path, clear, where):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def loop():
            for x, y in parts() * 2:
                if where == "before":
                    clear(model, optimizer)
                classify(model, x, y).backward()
                optimizer.step()
                if where == "after":
                    clear(model, optimizer)

        assert codes(verdict(tmp_path, loop)) == []

    def test_lbfgs(self, tmp_path):
        x, y = blobs(100)
        model = nn.Linear(8, 4)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)

        def closure():
            optimizer.zero_grad()
            loss = classify(model, x, y) + 1e-2 * model.weight.square().sum()
            loss.backward()
            return loss

        assert codes(verdict(tmp_path, lambda: [optimizer.step(closure) for _ in range(40)])) == []

    @pytest.mark.parametrize("how", ["requires_grad_", "no_grad", "not in the optimiser and detached"])
    def test_a_frozen_backbone(self, tmp_path, how):
        backbone, head = nn.Sequential(nn.Linear(8, 32), nn.ReLU()), nn.Linear(32, 4)
        if how == "requires_grad_":
            backbone.requires_grad_(False)

        def loss(model, x, y):
            with torch.set_grad_enabled(how == "requires_grad_"):
                features = backbone(x)
            return F.cross_entropy(head(features.detach() if "detached" in how else features), y)

        moved = head.parameters() if "detached" in how else [p for p in head.parameters() if p.requires_grad]
        found = verdict(tmp_path, train(head, torch.optim.SGD(moved, lr=0.1), parts(), 60, loss))
        assert codes(found) == []

    def test_a_target_network_and_a_stop_gradient(self, tmp_path):
        net, target = mlp(), mlp()

        def loss(model, x, y):
            return F.mse_loss(model(x), target(x).detach()) + F.mse_loss(model(x), model(x).detach() + 0.1)

        found = verdict(tmp_path, train(net, torch.optim.SGD(net.parameters(), lr=0.05), parts(), 60, loss))
        assert not {"graph-cut", "parameters-not-optimised"} & set(codes(found))

    def test_a_layer_that_only_some_steps_use(self, tmp_path):
        model = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])
        steps = iter(range(1000))

        def loss(model, x, y):
            return F.cross_entropy(model[next(steps) % 2](x), y)

        found = verdict(tmp_path, train(model, torch.optim.Adam(model.parameters(), lr=0.01), parts(), 60, loss))
        assert codes(found) == []


class TestOddRuns:
    def test_three_steps(self, tmp_path):
        model = mlp()
        found = verdict(tmp_path, train(model, torch.optim.SGD(model.parameters(), lr=0.1), parts(), 3))
        assert codes(found) == []
        assert found.steps == 3

    def test_a_run_too_short_for_a_standstill_says_so(self, tmp_path):
        model = mlp()
        found = verdict(tmp_path, train(model, torch.optim.SGD(model.parameters(), lr=1e-6), parts(), 50))
        assert codes(found) == []
        assert {"lr-too-small", "noise-floor"} <= set(found.not_checked)
        others = {code: because for code, because in found.not_checked.items() if code not in CHECKS}
        assert all("60 steps, and this run has" in because for because in others.values())
        assert {"saddle", "dead-units", "lr-diverges"} <= set(found.checked)
        assert found.status == 0

    def test_no_step_at_all(self, tmp_path):
        found = verdict(tmp_path, lambda: None)
        assert found.status == 2
        assert not found.checked and set(found.not_checked.values()) == {"no optimiser step was recorded"}

    def test_a_loss_of_zero(self, tmp_path):
        """A hinge that every example clears: nothing to learn, and nothing wrong."""
        model = nn.Linear(8, 1)
        nn.init.constant_(model.bias, 100.0)

        def loss(model, x, y):
            return (1 - model(x)).relu().mean()

        found = verdict(tmp_path, train(model, torch.optim.SGD(model.parameters(), lr=0.1), parts(), 60, loss))
        assert codes(found) == []

    def test_a_loss_that_is_exactly_zero_with_constant_outputs(self, tmp_path):
        model = nn.Linear(8, 2)
        nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)

        def loss(model, x, y):
            return F.mse_loss(model(x), torch.zeros(len(x), 2))

        found = verdict(tmp_path, train(model, torch.optim.SGD(model.parameters(), lr=0.1), parts(), 60, loss))
        assert codes(found) == []

    def test_losses_below_zero(self, tmp_path):
        """The likelihood of a narrow Gaussian."""
        x = 0.01 * torch.randn(160, 8)
        spread = nn.Parameter(torch.zeros(8))
        model = nn.ParameterList([spread])

        def loss(model, x, y):
            return -torch.distributions.Normal(0.0, spread.exp()).log_prob(x).mean()

        data = batches(x, torch.zeros(160), 16)
        found = verdict(tmp_path, train(model, torch.optim.Adam([spread], lr=0.02), data, 300, loss))
        assert codes(found) == []
        assert found.status == 0

    def test_a_negative_loss_of_a_network(self, tmp_path):
        model = mlp()

        def loss(model, x, y):
            return -model(x).softmax(1).gather(1, y[:, None]).mean()

        found = verdict(tmp_path, train(model, torch.optim.Adam(model.parameters(), lr=0.01), parts(), 200, loss))
        assert codes(found) == []

    def test_doubles(self, tmp_path):
        """Every measure of a stuck run in float64."""
        x, y = blobs(160)
        model = mlp().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        found = verdict(tmp_path, train(model, optimizer, batches(x.double(), y, 16), 200))
        assert codes(found)[:1] == ["lr-too-small"]

    def test_an_optimiser_that_cannot_be_rebuilt(self, tmp_path):
        class Own(torch.optim.SGD):
            def __init__(self, params, teacher):
                super().__init__(params, lr=teacher)

        model = mlp()
        found = verdict(tmp_path, train(model, Own(model.parameters(), 1e-6), parts(), 200))
        assert codes(found) == []
        assert "cannot be built again" in found.not_checked["lr-too-small"]

    def test_dead_units_under_an_optimiser_that_cannot_be_rebuilt(self, tmp_path):
        class Own(torch.optim.SGD):
            def __init__(self, params, teacher):
                super().__init__(params, lr=teacher)

        model = mlp()
        nn.init.constant_(model[0].bias, -50.0)
        found = verdict(tmp_path, train(model, Own(model.parameters(), 0.1), parts(), 200))
        assert codes(found)[:1] == ["dead-units"]
        assert found.findings[0].word == SHOWN
        assert "cannot be built again" in found.findings[0].advice


def test_an_epsilon_above_the_gradients_is_no_small_rate(tmp_path):
    torch.manual_seed(0)
    model = mlp()
    found = verdict(tmp_path, train(model, torch.optim.Adam(model.parameters(), lr=1e-3, eps=10.0), parts(), 200))
    assert codes(found) == ["adam-constants"]
    assert found.findings[0].word == PROVED
    assert "lr-too-small" in {r.code for r in found.findings[0].ruled_out}


class TestWithoutTapes:
    def compiled(self, tmp_path, loss):
        """A custom function in the path: it cannot be replayed."""

        class Own(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, g):
                return g.clone()

        model = mlp()

        def through(model, x, y):
            return loss(Own.apply(model(x)), y)

        return tmp_path, model, through

    def test_exact_faults_are_found_all_the_same(self, tmp_path):
        folder, model, loss = self.compiled(tmp_path, F.cross_entropy)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

        def loop():
            for x, y in parts() * 2:
                loss(model, x, y).backward()
                optimizer.step()

        assert "zero-grad-missing" in codes(verdict(folder, loop))

    def test_a_loss_at_chance_cannot_be_told(self, tmp_path):
        folder, model, loss = self.compiled(tmp_path, F.cross_entropy)
        found = verdict(folder, train(model, torch.optim.SGD(model.parameters(), lr=1e-6), parts(), 100, loss))
        assert codes(found) == ["unknown"]
        assert found.findings[0].word == CANNOT_TELL and found.status == 2
        assert "cannot be replayed" in found.findings[0].claim
        assert all(found.not_checked[h.code] for h in HYPOTHESES)

    def test_a_log_alone(self, tmp_path):
        assert codes(diagnose(of_losses(tmp_path / "stuck", [2.3] * 100))) == ["unknown"]
        assert codes(diagnose(of_losses(tmp_path / "fine", [2.3 * 0.97**k for k in range(100)]))) == []

    def test_the_loss_of_a_policy_is_not_at_chance_because_it_never_falls(self, tmp_path):
        """What guessing earns is not known of it, and it has left the level at which it began: upwards."""
        losses = torch.cat([torch.full((10,), 20.0), 27 + 4 * torch.randn(300)]).tolist()
        assert codes(diagnose(of_losses(tmp_path, losses))) == []


class TestResult:
    def stuck(self, tmp_path):
        model = mlp()
        nn.init.constant_(model[0].bias, -50.0)
        return recorded(tmp_path, train(model, torch.optim.SGD(model.parameters(), lr=0.1), parts(), 150))

    def test_findings_come_most_certain_first(self, tmp_path):
        words = [f.word for f in diagnose(self.stuck(tmp_path)).findings]
        assert words == sorted(words, key=["PROVED", "SHOWN", "SUSPECT", "CANNOT TELL"].index)

    def test_rivals_fall_by_a_number(self, tmp_path):
        first = diagnose(self.stuck(tmp_path)).findings[0]
        assert first.code == "dead-units"
        assert {"zero-init", "killed"} <= {r.code for r in first.ruled_out}
        assert all(any(c.isdigit() for c in r.because) or "remedy" in r.because for r in first.ruled_out)

    def test_every_code_is_checked_or_not(self, tmp_path):
        found = diagnose(self.stuck(tmp_path))
        named = {f.code for f in found.findings}
        assert {h.code for h in HYPOTHESES} <= set(found.checked) | set(found.not_checked) | named
        assert not set(found.checked) & set(found.not_checked)

    def test_json_keeps_everything(self, tmp_path):
        found = diagnose(self.stuck(tmp_path))
        text = dumps(found.to_json())
        again = Diagnosis.from_json(json.loads(text))
        assert again.findings == found.findings
        assert (again.checked, again.not_checked, again.steps) == (found.checked, found.not_checked, found.steps)
        assert dumps(again.to_json()) == text

    def test_numbers_that_are_not_finite_survive_json(self, tmp_path):
        model = mlp()
        run = recorded(tmp_path, train(model, torch.optim.SGD(model.parameters(), lr=1e5), parts(), 60, fit_labels))
        found = diagnose(run)
        assert codes(found)[:1] == ["lr-diverges"]
        text = dumps(found.to_json())
        assert "NaN" not in text and "Infinity" not in text
        assert Diagnosis.from_json(json.loads(text)).findings == found.findings

    def test_diagnosing_twice_says_the_same(self, tmp_path):
        run = self.stuck(tmp_path)
        assert dumps(diagnose(run).to_json()) == dumps(diagnose(run).to_json())

    def test_progress_goes_from_nothing_to_at_most_all(self, tmp_path):
        told = []
        diagnose(self.stuck(tmp_path), progress=lambda text, share: told.append((text, share)))
        assert told and all(text and 0 <= share <= 1 for text, share in told)


def fit_labels(model, x, y):
    return fit(model, x, F.one_hot(y, 4).float())


class TestExtension:
    def mine(self, low, high, **options):
        return Hypothesis(
            "too-warm",
            ("blind", "stuck"),
            (Prediction("temperature", low, high, "it is {shown} degrees"),),
            lambda case: f"{case['temperature'].value:.0f} degrees",
            "Open a window.",
            **options,
        )

    def diagnosed(self, tmp_path, hypothesis):
        model = mlp()
        run = recorded(tmp_path, train(model, torch.optim.SGD(model.parameters(), lr=1e-6), parts(), 100))
        measured = []

        def temperature(case):
            measured.append(case)
            return Evidence.exact("temperature", 31.0, "of the room")

        found = diagnose(run, hypotheses=[hypothesis], measures={"temperature": temperature})
        return found, measured

    def test_a_hypothesis_of_ones_own(self, tmp_path):
        found, measured = self.diagnosed(tmp_path, self.mine(30, 40, decisive=True))
        assert codes(found) == ["too-warm"]
        assert found.findings[0].claim == "31 degrees"
        assert "temperature" in [e.name for e in found.findings[0].evidence]
        assert len(measured) == 1  # a quantity is measured once

    @pytest.mark.parametrize("known", [True, False])
    def test_the_claim_goes_with_the_remedy_that_won(self, tmp_path, known):
        """Its own remedy does nothing; the one beside it wins, and proves the cause that it names, if any has it."""
        own = Remedy("nothing", lambda copy: None)
        beside = Remedy("a rate that moves", lambda copy: copy.scale_rate(1e5), proves="too-cold")
        mine = self.mine(30, 40, remedies=lambda case: [own, beside])
        other = replace(self.mine(0, 10), code="too-cold", advice="Close the window.")  # refuted by its own prediction
        model = mlp()
        run = recorded(tmp_path, train(model, torch.optim.SGD(model.parameters(), lr=1e-6), parts(), 100))
        measures = {"temperature": lambda case: Evidence.exact("temperature", 31.0, "of the room")}
        found = diagnose(run, hypotheses=[mine, other] if known else [mine], measures=measures)
        assert codes(found) == (["too-cold"] if known else [])
        if known:
            (cold,) = found.findings
            assert cold.word == PROVED
            assert cold.advice.startswith("Close the window. Tried on a copy")
            assert "a rate that moves" in cold.advice
            (warm,) = cold.ruled_out
            assert (warm.code, warm.because[:40]) == ("too-warm", "its own remedy does not help: nothing en")

    def test_its_prediction_rules_it_out(self, tmp_path):
        found, _ = self.diagnosed(tmp_path, self.mine(0, 30, decisive=True))
        assert codes(found) == []
        assert "too-warm" in found.checked

    def test_what_cannot_be_measured_is_not_checked(self, tmp_path):
        model = mlp()
        run = recorded(tmp_path, train(model, torch.optim.SGD(model.parameters(), lr=1e-6), parts(), 100))
        found = diagnose(run, hypotheses=[self.mine(0, 99)], measures={"temperature": lambda case: None})
        unheard = dict.fromkeys(CHECKS, "no validation was heard")
        assert found.not_checked == {"too-warm": "temperature cannot be measured in this run", **unheard}
