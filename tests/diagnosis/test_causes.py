"""Each cause in a small training, beside the same training without it: named there, and silent here."""

import pytest
import torch
from runs import blobs, classify, codes, recorded
from torch import nn
from torch.nn import functional as F

from unstuck.diagnosis import PROVED, SHOWN, SUSPECT, diagnose


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Task:
    """Blobs to be classified by a network of some depth, and what may go wrong with it."""

    def __init__(self, *, depth=1, width=32, act=nn.ReLU, features=8, drop=0.0, norm=False, size=32, rows=2000):
        layers = []
        for k in range(depth):
            layers += [nn.Linear(width if k else features, width), act()]
            layers += [nn.BatchNorm1d(width)] if norm else []
            layers += [nn.Dropout(drop)] if drop else []
        self.model = nn.Sequential(*layers, nn.Linear(width, 4))
        self.x, self.y = blobs(rows, features=features)
        self.x = self.x / self.x.std()
        self.size, self.loss, self.steps = size, classify, 200
        self.kind, self.options, self.clip = torch.optim.SGD, {"lr": 0.1}, 0.0
        self.schedule, self.every = None, 1

    def matrices(self):
        return [m for m in self.model if isinstance(m, nn.Linear)]

    def run(self, folder):
        return diagnose(self.recorded(folder))

    def recorded(self, folder):
        parts = [(self.x[k : k + self.size], self.y[k : k + self.size]) for k in range(0, len(self.x), self.size)]

        def loop():
            optimizer = self.kind(self.model.parameters(), **self.options)
            schedule = self.schedule(optimizer) if self.schedule else None
            for k in range(self.steps):
                x, y = parts[k % len(parts)]
                optimizer.zero_grad()
                self.loss(self.model, x, y).backward()
                if self.clip:
                    nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
                optimizer.step()
                if schedule and k % self.every == 0:
                    schedule.step()

        return recorded(folder, loop)


def clipped(t, norm):
    t.clip = norm
    t.options["lr"] = 0.05


def decayed(t, decay):
    t.options["weight_decay"] = decay


def with_momentum(t, beta):
    t.options = {"lr": 0.3, "momentum": beta}


def lost_early(t, times):
    t.schedule = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, times, 1e-3)
    t.every = 5


def lost_at_once(t, times):
    t.schedule = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, times, 1e-3)


def scaled_inputs(t, factor):
    t.x = factor * (t.x + 1)
    t.options["lr"] = 0.3


def large(t, gain):
    for m in t.matrices():
        nn.init.normal_(m.weight, std=gain / m.in_features**0.5)


def growing(t, gain):
    t.options["lr"] = 1e-3 if gain > 2 else 0.1
    for m in t.matrices():
        nn.init.orthogonal_(m.weight, gain=gain)


def biased(t, value):
    with torch.no_grad():
        t.model[-1].bias[0] = value
    t.options["lr"] = 0.02


def alike(t, value):
    for m in t.matrices():
        if value:
            nn.init.constant_(m.weight, value)
            nn.init.zeros_(m.bias)


def summed(t, rows):
    t.options["lr"] = 0.3
    if rows:
        t.loss = lambda model, x, y: F.cross_entropy(model(x), y, reduction="sum")


def far_rows(t, factor):
    t.options["lr"] = 0.3
    t.x[::40] *= factor


def dropped(t, p):
    for m in t.model:
        if isinstance(m, nn.Dropout):
            m.p = p


def uneven(t, decades):
    t.x = t.x * torch.logspace(-decades, 0, t.x.shape[1])


def small(t, gain):
    t.options["lr"] = 0.05
    large(t, gain)
    for m in t.matrices():
        nn.init.zeros_(m.bias)


def far_out(t, gain):
    t.options["lr"] = 0.05
    for m in t.matrices()[:-1]:
        nn.init.normal_(m.weight, std=gain / m.in_features**0.5)


