"""When the block ends, however it ends, the process is as it was before."""

import builtins
import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import optimizer as optim
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

import unstuck
from unstuck.record import run_script

# Where a watcher might leave a call that is its own
PATCHED = (
    torch,
    torch.Tensor,
    torch.autograd,
    torch.autograd.graph,
    torch.overrides,
    torch.amp.GradScaler,
    torch.nn.functional,
    torch.nn.utils,
    torch.optim.Optimizer,
    torch.optim.SGD,
    torch.optim.LBFGS,
    torch.optim.lr_scheduler.LRScheduler,
    torch.optim.swa_utils.AveragedModel,
    torch.utils.data.DataLoader,
    nn.Linear,
    nn.Module,
    nn.parallel.DistributedDataParallel,
    builtins,
    sys,
    warnings,
)
LISTS = [name for name in vars(torch.nn.modules.module) if name.startswith("_global_") and name.endswith("hooks")]
# What Python itself notes in passing
PASSING = {
    "__slotnames__",
    "last_exc",
    "last_value",
    "last_type",
    "last_traceback",
    "__warningregistry__",
    "_filters_version",
}


class Mine(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def surroundings():
    return {
        "pre hooks": dict(optim._global_optimizer_pre_hooks),
        "post hooks": dict(optim._global_optimizer_post_hooks),
        "calls": (
            torch.autograd.backward,
            torch.optim.Optimizer.__init__,
            torch.compile,
            torch.optim.Optimizer.zero_grad,
            nn.Module.zero_grad,
            nn.utils.clip_grad_norm_,
            torch.optim.lr_scheduler.LRScheduler.step,
            torch.amp.GradScaler.scale,
            torch.overrides.has_torch_function,
        ),
        "modes": list(_get_current_function_mode_stack()),
        "filters": list(warnings.filters),
        "excepthook": sys.excepthook,
        "argv": (sys.argv, list(sys.argv)),
        "path": (id(sys.path), list(sys.path)),
        "main": sys.modules["__main__"],
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "module hooks": {name: dict(getattr(torch.nn.modules.module, name)) for name in LISTS},
        "attributes": {(o.__name__, n): id(v) for o in PATCHED for n, v in vars(o).items() if n not in PASSING},
        "threads": threading.enumerate(),
        "tracing": (sys.gettrace(), sys.getprofile(), threading.gettrace(), list(gc.callbacks), gc.isenabled()),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)],
        "process": (Path.cwd(), dict(os.environ), logging.root.handlers, multiprocessing.active_children()),
        "device": torch.get_default_device(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
        "checks": (torch.is_anomaly_enabled(), torch.are_deterministic_algorithms_enabled()),
        "dispatch modes": torch.utils._python_dispatch._get_current_dispatch_mode_stack(),
        "switches": (torch.backends.cuda.math_sdp_enabled(), torch.get_default_dtype(), torch.get_num_threads()),
    }


