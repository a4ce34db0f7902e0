"""Watching on a GPU changes nothing: weights, optimiser and generators are those of the unwatched run, byte by byte."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_programs import PROGRAMS
from torch import Tensor, nn

import unstuck

STEPS = 60
EVERYTHING = 100.0  # times the training may go into watching: every step is recorded
REFUSED = {"two optimisers": "part of the loss was made out of sight"}  # before the step of the other


def flat(x):
    """Everything in nested containers, tensors as their bytes."""
    if isinstance(x, Tensor):
        return [
            str(x.dtype),
            tuple(x.shape),
            x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
        ]
    if isinstance(x, dict):
        return [(repr(k), flat(v)) for k, v in x.items()]
    if isinstance(x, (list, tuple)):
        return [flat(v) for v in x]
    return repr(x)


def trained(make, device, folder=None):
    """What the program moves, and where it leaves the generators; with the run where it is watched."""
    torch.manual_seed(0)
    run = None
    if folder is None:
        moved = _train(make, device)
    else:
        with unstuck.watch(folder=folder, budget=EVERYTHING) as run:
            moved = _train(make, device)
    generators = [torch.get_rng_state()]
    if device.type == "cuda":
        generators.append(torch.cuda.get_rng_state(device))
    return flat(moved), flat(generators), run


def _train(make, device):
    step, owners = make(device)
    losses = [step(k) for k in range(STEPS)]
    return [losses, *(owner.state_dict() for owner in owners)]


def trouble(run):
    return [e for e in run.of("fact") if e["code"] in ("watcher-failed", "not-saved")]


@pytest.mark.parametrize("name", PROGRAMS)
def test_weights_optimiser_and_generators_are_those_of_the_unwatched_run(name, device, repeating, tmp_path):
    plain, again = (trained(PROGRAMS[name], device)[:2] for _ in range(2))
    assert plain == again, "the program does not repeat itself, so that nothing could be said of watching"
    moved, generators, run = trained(PROGRAMS[name], device, tmp_path / "run")
    assert not trouble(run)
    assert moved == plain[0]
    assert generators == plain[1]
    assert run.heard > STEPS // 2
    refusals = run.of("end")[0]["refusals"]
    assert [r for r in refusals if not r.startswith(REFUSED.get(name, "-"))] == []
    assert len(run.memory().tapes) > STEPS // 2


def test_a_graph_is_captured_as_without_a_watcher(device, repeating, tmp_path):
    if device.type != "cuda":
        pytest.skip("CUDA graphs are captured on a GPU only")

    def captured():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4)).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, capturable=True)
        x = torch.randn(16, 20, device=device)

        def step():
            optimizer.zero_grad(set_to_none=True)
            model(x).square().mean().backward()
            optimizer.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(5):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            step()
        for _ in range(20):
            graph.replay()
        return flat([model.state_dict(), optimizer.state_dict()])

    plain = captured()
    assert plain == captured()
    with unstuck.watch(folder=tmp_path / "run", budget=EVERYTHING) as run:
        assert captured() == plain
    assert not trouble(run)
    assert run.steps == 5  # those of the warm-up: a captured one takes place on replay only, unseen


LSTM = """
import sys, hashlib, torch
from torch.nn import functional as F
sys.path.insert(0, {here!r})
import unstuck
from gpu_programs import Recurrent

device = torch.device({device!r})
torch.manual_seed(0)
torch.use_deterministic_algorithms(True, warn_only=True)
model = Recurrent(2, 0.3).to(device)
x, y = torch.randn(64, 9, 6, device=device), torch.randint(0, 4, (64,), device=device)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

def train():
    for k in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

if {folder!r}:
    with unstuck.watch(folder={folder!r}, budget=100.0) as run:
        train()
    print(run.of("end")[0]["refusals"], file=sys.stderr)
else:
    train()
weights = b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters())
print(hashlib.sha256(weights).hexdigest())
"""


def test_masks_of_cudnn_are_drawn_once(device, tmp_path):
    """They come from a state of its own, which a replay would move: such steps are not replayed, and it is said why."""

    def run(folder):
        code = LSTM.format(here=str(Path(__file__).parent), device=str(device), folder=folder)
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    plain, again, watched = run(""), run(""), run(str(tmp_path / "run"))
    assert plain.stdout == again.stdout, "the program does not repeat itself"
    assert watched.stdout == plain.stdout
    if device.type == "cuda":
        assert "masks of cuDNN's" in watched.stderr
