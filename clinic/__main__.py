"""The scoreboard: every program with every fault, and every healthy run, watched and diagnosed as a user would.

python -m clinic                                    all of it, about three minutes on two cores
python -m clinic --program mlp --run lr-bounces     one cell
python -m clinic --seeds 3 --output clinic/results.json
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from clinic import FAULTS, PROGRAMS, VARIANTS

PROOF_NEEDED = ("lr-bounces", "lr-too-small", "saddle", "dead-units")  # these must be proved by a trial


@dataclass(frozen=True)
class Cell:
    """One watched run and what was said of it."""

    program: str
    run: str  # a fault, a variant or "healthy"
    seed: int
    expected: str  # the code that must come first; "" for silence
    found: str
    word: str
    remedy: str
    effect: str
    seconds: float
    overhead: float

    @property
    def right(self) -> bool:
        proved = self.word == "PROVED" or self.expected not in PROOF_NEEDED
        return self.found == self.expected and proved


def cases(programs: tuple[str, ...], runs: tuple[str, ...], seeds: int) -> list[tuple[str, str, int]]:
    """Program, run and seed of every cell that was asked for."""
    everything = [(p, r) for p in PROGRAMS for r in ("healthy", *FAULTS)]
    everything += [(p, r) for r, where in VARIANTS.items() for p in where]
    chosen = [(p, r) for p, r in everything if (not programs or p in programs) and (not runs or r in runs)]
    return [(p, r, seed) for p, r in chosen for seed in range(seeds)]


def examine(program: str, run: str, seed: int) -> Cell:
    """Runs one cell through the command, in a process of its own."""
    choice = ["--fault", run] if run in FAULTS else ["--variant", run] if run in VARIANTS else []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "diagnosis.json")
        command = [sys.executable, "-c", "from unstuck.cli import main; main()", "run"]
        options = ["--out", str(Path(folder, "run")), "--json", str(out)]
        script = [str(PROGRAMS[program]), "--seed", str(seed), *choice]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, *options, *script], check=True, capture_output=True, env=environment)
        said = json.loads(out.read_text())
    first = said["findings"][0] if said["findings"] else {"code": "", "word": "", "remedies": []}
    accepted = [r for r in first["remedies"] if r["accepted"]]
    best = min(accepted, key=lambda r: float(r["effect"]), default={"remedy": "", "effect": ""})
    return Cell(
        program=program,
        run=run,
        seed=seed,
        expected=run if run in FAULTS else "",
        found=first["code"],
        word=first["word"],
        remedy=best["remedy"],
        effect=best["effect"] if isinstance(best["effect"], str) else f"{best['effect']:+.2f}",
        seconds=round(said["seconds"], 2),
        overhead=round(float(said["overhead"]["share"]), 3),
    )


def examine_all(chosen: list[tuple[str, str, int]], executor: Executor, console: Console) -> list[Cell]:
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("clinic", total=len(chosen))
        futures = [executor.submit(examine, *case) for case in chosen]
        for future in futures:
            future.add_done_callback(lambda _: bar.advance(task))
        return [future.result() for future in futures]


def table(cells: list[Cell]) -> Table:
    shown = Table("program", "run", "seed", "first finding", "word", "accepted remedy", "ln effect", "")
    for c in cells:
        mark = "ok" if c.right else "WRONG"
        shown.add_row(c.program, c.run, str(c.seed), c.found or "—", c.word, c.remedy, c.effect, mark)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", action="append", default=[], choices=tuple(PROGRAMS))
    parser.add_argument("--run", action="append", default=[], choices=("healthy", *FAULTS, *VARIANTS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, help="where to store the scoreboard as JSON")
    args = parser.parse_args()

    console = Console(width=None if sys.stdout.isatty() else 132)
    with ThreadPoolExecutor(args.workers) as executor:
        cells = examine_all(cases(tuple(args.program), tuple(args.run), args.seeds), executor, console)
    console.print(table(cells))
    faulty = [c for c in cells if c.expected]
    healthy = [c for c in cells if not c.expected]
    console.print(f"right cause first: {sum(c.right for c in faulty)} of {len(faulty)} faulty runs")
    console.print(f"silent: {sum(c.right for c in healthy)} of {len(healthy)} healthy runs")
    if args.output:
        where = {"torch": torch.__version__, "python": platform.python_version(), "cpus": os.cpu_count()}
        rows = [{**asdict(c), "right": c.right} for c in cells]
        args.output.write_text(json.dumps({"environment": where, "seeds": args.seeds, "cells": rows}, indent=1) + "\n")
    sys.exit(0 if all(c.right for c in cells) else 1)


if __name__ == "__main__":
    main()
