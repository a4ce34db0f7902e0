"""What curvature costs from 10⁵ to 10⁸ parameters: seconds of a product, of λmax to 5 %, and the memory of it.

python benchmarks/scale.py            every case, each in a process of its own, and writes benchmarks/scale.json
python benchmarks/scale.py 3 4e9      one case: network number 3 of SHAPES, with a basis of up to 4e9 bytes

The networks are transformers with the weights that they begin with, and all see the same characters. Memory is the
peak of the process above what it had with torch and unstuck imported, in gradients: 4 bytes a parameter.
"""

import argparse
import functools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import unstuck
from environment import environment
from unstuck.curvature import Eigenpairs
from unstuck.objective import Objective
from workloads import GPT, loss, sources

SHAPES = (  # width, layers, heads: about 10⁵, 10⁶, 10⁷ and 10⁸ parameters
    (48, 3, 4),
    (128, 5, 4),
    (320, 8, 5),
    (768, 14, 12),
)
CASES = ((0, 4e9), (1, 4e9), (2, 4e9), (3, 4e9), (3, 8e9))  # network, memory for the basis in bytes
ROWS, LENGTH = 2, 64
TOL = 0.05
LONGER = 100  # products of the run that tells how far the first was off


def peak() -> int:
    """The largest resident memory of this process so far, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def seconds_of(function: Any, repeats: int) -> tuple[float, float]:
    """The seconds of the first call, and the median of those after it."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return times[0], sorted(times[1:])[repeats // 2]


def top(H: unstuck.Operator, *, memory: float, tol: float, **options: Any) -> tuple[dict[str, Any], Eigenpairs]:
    began = time.perf_counter()
    found = unstuck.eigenpairs(
        H, largest=1, smallest=0, tol=tol, memory=memory, generator=torch.Generator().manual_seed(0), **options
    )
    told = {
        "value": float(found.values[0]),
        "error": float(found.errors[0]),
        "products": found.products,
        "converged": found.converged,
        "seconds": round(time.perf_counter() - began, 2),
    }
    return told, found


def measure(shape: int, memory: float) -> dict[str, Any]:
    """One case, in this process."""
    width, layers, heads = SHAPES[shape]
    before = peak()
    torch.manual_seed(0)
    model = GPT(width=width, layers=layers, heads=heads, length=LENGTH)
    objective = Objective(model, loss, [sources(ROWS, LENGTH)])
    unit = 4 * objective.size
    peaks = {"model and objective": peak()}
    _, gradient = seconds_of(objective.gradient, 3)
    peaks["gradient"] = peak()
    H = unstuck.hessian(objective)
    drawn = torch.randn(H.size, generator=torch.Generator().manual_seed(1))
    first, product = seconds_of(functools.partial(H.matvec, drawn), 3)
    del drawn
    peaks["product"] = peak()
    told, found = top(H, memory=memory, tol=TOL)
    peaks["eigenpairs"] = peak()
    rows = min(told["products"], int(memory / unit) - 1)  # as many as fit, less one for the result
    plan = objective.plan
    assert plan is not None
    measured = {
        "parameters": objective.size,
        "memory": memory,
        "gradient_seconds": gradient,
        "first_product_seconds": first,
        "product_seconds": product,
        "top": told,
        "rows": rows,
        "graph_gradients": plan.bytes / unit,
        "peak_mb": round((peaks["eigenpairs"] - before) / 1e6),
        "peak_gradients": {name: (bytes_ - before) / unit for name, bytes_ in peaks.items()},
        "beside_rows": (peaks["eigenpairs"] - before) / unit - rows,
    }
    if (shape, memory) == CASES[-1]:  # the same start, followed for longer
        del found
        measured["longer"], _ = top(H, memory=memory, tol=1e-3, max_products=LONGER)
    return measured


def exponent(cases: list[dict[str, Any]], least: float) -> float:
    """The slope of log seconds of a product over log parameters, by least squares, of cases from a size on."""
    pairs = sorted({c["parameters"]: c["product_seconds"] for c in cases if c["parameters"] >= least}.items())
    x, y = torch.tensor(pairs, dtype=torch.float64).log().T
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def bound(cases: list[dict[str, Any]]) -> dict[str, int]:
    """What no peak is above: gradients · (rows + constant) + the libraries' and the activations' own megabytes."""
    constant = math.ceil(max(case["beside_rows"] for case in cases if case["parameters"] > 5e7))
    fixed = (case["peak_mb"] - 4e-6 * case["parameters"] * (case["rows"] + constant) for case in cases)
    return {"constant": constant, "fixed_mb": math.ceil(max(0.0, *fixed))}


def show(cases: list[dict[str, Any]]) -> None:
    table = Table("parameters", "memory=", "gradient, s", "product, s", "ratio", "λmax", "products", "s", "rows")
    table.add_column("peak, gradients")
    table.add_column("beside rows")
    for case in cases:
        found = case["top"]
        table.add_row(
            f"{case['parameters']:,}",
            f"{case['memory']:.0e}",
            f"{case['gradient_seconds']:.3g}",
            f"{case['product_seconds']:.3g}",
            f"{case['product_seconds'] / case['gradient_seconds']:.2f}",
            f"{found['value']:.4g} ± {found['error']:.1g}{'' if found['converged'] else ' NOT converged'}",
            str(found["products"]),
            f"{found['seconds']:.3g}",
            str(case["rows"]),
            f"{case['peak_gradients']['eigenpairs']:.1f}",
            f"{case['beside_rows']:.1f}",
        )
    Console(width=140).print(table)


def main() -> None:
    load = os.getloadavg()[0]
    cases = []
    for shape, memory in CASES:
        command = [sys.executable, __file__, str(shape), str(memory)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        cases.append(json.loads(done.stdout))
        show(cases[-1:])
    longer, found = cases[-1]["longer"], cases[-1]["top"]
    result = {
        "tokens": ROWS * LENGTH,
        "tolerance": TOL,
        "cases": cases,
        "exponent": {"from 1e5": exponent(cases, 0), "from 1e6": exponent(cases, 5e5)},
        "bound": bound(cases),
        "environment": environment(load),
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(cases)
    print(f"seconds of a product grow as parameters to the power of {result['exponent']['from 1e6']:.2f} from 10⁶ on")
    most = result["bound"]
    print(f"peak memory ≤ gradient · (rows of the basis + {most['constant']}) + {most['fixed_mb']} MB")
    off = 1 - found["value"] / longer["value"]
    print(f"λmax after {longer['products']} products {longer['value']:.4g}: to 5 % it was {100 * off:.2g} % lower")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "case", nargs="*", type=float, help="shape and memory of one case alone; without, all are measured"
    )
    given = parser.parse_args().case
    if given:
        print(json.dumps(measure(int(given[0]), given[1])))
    else:
        main()
