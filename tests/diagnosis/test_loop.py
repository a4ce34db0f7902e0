"""Errors in the order of a loop's calls, in who writes into the weights, and in what rounding leaves of an update."""

import copy

import pytest
import torch
from loops import STEPS, Task, accumulated, looped, sharpness_aware, usual
from runs import codes, verdict
from torch import nn
from torch.nn import functional as F


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def cleared_late(t):
    t.loss().backward()
    t.optimizer.zero_grad(set_to_none=False)
    t.optimizer.step()


def stepped_early(t):
    t.optimizer.zero_grad()
    loss = t.loss()
    t.optimizer.step()
    loss.backward()


def cleared_at_the_end(t):
    t.loss().backward()
    t.optimizer.step()
    t.model.zero_grad()


def with_a_closure(t):
    def closure():
        t.optimizer.zero_grad()
        loss = t.loss()
        loss.backward()
        return loss

    t.optimizer.step(closure)


def others_cleared(t):
    """What is cleared between backward() and step() belongs to another network."""
    t.optimizer.zero_grad()
    t.loss().backward()
    nn.Linear(3, 3).zero_grad()
    t.optimizer.step()


@pytest.mark.parametrize("step", [cleared_late, stepped_early])
def test_gradients_that_are_cleared_before_the_step_are_told_with_the_line(tmp_path, step):
    found = verdict(tmp_path / "run", looped(step))
    assert codes(found) == ["wrong-order"]
    line = step.__code__.co_firstlineno + (2 if step is cleared_late else 1)
    assert found.findings[0].where == f"{__file__}:{line}"


@pytest.mark.parametrize(
    "step",
    [usual, cleared_at_the_end, others_cleared, accumulated, with_a_closure, sharpness_aware],
    ids=lambda step: step.__name__,
)
def test_loops_that_are_in_order_are_not_told(tmp_path, step):
    kind = torch.optim.LBFGS if step is with_a_closure else torch.optim.SGD
    assert codes(verdict(tmp_path / "run", looped(step, kind=kind))) == []


def test_a_gradient_that_two_steps_use_is_told_with_the_line_of_the_second(tmp_path):
    def twice(t):
        usual(t)
        t.optimizer.step()

    found = verdict(tmp_path / "run", looped(twice))
    assert codes(found) == ["stepped-twice"]
    assert found.findings[0].where == f"{__file__}:{twice.__code__.co_firstlineno + 2}"
    assert "The same optimiser" in found.findings[0].claim


def test_two_optimisers_on_the_same_parameters_step_twice(tmp_path):
    t = Task()
    other = torch.optim.Adam(t.model[0].parameters(), lr=1e-3)

    def loop():
        for _ in range(STEPS):
            usual(t)
            other.step()

    found = verdict(tmp_path / "run", loop)
    assert codes(found) == ["stepped-twice"]
    assert "Another optimiser" in found.findings[0].claim


def test_two_optimisers_that_share_a_backward_pass_and_no_parameter_are_in_order(tmp_path):
    t = Task()
    first, last = (torch.optim.SGD(t.model[k].parameters(), lr=0.01) for k in (0, 2))

    def loop():
        for _ in range(STEPS):
            t.model.zero_grad()
            t.loss().backward()
            first.step()
            last.step()

    assert codes(verdict(tmp_path / "run", loop)) == []


def test_weights_that_are_loaded_again_each_epoch_are_told(tmp_path):
    t = Task()
    start = copy.deepcopy(t.model.state_dict())

    def loop():
        for _ in range(6):
            t.model.load_state_dict(start)
            for _ in range(10):
                usual(t)

    found = verdict(tmp_path / "run", loop)
    assert codes(found) == ["weights-reset"]
    assert found.findings[0].step == 11


def clamped(t):
    usual(t)
    with torch.no_grad():
        for p in t.model.parameters():
            p.clamp_(-1, 1)


def averaged_for_a_look(t):
    usual(t)
    now = copy.deepcopy(t.model.state_dict())
    t.model.load_state_dict({name: 0.5 * x for name, x in now.items()})
    t.model.load_state_dict(now)


def not_moved(t):
    for group in t.optimizer.param_groups:
        group["lr"] = 0.0
    clamped(t)


@pytest.mark.parametrize("step", [clamped, averaged_for_a_look, not_moved], ids=lambda step: step.__name__)
def test_weights_that_somebody_writes_into_are_not_reset(tmp_path, step):
    assert "weights-reset" not in codes(verdict(tmp_path / "run", looped(step)))


def test_weights_that_go_back_once_are_not_told(tmp_path):
    t = Task()
    start = copy.deepcopy(t.model.state_dict())

    def loop():
        for k in range(STEPS):
            usual(t)
            if k == 20:
                t.model.load_state_dict(start)

    assert codes(verdict(tmp_path / "run", loop)) == []


@pytest.mark.parametrize("backoff", [0.99, 0.5])
def test_a_scaler_that_leaves_out_most_steps_is_told_and_one_that_finds_its_scale_is_not(tmp_path, backoff):
    t = Task(lr=1e-5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=backoff)

    def loop():
        for _ in range(60):
            t.optimizer.zero_grad()
            scaler.scale(1e3 * t.loss()).backward()
            scaler.step(t.optimizer)
            scaler.update()

    found = verdict(tmp_path / "run", loop)
    assert codes(found) == (["scaler-skips"] if backoff > 0.9 else [])


@pytest.mark.parametrize(("rate", "lost"), [(1e-5, True), (0.3, False)])
def test_updates_that_rounding_swallows_are_told(tmp_path, rate, lost):
    t = Task(lr=rate)
    t.model.bfloat16()

    def step(t):
        t.optimizer.zero_grad()
        x = torch.randn(8, 3)
        F.mse_loss(t.model(x.bfloat16()).float(), x.sum(1, keepdim=True)).backward()
        t.optimizer.step()

    found = verdict(tmp_path / "run", lambda: [step(t) for _ in range(STEPS)])
    assert ("update-below-precision" in codes(found)) == lost
    if lost:
        assert found.findings[0].evidence[0].value > 0.9


# Gradients that half precision cannot hold


def in_float16(scale):
    """A step under autocast, whose loss is a share of the usual one."""

    def step(t):
        t.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = t.loss() * scale
        loss.backward()
        t.optimizer.step()

    return step


def rounded_by_hooks(t):
    if not t.model[0].weight._backward_hooks:
        for p in t.model.parameters():
            p.register_hook(lambda g: g.half().float())
    t.optimizer.zero_grad()
    (1e-7 * t.loss()).backward()
    t.optimizer.step()


def masked_by_hooks(t):
    """Gradients that are 0 on purpose are of any size where nobody masks them."""
    if not t.model[0].weight._backward_hooks:
        t.model[0].weight.register_hook(lambda g: g * (torch.arange(8) % 2)[:, None])
    usual(t)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (in_float16(1e-7), ["fp16-underflow"]),
        (rounded_by_hooks, ["fp16-underflow"]),
        (in_float16(1.0), []),
        (masked_by_hooks, []),
    ],
)
def test_gradients_that_float16_cannot_hold(tmp_path, step, said):
    t = Task()

    def loop():
        for _ in range(STEPS):
            step(t)

    assert codes(verdict(tmp_path, loop)) == said
