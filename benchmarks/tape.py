"""What a tape costs: to record a step, and to run it again.

python benchmarks/tape.py            every program, and writes benchmarks/tape.json
python benchmarks/tape.py mlp gpt    some of them; the others keep their numbers

Recording is measured in pairs: blocks of plain steps and blocks of recorded ones in turn, in processor seconds of this
process; a recorded step ends with its compiled tape. The share is the median of the pairs, the cost of a call that of a
step divided by the torch calls that the recorder saw in it. A replay's time is given in plain forward and backward
passes of the same step. The first Hessian product builds a graph, which the later ones use again.
"""

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from environment import environment
from unstuck.objective import Program, Recorder, Vault
from workloads import GPT, cnn

PAIRS = 60
SECONDS = 0.1  # of a block
PLACE = Path(__file__).with_suffix(".json")


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.units, self.head = nn.GRU(16, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.units(x)[0][:, -1])


def _sgd(weights: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(weights, lr=1e-3, momentum=0.9)


def _adamw(weights: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=1e-4)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))


PROGRAMS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], torch.optim.Optimizer], tuple[int, ...], int]] = {
    "mlp-sgd": (_mlp, _sgd, (64, 64), 0),
    "mlp-adamw": (_mlp, _adamw, (64, 64), 0),
    "cnn": (cnn, _sgd, (32, 1, 28, 28), 0),
    "gru": (Recurrent, _adamw, (32, 32, 16), 0),
    "gpt": (lambda: GPT(width=64, layers=2, heads=4, length=64), _adamw, (8, 64), 128),
}


class Loop:
    """A training loop over batches of random numbers, as people write it."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        make, optimizer, shape, symbols = PROGRAMS[name]
        self.model = make()
        self.optimizer = optimizer(self.model.parameters())
        self.data = torch.randint(symbols, (8, *shape)) if symbols else torch.randn(8, *shape)
        self.targets = torch.randint(10, (8, *(shape if symbols else shape[:1])))
        self.seen = 0.0
        self.calls = 0
        self._leaves = list(self.model.parameters())
        self._vault = Vault()
        self._programs: list[Program] = []

    def forward(self, k: int) -> Tensor:
        x, y = self.data[k % 8], self.targets[k % 8]
        logits = self.model(x)
        return F.cross_entropy(logits.flatten(0, -2), y.flatten())

    def plain(self, k: int) -> None:
        self.optimizer.zero_grad()
        loss = self.forward(k)
        loss.backward()
        self.seen += loss.item()
        self.optimizer.step()

    def recorded(self, k: int) -> None:
        with Recorder(self._leaves) as recorder:
            self.optimizer.zero_grad()
            loss = self.forward(k)
            recorder.root([loss])
            loss.backward()
            self.seen += loss.item()
        self.tape = recorder.finish(self._vault, step=k, like=self._programs)
        self._programs = [self.tape.program]
        self.calls = recorder.calls
        self.optimizer.step()


def spent(step: Callable[[int], None], steps: int) -> float:
    """Processor seconds of one step."""
    began = time.process_time()
    for k in range(steps):
        step(k)
    return (time.process_time() - began) / steps


def recording(loop: Loop, pairs: int) -> dict[str, Any]:
    for step in (loop.plain, loop.recorded):
        spent(step, 20)
    steps = max(10, round(SECONDS / spent(loop.plain, 20)))
    plain, added, shares = [], [], []
    for pair in range(pairs):
        order = (loop.plain, loop.recorded) if pair % 2 else (loop.recorded, loop.plain)
        took = {step: spent(step, steps) for step in order}
        plain.append(took[loop.plain])
        added.append(took[loop.recorded] - took[loop.plain])
        shares.append(added[-1] / plain[-1])
    return {
        "step_ms": round(1e3 * statistics.median(plain), 4),
        "calls": loop.calls,
        "us_a_call": round(1e6 * statistics.median(added) / loop.calls, 2),
        "percent": round(100 * statistics.median(shares), 2),
        "percent_quartiles": [round(100 * q, 2) for q in statistics.quantiles(shares)[::2]],
        "pairs": pairs,
    }


def replaying(loop: Loop, rounds: int) -> dict[str, float]:
    """Replays and Hessian products, in plain forward and backward passes of the step."""
    leaves = [p.detach().clone().requires_grad_() for p in loop.model.parameters()]
    direction = [torch.randn_like(p) for p in leaves]
    took: dict[str, list[float]] = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        began = time.process_time()
        result = run()
        took.setdefault(name, []).append(time.process_time() - began)
        return result

    def slopes(*, graph: bool) -> Any:
        return torch.autograd.grad(loop.tape.replay(leaves), leaves, create_graph=graph)

    for k in range(rounds):
        timed("plain", lambda k=k: loop.forward(k).backward())
        timed("forward and backward", lambda: slopes(graph=False))
        began = time.process_time()
        product = functools.partial(torch.autograd.grad, slopes(graph=True), leaves, direction, retain_graph=True)
        product()
        took.setdefault("first product", []).append(time.process_time() - began)
        timed("later products", product)
    plain = took.pop("plain")
    return {
        name: round(statistics.median(a / b for a, b in zip(seconds, plain, strict=True)), 2)
        for name, seconds in took.items()
    }


def show(results: dict[str, Any]) -> None:
    table = Table("program", "step, ms", "calls", "µs a call", "recording, %", "replay", "first product", "later")
    for name, row in results.items():
        replay = row["replay"]
        table.add_row(
            name,
            *(str(row["recording"][key]) for key in ("step_ms", "calls", "us_a_call", "percent")),
            *(str(replay[key]) for key in ("forward and backward", "first product", "later products")),
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help=f"of {', '.join(PROGRAMS)}; all without one")
    parser.add_argument("--quick", action="store_true", help="a tenth of the pairs, and nothing is written")
    given = parser.parse_args()
    unknown = sorted(set(given.programs) - set(PROGRAMS))
    if unknown:
        parser.error(f"the programs are {', '.join(PROGRAMS)}, got {', '.join(unknown)}")
    load = os.getloadavg()[0]
    torch.set_num_threads(1)
    pairs = PAIRS // 10 if given.quick else PAIRS
    results: dict[str, Any] = {}
    for name in given.programs or PROGRAMS:
        loop = Loop(name)
        results[name] = {"recording": recording(loop, pairs), "replay": replaying(loop, pairs)}
        results[name]["environment"] = environment(load)
    show(results)
    if not given.quick:
        kept = json.loads(PLACE.read_text(encoding="utf-8")) if PLACE.is_file() else {}
        merged = {name: (kept | results)[name] for name in PROGRAMS if name in kept | results}
        PLACE.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
