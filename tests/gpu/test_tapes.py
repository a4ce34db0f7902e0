"""A step recorded on a GPU gives its loss and gradient again there, and on a CPU where that can be."""

import io
import os
import subprocess
import sys

import pytest
import torch
from gpu_programs import PROGRAMS, Block, Recurrent, gpt
from torch import nn
from torch.nn import functional as F

import unstuck
from unstuck.objective import Recorder, TapeError, Vault, on_cpu, pack, unpack
from unstuck.record import of_tapes


def recorded(body, parameters):
    """The tape of body(), and the gradients that its backward pass leaves."""
    recorder = Recorder(parameters)
    with recorder:
        loss = body()
        recorder.root([loss])
        loss.backward()
    tape = recorder.finish(Vault())
    return tape, [p.grad.clone() for p in parameters]


def replayed(tape, parameters):
    copies = [p.detach().clone().requires_grad_() for p in parameters]
    loss = tape.replay(copies)
    return float(loss.detach()), torch.autograd.grad(loss, copies)


def bodies(device):
    """Steps with what a GPU does in its own way: masks, attention, recurrence, statistics, casts."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 9, 32, device=device), torch.randint(0, 4, (16,), device=device)
    head = nn.Linear(32, 4).to(device)

    def over(model, cast=None):
        model = model.to(device)
        parameters = [*model.parameters(), *head.parameters()]

        def body():
            with torch.autocast(device.type, dtype=cast, enabled=cast is not None):
                out = model(x)
                return F.cross_entropy(head(out[0][:, -1] if isinstance(out, tuple) else out.mean(1)), y)

        return body, parameters

    encoder = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
    return {
        "dropout": over(nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5), nn.Linear(32, 32))),
        "attention": over(Block(32, 4, 0.0)),
        "attention that drops": over(Block(32, 4, 0.2)),
        "multi-head attention that drops": over(encoder),
        "lstm": over(nn.LSTM(32, 32, batch_first=True)),
        "gru": over(nn.GRU(32, 32, num_layers=2, batch_first=True)),
        "batch norm": over(nn.Sequential(nn.Conv1d(9, 9, 3, padding=1), nn.BatchNorm1d(9), nn.ReLU())),
        "bfloat16": over(Block(32, 4, 0.0), torch.bfloat16),
        "bfloat16 that drops": over(Block(32, 4, 0.2), torch.bfloat16),
        "float16": over(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 32)), torch.float16),
    }


BODIES = [
    "dropout",
    "attention",
    "attention that drops",
    "multi-head attention that drops",
    "lstm",
    "gru",
    "batch norm",
    "bfloat16",
    "bfloat16 that drops",
    "float16",
]


@pytest.mark.parametrize("name", BODIES)
def test_the_replay_gives_the_recorded_loss_and_gradient(name, device, repeating):
    body, parameters = bodies(device)[name]
    tape, gradients = recorded(body, parameters)
    loss, found = replayed(tape, parameters)
    assert loss == tape.loss
    low = "float16" in name  # where sums in another order may round to the next number
    for a, b in zip(found, gradients, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-2 if low else 1e-5, atol=float(b.abs().max()) * (1e-2 if low else 1e-5)
        )


def test_a_replay_leaves_the_generators_of_the_device_alone(device, repeating):
    body, parameters = bodies(device)["dropout"]
    tape, _ = recorded(body, parameters)
    before = torch.randn(3, device=device)  # moves the generator
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    replayed(tape, parameters)
    after = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    assert torch.equal(state, after)
    assert before.isfinite().all()


@pytest.mark.parametrize("name", BODIES)
def test_read_on_a_cpu_it_is_the_same_loss_or_refused(name, device):
    body, parameters = bodies(device)[name]
    tape, gradients = recorded(body, parameters)
    file = io.BytesIO()
    torch.save(pack([tape]), file)
    file.seek(0)
    tapes, because = on_cpu(unpack(torch.load(file, map_location="cpu", weights_only=True)))
    if tape.states and device.type == "cuda":
        assert tapes == []
        assert "random numbers" in because
        return
    loss, found = replayed(tapes[0], [p.cpu() for p in parameters])
    low = "float16" in name
    assert abs(loss - tape.loss) <= (2e-2 if low else 2e-3) * tape.loss  # TF32 in recurrent and convolution kernels
    for a, b in zip(found, gradients, strict=True):
        assert float((a - b.cpu()).norm()) <= (0.2 if low else 2e-2) * float(b.norm()) + 1e-6


def test_devices_named_by_the_step_are_the_cpu_there(device):
    layer = nn.Linear(6, 6).to(device)
    x = torch.randn(5, 6, device=device)

    def body():
        h = layer(x).cpu().to(device)
        h = h.to(device=str(device)) + torch.ones_like(h, device=device)
        h = h.cuda() if device.type == "cuda" else h
        return (h * torch.arange(6, device=h.device)).square().mean()

    tape, _ = recorded(body, list(layer.parameters()))
    file = io.BytesIO()
    torch.save(pack([tape]), file)
    file.seek(0)
    (here,), _ = on_cpu(unpack(torch.load(file, map_location="cpu", weights_only=True)))
    loss, _ = replayed(here, [p.cpu() for p in layer.parameters()])
    assert loss == pytest.approx(tape.loss, rel=1e-4)


def test_masks_of_a_gpu_are_not_drawn_on_a_cpu(device):
    body, parameters = bodies(device)["dropout"]
    tape, _ = recorded(body, parameters)
    if device.type == "cuda":
        held = [c.cpu() for c in tape.constants]
        there = type(tape)(tape.program, tuple(held), (None,) * len(held), tape.states, tape.loss, tape.step)
        with pytest.raises(TapeError, match="another device"):
            there.replay([p.detach().cpu() for p in parameters])


ELSEWHERE = """
import sys, torch, unstuck
run = unstuck.Run(sys.argv[1])
memory = run.memory()
places = {str(w.device) for s in memory.states for w in s.weights}
print(len(memory.tapes), places, memory.left_out)
print(run.diagnose())
"""


@pytest.mark.parametrize("name", ["mlp with dropout", "cnn with batch norm", "capturable, with its rate on the device"])
def test_a_run_is_read_and_diagnosed_on_a_machine_without_a_gpu(name, device, tmp_path):
    torch.manual_seed(0)
    with unstuck.watch(folder=tmp_path / "run", budget=100.0) as run:
        step, _ = PROGRAMS[name](device)
        for k in range(130):
            step(k)
    kept = run.memory()
    assert {w.device.type for s in kept.states for w in s.weights} == {device.type}
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ":".join(sys.path)}
    code = [sys.executable, "-W", "ignore", "-c", ELSEWHERE, str(run.folder)]
    found = subprocess.run(code, env=hidden, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    told = found.stdout.splitlines()[0]
    assert "{'cpu'}" in told
    drops = "dropout" in name or "capturable" in name  # both have a layer that drops
    if drops and device.type == "cuda":
        assert told.startswith("0 ")
        assert "random numbers" in told
    else:
        assert int(told.split()[0]) > 60


def test_the_weights_and_the_optimiser_go_on_where_they_stood(device, repeating, tmp_path):
    """A step of the optimiser that is built from the run moves the weights as the script's own next step does."""
    torch.manual_seed(0)
    with unstuck.watch(folder=tmp_path / "run", budget=100.0) as run:
        step, (model, _) = gpt(device, fused=True)
        for k in range(20):
            step(k)
        memory = run.memory()
        last = memory.states[-1]
        assert last.step == 20
        weights = [w.clone().requires_grad_() for w in last.weights]
        optimizer = last.optimizer.build(weights)
        tape = memory.tapes[-8]  # of the batch that comes next
        optimizer.zero_grad()
        tape.replay(weights).backward()
        optimizer.step()
        step(20)
    names = dict(model.named_parameters())
    for name, w in zip(memory.names, weights, strict=True):
        torch.testing.assert_close(w, names[name], rtol=1e-5, atol=1e-6)


def test_recurrent_networks_have_second_derivatives(device):
    torch.manual_seed(0)
    model, x = Recurrent().to(device), torch.randn(8, 5, 6, device=device)
    y = torch.randint(0, 4, (8,), device=device)
    tape, _ = recorded(lambda: F.cross_entropy(model(x), y), list(model.parameters()))
    weights = [p.detach() for p in model.parameters()]
    there = unstuck.hessian(of_tapes([tape], weights))
    here = unstuck.hessian(unstuck.Objective(model.cpu().double(), _loss, [(x.cpu().double(), y.cpu())]))
    v = torch.randn(there.size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close((there @ v.to(device)).cpu().double(), here @ v.double(), rtol=1e-3, atol=1e-4)


def _loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])