def any_labels(t, share):
    t.options["lr"] = 0.3
    rows = torch.rand(len(t.y)) < share
    t.y[rows] = t.y[rows][torch.randperm(int(rows.sum()))]


def slow_statistics(t, momentum):
    t.x = 3 * t.x + 4
    for m in t.model:
        if isinstance(m, nn.BatchNorm1d):
            m.momentum = momentum


def shrinking(t, factor):
    plain = t.loss

    def loss(model, x, y):
        x.mul_(factor)
        return plain(model, x, y)

    t.loss = loss


def by_hand(t, factor):
    def loss(model, x, y):
        z = factor * model(x)
        return (z.exp().sum(1).log() - z.gather(1, y[:, None])[:, 0]).mean()

    t.loss = loss


def root(t, least):
    plain = t.loss

    def loss(model, x, y):
        spread = model[0].bias.square() * (torch.arange(32) > 5)
        return plain(model, x, y) + 1e-3 * (spread + least).sqrt().sum()

    t.loss = loss


def whole_batches(t, times):
    t.size, t.steps = times * t.size, t.steps // times
    t.options["lr"] = 0.2


def by_class(t, is_sorted):
    t.options["lr"] = 0.3
    if is_sorted:
        order = t.y.argsort(stable=True)
        t.x, t.y = t.x[order], t.y[order]


def left_over(t, columns):
    t.x[:, columns:] = 0


def with_epsilon(t, eps):
    t.kind, t.options = torch.optim.Adam, {"lr": 3e-3, "eps": eps}


def slowly(t, rate):
    t.options["lr"] = rate


def nothing(t, _):
    pass


TRAININGS = {  # by code: how the task is built, what is done to it, the value that harms and one that does not
    "clip-too-strong": ({}, clipped, 1e-3, 10.0),
    "weight-decay-too-large": ({"depth": 2}, decayed, 1.0, 1e-4),
    "lr-decayed-early": ({}, lost_early, 2, 10**6),
    "scheduler-misused": ({}, lost_at_once, 8, 10**6),
    "inputs-unscaled": ({"depth": 2}, scaled_inputs, 100.0, 1.0),
    "init-too-large": ({"depth": 3}, large, 15.0, 1.0),
    "exploding-gradient": ({"depth": 12}, growing, 2.2, 1.3),
    "output-bias": ({}, biased, 100.0, 0.0),
    "constant-init": ({"depth": 2}, alike, 0.05, 0.0),
    "loss-summed": ({"depth": 2}, summed, True, False),
    "momentum-too-high": ({"depth": 2}, with_momentum, 0.999, 0.5),
    "outliers": ({"depth": 2}, far_rows, 1e4, 1.0),
    "dropout-too-high": ({"drop": 0.5, "depth": 2}, dropped, 0.95, 0.1),
    "ill-conditioned": ({}, uneven, 4.0, 0.0),
    "init-too-small": ({"depth": 4}, small, 0.15, 1.4),
    "saturated": ({"depth": 2, "act": nn.Tanh}, far_out, 60.0, 1.0),
    "labels-shuffled": ({"rows": 6000}, any_labels, 1.0, 0.0),
    "batchnorm-stale": ({"norm": True}, slow_statistics, 1e-3, 0.1),
    "data-corrupted-in-place": ({}, shrinking, 0.3, 1.0),
    "forward-overflow": ({}, by_hand, 300.0, 1.0),
    "non-finite-gradient": ({}, root, 0.0, 1e-6),
    "vanishing-gradient": ({"depth": 8, "act": nn.Sigmoid}, nothing, None, None),
    "batch-too-large": ({"depth": 2}, whole_batches, 20, 1),
    "not-shuffled": ({"depth": 2}, by_class, True, False),
    "inputs-empty": ({"depth": 2}, left_over, 1, 8),
    "adam-constants": ({"depth": 2}, with_epsilon, 0.3, 1e-8),
    "lr-too-small": ({"depth": 2}, slowly, 1e-3, 0.3),
}


