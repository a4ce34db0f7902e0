"""Cockpit and TrainCheck on the same programs, each started as its own documentation starts it.

Cockpit in its economy configuration. TrainCheck with all that it can collect (its reference run), and with the
invariants inferred from such a run of the same program (its target run, which collects less). A peer's seconds are set
against those of unwatched steps of the same process or script.
"""

import contextlib
import importlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from healthy import PROGRAMS, Plain

Row = dict[str, Any]
ALL = "every program"
CHAINS = ("perceptron", "convolution", "autoencoder", "small-perceptron", "small-convolution", "small-autoencoder")
TRACED = ("perceptron", "small-perceptron")  # TrainCheck takes minutes a program
PATIENCE = 400.0  # seconds for one command of TrainCheck

SCRIPT = """
import json, sys, time
sys.path.insert(0, {here!r})
import torch
from healthy import PROGRAMS
torch.set_num_threads(1)
torch.manual_seed(0)
program = PROGRAMS[{name!r}]()
model = program.model
optimizer = type(program.optimizer)(model.parameters(), **program.optimizer.defaults)
torch.manual_seed(1)
seconds, losses = [], []
for step in range({steps}):
    began = time.process_time()
    x, y = program.batch()
    optimizer.zero_grad()
    loss = program.loss(model(x), y)
    loss.backward()
    optimizer.step()
    seconds.append(time.process_time() - began)
    losses.append(float(loss.detach()))
print("MEASURED", json.dumps([seconds, losses]))
"""


def measured(names: list[str], peers: list[str]) -> Iterator[tuple[str, str, Row]]:
    """Peer, program and the ratio to the unwatched steps, or why there is none."""
    for peer in peers:
        package, module, measure, programs, steps = PEERS[peer]
        try:
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                importlib.import_module(module)
        except Exception as error:
            yield peer, ALL, {"failed": f"{type(error).__name__}: {error}; see benchmarks/requirements-watch.txt"}
            continue
        for name in [n for n in programs if n in names]:
            try:
                for kind, row in measure(name, steps):
                    yield kind, name, row | {"version": metadata.version(package)}
            except Exception as error:  # whatever a peer raises is its answer
                yield peer, name, {"failed": f"{type(error).__name__}: {str(error)[-300:]}"}


def cockpit(name: str, steps: int) -> Iterator[tuple[str, Row]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (plain, had), (watched, has), (again, _) = (stepped(name, steps, m) for m in (unwatched, flown, unwatched))
    ratio = sum(watched) / statistics.fmean((sum(plain), sum(again)))
    yield "Cockpit, economy", {"ratio": ratio, "steps": steps, "identical": had == has}


def stepped(
    name: str, steps: int, made: Callable[[Plain], Callable[[], torch.Tensor]]
) -> tuple[list[float], list[float]]:
    torch.manual_seed(0)
    program = PROGRAMS[name]()
    assert isinstance(program, Plain)
    step = made(program)
    torch.manual_seed(1)
    seconds, losses = [], []
    for _ in range(steps):
        began = time.process_time()
        losses.append(step())
        seconds.append(time.process_time() - began)
    return seconds[2:], [float(x) for x in losses]


def unwatched(program: Plain) -> Callable[[], torch.Tensor]:
    return program


def flown(program: Plain) -> Callable[[], torch.Tensor]:
    """The step with Cockpit's calls in it, as its basic example writes them."""
    extend = importlib.import_module("backpack").extend
    economy = importlib.import_module("cockpit.utils.configuration").configuration("economy")
    model, mean = extend(program.model), extend(program.loss)
    single = type(program.loss)(reduction="none")
    instruments = importlib.import_module("cockpit").Cockpit(model.parameters(), quantities=economy)
    count = 0

    def step() -> torch.Tensor:
        nonlocal count
        x, y = program.batch()
        program.optimizer.zero_grad()
        outputs = model(x)
        loss = mean(outputs, y)
        losses = single(outputs, y).detach()
        if isinstance(program.loss, nn.MSELoss):
            losses = losses.flatten(1).mean(1)
        with instruments(count, info={"batch_size": len(x), "individual_losses": losses, "loss": loss}):
            loss.backward(create_graph=instruments.create_graph(count))
        program.optimizer.step()
        count += 1
        return loss.detach()

    return step


def traincheck(name: str, steps: int) -> Iterator[tuple[str, Row]]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        script = SCRIPT.format(here=str(Path(__file__).parent), name=name, steps=steps)
        (folder / "program.py").write_text(script, encoding="utf-8")
        bare, had = _told(_ran(folder, sys.executable, "program.py"))
        collect = ("traincheck-collect", "--pyscript", "program.py", "--models-to-track", "model")
        every, has = _told(_ran(folder, *collect, "--output-dir", "all"))
        yield "TrainCheck, all", {"ratio": every / bare, "steps": steps, "identical": had == has}
        _ran(folder, "traincheck-infer", "-f", "all", "-o", "invariants.json")
        count = len((folder / "invariants.json").read_text(encoding="utf-8").splitlines())
        some, has = _told(_ran(folder, *collect, "--invariants", "invariants.json", "--output-dir", "some"))
        row = {"ratio": some / bare, "steps": steps, "identical": had == has, "invariants": count}
        yield "TrainCheck, by invariants", row


def _ran(folder: Path, *command: str) -> str:
    beside = str(Path(sys.executable).parent)
    around = os.environ | {"PATH": f"{beside}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run(
        command, cwd=folder, env=around, timeout=PATIENCE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    text = done.stdout.decode(errors="replace")
    if done.returncode:
        raise subprocess.SubprocessError(f"{' '.join(command[:2])}: {text.strip()}")
    return text


def _told(text: str) -> tuple[float, list[float]]:
    line = next(x for x in text.splitlines() if "MEASURED" in x)
    start = line.index("[", line.index("MEASURED"))
    (seconds, losses), _ = json.JSONDecoder().raw_decode(line[start:])
    return sum(seconds[5:]), losses


PEERS: dict[str, tuple[str, str, Callable[..., Iterator[tuple[str, Row]]], Sequence[str], int]] = {
    "cockpit": ("cockpit-for-pytorch", "cockpit", cockpit, CHAINS, 40),
    "traincheck": ("traincheck", "traincheck", traincheck, TRACED, 50),
}
