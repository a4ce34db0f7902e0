"""The scoreboard: trainings with one thing wrong, and healthy ones, watched and diagnosed as a user's are.

python -m clinic.score --smoke                        a few cells, two minutes
python -m clinic.score --strength clear --seeds 1     every fault on every program, once
python -m clinic.score --fault saddle --program mlp
python -m clinic.score --healthy --seeds 2            all that must stay silent
python -m clinic.score                                everything, with two seeds: hours; it goes on where it stopped

What was said of a cell is kept in clinic/results/cells.jsonl, its training in clinic/results/runs. It is trained again
only when its own sources or those that record it have changed; after a change of the diagnosis alone the kept training
is diagnosed again.
"""

import argparse
import functools
import inspect
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console

from clinic import fingerprints, kept, recordings
from clinic.board import board
from clinic.cells import HERE, SCRIPTS, Case
from clinic.faults import FAULTS, STRENGTHS
from clinic.harm import mutants
from clinic.healthy import OPTIMISERS, RATES, VARIANTS
from clinic.heldout import FAULTY
from clinic.programs import PROGRAMS
from clinic.recordings import Row
from clinic.tables import show

CELLS = HERE / "results" / "cells.jsonl"

SMOKE = (
    Case("mlp"),
    Case("mlp", variant="cosine-tail"),
    Case("mlp", optimiser="AdamW"),
    Case("mlp", fault="zero-grad-missing", strength="clear"),
    Case("tabular", fault="parameters-not-optimised", strength="clear"),
    Case("gan", fault="non-finite-data", strength="clear"),
    Case("regression", fault="dead-units", strength="clear"),
    Case("mlp", fault="zero-init", strength="clear"),
    Case("mlp", fault="lr-diverges", strength="clear"),
    Case("cnn", fault="graph-cut", strength="clear"),
)


def ill(faults: Sequence[str], strengths: Sequence[str], seeds: int) -> list[Case]:
    """Every fault on every program that can have it, and the held-out scripts'."""
    cases = [
        Case(program, fault=code, strength=strength, seed=seed)
        for seed in range(seeds)
        for code, fault in FAULTS.items()
        if not faults or code in faults
        for program in fault.strengths
        for strength in strengths
    ]
    if "clear" in strengths:
        cases += [
            Case(f"heldout/{script}", fault=code, strength="clear", seed=seed)
            for seed in range(seeds)
            for script, codes in FAULTY.items()
            for code in codes
            if not faults or code in faults
        ]
    return cases


def well(seeds: int) -> list[Case]:
    """Every program by itself, with every optimiser that has a rate for it, every look-alike, the held-out scripts."""
    cases = []
    for seed in range(seeds):
        cases += [Case(program, seed=seed) for program in (*PROGRAMS, *SCRIPTS)]
        cases += [Case(program, variant=name, seed=seed) for name, v in VARIANTS.items() for program in v.programs]
        cases += [Case(program, optimiser=o, seed=seed) for o in OPTIMISERS for program in RATES[o]]
    return cases


def chosen(args: argparse.Namespace) -> list[Case]:
    """The cells that the command asks for."""
    cases = list(SMOKE)
    if not args.smoke:
        cases = [] if args.healthy else ill(args.fault, args.strength or STRENGTHS, args.seeds)
        cases += [] if args.fault else well(args.seeds)
    return [case for case in cases if not args.program or case.program in args.program]


def measured(cases: Sequence[Case], cells: Path, *, workers: int, console: Console) -> list[Row]:
    """What is said of each cell: read, or else worked out in so many processes."""
    said_by = fingerprints.digits(fingerprints.of_diagnosis(), inspect.getsource(recordings))
    named = [(case, f"{fingerprints.of_training(case)}-{said_by}") for case in cases]
    work = functools.partial(recordings.examine, runs=cells.with_name("runs"))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as executor:
        return kept.measure(named, work, cells, executor=executor, console=console)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--smoke", action="store_true", help="a few cells that stand for all; the status is 1 where one is wrong"
    )
    parser.add_argument("--healthy", action="store_true", help="only the runs that must stay silent")
    parser.add_argument("--fault", action="append", default=[], choices=tuple(FAULTS), metavar="CODE")
    parser.add_argument("--program", action="append", default=[], choices=(*PROGRAMS, *SCRIPTS), metavar="NAME")
    parser.add_argument("--strength", action="append", default=[], choices=STRENGTHS)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--cells",
        type=Path,
        default=CELLS,
        help="the file that keeps what was said; the trainings lie beside it, in runs",
    )
    parser.add_argument("--output", type=Path, help="where to write the scoreboard as JSON")
    args = parser.parse_args(argv)

    console = Console(width=None if sys.stdout.isatty() else 150)
    rows = measured(chosen(args), args.cells, workers=args.workers, console=console)
    found = board(rows, mutants())
    show(found, console)
    size = recordings.size_of(args.cells.with_name("runs"))
    console.print(f"the kept trainings take {size / 1e6:,.0f} MB")
    if args.output:
        args.output.write_text(json.dumps({"environment": kept.environment(), **found}, indent=1) + "\n")
    if not args.smoke:
        return 0
    return int(found["faulty"]["first"] < found["faulty"]["runs"] or bool(found["failures"]))


if __name__ == "__main__":
    sys.exit(main())
