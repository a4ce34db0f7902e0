"""Settings and data that are only a little off: named where the cure gains enough, and silent where it does not."""

import pytest
import torch
from runs import batches, blobs, case, classify, codes, mlp, recorded, train
from test_causes import Task, any_labels
from torch import nn
from torch.nn import functional as F

from unstuck.diagnosis import PROVED, SHOWN, diagnose


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# A loss of several parts


def in_parts(how, parts):
    """The loss of each part of a batch: added up, averaged, or with a backward() of its own."""

    def step(model, x, y):
        losses = [classify(model, a, b) for a, b in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True)]
        if how == "one by one":
            for loss in losses[:-1]:
                loss.backward()
            return losses[-1]
        return sum(losses) / (parts if how == "averaged" else 1)

    return step


def parted(folder, how, parts=8, *, rate=0.3, steps=60):
    layers = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    return recorded(folder, train(model, optimizer, batches(*blobs(2048), 64), steps, in_parts(how, parts)))


@pytest.mark.parametrize("how", ["added up", "one by one"])
def test_losses_of_the_parts_of_a_batch_that_are_added_up_are_told(tmp_path, how):
    found = diagnose(parted(tmp_path, how, 4, rate=0.6, steps=40))
    assert codes(found) == ["loss-summed"]
    (first,) = found.findings
    assert first.word == PROVED
    assert first.claim.startswith("The 4 losses of a step are added up, not averaged")
    assert "(÷ 4" in first.trial.accepted[0].remedy


@pytest.mark.parametrize(
    ("how", "parts", "scale"),
    [("added up", 8, 1.0), ("one by one", 8, 1.0), ("averaged", 8, 1 / 8), ("added up", 3, 1.0), ("added up", 2, None)],
)
def test_the_scale_of_the_loss_is_what_is_differentiated_over_the_sum_of_its_parts(tmp_path, how, parts, scale):
    """Of two losses sum and mean lie too near one another."""
    found = case(parted(tmp_path, how, parts, rate=1e-3, steps=6))["scale of the loss"]
    assert (None if found is None else found.value) == (scale and pytest.approx(scale, rel=1e-5))
    if found is not None:
        assert (found.n, found.meaning) == (parts, f"what is differentiated, over the sum of {parts} losses")


def test_losses_of_different_kinds_have_no_scale(tmp_path):
    model = mlp()

    def loss(model, x, y):
        z = model(x)
        return sum(F.cross_entropy(z[k::4], y[k::4]) for k in range(4)) + F.mse_loss(z, F.one_hot(y, 4).float())

    loop = train(model, torch.optim.SGD(model.parameters(), lr=1e-3), batches(*blobs(256), 32), 8, loss)
    assert case(recorded(tmp_path, loop))["scale of the loss"] is None


# Settings of the optimiser, and the inputs


def clipping(norm, noise=0.0):
    t = Task()
    t.clip, t.options["lr"] = norm, 0.05
    any_labels(t, noise)
    t.options["lr"] = 0.05
    return t


def decaying(decay):
    t = Task(depth=2)
    t.options["weight_decay"] = decay
    return t


def spreading(decades):
    t = Task()
    t.x = t.x * torch.logspace(-decades, 0, 8)
    return t


def shifted(offset, rate):
    t = Task(depth=2)
    t.x, t.options["lr"] = t.x + offset, rate
    return t


A_LITTLE = {  # by code: the quantity, where it must lie for the test to say anything, a run that is told and one not
    "clip-too-strong": ("what clipping leaves", 0.1, 0.3, lambda: clipping(0.1), lambda: clipping(0.05, noise=0.5)),
    "weight-decay-too-large": ("share of weight decay", 0.15, 0.3, lambda: decaying(0.02), None),
    "ill-conditioned": ("spread of the inputs", 20, 50, lambda: spreading(1.6), None),
    "inputs-unscaled": ("scale of the inputs", 0.35, 1.0, lambda: shifted(2.5, 0.3), lambda: shifted(2.5, 0.1)),
}
LESS = {  # what is less than that, and no premise any more
    "weight-decay-too-large": ("share of weight decay", 0.15, lambda: decaying(0.005)),
    "ill-conditioned": ("spread of the inputs", 20, lambda: spreading(1.2)),
    "inputs-unscaled": ("scale of the inputs", 0.35, lambda: shifted(0.5, 0.3)),
}


@pytest.mark.parametrize("code", A_LITTLE)
def test_what_is_a_little_off_is_told_where_its_cure_gains_enough(tmp_path, code):
    quantity, low, high, task, _ = A_LITTLE[code]
    run = task().recorded(tmp_path)
    assert low < case(run)[quantity].value < high
    found = diagnose(run)
    assert codes(found)[:1] == [code]
    assert found.findings[0].word == PROVED


@pytest.mark.parametrize(("code", "least"), [("clip-too-strong", 0.2), ("inputs-unscaled", 0.5)])
def test_and_is_not_where_its_cure_gains_less(tmp_path, code, least):
    quantity, low, high, _, task = A_LITTLE[code]
    run = task().recorded(tmp_path)
    assert low < case(run)[quantity].value < high
    assert code not in codes(diagnose(run))


@pytest.mark.parametrize("code", LESS)
def test_what_is_hardly_off_is_not(tmp_path, code):
    quantity, bound, task = LESS[code]
    run = task().recorded(tmp_path)
    assert case(run)[quantity].value < bound
    assert code not in codes(diagnose(run))


# Rows that come again


def passes(change, count=12):
    """Passes over the same rows in a new order each, of which `change(x, rows)` makes a batch."""
    x, y = blobs(320)
    x, model = x / x.std(), mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def loop():
        for k in range(count):
            for rows in torch.randperm(320).split(32):
                optimizer.zero_grad()
                classify(model, change(x, rows, k), y[rows]).backward()
                optimizer.step()

    return loop


def once_a_pass(factor):
    seen = set()

    def change(x, rows, k):
        if k not in seen:
            seen.add(k)
            x.mul_(factor if k else 1.0)
        return x[rows]

    return change


def brighter(x, rows, _):
    return x[rows] * (0.8 + 0.4 * torch.rand(32, 1))


def far_out_late(x, rows, k):
    return torch.cat([x[rows][:29], x[rows][29:] * (100 if k > 5 else 1)])


def unchanged(x, rows, _):
    return x[rows]


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_rows_that_come_again_multiplied_are_told_with_the_factor(tmp_path, factor):
    """Too little for their size alone to tell: it stays between a fifth and five times what it was."""
    found = diagnose(recorded(tmp_path, passes(once_a_pass(factor))))
    assert codes(found) == ["data-corrupted-in-place"]
    (first,) = found.findings
    assert first.word == SHOWN
    (evidence,) = first.evidence
    assert evidence.value == pytest.approx(factor**11, rel=1e-4)  # the last of twelve passes beside the first
    assert evidence.meaning == "of the same rows, now over then"
    assert 8 <= evidence.n <= 128


@pytest.mark.parametrize("change", [unchanged, brighter, far_out_late], ids=lambda change: change.__name__)
def test_rows_that_come_again_as_they_were_or_each_with_a_factor_of_its_own_are_not(tmp_path, change):
    assert "data-corrupted-in-place" not in codes(diagnose(recorded(tmp_path, passes(change))))
