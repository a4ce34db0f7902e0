"""A check hears the gradient that backward() makes, and the training notices nothing of it."""

import copy
import io
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import unstuck
from unstuck.record import _deck
from unstuck.record._heard import Heard
from unstuck.record._turns import Turns

HEARD = (1, 4, 16)  # of the first twenty steps
CLIPPED = 0.01


@pytest.fixture(autouse=True)
def averaged(monkeypatch):
    """As on one of two ranks, whose gradients are averaged."""
    monkeypatch.setattr(_deck, "ranks", lambda: 2)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head, self.spare = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(1, 1)
        self.head.bias.requires_grad_(False)
        self.twin = self.body.bias  # tied

    def forward(self, x):
        return self.head((self.body(x) + self.twin).tanh())


def loss_of(model, x):
    return model(x).square().mean()


def trained(folder, between, *, steps=20, model=None):
    """The run of a loop that calls `between(model)` between backward() and the step."""
    torch.manual_seed(0)
    model = model or Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with unstuck.watch(model, optimizer, folder=folder, budget=100.0) as run:
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(model, torch.randn(5, 3)).backward()
            between(model)
            optimizer.step()
    return run


def hooked(model):
    return [name for name, p in model.named_parameters() if p._backward_hooks is not None]


def test_what_is_heard_is_the_gradient_of_all_losses_whatever_the_stored_one_becomes():
    model = Net()
    leaves, heard = list(model.parameters()), Heard()
    batches = [torch.randn(5, 3) for _ in range(3)]
    for x in batches:
        heard.listen(leaves)
        loss_of(model, x).backward()
        assert not hooked(model)
        stored = [None if p.grad is None else p.grad.clone() for p in leaves]
        nn.utils.clip_grad_norm_(leaves, CLIPPED)
    wanted = [p for p in leaves if p.requires_grad]
    expected = torch.autograd.grad(sum(loss_of(model, x) for x in batches), wanted, allow_unused=True)
    assert sorted(heard.slots) == [k for k, p in enumerate(leaves) if p.requires_grad]
    for p, gradient in zip(wanted, expected, strict=True):
        slot = next(k for k, q in enumerate(leaves) if q is p)
        assert (slot in heard.gradients) is (gradient is not None)
        if gradient is not None:
            torch.testing.assert_close(heard.gradients[slot], gradient)
            assert torch.equal(heard.stored[slot], stored[slot])


def clipped(model):
    nn.utils.clip_grad_norm_(model.parameters(), CLIPPED)


def cut_each(model):
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)


def disturbed(model):
    for p in model.parameters():
        if p.grad is not None:
            p.grad.add_(0.1 * torch.randn_like(p))


@pytest.mark.parametrize("between", [clipped, cut_each, disturbed, lambda model: None])
def test_what_happens_to_the_gradient_before_the_step_costs_no_tape(tmp_path, between):
    run = trained(tmp_path, between)
    memory = run.memory()
    assert [t.step for t in memory.tapes] == list(range(1, 21))
    assert run.of("end")[0]["refusals"] == {}
    at_the_end = [w.clone().requires_grad_() for w in memory.states[-1].weights]
    torch.autograd.grad(memory.tapes[-1].replay(at_the_end), at_the_end[0])


def rescaled(folder):
    return torch.load(folder / "tapes.pt", weights_only=True)["rescaled"]


def test_the_factor_of_clipping_is_the_one_that_was_used(tmp_path):
    factors = []

    def clip(model):
        factors.append(CLIPPED / float(nn.utils.clip_grad_norm_(model.parameters(), CLIPPED)))

    trained(tmp_path, clip)
    assert rescaled(tmp_path) == pytest.approx(factors[HEARD[-1] - 1], rel=1e-4)
    assert factors[HEARD[-1] - 1] < 0.5


def test_a_change_that_is_no_factor_is_told_as_such(tmp_path):
    trained(tmp_path, cut_each)
    assert math.isnan(rescaled(tmp_path))


def test_a_scaler_and_its_unscaling_cost_no_tape(tmp_path):
    torch.manual_seed(0)
    model, scaler = Net(), torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with unstuck.watch(model, optimizer, folder=tmp_path, budget=100.0) as run:
        for _ in range(6):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, torch.randn(5, 3))).backward()
            scaler.step(optimizer)
            scaler.update()
    assert len(run.memory().tapes) == 6
    assert rescaled(tmp_path) == pytest.approx(1 / 256)


def test_a_gradient_that_is_changed_inside_of_backward_is_refused(tmp_path):
    model = Net()
    handle = model.body.weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    run = trained(tmp_path, lambda _: None, model=model, steps=6)
    handle.remove()
    assert run.memory() is None
    assert list(run.of("end")[0]["refusals"]) == ["the replayed gradient differs from the one that backward() made"]


def test_gradients_of_other_losses_do_not_count(tmp_path):
    def look(model):
        torch.autograd.grad(model(torch.ones(1, 3)).sum(), list(model.body.parameters()))

    assert len(trained(tmp_path, look).memory().tapes) == 20


