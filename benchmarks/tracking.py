"""How many products it takes to follow λmax to 5 % along a training run, cold and warm, and how often the answer holds.

python benchmarks/tracking.py         every network, and writes benchmarks/tracking.json
python benchmarks/tracking.py mlp     some of them; the others keep their numbers

There is a point every five steps from the start. At each, ARPACK gives the reference, which is kept in .references; a
Ritz value of any run that lies above it replaces it, as none can exceed λmax. A product with a quarter of the data
counts as a quarter. An error holds where the reference lies within it. The ways:

cold          a random start at each point
warm          start= the vector of the point before
nested        cold on a random quarter of the data, from its vector on all of them
both          from the quarter's vector and that of the point before
quarters      each quarter warm, by itself; the mean, with three standard errors beside the tolerance
"""

import argparse
import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

import unstuck
from environment import environment
from unstuck.curvature import Eigenpairs, to_scipy
from unstuck.objective import Objective
from workloads import KEPT, MODELS, digits, fashion, loss, sources

POINTS, EVERY = 50, 5
STARTS = {"mlp": 6, "cnn": 1, "gpt": 1}  # how often each way is gone, with other random numbers
TOL = 0.05
PLACE = Path(__file__).with_suffix(".json")

Data = tuple[Tensor, Tensor]
Answer = tuple[float, float, float]  # the value, its error, the products
Way = Callable[["Point"], Answer]

DATA: dict[str, Callable[[], Data]] = {
    "mlp": digits,
    "cnn": lambda: fashion(300),
    "gpt": lambda: sources(8, 64),
}


class Point:
    """The network on its way, with the loss over all the data and over each quarter of them."""

    def __init__(self, number: int, model: nn.Module, data: Data) -> None:
        self.number = number
        self.objective = Objective(model, loss, [data])
        self.H = unstuck.hessian(self.objective)
        order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(0))
        parts = [(data[0][order[k::4]], data[1][order[k::4]]) for k in range(4)]
        self.quarters = [unstuck.hessian(Objective(model, loss, [part])) for part in parts]


def points(name: str) -> Iterator[Point]:
    """The points of a run of the workload's own optimiser on its own data."""
    torch.manual_seed(0)
    model, data = MODELS[name](), DATA[name]()
    if name == "gpt":
        optimizer, rows = torch.optim.Adam(model.parameters(), lr=1e-3), 4
    else:
        optimizer, rows = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), 64
    generator = torch.Generator().manual_seed(0)
    for number in range(POINTS):
        yield Point(number, model.eval(), data)
        model.train()
        for _ in range(EVERY):
            chosen = torch.randint(len(data[0]), (rows,), generator=generator)
            optimizer.zero_grad()
            loss(model, (data[0][chosen], data[1][chosen])).backward()
            optimizer.step()


def top(H: unstuck.Operator, seed: int, start: Tensor | None = None) -> Eigenpairs:
    generator = torch.Generator().manual_seed(seed)
    return unstuck.eigenpairs(H, largest=1, smallest=0, tol=TOL, start=start, generator=generator)


def answer(found: Eigenpairs, before: float = 0.0) -> Answer:
    return float(found.values[0]), float(found.errors[0]), found.products + before


def full(seed: int, *, quarter: bool, last: bool) -> Way:
    """All the data, from the vector of a quarter of them, of the point before or of both; from none, cold."""
    kept: list[Tensor] = []

    def way(point: Point) -> Answer:
        starts = kept[-1:] if last else []
        before = 0.0
        if quarter:
            found = top(point.quarters[point.number % 4], seed + point.number)
            starts, before = [*starts, found.vectors], found.products / 4
        found = top(point.H, seed + point.number, torch.cat(starts) if starts else None)
        kept[:] = [found.vectors]
        return answer(found, before)

    return way


def quarters(seed: int) -> Way:
    last: list[Tensor | None] = [None] * 4

    def way(point: Point) -> Answer:
        found = [top(H, seed + point.number, start) for H, start in zip(point.quarters, last, strict=True)]
        last[:] = [f.vectors for f in found]
        values = [float(f.values[0]) for f in found]
        error = max(float(f.errors[0]) for f in found) + 3 * statistics.stdev(values) / 2
        return statistics.fmean(values), error, sum(f.products for f in found) / 4

    return way


