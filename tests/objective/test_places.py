"""A program knows where in the script each call was made: the innermost module and the line."""

import contextlib
import gc
import inspect
import io
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module

from unstuck.objective import Recorder, Vault, pack, unpack


def named_by(model):
    """Names as the model itself has them."""
    names = {module: name for name, module in model.named_modules()}
    return lambda modules: [names.get(module, "") for module in modules]


def recorded(model, step, *, names=None, like=()):
    recorder = Recorder(list(model.parameters()), names=names or named_by(model))
    with recorder:
        loss = step(model)
        recorder.root([loss])
        loss.backward()
    return recorder.finish(Vault(), like=like)


def places(tape):
    """Module and line of each call, by its name."""
    calls = zip(tape.program.instructions, tape.program.places, strict=True)
    return [(call.name, place.module, place.line) for call, place in calls]


def modules(tape):
    return [(name, module) for name, module, _ in places(tape)]


def line_of(function, text):
    """Where in this file a function says `text`."""
    lines, first = inspect.getsourcelines(function)
    return f"{__file__}:{first + next(k for k, line in enumerate(lines) if text in line)}"


class Attention(nn.Module):
    def forward(self, x):
        return (x @ x.T).softmax(1) @ x


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attn, self.act = nn.LayerNorm(3), Attention(), nn.ReLU()

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return self.act(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(3, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x).tanh()


def step(model):
    g = torch.Generator().manual_seed(0)
    return F.mse_loss(model(torch.randn(5, 3, generator=g)), torch.zeros(5, 2)) / 2


def no_hooks():
    return all(not v for n, v in vars(torch_module).items() if n.startswith("_global_forward"))


BLOCK = [("layer_norm", "norm"), ("softmax", "attn"), ("relu", "act")]


def test_each_call_is_in_the_module_that_made_it():
    torch.manual_seed(0)
    found = modules(recorded(Net(), step))
    for k in (0, 1):
        for call, name in BLOCK:
            assert (call, f"layers.{k}.{name}") in found
        assert ("__add__", f"layers.{k}") in found or ("add", f"layers.{k}") in found
    assert ("linear", "head") in found
    assert ("tanh", "Net") in found, "the model itself has the name of its class"
    assert found[-2:] == [("mse_loss", ""), ("div", "")]


def test_a_line_is_the_innermost_of_the_scripts_own():
    tape = recorded(Net(), step)
    found = {name: line for name, _, line in places(tape)}
    assert found["softmax"] == line_of(Attention.forward, "softmax")
    assert found["tanh"] == line_of(Net.forward, "tanh")
    assert found["mse_loss"] == found["div"] == line_of(step, "mse_loss")
    assert found["layer_norm"] == "", "the module says as much"
    k = [call.name for call in tape.program.instructions].index("softmax")
    assert tape.program.place(k) == f"layers.0.attn (softmax, {found['softmax'].rpartition('/')[2]})"


def test_what_is_called_in_place_of_a_module_or_outside_of_all_is_no_module():
    tape = recorded(nn.Linear(3, 2), lambda model: model.forward(torch.ones(4, 3)).sum())
    assert modules(tape) == [("linear", ""), ("sum", "")]
    assert tape.program.place(1).startswith("sum (test_places.py:")


class Again(nn.Module):
    """Calls itself."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x, depth=2):
        x = self.linear(x)
        return (self(x, depth - 1) if depth else x).sin()


def test_a_module_that_calls_itself_and_one_with_two_names():
    model = nn.Sequential(Again(), nn.Sequential(nn.Tanh()))
    model.append(model[1][0])
    found = modules(recorded(model, lambda m: m(torch.ones(2, 3)).sum()))
    assert found[:-1] == [*[("linear", "0.linear")] * 3, *[("sin", "0")] * 3, *[("tanh", "1.0")] * 2]


class Fails(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.inner, self.error = nn.Sequential(nn.Tanh()), error
        self.inner[0].register_forward_hook(self.fail)

    def fail(self, *_):
        raise self.error

    def forward(self, x):
        with contextlib.suppress(type(self.error)):
            x = self.inner(x)
        return x.sin()


def test_an_exception_inside_a_module_ends_it():
    model = nn.Sequential(nn.Linear(3, 3), Fails(ValueError()), nn.Sigmoid())
    found = modules(recorded(model, lambda m: m(torch.ones(2, 3)).sum()))
    assert found == [("linear", "0"), ("sin", "1"), ("sigmoid", "2"), ("sum", "")]
    assert no_hooks()


def test_an_interrupt_that_the_script_survives_is_over_when_an_outer_module_returns():
    model = nn.Sequential(nn.Linear(3, 3), Fails(KeyboardInterrupt()), nn.Sigmoid())
    found = modules(recorded(model, lambda m: m(torch.ones(2, 3)).sum()))
    assert found[2:] == [("sigmoid", "2"), ("sum", "")]


def test_an_error_that_ends_the_step_leaves_no_hook():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        recorded(model, lambda m: m(torch.ones(2, 3)).sum())
    assert no_hooks()


def test_modules_that_another_thread_calls_are_not_this_ones():
    model, other = nn.Linear(3, 3), nn.Sequential(nn.Tanh())
    inside, done = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        done.wait(10)

    other[0].register_forward_hook(wait)
    thread = threading.Thread(target=lambda: other(torch.ones(3)))

    def both(m):
        thread.start()
        assert inside.wait(10)
        loss = m(torch.ones(2, 3)).sin().sum()
        done.set()
        thread.join()
        return loss.cos()

    found = modules(recorded(model, both))
    assert found == [("linear", "Linear"), ("sin", ""), ("sum", ""), ("cos", "")]


def test_hooks_of_the_script_see_and_change_what_they_did():
    def run(names):
        torch.manual_seed(0)
        model, seen = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), []
        model[0].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
        model[0].register_forward_hook(lambda m, args, out: (seen.append(args), out * 2)[1])
        model[1].register_full_backward_hook(lambda m, made, given: (made[0] * 3,))
        recorder = Recorder(list(model.parameters()), names=names and names(model))
        with recorder:
            loss = model(torch.ones(2, 3)).sum()
            recorder.root([loss])
            loss.backward()
        return [loss, seen[0][0], *(p.grad for p in model.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(run(None), run(named_by), strict=True))


@pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning")
def test_a_scripted_module_computes_what_it_did():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 3), torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.Tanh())), nn.Sigmoid())
    loss = plain(torch.ones(2, 3)).sum()
    recorder = Recorder(list(plain.parameters()), names=named_by(plain))
    with recorder:
        recorder.root([watched := plain(torch.ones(2, 3)).sum()])
    assert torch.equal(loss, watched)
    assert no_hooks()


def test_a_module_that_is_gone_has_the_name_of_its_class_and_is_not_held():
    model, alive = nn.Linear(3, 2), []

    def once(m):
        loss = nn.MSELoss()
        alive.append(weakref.ref(loss))
        out = loss(m(torch.ones(4, 3)), torch.ones(4, 2))
        del loss
        assert alive[0]() is None
        return out

    gc.collect()
    assert modules(recorded(model, once)) == [("linear", "Linear"), ("mse_loss", "MSELoss")]


def test_places_do_not_part_programs_and_the_latest_count():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Tanh())
    one = recorded(model, lambda m: m[1](m[0](torch.ones(2, 3))).sum())
    other = recorded(model, lambda m: m[2](m[0](torch.ones(2, 3))).sum())
    assert one.program == other.program
    assert (modules(one)[1], modules(other)[1]) == (("tanh", "1"), ("tanh", "2"))
    shared = recorded(model, lambda m: m[2](m[0](torch.ones(2, 3))).sum(), like=[one.program])
    assert shared.program is one.program
    assert modules(one)[1] == ("tanh", "2")


def test_a_new_program_takes_the_places_of_the_calls_with_which_a_known_one_begins():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    known = recorded(model, lambda m: m(torch.ones(2, 3)).sum())
    recorder = Recorder(list(model.parameters()))
    with recorder:
        recorder.root([model(torch.ones(2, 3)).mean()])
    program = recorder.finish(Vault(), like=[known.program]).program
    assert [program.where(k).module for k in range(3)] == ["0", "1", ""]
    assert program.place(2) == "mean()"


def test_places_survive_the_disk_and_old_files_have_none():
    tape = recorded(Net(), step)
    file = io.BytesIO()
    torch.save(pack([tape]), file)
    file.seek(0)
    data = torch.load(file, weights_only=True)
    (back,) = unpack(data)
    assert back.program.places == tape.program.places
    del data["programs"][0]["places"], data["tapes"][0]["numbers"]
    (old,) = unpack(data)
    assert (old.program.places, old.program) == ([], tape.program)
    assert old.program.place(1) == f"{old.program.instructions[1].name}()"
