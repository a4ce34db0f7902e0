"""What a watched run knows of the script: names, facts, states, tapes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unstuck
from unstuck.record import State, _watch
from unstuck.record._state import pack_state, snapshot, unpack_state


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(x).tanh())


def train(model, optimizer, *, steps=4, loss=lambda out: out.square().mean()):
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(torch.randn(5, 3))).backward()
        optimizer.step()


def names(run):
    return run.memory().names


def test_parameters_of_a_model_that_lives_in_a_function_have_their_names(tmp_path):
    def main():
        model = Net()
        train(model, torch.optim.SGD(model.parameters(), lr=0.1))

    with unstuck.watch(folder=tmp_path / "run") as run:
        main()
    assert names(run) == ("body.weight", "body.bias", "head.weight", "head.bias")


def test_parameters_of_two_models_and_of_none(tmp_path):
    one, two, loose = Net(), nn.Linear(2, 2), torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.SGD([*one.parameters(), *two.parameters(), loose], lr=0.1)
    with unstuck.watch(folder=tmp_path / "run") as run:
        train(lambda x: two(one(x)) + loose, optimizer)
    assert len(set(names(run))) == 7
    assert {"body.weight", "weight"} < set(names(run))
    assert names(run)[-1] == "tensor[6]"


def test_a_scripted_module_in_the_process_does_no_harm(tmp_path):
    with pytest.warns(DeprecationWarning):
        kept = torch.jit.trace(nn.Linear(2, 2), torch.randn(1, 2))
    model = Net()
    with unstuck.watch(folder=tmp_path / "run") as run:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert names(run)[0] == "body.weight"
    assert kept is not None


def test_the_optimiser_is_taken_apart_and_goes_on_as_the_same(tmp_path):
    torch.manual_seed(0)
    for kind, options in (
        (torch.optim.Adam, {"lr": torch.tensor(0.01), "amsgrad": True}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        (torch.optim.RMSprop, {"lr": 0.01, "centered": True}),
        (torch.optim.NAdam, {"lr": 0.01}),
        (torch.optim.Adagrad, {"lr": 0.01}),
        (torch.optim.LBFGS, {"lr": 0.1, "history_size": 3}),
    ):
        model, data = Net(), torch.randn(8, 3)
        leaves = list(model.parameters())
        optimizer = kind(leaves, **options)

        def step(net, own, data=data):
            def loss():
                own.zero_grad()
                value = net(data).square().mean()
                value.backward()
                return value

            own.step(loss)

        for _ in range(5):
            step(model, optimizer)
        path = tmp_path / f"{kind.__name__}.pt"
        torch.save(pack_state(snapshot(5, leaves, optimizer)), path)
        for _ in range(5):
            step(model, optimizer)
        state = unpack_state(torch.load(path, weights_only=True))
        twin = Net()
        for p, w in zip(twin.parameters(), state.weights, strict=True):
            p.data.copy_(w)
        again = state.optimizer.build(list(twin.parameters()))
        for _ in range(5):
            step(twin, again)
        for p, q in zip(leaves, twin.parameters(), strict=True):
            assert torch.equal(p, q), kind


def test_two_groups_keep_their_own_rates(tmp_path):
    model = Net()
    groups = [{"params": model.body.parameters(), "lr": 0.5}, {"params": model.head.parameters()}]
    with unstuck.watch(folder=tmp_path / "run") as run:
        train(model, torch.optim.SGD(groups, lr=0.1))
    optimizer = run.memory().states[-1].optimizer
    assert [g["lr"] for g in optimizer.groups] == [0.5, 0.1]
    assert optimizer.members == ((0, 1), (2, 3))


def test_states_are_the_first_two_recent_ones_and_the_last(tmp_path):
    model = Net()
    start = [p.detach().clone() for p in model.parameters()]
    with unstuck.watch(folder=tmp_path / "run", budget=1.0) as run:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=230)
        middle = [p.detach().clone() for p in model.parameters()]
        assert [s.step for s in run.memory().states] == [0, 150, 200, 230]
    memory = run.memory()
    assert all(map(torch.equal, memory.states[0].weights, start))
    assert all(map(torch.equal, memory.states[-1].weights, middle))
    assert all(isinstance(s, State) and len(s.weights) == 4 for s in memory.states)


def test_of_a_large_model_only_the_last_state_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(_watch, "STATE_BYTES", 10)
    model = Net()
    with unstuck.watch(folder=tmp_path / "run") as run:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=60)
    assert [s.step for s in run.memory().states] == [60]


def test_a_tape_that_cannot_be_written_leaves_the_others(tmp_path):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with unstuck.watch(folder=tmp_path / "run") as run:
        train(model, optimizer)
        train(model, optimizer, loss=lambda out: torch._foreach_round([out])[0].sum() + out.square().mean())
        train(model, optimizer)
    assert any("_foreach_round" in reason for reason in run.of("end")[0]["refusals"])
    assert [t.step for t in run.memory().tapes] == [2, 3, 4, 9, 10, 11, 12]


def test_a_frozen_parameter_is_not_cut_off(tmp_path):
    model = Net()
    model.body.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with unstuck.watch(folder=tmp_path / "run") as run:
        for _ in range(12):
            optimizer.zero_grad()
            out = model(torch.randn(5, 3))
            assert out.mean().item() < 1e9
            out.square().mean().backward()
            optimizer.step()
    assert not run.of("fact")


def test_the_sum_of_accumulated_losses_is_the_loss_of_the_step(tmp_path):
    model, data = Net(), torch.randn(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with unstuck.watch(folder=tmp_path / "run") as run:
        for _ in range(3):
            with torch.no_grad():
                expected = model(data).square().mean().item()
            optimizer.zero_grad()
            for part in data.chunk(4):
                (model(part).square().mean() / 4).backward()
            optimizer.step()
    assert run.series("loss")[1][-1] == pytest.approx(run.memory().tapes[-1].loss)
    assert run.series("loss")[1][-1] == pytest.approx(expected, rel=1e-5)
    assert [e["backwards"] for e in run.of("step")] == [4, 4, 4]


def test_the_pulses_are_the_norms_that_plain_torch_gives(tmp_path):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with unstuck.watch(folder=tmp_path / "run") as run:
        train(model, optimizer, steps=1)
    (step,) = run.of("step")
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    before = torch.cat([(p + 0.3 * p.grad).flatten() for p in model.parameters()])
    assert step["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)
    assert step["weight_norm"] == pytest.approx(before.norm().item(), rel=1e-5)
    assert step["update_ratio"] == pytest.approx(0.3 * gradient.norm().item() / before.norm().item(), rel=1e-4)
    assert step["lr"] == 0.3


def test_a_compiled_model_is_refused_and_trains_on(tmp_path):
    def trained():
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train(torch.compile(model, backend="eager"), optimizer, steps=5)
        return model.state_dict()

    plain = trained()
    torch._dynamo.reset()
    with unstuck.watch(folder=tmp_path / "run") as run:
        watched = trained()
    assert all(torch.equal(plain[k], watched[k]) for k in plain)
    assert run.steps == 5
    assert run.memory() is None
    assert any("compiled" in reason for reason in run.of("end")[0]["refusals"])
    torch._dynamo.reset()


def test_a_diagnosis_on_the_way_costs_no_step_its_tape(tmp_path):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with unstuck.watch(model, optimizer, folder=tmp_path / "run") as run:
        for _ in range(6):
            optimizer.zero_grad()
            out = model(torch.randn(5, 3))
            run.diagnose()
            F.mse_loss(out, torch.zeros_like(out)).backward()
            optimizer.step()
    assert [t.step for t in run.memory().tapes] == [1, 2, 3, 4, 5, 6]


def test_an_error_of_the_watcher_costs_the_watcher_and_one_warning(tmp_path, monkeypatch):
    def fail(*_):
        raise ArithmeticError("broken")

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="ArithmeticError: broken") as said:  # noqa: SIM117
        with unstuck.watch(folder=tmp_path / "run") as run:
            train(model, optimizer)
            monkeypatch.setattr(_watch.Pulses, "before_step", fail)
            train(model, optimizer)
    assert len(said) == 1
    assert run.steps == 4
    assert len(run.memory().tapes) >= 3
