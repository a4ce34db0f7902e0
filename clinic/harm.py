"""The harm rule: an injected error counts as a fault only if the run ends worse than the healthy one.

python -m clinic.harm --seeds 3 --output clinic/results-harm.json
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from clinic import FAULTS, PROGRAMS, VARIANTS


def run(program, seed, *choice):
    """The held-out accuracy and the final training loss that a program prints last."""
    command = [sys.executable, PROGRAMS[program], "--seed", str(seed), *choice]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    _, accuracy, _, loss = printed.splitlines()[-1].split()
    return float(accuracy), float(loss)


def ending(program, seeds, *choice):
    """Medians over the seeds; a loss that is not a number is the worst of all."""
    runs = [run(program, seed, *choice) for seed in range(seeds)]
    losses = [math.inf if math.isnan(loss) else loss for _, loss in runs]
    return median(accuracy for accuracy, _ in runs), median(losses)


def is_harmful(end, healthy):
    """Two points of held-out accuracy lost, or a loss clearly more than twice the healthy one."""
    return end[0] <= healthy[0] - 0.02 or end[1] > 2 * healthy[1] + 0.03


def judge(program, seeds):
    """One row a run: its choice, its end and the verdict."""
    healthy = ending(program, seeds)
    yield "healthy", healthy, ""
    for fault in FAULTS:
        end = ending(program, seeds, "--fault", fault)
        yield fault, end, "harmful" if is_harmful(end, healthy) else "equivalent mutant"
    for variant, programs in VARIANTS.items():
        if program in programs:
            end = ending(program, seeds, "--variant", variant)
            yield f"({variant})", end, "NOT HEALTHY" if is_harmful(end, healthy) else "healthy"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="where to store the table as JSON")
    args = parser.parse_args()

    table = Table("program", "run", "accuracy", "loss", "verdict", title=f"medians over {args.seeds} seeds")
    rows = []
    for program in PROGRAMS:
        for choice, (accuracy, loss), verdict in judge(program, args.seeds):
            table.add_row(program, choice, f"{accuracy:.3f}", f"{loss:.4g}", verdict)
            shown = loss if math.isfinite(loss) else "inf"
            rows.append({"program": program, "run": choice, "accuracy": accuracy, "loss": shown, "verdict": verdict})
    Console().print(table)
    if args.output:
        where = {"torch": torch.__version__, "python": platform.python_version(), "cpus": os.cpu_count()}
        args.output.write_text(json.dumps({"environment": where, "seeds": args.seeds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
