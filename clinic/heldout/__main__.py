"""The held-out scoreboard: each program run as it is and watched; what was said, and whether watching changed anything.

python -m clinic.heldout                                        all of it
python -m clinic.heldout --program gan --seeds 1
python -m clinic.heldout --output clinic/heldout/results.json
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from clinic.board import ENDS_AS
from clinic.heldout import FAULTS, FAULTY, PROGRAMS
from unstuck.record import Run

EMPTY = {"findings": [], "seconds": 0, "overhead": {"share": 0}, "not_checked": []}


@dataclass(frozen=True)
class Watched:
    """One watched run, what was said of it, and what became of the run itself."""

    program: str
    run: str  # a fault or "healthy"
    seed: int
    expected: str  # the code that must come first; "" for silence
    found: str
    word: str
    remedy: str
    effect: str
    seconds: float
    overhead: float
    others: tuple[str, ...]  # further findings
    trouble: str  # what the watcher could not do, or did to the script
    unchecked: int  # causes that could not be judged: silence is worth less there

    @property
    def right(self) -> bool:
        return self.found == self.expected and not self.trouble  # no proof is asked for: nobody tuned the strengths


def examine(program: str, run: str, seed: int) -> Watched:
    """Runs one cell twice, plain and through the command, each in a process of its own."""
    script = [str(PROGRAMS[program]), "--seed", str(seed), *(["--fault", run] if run in FAULTS else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    plain = subprocess.run([sys.executable, *script], capture_output=True, text=True, env=environment)
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder, "diagnosis.json"), Path(folder, "run")
        command = [sys.executable, "-c", "from unstuck.cli import main; main()", "run"]
        options = ["--out", str(log), "--json", str(out)]
        watched = subprocess.run([*command, *options, *script], capture_output=True, text=True, env=environment)
        said = json.loads(out.read_text()) if out.exists() else EMPTY
        trouble = _trouble(plain, watched, Run(log))
    first, *others = said["findings"] or [{"code": "", "word": "", "remedies": []}]
    accepted = [r for r in first["remedies"] if r["accepted"]]
    best = min(accepted, key=lambda r: float(r["effect"]), default={"remedy": "", "effect": ""})
    return Watched(
        program=program,
        run=run,
        seed=seed,
        expected=ENDS_AS.get((f"heldout/{program}", run), run) if run in FAULTS else "",
        found=first["code"],
        word=first["word"],
        remedy=best["remedy"],
        effect=best["effect"] if isinstance(best["effect"], str) else f"{best['effect']:+.2f}",
        seconds=round(said["seconds"], 2),
        overhead=round(float(said["overhead"]["share"]), 3),
        others=tuple(f["code"] for f in others),
        trouble=trouble,
        unchecked=len(said["not_checked"]),
    )


def _trouble(plain: subprocess.CompletedProcess, watched: subprocess.CompletedProcess, run: Run) -> str:
    found = [e["because"] for e in run.of("fact") if e["code"] in ("watcher-failed", "not-saved")]
    if plain.stdout != watched.stdout:
        found.append("another output")
    if plain.returncode != watched.returncode:
        found.append(f"exit status {watched.returncode} instead of {plain.returncode}: {watched.stderr[-300:]}")
    return "; ".join(found)


def table(cells: list[Watched]) -> Table:
    shown = Table("program", "run", "seed", "first finding", "word", "accepted remedy", "ln effect", "")
    for c in cells:
        mark = "ok" if c.right else "WRONG"
        shown.add_row(c.program, c.run, str(c.seed), c.found or "—", c.word, c.remedy, c.effect, mark)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", action="append", default=[], choices=tuple(PROGRAMS))
    parser.add_argument("--run", action="append", default=[], choices=("healthy", *FAULTS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output", type=Path, help="where to store the scoreboard as JSON")
    args = parser.parse_args()

    chosen = [(p, r) for p in PROGRAMS for r in ("healthy", *FAULTY.get(p, ()))]
    chosen = [(p, r) for p, r in chosen if not args.program or p in args.program]
    chosen = [(p, r, seed) for p, r in chosen if not args.run or r in args.run for seed in range(args.seeds)]
    console = Console(width=None if sys.stdout.isatty() else 132)
    cells = []
    with ThreadPoolExecutor(args.workers) as executor:
        for cell in executor.map(lambda case: examine(*case), chosen):
            cells.append(cell)
            print(f"{len(cells)} of {len(chosen)}", end="\r", file=sys.stderr)
    console.print(table(cells))
    for c in cells:
        if c.trouble or (c.others and not c.right):
            console.print(f"{c.program} {c.run} {c.seed}: {', '.join(c.others)} {c.trouble}")
    faulty = [c for c in cells if c.expected]
    healthy = [c for c in cells if not c.expected]
    console.print(f"right cause first: {sum(c.right for c in faulty)} of {len(faulty)} faulty runs")
    console.print(f"silent and unchanged: {sum(c.right for c in healthy)} of {len(healthy)} healthy runs")
    if args.output:
        where = {"torch": torch.__version__, "python": platform.python_version(), "cpus": os.cpu_count()}
        rows = [{**asdict(c), "right": c.right} for c in cells]
        args.output.write_text(json.dumps({"environment": where, "seeds": args.seeds, "cells": rows}, indent=1) + "\n")
    sys.exit(0 if all(c.right for c in cells) else 1)


if __name__ == "__main__":
    main()
