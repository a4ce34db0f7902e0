"""How many products it takes to follow λmax to 5 % along a training run, cold and warm, and how often the answer holds.

python benchmarks/tracking.py         every network, and writes benchmarks/tracking.json
python benchmarks/tracking.py mlp     some of them; the others keep their numbers

There is a point every five steps from the start. At each, ARPACK gives the reference; a Ritz value of any run that lies
above it replaces it, as none can exceed λmax. A product with a quarter of the data counts as a quarter. An error holds
where the reference lies within it. The ways:

cold          a random start at each point
warm          start= the vector of the point before
warm of two   start= the vectors of the two points before, with one sign
extrapolated  start= twice the last vector less the one before
nested        cold on a random quarter of the data, from its vector on all of them
quarters      each quarter warm, by itself; the mean, with three standard errors beside the tolerance
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import scipy
import torch
from rich.console import Console
from rich.table import Table
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

import unstuck
from demo import processor
from unstuck.curvature import Eigenpairs, to_scipy
from unstuck.objective import Objective
from workloads import MODELS, digits, fashion, loss, sources

POINTS, EVERY = 50, 5
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
        self.H = unstuck.hessian(Objective(model, loss, [data]))
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


def following(start: Callable[[Tensor], Tensor | None]) -> Way:
    """From what `start` makes of the vectors of up to two points before, one a row and the last one last."""
    last = torch.zeros(0, 0)

    def way(point: Point) -> Answer:
        nonlocal last
        found = top(point.H, point.number, start(last) if len(last) else None)
        vector = found.vectors
        if len(last) and float(last[-1] @ vector[0]) < 0:
            vector = -vector
        last = torch.cat([last[-1:], vector]) if len(last) else vector
        return answer(found)

    return way


def nested(point: Point) -> Answer:
    quarter = top(point.quarters[point.number % 4], point.number)
    return answer(top(point.H, point.number, quarter.vectors), quarter.products / 4)


def quarters() -> Way:
    last: list[Tensor | None] = [None] * 4

    def way(point: Point) -> Answer:
        found = [top(H, point.number, start) for H, start in zip(point.quarters, last, strict=True)]
        last[:] = [f.vectors for f in found]
        values = [float(f.values[0]) for f in found]
        error = max(float(f.errors[0]) for f in found) + 3 * statistics.stdev(values) / 2
        return statistics.fmean(values), error, sum(f.products for f in found) / 4

    return way


def ways() -> dict[str, Way]:
    return {
        "cold": following(lambda last: None),
        "warm": following(lambda last: last[-1:]),
        "warm of two": following(lambda last: last),
        "extrapolated": following(lambda last: 2 * last[-1] - last[0]),
        "nested": nested,
        "quarters": quarters(),
    }


def reference(H: unstuck.Operator) -> float:
    start = torch.randn(H.size, generator=torch.Generator().manual_seed(99)).numpy()
    return float(eigsh(to_scipy(H), k=1, which="LA", tol=1e-3, ncv=20, v0=start, return_eigenvectors=False)[0])


def measure(name: str) -> dict[str, Any]:
    followed = ways()
    answers: dict[str, list[Answer]] = {way: [] for way in followed}
    references = []
    began = time.perf_counter()
    for point in points(name):
        for way, ask in followed.items():
            answers[way].append(ask(point))
        ritz = [given[-1][0] for way, given in answers.items() if way != "quarters"]
        references.append(max(reference(point.H), *ritz))
    told = {way: summary(given, references) for way, given in answers.items()}
    return {"reference": references, "ways": told, "seconds": round(time.perf_counter() - began)}


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
        "wrong_at": [k for k, x in enumerate(off) if x > TOL],
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
            "environment": {
                "processor": processor(),
                "processors": os.cpu_count(),
                "threads": torch.get_num_threads(),
                "load_before": round(load, 2),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "scipy": scipy.__version__,
            },
        }
        PLACE.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:] or list(DATA))
