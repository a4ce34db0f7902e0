"""The first number that is not finite is traced to the parameter, the batch, or the very call that made it."""

import math

import pytest
import torch
from torch import nn

import unstuck
from unstuck.diagnosis import non_finite
from unstuck.objective import Recorder, Vault
from unstuck.record import _governor, _stepped, _watch
from unstuck.record._models import module_names
from unstuck.record._nonfinite import first_nonfinite, origin

INF, NAN = math.inf, math.nan
ZERO, ONE = torch.zeros(()), torch.ones(())


class Attention(nn.Module):
    def forward(self, x, mask):
        return (x @ x.transpose(-1, -2)).masked_fill(mask, -INF).softmax(-1) @ x


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.attn = nn.Linear(4, 4), Attention()

    def forward(self, x, mask):
        return self.attn(self.fc(x).tanh(), mask)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(4, 1)

    def forward(self, x, mask):
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x)


def layer():
    torch.manual_seed(0)
    return nn.Linear(3, 3), torch.randn(5, 3)


def traced(model, loss):
    """Where the first number arose that is not finite, in a step whose loss is `loss()`."""
    leaves = list(model.parameters())
    recorder = Recorder(leaves, names=lambda modules: module_names(modules, leaves, [model]))
    with recorder:
        recorder.root([loss()])
    return origin(recorder.finish(Vault()), leaves)


def at(found):
    return found["origin"], found["call"], found["nan"], found["inf"], found["numbers"]


def triangle(*rows):
    """A causal mask that leaves nothing of some rows."""
    mask = torch.ones(6, 6).triu(1).bool()
    mask[list(rows)] = True
    return mask


def test_a_masked_softmax_is_named_with_its_module_line_and_shape():
    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 6, 4)
    mask = torch.stack([triangle(), triangle(2)])
    found = traced(model, lambda: model(x, mask).square().mean())
    assert at(found) == ("forward", "softmax", 6, 0, 72)
    assert (found["module"], found["shape"]) == ("layers.0.attn", [2, 6, 6])
    assert found["where"].startswith("layers.0.attn (softmax, test_nonfinite.py:")
    assert found["masked"]
    assert traced(model, lambda: model(x, torch.stack([triangle()] * 2)).square().mean()) is None


FORWARD = {  # what the script does with h, and the call in which the first such number arises
    "log": lambda h, x: (h * 0).log().sum(),
    "exp": lambda h, x: (h.abs() + 100).exp().sum().log(),
    "div": lambda h, x: (h / (h - h)).sum(),
    "log_": lambda h, x: (h * 0).log_().sum(),
    "div_": lambda h, x: h.clone().div_(0).sum(),
    "sqrt": lambda h, x: (-1 - h.abs()).sqrt().mean(),
    "mul": lambda h, x: (h * INF).sum(),
}


@pytest.mark.parametrize("call", FORWARD)
def test_the_call_that_is_given_finite_numbers_and_makes_others_is_named(call):
    f, x = layer()
    assert traced(f, lambda: FORWARD[call](f(x), x))["call"] == call


def test_what_does_not_reach_the_loss_is_not_to_blame():
    f, x = layer()
    far = torch.full((5, 3), INF)

    def loss():
        h = f(x)
        nearest = torch.minimum(far, h.square())  # infinity that is meant, and gone
        hidden = torch.where(x > 9, (h * 0).log(), h)
        weights = h.masked_fill(torch.tensor([True, False, False]), -INF).softmax(1)
        return (nearest + hidden + weights).sum().div(0)

    found = traced(f, loss)
    assert at(found) == ("forward", "div", 0, 1, 1)
    assert found["numbers"] == 1


def test_a_number_that_was_written_into_a_value_is_traced_to_the_writer():
    f, x = layer()

    def loss():
        h = f(x).clone()
        view = h[1:3]
        view.div_(0)
        return h.sum()

    assert traced(f, loss)["call"] == "div_"


@pytest.mark.parametrize(("dtype", "overflows"), [(torch.float32, True), (torch.float64, False)])
def test_an_overflow_is_told_from_a_number_that_no_type_has(dtype, overflows):
    f, x = layer()
    f.to(dtype)
    x = x.to(dtype)
    assert bool(traced(f, lambda: (f(x).abs() + 800).exp().sum()).get("overflow")) is False
    if overflows:
        assert traced(f, lambda: (f(x).abs() + 100).exp().sum())["overflow"]