def three_steps(model, optimizer):
    for _ in range(3):
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("end", [None, KeyError("x"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
def test_nothing_is_left_behind(tmp_path, end):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    things = [model, optimizer, *model.parameters()]
    before, had = surroundings(), [set(vars(t)) for t in things]
    try:
        with unstuck.watch(folder=tmp_path / "run") as run:
            three_steps(model, optimizer)
            run.diagnose()
            model(torch.randn(4, 3))  # a step that is under way
            if end is not None:
                raise end
    except BaseException as error:
        assert error is end
    assert surroundings() == before
    assert [set(vars(t)) for t in things] == had
    assert not (model._forward_hooks or model._backward_hooks or any(p._backward_hooks for p in model.parameters()))
    named = {None: "finished", KeyboardInterrupt: "interrupted"}
    assert run.outcome == named.get(end if end is None else type(end), f"raised {type(end).__name__}")


def test_an_error_inside_a_call_that_is_recorded_passes_through_and_leaves_nothing(tmp_path):
    before, model = surroundings(), nn.Linear(3, 2)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), unstuck.watch(model, folder=tmp_path / "r"):
        three_steps(model, torch.optim.SGD(model.parameters(), lr=0.1))
        model(torch.randn(4, 5))
    assert surroundings() == before


def test_a_watch_in_a_watch_sees_what_both_see(tmp_path):
    before, model = surroundings(), nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with unstuck.watch(folder=tmp_path / "a") as outer:
        three_steps(model, optimizer)
        with unstuck.watch(folder=tmp_path / "b") as inner:
            three_steps(model, optimizer)
        three_steps(model, optimizer)
    three_steps(model, optimizer)
    assert (outer.steps, inner.steps) == (9, 3)
    assert [len(run.memory().tapes) for run in (outer, inner)] == [9 - 1, 3 - 1]  # the first made the optimiser known
    assert surroundings() == before


def test_the_modes_of_the_script_end_as_they_began(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mine = Mine()
    with unstuck.watch(model, optimizer, folder=tmp_path / "run") as run:
        with torch.device("meta"):
            assert torch.zeros(1).device.type == "meta"
        assert torch.zeros(1).device.type == "cpu"
        mine.__enter__()
        three_steps(model, optimizer)
        with torch.device("cpu"):
            three_steps(model, optimizer)
        mine.__exit__(None, None, None)
        torch.set_default_device("cpu")
        three_steps(model, optimizer)
        torch.set_default_device("meta")
        three_steps_on_cpu = nn.Linear(3, 2, device="cpu")
        assert torch.zeros(1).device.type == "meta"
        torch.set_default_device(None)
        assert three_steps_on_cpu.weight.device.type == torch.zeros(1).device.type == "cpu"
        three_steps(model, optimizer)
    assert _get_current_function_mode_stack() == []
    assert len(run.memory().tapes) == run.steps == 12


def test_a_mode_of_the_script_that_stays_open_is_left_where_it_is(tmp_path):
    model, mine = nn.Linear(3, 2), Mine()
    with unstuck.watch(folder=tmp_path / "run"):
        three_steps(model, torch.optim.SGD(model.parameters(), lr=0.1))
        mine.__enter__()
    assert _get_current_function_mode_stack() == [mine]
    mine.__exit__(None, None, None)


def test_a_call_that_the_script_has_wrapped_in_turn_stays_wrapped(tmp_path, monkeypatch):
    calls, original = [], torch.autograd.backward
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with unstuck.watch(folder=tmp_path / "run") as run:
        ours = torch.autograd.backward
        theirs = lambda *a, **k: (calls.append(1), ours(*a, **k))[1]  # noqa: E731
        monkeypatch.setattr(torch.autograd, "backward", theirs)
        three_steps(model, optimizer)
    assert torch.autograd.backward is theirs
    three_steps(model, optimizer)
    assert (len(calls), run.steps) == (6, 3)
    monkeypatch.undo()
    torch.autograd.backward = original


@pytest.mark.parametrize("ending", ["", "raise KeyError(1)", "raise SystemExit(3)", "raise KeyboardInterrupt"])
def test_a_script_leaves_nothing_behind(tmp_path, ending, capsys):
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, torch\n"
        "sys.path.insert(0, 'elsewhere'); sys.argv.append('more')\n"
        "model = torch.nn.Linear(3, 2); optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "for _ in range(3):\n    model(torch.randn(4, 3)).square().mean().backward(); optimizer.step()\n" + ending
    )
    before = surroundings()
    done = run_script(script, ["--x"], folder=tmp_path / "run")
    assert surroundings() == before
    assert done.run.steps == 3
    assert done.run.header["argv"] == ["--x"]
    capsys.readouterr()


def test_the_watcher_holds_no_folder_open_and_leaves_no_half_written_file(tmp_path):
    model = nn.Linear(3, 2)
    with unstuck.watch(folder=tmp_path / "run"):
        three_steps(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["log.jsonl", "tapes.pt"]
    open_files = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [name for name in open_files if str(tmp_path / "run") in name]


class Busy(nn.Module):
    """Raises in the middle of a step: in the forward pass, in the backward pass, in the optimiser's step."""

    def __init__(self, where, error):
        super().__init__()
        self.net, self.where, self.error = nn.Linear(3, 2), where, error

    def forward(self, x):
        out = self.net(x)
        if self.where == "forward":
            raise self.error
        if self.where == "backward":
            out.register_hook(self.fail)
        return out.square().mean()

    def fail(self, *_):
        raise self.error


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt()], ids=["exception", "interrupt"])
@pytest.mark.parametrize("where", ["forward", "backward", "optimiser", "no_grad"])
def test_an_error_in_the_middle_of_a_step_leaves_nothing(tmp_path, where, error):
    model = Busy("", error)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = surroundings()
    seen = None
    try:
        with unstuck.watch(folder=tmp_path / "run") as run:
            three_steps(lambda x: model(x), optimizer)
            model.where = where
            loss = model(torch.randn(4, 3)) if where != "no_grad" else None
            if where == "no_grad":
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                    model.where = "forward"
                    model(torch.randn(4, 3))
            loss.backward()
            handle = optimizer.register_step_pre_hook(model.fail)
            try:
                optimizer.step()
            finally:
                handle.remove()
    except (KeyError, KeyboardInterrupt) as caught:
        seen = caught
    assert type(seen) is type(error)
    assert surroundings() == before
    assert run.outcome == ("interrupted" if isinstance(error, KeyboardInterrupt) else "raised KeyError")
    assert run.steps == 3
    three_steps(lambda x: model.net(x), optimizer)  # the training goes on without the watcher
    assert run.steps == 3


def test_a_training_that_changes_the_working_directory_leaves_its_run_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    model = nn.Linear(3, 2)
    with unstuck.watch(folder="run") as run:
        monkeypatch.chdir("there")
        three_steps(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert (run.steps, run.outcome) == (3, "finished")
    assert run.memory() is not None
    assert [p.name for p in tmp_path.rglob("*.pt")] == ["tapes.pt"]


def test_after_a_step_that_raised_the_steps_of_another_optimiser_are_seen(tmp_path):
    w = torch.ones(3, requires_grad=True)
    one, other = torch.optim.LBFGS([w], lr=0.1), torch.optim.SGD([w], lr=0.1)

    def closure():
        raise KeyError("a batch that is not there")

    with unstuck.watch(folder=tmp_path / "run") as run:
        with pytest.raises(KeyError):
            one.step(closure)
        for _ in range(5):
            other.zero_grad()
            w.square().sum().backward()
            other.step()
    assert run.steps == 5


def test_a_step_within_the_step_of_another_optimiser_is_a_part_of_that(tmp_path):
    class Slow(torch.optim.SGD):
        def __init__(self, parameters, inner):
            super().__init__(parameters, lr=0.5)
            self.inner = inner

        def step(self, closure=None):
            self.inner.step()
            return super().step(closure)

    w = torch.ones(3, requires_grad=True)
    optimizer = Slow([w], torch.optim.Adam([w], lr=0.1))
    with unstuck.watch(folder=tmp_path / "run") as run:
        for _ in range(5):
            optimizer.zero_grad()
            w.square().sum().backward()
            optimizer.step()
    assert run.steps == 5
    assert {entry["name"] for entry in run.of("optimizer")} == {f"{Slow.__module__}.{Slow.__qualname__}"}


@pytest.mark.parametrize(
    "call",
    [lambda: torch.autograd.backward(), lambda: torch.autograd.backward(None), lambda: torch.autograd.backward([])],
    ids=["no", "None", "empty"],
)
def test_a_wrong_call_of_backward_is_answered_as_torch_does(tmp_path, call):
    def answer():
        try:
            return repr(call())
        except Exception as error:
            return f"{type(error)} {error}"

    plain = answer()
    with unstuck.watch(folder=tmp_path / "run"):
        assert answer() == plain


def test_a_root_given_by_name_is_the_loss(tmp_path):
    w = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.1)
    with unstuck.watch(folder=tmp_path / "run") as run:
        torch.autograd.backward(tensors=[(w * 2).sum()])
        optimizer.step()
    assert run.series("loss") == ([1], [6.0])
