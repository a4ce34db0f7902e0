"""Gradients that a step makes and does not use: cleared between its backward() calls, or clipped before unscale_."""

import pytest
import torch
from loops import STEPS, Task, accumulated, looped, sharpness_aware, usual
from runs import codes, recorded, verdict
from torch import nn
from torch.nn import functional as F

from unstuck.diagnosis import diagnose


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def half_by_half(t):
    t.optimizer.zero_grad()
    t.loss().backward()
    t.optimizer.zero_grad()
    t.loss().backward()
    t.optimizer.step()


def cleared_in_the_loop(t):
    for _ in range(4):
        t.model.zero_grad()
        t.loss().backward()
    t.optimizer.step()


def summed_by_hand(t):
    """As methods do that weigh the gradients of several tasks against one another."""
    t.optimizer.zero_grad()
    t.loss().backward()
    before = [p.grad.clone() for p in t.model.parameters()]
    t.optimizer.zero_grad()
    t.loss().backward()
    for p, g in zip(t.model.parameters(), before, strict=True):
        p.grad += g
    t.optimizer.step()


def only_measured(t):
    """The first gradient is read, and then cleared on purpose."""
    t.optimizer.zero_grad()
    t.loss().backward()
    t.size = sum(float(p.grad.norm()) for p in t.model.parameters())
    t.optimizer.zero_grad()
    t.loss().backward()
    t.optimizer.step()


def begun_anew(t):
    """Of three gradients the first is cleared, and the others are added up."""
    t.optimizer.zero_grad()
    t.loss().backward()
    t.optimizer.zero_grad()
    t.loss().backward()
    t.loss().backward()
    t.optimizer.step()


def tried_further_on(t):
    """The weights have moved between the two, by what has nothing to do with the gradient."""
    t.optimizer.zero_grad()
    t.loss().backward()
    with torch.no_grad():
        moves = [0.01 * torch.randn_like(p) for p in t.model.parameters()]
        torch._foreach_add_(list(t.model.parameters()), moves)
    t.optimizer.zero_grad()
    t.loss().backward()
    with torch.no_grad():
        torch._foreach_sub_(list(t.model.parameters()), moves)
    t.optimizer.step()


class Pair(Task):
    """A generator and the discriminator that its gradients pass through."""

    def __init__(self):
        super().__init__()
        self.judge = nn.Linear(1, 1)
        self.other = torch.optim.SGD(self.judge.parameters(), lr=0.01)


def against_another(t):
    """What is cleared in between is what the one step left in the other's parameters."""
    made = t.model(torch.randn(8, 3))
    t.other.zero_grad()
    F.softplus(t.judge(made.detach())).mean().backward()
    t.optimizer.zero_grad()
    F.softplus(-t.judge(made)).mean().backward()
    t.other.step()
    t.optimizer.step()


def scaled(order):
    """A step under a GradScaler, whose calls after backward() are these."""

    def step(t):
        t.scaler = getattr(t, "scaler", None) or torch.amp.GradScaler("cpu", init_scale=64.0)
        t.optimizer.zero_grad()
        t.scaler.scale(t.loss()).backward()
        for name in order:
            if name == "unscale":
                t.scaler.unscale_(t.optimizer)
            elif name == "clip":
                nn.utils.clip_grad_norm_(t.model.parameters(), 100.0)
        t.scaler.step(t.optimizer)
        t.scaler.update()

    return step


def left_out(t):
    """Every second gradient overflows: its step is left out, and the next one begins with zero_grad()."""
    t.scaler = getattr(t, "scaler", None) or torch.amp.GradScaler("cpu", init_scale=2.0**100, growth_interval=1)
    t.optimizer.zero_grad()
    t.scaler.scale(1e8 * t.loss()).backward()
    t.scaler.step(t.optimizer)
    t.scaler.update()


@pytest.mark.parametrize(("step", "parts", "line"), [(half_by_half, 2, 3), (cleared_in_the_loop, 4, 2)])
def test_gradients_that_are_cleared_between_two_backward_calls_are_told_with_the_line(tmp_path, step, parts, line):
    found = verdict(tmp_path / "run", looped(step))
    assert codes(found) == ["wrong-order"]
    (first,) = found.findings
    assert (first.word, first.where) == ("SHOWN", f"{__file__}:{step.__code__.co_firstlineno + line}")
    (evidence,) = first.evidence
    assert evidence.value == parts - 1
    assert evidence.meaning.endswith(", ".join(["zero_grad, backward"] * parts) + ", step")


@pytest.mark.parametrize(
    ("step", "task"),
    [
        (accumulated, Task),
        (summed_by_hand, Task),
        (only_measured, Task),
        (sharpness_aware, Task),
        (begun_anew, Task),
        (tried_further_on, Task),
        (against_another, Pair),
        (left_out, Task),
    ],
    ids=lambda x: x.__name__,
)
def test_gradients_that_somebody_may_have_used_are_not_told(tmp_path, step, task):
    run = recorded(tmp_path / "run", looped(step, task))
    assert not {"gradient-thrown-away", "cleared-before-step"} & {fact["code"] for fact in run.facts}
    assert "wrong-order" not in codes(diagnose(run))


def test_gradients_that_are_thrown_away_now_and_then_are_not_told(tmp_path):
    t = Task()
    assert codes(verdict(tmp_path / "run", lambda: [(usual if k % 4 else half_by_half)(t) for k in range(STEPS)])) == []


# Gradients that are clipped before they are unscaled


def test_gradients_that_are_clipped_before_they_are_unscaled_are_told_with_the_line(tmp_path):
    def step(t):
        t.optimizer.zero_grad()
        scaler.scale(t.loss()).backward()
        nn.utils.clip_grad_norm_(t.model.parameters(), 1.0)
        scaler.step(t.optimizer)
        scaler.update()

    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    found = verdict(tmp_path / "run", looped(step))
    assert codes(found) == ["scaler-skips"]
    (first,) = found.findings
    assert (first.word, first.where) == ("SHOWN", f"{__file__}:{step.__code__.co_firstlineno + 3}")
    assert "Call scaler.unscale_(optimizer) before the clipping." in first.advice
    assert first.evidence[0].meaning.endswith("zero_grad, backward, clip, unscale, step")


@pytest.mark.parametrize(
    "order", [("unscale", "clip"), ("unscale",), ()], ids=lambda order: " then ".join(order) or "neither"
)
def test_gradients_that_are_unscaled_first_may_be_clipped(tmp_path, order):
    assert codes(verdict(tmp_path / "run", looped(scaled(order)))) == []


def test_a_scaler_that_is_disabled_scales_nothing(tmp_path):
    t, step = Task(), scaled(("clip", "unscale"))
    t.scaler = torch.amp.GradScaler("cpu", enabled=False)
    assert codes(verdict(tmp_path / "run", lambda: [step(t) for _ in range(STEPS)])) == []
