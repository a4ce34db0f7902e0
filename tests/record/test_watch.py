"""What a watched run knows of the script: names, facts, states, tapes."""

import copy
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unstuck
from unstuck.record import State, _governor, _stepped, _store, _watch
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
    with unstuck.watch(folder=tmp_path / "run", budget=100) as run:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=230)
        middle = [p.detach().clone() for p in model.parameters()]
        assert [s.step for s in run.memory().states] == [0, 150, 200, 230]
    memory = run.memory()
    assert all(map(torch.equal, memory.states[0].weights, start))
    assert all(map(torch.equal, memory.states[-1].weights, middle))
    assert all(isinstance(s, State) and len(s.weights) == 4 for s in memory.states)


def test_the_states_of_a_large_model_are_on_disk(tmp_path, monkeypatch):
    def trained(folder):
        torch.manual_seed(0)
        model = Net()
        with unstuck.watch(folder=folder, budget=100) as run:
            train(model, torch.optim.Adam(model.parameters()), steps=230)
        return run.memory().states

    inside = trained(tmp_path / "small")
    monkeypatch.setattr(_store, "STATE_BYTES", 10)
    outside = trained(tmp_path / "large")
    assert [s.step for s in outside] == [s.step for s in inside] == [0, 150, 200, 230]
    assert len(list((tmp_path / "large").glob("state-*.pt"))) == 3
    for one, other in zip(inside, outside, strict=True):
        assert all(map(torch.equal, one.weights, other.weights))
        assert one.optimizer.members == other.optimizer.members
        for k, values in one.optimizer.state.items():
            assert all(torch.equal(value, other.optimizer.state[k][name]) for name, value in values.items())


def test_a_disk_that_takes_no_state_costs_the_states(tmp_path, monkeypatch):
    monkeypatch.setattr(_store, "STATE_BYTES", 10)
    monkeypatch.setattr(_store.Shelf, "put", lambda *_: open("/dev/full/x"))  # noqa: SIM115, PTH123
    model = Net()
    with unstuck.watch(folder=tmp_path / "run", budget=100) as run:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=60)
    assert [s.step for s in run.memory().states] == [60]
    assert [e["code"] for e in run.of("fact")] == ["not-saved"]


def test_a_long_run_is_saved_on_its_way(tmp_path, monkeypatch):
    monkeypatch.setattr(_watch, "SAFE_SECONDS", 0.01)
    model = Net()
    with unstuck.watch(folder=tmp_path / "run"):
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=300)
        assert (tmp_path / "run" / "tapes.pt").is_file()


def test_the_order_of_the_calls_and_the_mode_are_told_when_they_change(tmp_path):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    with unstuck.watch(model, optimizer, folder=tmp_path / "run") as run:
        for k in range(6):
            model.train(k < 4)
            optimizer.zero_grad()
            for _ in range(2):
                model(torch.randn(5, 3)).square().mean().backward()
            if k != 3:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    steps = run.of("step")
    orders = {e["step"]: e["order"] for e in steps if "order" in e}
    assert orders == {1: "zbbcs", 2: "lzbbcs", 4: "lzbbs", 5: "lzbbcs"}
    assert {e["step"]: e["training"] for e in steps if "training" in e} == {1: True, 5: False}


