"""What products, densities, traces and memory cost, ours and the peers'."""

import contextlib
import ctypes
import dataclasses
import gc
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import unstuck
from peers import (
    Curvlinops,
    Eigenthings,
    PyHessian,
    Quadrature,
    conditions,
    finite_difference,
    plain_gradient,
    plain_product,
    sentence,
)
from spectra import Bench, Row, report, timed
from unstuck.curvature import Density, density, trace
from workloads import Workload, workload

EXACT = 1e-3  # of a product in float32, relative to differences in float64
ROUNDS = {"mlp": 50, "cnn": 5, "gpt": 10}
STEPS = {"mlp": 30, "cnn": 20, "gpt": 30}
SAMPLES = 2
PROBES = {"mlp": 200, "cnn": 100, "gpt": 24}
PEER_PROBES = 8
LIMIT = 3e8  # bytes

PEERS: dict[str, tuple[str, Callable[[Workload], Any]]] = {
    "PyHessian": ("PyHessian", PyHessian),
    "hessian-eigenthings": ("hessian-eigenthings", Eigenthings),
    "curvlinops": ("curvlinops-for-pytorch", Curvlinops),
}


def product(bench: Bench) -> Row:
    """One gradient and one Hessian product of each tool, in turn; kept graphs are built before."""
    given, seconds, failed = bench.given, {}, {}
    objective = given.objective()
    H = unstuck.hessian(objective)
    v = torch.randn(H.size, generator=torch.Generator().manual_seed(0))
    tools: dict[str, Callable[[], Tensor]] = {
        "gradient by hand": lambda: plain_gradient(given),
        "our gradient": objective.gradient,
        "our product": lambda: H @ v,
        "product by hand": lambda: plain_product(given, v),
    }
    for name, (package, peer) in PEERS.items():
        if bench.has(package):
            with _noting(failed, f"{name} product"), conditions(0, relaxed=bench.relaxed):
                apply = peer(given).product()
                tools[f"{name} product"] = lambda apply=apply: apply(v)
    results: dict[str, Tensor] = {}
    for index in range(1 + (1 if bench.quick else ROUNDS[given.name])):
        report(f"{given.name}: products, round {index}")
        for name, run in list(tools.items()):
            mine = name.startswith("our")
            with contextlib.nullcontext() if mine else conditions(0, relaxed=bench.relaxed):
                try:
                    results[name], taken = timed(run)
                except Exception as error:
                    if mine:
                        raise
                    failed[name] = sentence(error)
                    del tools[name]
                    continue
            if index:  # the first round builds what is kept
                seconds.setdefault(name, []).append(taken)
    report(f"{given.name}: products, the truth")
    exact = {"gradient": results["gradient by hand"], "product": finite_difference(given, v)}
    rows: list[Row] = []
    for name in tools:
        truth = exact["gradient" if "gradient" in name else "product"]
        apart = float((results[name] - truth).norm() / truth.norm())
        rows.append(
            {
                "tool": name,
                "seconds": statistics.median(seconds[name]),
                "gradients": _ratio(seconds[name], seconds["gradient by hand"]),
                "ratio": _ratio(seconds[name], seconds["our product"]),
                "difference": apart,
                "right": apart <= EXACT,
            }
        )
    return {
        "rounds": len(seconds["our product"]),
        "plan": dataclasses.asdict(objective.plan),
        "rows": rows + [{"tool": name, "failed": why} for name, why in failed.items()],
    }