BACKWARD = {  # finite losses; torch's own anomaly mode names the node that returns NaN, which is of this call
    "sqrt": lambda h, x: torch.where(h > 1e9, (-1 - h.abs()).sqrt(), h).sum(),
    "acos": lambda h, x: torch.where(h > 1e9, (h + 100).acos(), h).sum(),
    "div": lambda h, x: torch.where(h > 1e9, h / (h * 0), h).sum(),
    "pow": lambda h, x: torch.where(h > 1e9, (h * 0).pow(0.5), h).sum(),
    "softmax": lambda h, x: h.masked_fill(x == x, -INF).softmax(1).nan_to_num().sum(),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.filterwarnings("ignore:Error detected in")
@pytest.mark.parametrize("call", BACKWARD)
def test_a_gradient_that_a_finite_one_makes_is_traced_to_the_call(call):
    f, x = layer()
    found = traced(f, lambda: BACKWARD[call](f(x), x))
    assert (found["origin"], found["call"]) == ("backward", call)
    with pytest.raises(RuntimeError, match=f"(?i)'{call}Backward0' returned nan"), torch.autograd.detect_anomaly(True):
        BACKWARD[call](f(x), x).backward()


def test_an_infinite_gradient_is_found_where_it_arises_and_not_where_it_becomes_nan():
    f, x = layer()
    found = traced(f, lambda: ((h := f(x)) - h).square().sum(1).sqrt().mean())
    assert at(found) == ("backward", "sqrt", 0, 5, 5)
    assert found["zeros"] == 5


def test_numbers_that_only_the_forward_pass_left_out_are_told_with_their_origin():
    torch.manual_seed(0)
    model, x, mask = Net(), torch.randn(2, 6, 4), torch.stack([triangle(), triangle(2)])

    def loss():
        out = model(x, mask)
        return torch.where(out.isnan(), ZERO, out).square().mean()

    found = traced(model, loss)
    assert (found["origin"], found["where"]) == ("backward", "head (linear)"), "its weights' slope is input · 0 = NaN"
    assert found["hidden"].startswith("layers.0.attn (softmax, test_nonfinite.py:")


def test_finite_gradients_whose_sum_is_not_are_told():
    f, x = layer()
    found = traced(f, lambda: ((h := f(x)) * 3e38 * 1e-38).sum() + (h * 3e38 * 0.99).mean() * 0 + (h * 3e38).sum() * 0)
    assert found is None
    big = torch.full((), 3e38)
    found = traced(f, lambda: ((h := f(x).tanh() * 1e-38) * big).sum() + (h * big).sum())
    assert (found["origin"], found["met"], found["call"]) == ("backward", True, "mul")


def test_the_batch_is_to_blame_where_it_holds_such_numbers_itself():
    f, x = layer()
    x[3, 1] = NAN
    assert traced(f, lambda: f(x).square().mean()) == {
        "origin": "batch",
        "where": "input 0 of the step, shape (5, 3)",
        "rows": [3],
    }
    x[3, 1] = -INF  # which a mask may hold, but no layer makes sense of
    assert traced(f, lambda: f(x).square().mean())["rows"] == [3]


def test_a_parameter_is_to_blame_only_where_its_numbers_reach_the_loss():
    f, x = layer()
    unused = nn.Linear(3, 3)
    model = nn.ModuleList([f, unused])
    with torch.no_grad():
        unused.weight[0, 0] = NAN
    assert traced(model, lambda: f(x).sum().div(0))["call"] == "div"
    with torch.no_grad():
        f.bias[1] = INF
    assert traced(model, lambda: f(x).square().sum()) == {"origin": "parameter", "slot": 1}


def test_without_a_tape_only_a_parameter_can_be_found():
    f, _ = layer()
    options = {"step": 7, "tapes": [], "states": []}
    assert first_nonfinite(None, list(f.parameters()), str, **options) == {"origin": "unknown", "where": ""}
    with torch.no_grad():
        f.bias[1] = INF
    found = first_nonfinite(None, list(f.parameters()), lambda p: f"of {p.numel()}", **options)
    assert found == {"origin": "parameter", "where": "of 3", "since": 6}


# In a training


def watched(tmp_path, model, loss, *, steps=12, rate=0.01, spoil=None, **options):
    """A run whose step k has the loss `loss(k)`; the facts of it, and what is said of them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    with unstuck.watch(model, optimizer, folder=tmp_path / "run", **options) as run:
        for k in range(1, steps + 1):
            optimizer.zero_grad()
            loss(k).backward()
            if spoil is not None:
                spoil(k)
            optimizer.step()
    facts = [f for f in run.facts if f["code"].startswith("non-finite")]
    return facts, non_finite(run)


ALWAYS = {"budget": 100.0}


def test_a_run_tells_the_module_the_line_and_the_numbers(tmp_path):
    torch.manual_seed(0)
    model, x = Net(), torch.randn(12, 2, 6, 4)

    def loss(k):
        return model(x[k - 1], torch.stack([triangle(), triangle(*([2] if k == 9 else []))])).square().mean()

    (fact,), finding = watched(tmp_path, model, loss, **ALWAYS)
    assert (fact["step"], fact["module"]) == (9, "layers.0.attn")
    line = fact["line"].rpartition(":")[2]
    assert finding.claim == (
        "The loss is nan since step 9, and the first number that is not finite is in the output of layers.0.attn "
        f"(softmax, test_nonfinite.py:{line}), shape (2, 6, 6): 6 of 72 numbers are NaN, made of arguments that are "
        "finite, or the −infinity of a mask."
    )
    assert finding.where == f"layers.0.attn (softmax, test_nonfinite.py:{line})"
    assert "masked throughout" in finding.advice


def test_a_gradient_is_told_at_its_step_while_the_loss_is_finite(tmp_path):
    f, x = layer()
    model = nn.Sequential(f)
    data = [x * (k != 9) for k in range(13)]

    def loss(k):
        return (f(data[k]) - f.bias).square().sum(1).sqrt().mean() + f.weight.square().sum()

    (fact,), finding = watched(tmp_path, model, loss, **ALWAYS)
    assert (fact["step"], fact["origin"], fact["parameter"]) == (9, "backward", "0.weight")
    assert math.isfinite(fact["loss"])
    assert finding.claim.startswith(f"The gradient is not finite since step 9, while the loss is {fact['loss']:.4g}: ")
    assert "the backward pass of sqrt (test_nonfinite.py:" in finding.claim
    assert "5 of 5 numbers are infinite. 5 of its arguments are exactly 0." in finding.claim


def test_a_norm_that_overflows_is_no_gradient_that_is_not_finite(tmp_path):
    f, x = layer()
    facts, _ = watched(tmp_path, f, lambda k: f(x).mean() * (1e25 if k == 5 else 1.0), rate=1e-30, **ALWAYS)
    assert facts == []


def test_a_gradient_that_was_spoilt_after_backward_is_not_laid_on_a_call(tmp_path):
    f, x = layer()

    def spoil(k):
        if k == 9:
            f.bias.grad[1] = NAN

    (fact,), finding = watched(tmp_path, f, lambda k: f(x).square().mean(), spoil=spoil, **ALWAYS)
    assert (fact["origin"], fact["where"], fact["parameter"]) == ("backward", "", "bias")
    assert finding.claim.endswith("that of bias is not, and a replay of the step has finite ones.")
    assert finding.where == "bias"


def test_weights_that_an_update_has_spoilt_name_its_step_and_the_call_that_shows_it_again(tmp_path, monkeypatch):
    """The gradient of step 9 is not looked at; its tape and the weights of the beginning are kept."""
    monkeypatch.setattr(_stepped.Pulses, "before_step", lambda *_: {})
    f, x = layer()
    data = [x * (k != 9) for k in range(13)]

    def loss(k):
        return (f(data[k]) - f.bias).square().sum(1).sqrt().mean() + f.weight.square().sum()

    (fact,), finding = watched(tmp_path, f, loss, **ALWAYS)
    assert (fact["step"], fact["origin"], fact["where"], fact["since"]) == (10, "parameter", "weight", 9)
    assert (fact["cause"]["call"], fact["cause"]["step"], fact["cause"]["weights"]) == ("sqrt", 9, 0)
    assert "The loss of step 9 was finite: what spoilt them is the update of that step." in finding.claim
    assert "Step 9 shows it at the weights of step 0 as well: the backward pass of sqrt (" in finding.claim


def test_weights_that_were_spoilt_from_the_start_are_told_so(tmp_path):
    f, x = layer()
    with torch.no_grad():
        f.bias[0] = NAN
    (fact,), finding = watched(tmp_path, f, lambda k: f(x).sum(), **ALWAYS)
    assert (fact["step"], fact["since"]) == (1, 0)
    assert "before the first step" in finding.claim


def test_a_call_that_fails_on_a_batch_is_told_when_the_batch_comes_again(tmp_path, monkeypatch):
    monkeypatch.setattr(_watch, "FIRST_TAPES", 2)
    monkeypatch.setattr(_governor, "GRANT_SECONDS", 0.0)
    torch.manual_seed(0)
    model, x = Net(), torch.randn(40, 6, 4)

    def loss(k):
        return model(x[k % 40], triangle(*([1] if k % 40 == 25 else []))).square().mean()

    facts, finding = watched(tmp_path, model, loss, steps=110, budget=1e-9)
    first, later = facts
    assert (first["step"], first["origin"], later["code"]) == (25, "unknown", "non-finite-call")
    assert (later["step"], later["weights"], later["module"]) == (65, 0, "layers.0.attn")
    assert (
        "Step 65 shows it at the weights of step 0 as well: the first number that is not finite is in the output of"
        " layers.0.attn (softmax, " in finding.claim
    )


def test_a_step_that_a_scaler_leaves_out_tells_where_its_gradients_stopped_being_finite(tmp_path):
    f, x = layer()
    optimizer = torch.optim.SGD(f.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    with unstuck.watch(f, optimizer, folder=tmp_path / "run", budget=100.0) as run:
        for _ in range(40):
            optimizer.zero_grad()
            loss = (f(x) * 1e6).sin().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    left_out = [e for e in run.facts if e["code"] == "step-left-out"]
    assert [e["count"] for e in left_out] == [4, 16]
    assert [e["call"] for e in left_out] == ["mul", "linear"], "at last only the sum over the examples overflows"
    assert [t.step for t in run.memory().tapes][:2] == [1, 2], "the steps that are taken have their own tapes"
