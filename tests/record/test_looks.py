"""Most steps are only noted; the others are looked at closely, in turn and at every place of a loop's habits."""

import itertools

import pytest
import torch
from torch import nn

import unstuck
from unstuck.record import _watch
from unstuck.record._governor import PART
from unstuck.record._stepped import FIRST_LOOKS, Stepped

NOTHING = 1e-9  # a budget


@pytest.fixture(autouse=True)
def few_tapes(monkeypatch):
    """A step that is recorded is looked at as well."""
    monkeypatch.setattr(_watch, "FIRST_TAPES", 2)
    monkeypatch.setattr(_watch, "KEPT", 0)


def trained(steps, *, model=None, optimizer=None, clear=lambda k: True):
    torch.manual_seed(0)
    model = model or nn.Linear(3, 2)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for k in range(steps):
        if clear(k):
            optimizer.zero_grad()
        loss = model(torch.randn(5, 3)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def looked_at(costs, pace=1e-3, share=0.02, steps=4000):
    """The steps that are looked at where looking takes `costs` seconds in turn."""
    stepped = Stepped(torch.optim.SGD([torch.zeros(1, requires_grad=True)]), 0, share)
    found = []
    for step, cost in zip(range(1, steps + 1), itertools.cycle(costs)):
        if stepped.closely:
            found.append(step)
            stepped.was_looked_at(cost, pace)
        else:
            stepped.passed()
    return found


def test_every_step_has_its_loss_rate_and_time_although_few_are_looked_at(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    rates, losses = [], []
    with unstuck.watch(folder=tmp_path / "run", budget=NOTHING) as run:
        for _ in range(120):
            rates.append(optimizer.param_groups[0]["lr"])
            losses += trained(1, model=model, optimizer=optimizer)
            schedule.step()
    assert run.series("loss") == (list(range(1, 121)), losses)
    assert run.series("lr")[1] == rates
    times = run.series("time")[1]
    assert times == sorted(times)
    assert len(times) == 120
    assert FIRST_LOOKS - 1 <= run.looked < 60


@pytest.mark.parametrize("cost", [2e-5, 1e-4, 1e-3])
def test_looks_take_their_share_of_the_time(cost):
    found = looked_at([cost])
    assert found[: FIRST_LOOKS - 1] == list(range(1, FIRST_LOOKS))
    spent = cost * (len(found) - FIRST_LOOKS) / (4000 * 1e-3)
    assert 0.4 * 0.02 * PART < spent <= 1.05 * 0.02 * PART


@pytest.mark.parametrize("period", [2, 3, 4, 8, 10])
def test_looks_meet_every_place_of_a_habit_that_repeats(period):
    found = [step % period for step in looked_at([period * 0.02 * PART * 1e-3])[FIRST_LOOKS:]]
    assert all(found.count(place) > len(found) / period / 4 for place in range(period))


def test_gradients_that_are_cleared_no_longer_are_found_although_most_steps_are_only_noted(tmp_path):
    with unstuck.watch(folder=tmp_path / "run", budget=0.02) as run:
        trained(1000, clear=lambda k: k < 200)
    assert run.looked < 600
    (first, *_) = [e for e in run.of("fact") if e["code"] == "stale-gradient"]
    assert 201 <= first["step"] <= 500


@pytest.mark.parametrize("kept", [True, False])
def test_cleared_gradients_are_not_stale_whatever_is_looked_at(tmp_path, kept):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with unstuck.watch(folder=tmp_path / "run", budget=0.02) as run:
        for _ in range(1000):
            optimizer.zero_grad(set_to_none=not kept)
            for _ in range(2):
                model(torch.randn(5, 3)).square().mean().backward()
            optimizer.step()
    assert run.looked < 600
    assert not run.of("fact")


def test_each_of_several_optimisers_has_its_turn(tmp_path):
    torch.manual_seed(0)
    often, seldom = nn.Linear(3, 3), nn.Linear(3, 3)
    one, other = (torch.optim.SGD(m.parameters(), lr=0.01) for m in (often, seldom))
    with unstuck.watch(folder=tmp_path / "run", budget=0.02) as run:
        for k in range(2400):
            optimizer = other if k % 6 == 5 else one
            if not (optimizer is other and k > 600):  # whose gradients are cleared no longer
                optimizer.zero_grad()
            seldom(often(torch.randn(5, 3))).square().mean().backward()
            optimizer.step()
    assert run.looked < 1500
    steps = {e["step"] for e in run.of("fact") if e["code"] == "stale-gradient"}
    assert steps
    assert all(step % 6 == 0 and step > 600 for step in steps)


def test_an_alarm_asks_only_for_the_recent_steps_that_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(_watch, "KEPT", 40)
    torch.manual_seed(0)
    model, data = nn.Linear(3, 2), torch.randn(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # the alarm rings at steps 64, 128 and 256
    with unstuck.watch(folder=tmp_path / "run", budget=NOTHING) as run:
        for _ in range(300):
            optimizer.zero_grad()
            model(data).square().mean().backward()
            optimizer.step()
        steps = [t.step for t in run.memory().tapes]
    late = [sum(64 * k < s <= 128 * k for s in steps) for k in (1, 2)]
    assert late == [35, 5]  # of the first twenty steps, five are still recent at step 64, and none at step 128