def spectrum(bench: Bench) -> Row:
    """The density from as many probes and steps by each tool, beside ours from graphs that are built anew."""
    given = bench.given
    steps = 8 if bench.quick else STEPS[given.name]
    largest = float(bench.reference[0][-1])

    def ours() -> Density:
        generator = torch.Generator().manual_seed(0)
        return density(unstuck.hessian(given.objective()), steps=steps, samples=SAMPLES, generator=generator)

    found, seconds = timed(ours)
    mine = Quadrature(found.nodes.tolist(), found.weights.tolist())
    rows: list[Row] = [{"tool": "ours", "seconds": seconds, "ratio": 1.0, **_moments(mine, largest, given.size)}]
    if bench.has("PyHessian"):
        row: Row = {"tool": "PyHessian, as shipped"}
        with _noting(row, "failed"), conditions(0):  # short, for it fails after its first probe
            row |= _moments(PyHessian(given).density(steps=2, samples=1), largest, given.size)
        rows.append(row)
    runs = {
        "PyHessian, torch.eig mended": ("PyHessian", lambda: PyHessian(given).density_mended),
        "hessian-eigenthings": ("hessian-eigenthings", lambda: Eigenthings(given).density),
    }
    for name, (package, prepare) in runs.items():
        if not bench.has(package):
            continue
        report(f"{given.name}: density, {name}")
        _, beside = timed(ours)
        row = {"tool": name}
        with _noting(row, "failed"), conditions(0, relaxed=bench.relaxed):
            method = prepare()
            other, taken = timed(lambda method=method: method(steps=steps, samples=SAMPLES))
            row |= {"seconds": taken, "ours": beside, "ratio": taken / beside}
            row |= _moments(other, largest, given.size)
        rows.append(row)
    return {"samples": SAMPLES, "steps": steps, "rows": rows, "check": _check_moments(given, mine)}


def _moments(found: Quadrature, largest: float, size: int) -> Row:
    """Estimates of trace and squared Frobenius norm, and how far the outermost node is from the largest value."""
    moments = [
        statistics.mean(sum(w * x**k for x, w in zip(nodes, weights, strict=True)) for nodes, weights in _runs(found))
        for k in (0, 1, 2)
    ]
    top = max(x for nodes, _ in _runs(found) for x in nodes)
    return {
        "mass": moments[0],
        "trace": size * moments[1],
        "squares": size * moments[2],
        "largest_error": abs(top - largest) / largest,
    }


def _runs(found: Quadrature) -> list[tuple[Sequence[float], Sequence[float]]]:
    return list(zip(found.nodes, found.weights, strict=True))


def _check_moments(given: Workload, mine: Quadrature) -> Row:
    """Each of our quadratures must give vᵀHv and ‖Hv‖² of its start v, here from products by hand."""
    generator = torch.Generator().manual_seed(0)
    worst = [0.0, 0.0]
    for nodes, weights in _runs(mine):
        v = torch.randn(given.size, generator=generator)
        v /= v.norm()
        with conditions(0):
            image = plain_product(given, v).double()
        truths = float(v.double() @ image), float(image @ image)
        scale = float(image.norm())
        for k, unit in ((1, scale), (2, scale**2)):
            moment = sum(w * x**k for x, w in zip(nodes, weights, strict=True))
            worst[k - 1] = max(worst[k - 1], abs(moment - truths[k - 1]) / unit)
    return {"first_moment": worst[0], "second_moment": worst[1], "right": max(worst) <= EXACT}