def trained_with(code, value, folder):
    build, change, *_ = TRAININGS[code]
    t = Task(**build)
    change(t, value)
    return t.run(folder)


@pytest.mark.parametrize("code", TRAININGS)
def test_a_cause_is_named(code, tmp_path):
    found = trained_with(code, TRAININGS[code][2], tmp_path)
    assert codes(found)[:1] == [code]
    rivals = [r.code for r in found.findings[0].ruled_out]
    assert len(set(rivals)) == len(rivals)
    if code in ("init-too-large", "exploding-gradient", "output-bias", "saturated"):
        assert found.findings[0].step == 1
    assert found.findings[0].word in ((SUSPECT,) if code == "labels-shuffled" else (PROVED, SHOWN))


@pytest.mark.parametrize(
    "code", [code for code in TRAININGS if code not in ("vanishing-gradient", "exploding-gradient")]
)
def test_the_same_training_without_it_is_silent(code, tmp_path):
    assert codes(trained_with(code, TRAININGS[code][3], tmp_path)) == []


@pytest.mark.parametrize("depth", [2, 3])
def test_a_rate_too_small_by_ten_thousand_times(depth, tmp_path):
    t = Task(depth=depth)
    slowly(t, 1e-5)
    assert codes(t.run(tmp_path)) == ["lr-too-small"]


RISING_AGAIN = {
    "restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 100),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.3, 200, div_factor=1e4),
    "triangles": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.3, 10),
    "a cosine as long as the run": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 200),
}


def test_an_exponential_that_overflows_in_any_type_is_the_fault_itself(tmp_path):
    t = Task()
    by_hand(t, 3000.0)  # e^710 is too large for float64
    assert codes(t.run(tmp_path)) == ["forward-overflow"]


def test_a_cosine_stepped_beyond_its_end(tmp_path):
    t = Task()
    t.schedule = lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10)
    found = t.run(tmp_path)
    assert codes(found) == ["scheduler-misused"]
    assert "every 20 steps" in found.findings[0].claim


@pytest.mark.parametrize("name", RISING_AGAIN)
def test_a_rate_that_is_meant_to_rise_again(name, tmp_path):
    t = Task()
    t.options["lr"], t.schedule, t.steps = 0.3, RISING_AGAIN[name], 400 if name == "restarts" else 200
    assert codes(t.run(tmp_path)) == []


@pytest.mark.parametrize("change", ["momentum", "dropout"])
def test_a_setting_that_moves_with_the_steps_is_no_setting(change, tmp_path):
    """Statistics as a plain mean over all batches, a dropout that a schedule raises: numbers of their own each step."""
    t = Task(norm=True)
    t.model[2].momentum = None if change == "momentum" else 0.1
    plain, steps = t.loss, iter(range(10**6))

    def loss(model, x, y):
        p = 0.9 - 0.4 / (1 + next(steps)) if change == "dropout" else 0.0
        return plain(model, x, y) if change == "momentum" else F.cross_entropy(model[3](F.dropout(model[:3](x), p)), y)

    t.loss = loss
    assert codes(t.run(tmp_path)) == []


def test_a_weight_of_the_loss_that_shrinks_is_no_corrupted_input(tmp_path):
    t, left = Task(), iter(range(10**6))

    def loss(model, x, y):
        weight = torch.rand(len(x)) * 0.97 ** next(left)
        return (weight * F.cross_entropy(model(x), y, reduction="none")).sum() / weight.sum()

    t.loss = loss
    assert codes(t.run(tmp_path)) == []


def test_a_momentum_that_never_ends(tmp_path):
    t = Task(depth=2)
    with_momentum(t, 1.0)
    found = t.run(tmp_path)
    assert codes(found)[:1] == ["momentum-too-high"]
    assert "for ever" in found.findings[0].claim
