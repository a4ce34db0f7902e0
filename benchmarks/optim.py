"""The optimisers of `unstuck.optim` beside torch's: time per step, a race off a saddle, a least-squares fit.

python benchmarks/optim.py [--seconds S] [steps saddle fit]      writes benchmarks/optim.json
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import unstuck
from environment import environment
from unstuck import optim

Made = Callable[[Iterable[Tensor]], torch.optim.Optimizer]

ELEMENTWISE: dict[str, Made] = {
    "torch Rprop": lambda p: torch.optim.Rprop(p, foreach=True),
    "torch RMSprop": lambda p: torch.optim.RMSprop(p, foreach=True),
    "torch Adagrad": lambda p: torch.optim.Adagrad(p, foreach=True),
    "Quickprop": optim.Quickprop,
    "RpropPlus": optim.RpropPlus,
    "RMSAdagrad": optim.RMSAdagrad,
    "RMSpropFirst": optim.RMSpropFirst,
}


def steps(seconds: float) -> dict[str, Any]:
    """Milliseconds a step, medians of 15, over parameters in 20 tensors."""
    del seconds
    found: dict[str, Any] = {}
    for size in (10**5, 10**6, 10**7):
        row = {}
        for name, made in ELEMENTWISE.items():
            own = torch.Generator().manual_seed(0)
            params = [nn.Parameter(torch.randn(size // 20, generator=own)) for _ in range(20)]
            gradients = [[torch.randn(size // 20, generator=own) for _ in params] for _ in range(2)]
            optimizer, times = made(params), []
            for k in range(18):
                for p, g in zip(params, gradients[k % 2], strict=True):
                    p.grad = g
                began = time.perf_counter()
                optimizer.step()
                times.append(time.perf_counter() - began)
            row[name] = round(1e3 * sorted(times[3:])[7], 3)
        found[f"{size:.0e}"] = row
        print(size, row, flush=True)
    return found


def raced(optimizer: torch.optim.Optimizer, asked: Callable[[], Tensor], seconds: float) -> dict[str, Any]:
    """The loss after so many seconds of steps; `asked` gives a loss, or residuals to be squared."""

    def loss() -> Tensor:
        given = asked()
        return given.square().mean() if given.ndim else given

    def closure() -> Any:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    count, small, began = 0, math.inf, time.perf_counter()
    whole: Any = asked if isinstance(optimizer, optim.LevenbergMarquardt) else loss
    while time.perf_counter() - began < seconds:
        before = optimizer.step(whole if isinstance(optimizer, optim.SecondOrder) else closure)
        count += 1
        if small == math.inf and before is not None and float(before.detach()) <= 1e-5:
            small = time.perf_counter() - began
    taken = time.perf_counter() - began
    reached = round(small, 1) if small < math.inf else "never"
    return {"loss": loss().item(), "steps": count, "seconds": round(taken, 1), "seconds to 1e-5": reached}


def saddle(seconds: float) -> dict[str, Any]:
    """Digits, tanh, 10⁵ weights from N(0, 0.01²): the loss at equal time, and the smallest eigenvalue there."""
    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    x = x.float() / 16
    found = {}
    racers: dict[str, Made] = {
        "gradient descent": lambda p: torch.optim.SGD(p, lr=0.5),
        "L-BFGS": lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe"),
        "damped Newton": optim.DampedNewton,
        "saddle-free Newton": optim.SaddleFreeNewton,
    }
    for name, made in racers.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 280), nn.Tanh(), nn.Linear(280, 280), nn.Tanh(), nn.Linear(280, 10))
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(0, 0.01)
        result = raced(made(model.parameters()), lambda m=model: F.cross_entropy(m(x), y), seconds)
        at_end = [(x.double(), y)]  # the curvature there is too small for float32
        objective = unstuck.Objective(model.double(), lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]), at_end)
        pairs = unstuck.eigenpairs(unstuck.hessian(objective), max_products=100)
        result |= {
            "smallest": float(pairs.values[0]),
            "error": float(pairs.errors[0]),
            "largest": float(pairs.values[-1]),
        }
        found[name] = result
        print(name, result, flush=True)
    return found


def fit(seconds: float) -> dict[str, Any]:
    """A regression on 10⁴ weights: the mean square at equal time; Adam at the best of three rates."""
    own = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 8, generator=own, dtype=torch.float64)
    y = torch.sin(2 * x @ torch.randn(8, 1, generator=own, dtype=torch.float64) / math.sqrt(8)) * x[:, :1]
    found = {}
    racers: dict[str, Made] = {
        **{f"Adam, lr={lr}": lambda p, lr=lr: torch.optim.Adam(p, lr=lr) for lr in (1e-3, 3e-3, 1e-2)},
        "L-BFGS": lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe"),
        "Levenberg–Marquardt": optim.LevenbergMarquardt,
    }
    for name, made in racers.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 96), nn.Tanh(), nn.Linear(96, 90), nn.Tanh(), nn.Linear(90, 1)).double()
        found[name] = raced(made(model.parameters()), lambda m=model: m(x) - y, seconds)
        print(name, found[name], flush=True)
    return found


def main() -> None:
    parts = {"steps": steps, "saddle": saddle, "fit": fit}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(parts), choices=[*parts, []])
    parser.add_argument("--seconds", type=float, default=40.0, help="for each optimiser of a race")
    given = parser.parse_args()
    place = Path(__file__).with_suffix(".json")
    result = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
    for name in given.parts:
        load = os.getloadavg()[0]
        result[name] = parts[name](given.seconds) | {"environment": environment(load)}
    place.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