def test_the_loss_is_the_one_before_scaling_and_steps_left_out_are_counted(tmp_path):
    torch.manual_seed(0)
    model, data = Net(), torch.randn(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    expected = []
    with unstuck.watch(model, optimizer, folder=tmp_path / "run") as run:
        for k in range(4):
            optimizer.zero_grad()
            loss = model(data).square().mean()
            scaler.scale(loss if k != 1 else loss * float("inf")).backward()
            if k != 1:
                expected.append(loss.item())
            scaler.step(optimizer)
            scaler.update()
    assert run.series("loss")[1] == pytest.approx(expected)
    assert run.series("skipped") == ([2], [1])
    assert not run.of("fact")


def test_two_gradients_in_a_row_are_compared(tmp_path):
    model = nn.Linear(300, 100, bias=False)  # of which each 16th number is looked at
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    gradients = []
    with unstuck.watch(model, optimizer, folder=tmp_path / "run", budget=100) as run:
        for _ in range(12):
            optimizer.zero_grad()
            model(torch.randn(5, 300)).square().mean().backward()
            gradients.append(model.weight.grad.flatten().clone())
            optimizer.step()
    steps, found = run.series("grad_cosine")
    assert {2, 3} <= set(steps)  # the first two steps are looked at whatever it costs
    for step, value in zip(steps, found, strict=True):
        a, b = gradients[step - 2], gradients[step - 1]
        assert value == pytest.approx(float(torch.cosine_similarity(a[::16], b[::16], dim=0)), abs=1e-5)
    tensors = run.of("step")[0]["tensors"]
    assert tensors["gradient"] == pytest.approx([float(gradients[0].norm())], rel=1e-5)


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
            monkeypatch.setattr(_stepped.Pulses, "before_step", fail)
            train(model, optimizer)
    assert len(said) == 1
    assert run.steps == 4
    assert len(run.memory().tapes) >= 3


def test_a_batch_with_nan_is_told_when_it_comes_again(tmp_path, monkeypatch):
    monkeypatch.setattr(_watch, "FIRST_TAPES", 2)
    monkeypatch.setattr(_governor, "GRANT_SECONDS", 0.0)
    torch.manual_seed(0)
    model, data = Net(), torch.randn(40, 4, 3)
    data[25, 1, 0] = float("nan")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with unstuck.watch(model, optimizer, folder=tmp_path / "run", budget=1e-9) as run:
        for x in [*data, *data, *data]:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    first, later = run.of("fact")
    assert (first["code"], first["step"], first["origin"]) == ("non-finite", 26, "unknown")
    assert (later["code"], later["step"], later["rows"]) == ("non-finite-batch", 66, [1])
    (finding,) = run.diagnose().findings
    assert finding.code == "non-finite-data"
    assert "step was not recorded, but the batch of step 66" in finding.claim


def test_statistics_that_a_blow_up_has_spoilt_are_no_bad_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(_watch, "FIRST_TAPES", 2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with unstuck.watch(model, optimizer, folder=tmp_path / "run", budget=1e-9) as run:
        for k in range(90):
            optimizer.zero_grad()
            loss = model(torch.randn(5, 3)).square().mean()
            (loss / (0.0 if k == 20 else 1.0)).backward()
            optimizer.step()
            model.eval() if k > 30 else None
    assert not torch.isfinite(model[1].running_mean).all()
    assert [e["code"] for e in run.of("fact")] == ["non-finite"]


def test_steps_that_are_refused_again_and_again_are_recorded_no_longer(tmp_path):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with unstuck.watch(model, optimizer, folder=tmp_path / "run", budget=1e-9) as run:
        for _ in range(60):
            optimizer.zero_grad()
            loss = model(torch.randn(5, 3)).square().mean()
            (loss * loss.item()).backward()
            optimizer.step()
    assert _watch.FRUITLESS <= run.heard < _watch.FIRST_TAPES


def test_a_copy_of_the_model_that_teaches_it_is_a_constant_of_each_step(tmp_path):
    torch.manual_seed(0)
    model, data = Net(), torch.randn(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    target = torch.zeros(8, 2)
    with unstuck.watch(folder=tmp_path / "run", budget=100) as run:
        for k in range(120):
            if k:
                with torch.no_grad():
                    target = 0.5 * copy.deepcopy(model)(data)
            optimizer.zero_grad()
            F.mse_loss(model(data), target).backward()
            optimizer.step()
    memory = run.memory()
    assert memory.names == ("body.weight", "body.bias", "head.weight", "head.bias")
    assert [s.step for s in memory.states] == [0, 50, 100, 120]
    elsewhere = [w + 0.1 for w in memory.states[-1].weights]
    with torch.no_grad():
        for p, w in zip(model.parameters(), elsewhere, strict=True):
            p.copy_(w)
        assert float(memory.tapes[-1].replay(elsewhere)) == pytest.approx(F.mse_loss(model(data), target).item())


def test_a_pause_within_a_pause_is_counted_once(tmp_path):
    with unstuck.watch(folder=tmp_path / "run") as run:
        time.sleep(0.02)
        before = run._live._elapsed()
        with run.paused(), run.paused():
            time.sleep(0.05)
        assert before <= run._live._elapsed() < before + 0.04
