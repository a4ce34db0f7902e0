"""What the recorder's deck makes of the steps of a loop: programs that are shared, tapes that are dropped again."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import unstuck


def layer():
    torch.manual_seed(0)
    return nn.Linear(3, 3), torch.randn(5, 3)


def watched(tmp_path, model, step, *, steps):
    """A run every step of which is recorded; `step(k)` calls backward."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with unstuck.watch(model, optimizer, folder=tmp_path / "run", budget=100.0) as run:
        for k in range(1, steps + 1):
            optimizer.zero_grad()
            step(k)
            optimizer.step()
    return run


def hooks():
    return len(torch.nn.modules.module._global_forward_hooks)


def test_modules_are_followed_in_the_first_recordings_of_a_program_only(tmp_path):
    f, x = layer()
    seen = []
    f.register_forward_hook(lambda *_: seen.append(hooks()))
    watched(tmp_path, f, lambda k: (f(x).sin() if k < 8 else f(x).cos()).sum().backward(), steps=20)
    assert [k for k, count in enumerate(seen, 1) if count] == [1, 2, 3, 4, 5, 9, 10, 11, 12]


def test_no_hook_is_left_when_the_script_compiles_a_module(tmp_path):
    f, x = layer()
    optimizer = torch.optim.SGD(f.parameters(), lr=0.1)
    try:
        with unstuck.watch(f, optimizer, folder=tmp_path / "run", budget=100.0):
            f(x).sum().backward()
            assert hooks() == 1
            compiled = torch.compile(f, backend="eager")  # which warns of global hooks
            assert hooks() == 0
            assert torch.equal(compiled(x), f(x))
            optimizer.step()
    finally:
        torch._dynamo.reset()


def test_a_weight_that_is_annealed_costs_no_tape(tmp_path):
    f, x = layer()
    run = watched(tmp_path, f, lambda k: (f(x).square().mean() + k / 41 * f(x).abs().mean()).backward(), steps=40)
    tapes = run.memory().tapes
    assert [t.step for t in tapes] == list(range(1, 41))
    assert len({id(t.program) for t in tapes}) == 2


def test_the_mean_over_steps_whose_numbers_move_counts_each(tmp_path):
    """Full-batch training repeats one batch; with another weight of the loss each step is a step of its own."""
    f, x = layer()
    run = watched(tmp_path, f, lambda k: (f(x).square().mean() * (k / 8)).backward(), steps=6)
    objective = run.objective()
    weights = {name: w.detach() for name, w in f.named_parameters()}
    mean = sum(F.linear(x, weights["weight"], weights["bias"]).square().mean() * (k / 8) for k in range(1, 7)) / 6
    torch.testing.assert_close(torch.tensor(float(objective.value())), mean)


def test_steps_that_quote_what_they_have_read_leave_no_tape(tmp_path):
    f, x = layer()

    def step(_):
        first = f(x).exp().sum()
        first.backward()
        (f(x).square().sum() * (first.item() % 0.7)).backward()

    run = watched(tmp_path, f, step, steps=6)
    assert run.memory() is None or not run.memory().tapes
    (refusals,) = [e["refusals"] for e in run.of("end")]
    assert sum(refusals.values()) == 5, "the first was taken for good until the second cast doubt on it"


CLEARED = {
    "by hand": lambda f, optimizer: [setattr(p, "grad", None) for p in f.parameters()],
    "by the optimiser": lambda f, optimizer: optimizer.zero_grad(),
    "to zeros": lambda f, optimizer: optimizer.zero_grad(set_to_none=False),
    "by the module": lambda f, optimizer: f.zero_grad(),
}


@pytest.mark.parametrize("how", CLEARED)
def test_accumulated_gradients_are_replayed_however_they_are_cleared(tmp_path, how):
    f, x = layer()
    parts, first = x.split(2), [p.detach().clone() for p in f.parameters()]
    optimizer = torch.optim.SGD(f.parameters(), lr=0.01)
    with unstuck.watch(f, optimizer, folder=tmp_path / "run", budget=100.0) as run:
        for _ in range(4):
            for part in parts:
                f(part).square().mean().backward()
            optimizer.step()
            CLEARED[how](f, optimizer)
    tapes = run.memory().tapes
    assert [t.step for t in tapes] == [1, 2, 3, 4]
    assert len({id(t.program) for t in tapes}) == 1
    assert [c.name for c in tapes[-1].program.instructions] == ["linear", "square", "mean"] * len(parts)
    w, b = (p.requires_grad_() for p in first)
    whole = sum(F.linear(part, w, b).square().mean() for part in parts)
    again = tapes[0].replay([w, b])
    torch.testing.assert_close(again, whole)
    torch.testing.assert_close(torch.autograd.grad(again, [w, b]), torch.autograd.grad(whole, [w, b]))


@pytest.mark.parametrize("how", list(CLEARED)[1:])
def test_a_step_whose_gradients_are_cleared_on_the_way_is_no_sum_of_its_losses(tmp_path, how):
    f, x = layer()
    optimizer = torch.optim.SGD(f.parameters(), lr=0.01)
    with unstuck.watch(f, optimizer, folder=tmp_path / "run", budget=100.0) as run:
        for _ in range(4):
            for part in x.split(2):
                CLEARED[how](f, optimizer)
                f(part).square().mean().backward()
            optimizer.step()
    assert run.memory() is None or not run.memory().tapes
    (refusals,) = (e["refusals"] for e in run.of("end"))
    assert list(refusals) == ["a gradient was read or changed between two backward() calls of the step"]