def ways(seed: int) -> dict[str, Way]:
    return {
        "cold": full(seed, quarter=False, last=False),
        "warm": full(seed, quarter=False, last=True),
        "nested": full(seed, quarter=True, last=False),
        "both": full(seed, quarter=True, last=True),
        "quarters": quarters(seed),
    }


def reference(point: Point) -> float:
    digest = hashlib.sha256(point.objective.point.numpy().tobytes()).hexdigest()[:16]
    kept = KEPT / f"tracking-{digest}.json"
    if not kept.is_file():
        start = torch.randn(point.H.size, generator=torch.Generator().manual_seed(99)).numpy()
        found = eigsh(to_scipy(point.H), k=1, which="LA", tol=1e-3, ncv=20, v0=start, return_eigenvectors=False)
        KEPT.mkdir(exist_ok=True)
        kept.write_text(json.dumps(float(found[0])), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def measure(name: str) -> dict[str, Any]:
    followed = [ways(10_000 * start) for start in range(STARTS[name])]
    answers: dict[str, list[Answer]] = {way: [] for way in followed[0]}
    references: list[float] = []
    began = time.perf_counter()
    for point in points(name):
        given = [(way, ask(point)) for one in followed for way, ask in one.items()]
        best = max(reference(point), *(value for way, (value, _, _) in given if way != "quarters"))
        references += [best] * len(followed)
        for way, found in given:
            answers[way].append(found)
    told = {way: summary(given, references) for way, given in answers.items()}
    reference_of = references[:: len(followed)]
    seconds = round(time.perf_counter() - began)
    return {"starts": len(followed), "reference": reference_of, "ways": told, "seconds": seconds}


def summary(given: list[Answer], references: list[float]) -> dict[str, Any]:
    off = [abs(value - true) / true for (value, _, _), true in zip(given, references, strict=True)]
    held = [abs(value - true) <= error for (value, error, _), true in zip(given, references, strict=True)]
    return {
        "products_median": statistics.median(products for _, _, products in given),
        "products_mean": statistics.fmean(products for _, _, products in given),
        "products_worst": max(products for _, _, products in given),
        "within": sum(x <= TOL for x in off) / len(off),
        "held": sum(held) / len(held),
        "worst": max(off),
        "median_error": statistics.median(error / true for (_, error, _), true in zip(given, references, strict=True)),
        "wrong_at": [k * POINTS // len(off) for k, x in enumerate(off) if x > TOL],
    }


def show(name: str, measured: dict[str, Any]) -> None:
    table = Table(
        "way", "products", "mean", "worst", "within 5 %", "error held", "worst, %", "error, %", "wrong at point"
    )
    for way, told in measured["ways"].items():
        table.add_row(
            way,
            f"{told['products_median']:g}",
            f"{told['products_mean']:.1f}",
            f"{told['products_worst']:g}",
            f"{100 * told['within']:.0f} %",
            f"{100 * told['held']:.0f} %",
            f"{100 * told['worst']:.2g}",
            f"{100 * told['median_error']:.2g}",
            " ".join(map(str, told["wrong_at"])),
        )
    low, high = min(measured["reference"]), max(measured["reference"])
    console = Console(width=140)
    console.print(f"{name}: λmax between {low:.3g} and {high:.3g}, {measured['seconds']} s")
    console.print(table)


def main(names: list[str]) -> None:
    known = json.loads(PLACE.read_text(encoding="utf-8"))["networks"] if PLACE.is_file() else {}
    load = os.getloadavg()[0]
    for name in names:
        known[name] = measure(name)
        show(name, known[name])
        result = {
            "points": POINTS,
            "every": EVERY,
            "tolerance": TOL,
            "networks": {name: known[name] for name in DATA if name in known},
            "environment": environment(load, "scipy"),
        }
        PLACE.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", choices=[*DATA, []], default=list(DATA))
    main(parser.parse_args().networks)