def test_only_steps_that_are_checked_are_listened_to(tmp_path):
    model, seen, step = Net(), [], [0]

    def note(p):
        if p._backward_hooks:
            seen.append(step[0])

    handles = [p.register_post_accumulate_grad_hook(note) for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with unstuck.watch(model, optimizer, folder=tmp_path, budget=100.0):
        for step[0] in range(1, 21):
            optimizer.zero_grad()
            loss_of(model, torch.randn(5, 3)).backward()
            optimizer.step()
    assert sorted(set(seen)) == list(HEARD)
    for handle in handles:
        handle.remove()


def test_alone_a_gradient_that_is_changed_number_by_number_costs_one_tape(tmp_path, monkeypatch):
    monkeypatch.setattr(_deck, "ranks", lambda: 1)
    run = trained(tmp_path, cut_each)
    assert [t.step for t in run.memory().tapes] == list(range(2, 21))


def test_a_program_that_comes_as_a_surprise_is_listened_to_when_it_comes_again(tmp_path):
    """Its gradient is changed before the step, as by an average over ranks, so that the step does not tell."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with unstuck.watch(model, optimizer, folder=tmp_path, budget=100.0) as run:
        for step in range(1, 16):
            optimizer.zero_grad()
            loss = loss_of(model, torch.randn(5, 3))
            (loss if step % 7 else 2 * loss + 1).backward()
            cut_each(model)
            optimizer.step()
    assert [t.step for t in run.memory().tapes] == [1, 2, 3, 4, 5, 6, *range(8, 16)]
    assert list(run.of("end")[0]["refusals"].values()) == [1]


class Calls(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def where_gradients_lie(model, x, calls, begin=lambda leaves: None):
    """Whether each `.grad` is the very memory that backward() made, and its strides."""
    made = {}
    names = {p: name for name, p in model.named_parameters()}
    handles = [p.register_hook(lambda g, p=p: made.update({names[p]: g.data_ptr()})) for p in names if p.requires_grad]
    loss = loss_of(model, x)
    with calls:
        begin(list(names))
        loss.backward()
    for handle in handles:
        handle.remove()
    grads = {names[p]: p.grad for p in names if p.grad is not None}
    return {n: (g.data_ptr() == made[n], g.stride(), g.clone()) for n, g in grads.items()}


def test_a_gradient_lies_where_it_would_have_and_the_modes_of_the_script_see_nothing():
    model, x = Net(), torch.randn(5, 3)
    plain_calls, calls, heard = Calls(), Calls(), Heard()
    plain = where_gradients_lie(copy.deepcopy(model), x, plain_calls)
    watched = where_gradients_lie(model, x, calls, heard.listen)
    assert any(taken for taken, _, _ in plain.values())
    assert plain.keys() == watched.keys()
    assert all(plain[n][:2] == watched[n][:2] and torch.equal(plain[n][2], watched[n][2]) for n in plain)
    assert calls.seen == plain_calls.seen
    assert heard.gradients


class Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise KeyError("broken")


def test_hooks_are_gone_when_backward_fails_or_the_step_never_comes(tmp_path):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with unstuck.watch(model, optimizer, folder=tmp_path):
        with pytest.raises(KeyError):
            (loss_of(model, torch.randn(5, 3)) + Breaks.apply(model.body.weight).sum()).backward()
        optimizer.step()
        assert not hooked(model)
        with pytest.raises(KeyError):
            (loss_of(model, torch.randn(5, 3)) + Breaks.apply(model.body.weight).sum()).backward()
    assert not hooked(model)


def test_a_model_can_be_saved_and_copied_while_its_backward_is_listened_to():
    model, heard = Net(), Heard()
    heard.listen(list(model.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.save(model, io.BytesIO())
        copy.deepcopy(model)
    heard.stop()
    assert not hooked(model)


def test_hooks_of_the_script_stay_and_are_part_of_the_gradient():
    model, heard, called = Net(), Heard(), []
    weight = model.body.weight
    handle = weight.register_hook(lambda g: (called.append(1), g.clamp(-0.001, 0.001))[1])
    heard.listen([weight])
    loss_of(model, torch.randn(5, 3)).backward()
    assert list(weight._backward_hooks) == [handle.id]
    assert called == [1]
    assert torch.equal(heard.gradients[0], weight.grad)


class Wrapper(torch.optim.Optimizer):
    """Steps within its own step, as Lookahead and ZeroRedundancyOptimizer do."""

    def __init__(self, inner):
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure=None):
        self.inner.step()


def test_a_step_within_a_step_is_one_step(tmp_path):
    model, x, y = Net(), torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])
    optimizer = Wrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    with unstuck.watch(model, optimizer, folder=tmp_path, budget=100.0) as run:
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert run.steps == 5
    assert len(run.series("loss")[0]) == 5
    assert [t.step for t in run.memory().tapes] == [1, 2, 3, 4, 5]
    assert run.memory().states[-1].optimizer.kind.endswith("Wrapper")


class TestTurns:
    def recorded(self, ranks, cost, *, steps=4000, pace=0.01, budget=0.014):
        """The steps that a rank records, whose recording of one takes `cost` seconds."""
        turns, spent, elapsed, found = Turns(ranks), 0.0, 0.0, []
        for step in range(1, steps + 1):
            if step <= 16 or turns.due(step, spent, budget * elapsed):
                found.append(step)
                spent += cost
                elapsed += cost
            elapsed += pace
        return found, spent / elapsed

    @pytest.mark.parametrize("cost", [5e-4, 1e-3, 4e-3])
    def test_ranks_of_unequal_speed_record_the_same_steps(self, cost):
        (slow, share), (fast, _) = self.recorded(2, 1.3 * cost), self.recorded(2, cost)
        assert share <= 0.015
        assert len({*slow[-50:]} & {*fast}) >= 45
        assert len({*slow[-50:]} & {*self.recorded(1, cost)[0]}) < 45

    def test_a_process_alone_uses_the_time_that_it_has(self):
        found, share = self.recorded(1, 1e-3)
        assert share == pytest.approx(0.014, rel=0.01)
        assert len(found) > len(self.recorded(2, 1e-3)[0]) > 0.75 * len(found)