def hutchinson(bench: Bench) -> Row:
    """The spread of single trace samples, plain and with the ten largest pairs known, and the seconds of a sample."""
    given = bench.given
    probes = 16 if bench.quick else PROBES[given.name]
    H = bench.kept
    H @ torch.zeros(H.size)  # builds the graphs
    pairs = unstuck.eigenpairs(H, largest=10, smallest=0, generator=torch.Generator().manual_seed(0))
    report(f"{given.name}: trace")
    drawn = {
        name: trace(H, tol=0, max_products=probes, known=known, generator=torch.Generator().manual_seed(1))
        for name, known in (("plain", None), ("known", pairs))
    }
    variance = {name: float(found.samples.var()) for name, found in drawn.items()}
    both = math.hypot(drawn["plain"].stderr, drawn["known"].stderr)
    rows: list[Row] = []
    for name, (package, peer) in PEERS.items():
        if not bench.has(package):
            continue
        report(f"{given.name}: trace, {name}")
        _, mine = timed(lambda: trace(unstuck.hessian(given.objective()), tol=0, max_products=PEER_PROBES))
        row: Row = {"tool": name}
        with _noting(row, "failed"), conditions(1, relaxed=bench.relaxed):
            method = peer(given).trace
            samples, taken = timed(lambda method=method: method(samples=PEER_PROBES))
            row |= {"seconds": taken / PEER_PROBES, "ours": mine / PEER_PROBES, "ratio": taken / mine}
            row |= {"estimate": statistics.mean(samples)}
        rows.append(row)
    return {
        "probes": probes,
        "estimate": {name: found.estimate for name, found in drawn.items()},
        "stderr": {name: found.stderr for name, found in drawn.items()},
        "agree": abs(drawn["plain"].estimate - drawn["known"].estimate) <= 4 * both,
        "variance": variance,
        "probes_saved": variance["plain"] / variance["known"],
        "products_for_pairs": pairs.products,
        "rows": rows,
    }


MEMORY: dict[str, tuple[str, Callable[[Workload], str]]] = {
    "ours": ("", lambda given: _ours_in(given, None)),
    "ours, memory=3e8": ("", lambda given: _ours_in(given, LIMIT)),
    "PyHessian": ("PyHessian", lambda given: _called(PyHessian(given).top, max_iter=2)),
    "hessian-eigenthings": ("hessian-eigenthings", lambda given: _called(Eigenthings(given).lanczos, seed=0)),
}


def memory(bench: Bench) -> Row:
    """Peak resident memory of some ten products each, in a process of its own."""
    rows: list[Row] = []
    for name, (package, _) in MEMORY.items():
        if package and not bench.has(package):
            continue
        report(f"{bench.given.name}: memory of {name}")
        command = [sys.executable, str(Path(__file__)), bench.given.name, name, str(torch.get_num_threads())]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            rows.append({"tool": name, "failed": lines[-1]})
        else:
            rows.append({"tool": name, **json.loads(done.stdout)})
    kept = next((row for row in rows if row["tool"] == "ours, memory=3e8" and "failed" not in row), None)
    within = kept is not None and 1e6 * kept["above_gradient_mb"] <= LIMIT
    return {"limit_mb": LIMIT / 1e6, "within_limit": within, "rows": rows}


def _ours_in(given: Workload, limit: float | None) -> str:
    objective = given.objective(memory=limit)
    unstuck.eigenpairs(unstuck.hessian(objective), largest=5, smallest=0, tol=1e-9, max_products=10)
    return str(objective.plan)


def _called(method: Callable[..., Any], **options: Any) -> str:
    return f"{method(**options).products} products"


def _alone(name: str, tool: str) -> Row:
    """The peaks of one gradient and of one tool above what is resident before, in this process."""
    given = workload(name)
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # a C library that does not trim leaves the pools as they are
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    resident = _resident("VmRSS")
    _forget_peak()
    plain_gradient(given)
    gradient = _resident("VmHWM")
    _forget_peak()
    with conditions(0):
        note = MEMORY[tool][1](given)
    peak = _resident("VmHWM")
    return {
        "peak_mb": peak - resident,
        "gradient_mb": gradient - resident,
        "above_gradient_mb": peak - gradient,
        "note": note,
    }


def _resident(field: str) -> float:
    """MB, of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * float(line.split()[1]) / 1e6
    raise SystemExit(f"the memory part needs Linux, got no {field} in /proc/self/status: leave it out with --parts")


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


@contextlib.contextmanager
def _noting(row: Row, key: str) -> Any:
    """An exception of a peer becomes a sentence."""
    try:
        yield
    except Exception as error:
        row[key] = sentence(error)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(_alone(sys.argv[1], sys.argv[2])))
