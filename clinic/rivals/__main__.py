"""Unstuck and the published rivals on the same trainings of the clinic, each tool as its own documentation has it.

python -m clinic.rivals --program tabular                all its faults that do harm, and its healthy runs
python -m clinic.rivals --program tabular --fault saddle
python -m clinic.rivals --output clinic/rivals/results.json

It goes on where it stopped: a cell is kept in clinic/results/rivals.jsonl. The tools want an environment of their own,
which `make clinic-rivals` sets up. clinic/rivals/meanings.py says what each tool's names count for.
"""

import argparse
import inspect
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console

from clinic import fingerprints, kept
from clinic.cells import HERE, Case
from clinic.faults import FAULTS
from clinic.harm import mutants
from clinic.programs import HELD_OUT
from clinic.rivals import lines, log
from clinic.rivals.board import GAUGES, NOTHING, board, table
from clinic.rivals.cell import Cell, examine
from clinic.rivals.tools import ATTACH
from clinic.score import ill, well

CELLS = HERE / "results" / "rivals.jsonl"
PROGRAMS = ("tabular", "regression", "mlp", "cnn", "gru", "autoencoder")
PACKAGES = {
    "Unstuck": "unstuck",
    "training-doctor": "training-doctor",
    "trainproof": "trainproof",
    "runmedic": "runmedic",
    "NeuralDBG": "neuraldbg",
    "torchdiag": "torchdiag",
    "Cockpit": "cockpit-for-pytorch",
}


def cells(programs: Sequence[str], faults: Sequence[str], seeds: int) -> list[Cell]:
    """Training by training, with all tools, so that what is there is whole wherever it stops."""
    harmless = mutants()
    cases = [case for case in ill(faults, ("clear",), seeds) if f"{case.fault} clear {case.program}" not in harmless]
    cases += [] if faults else well(seeds)
    cases = [case for program in programs for case in cases if case.program == program]
    return [Cell(**vars(case), tool=tool) for case in cases for tool in (NOTHING, *PACKAGES) if watched(tool, case)]


def watched(tool: str, case: Case) -> bool:
    """Gauges are measured on the programs as they are: for nothing but what they cost."""
    return tool not in GAUGES or not (case.fault or case.variant or case.optimiser)


def prints(cell: Cell) -> str:
    of_case = fingerprints.of_case(cell.case)
    if cell.tool == "Unstuck":
        return f"{fingerprints.of_training(cell.case)}-{fingerprints.of_diagnosis()}"
    sources = [inspect.getsource(module) for module in (inspect.getmodule(ATTACH[cell.tool]), log, lines)]
    version = "" if cell.tool == NOTHING else metadata.version(PACKAGES[cell.tool])
    return f"{of_case}-{fingerprints.digits(*sources, version)}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", action="append", default=[], choices=PROGRAMS, metavar="NAME")
    parser.add_argument("--fault", action="append", default=[], choices=tuple(FAULTS), metavar="CODE")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cells", type=Path, default=CELLS, help="the file that keeps them")
    parser.add_argument("--output", type=Path, help="where to write the table as JSON")
    args = parser.parse_args(argv)

    console = Console()
    named = [(cell, prints(cell)) for cell in cells(args.program or PROGRAMS, args.fault, args.seeds)]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as executor:
        rows = kept.measure(named, examine, args.cells, executor=executor, console=console)
    found = {
        "environment": kept.environment(),
        "versions": {tool: metadata.version(package) for tool, package in PACKAGES.items()},
        "programs": args.program or list(PROGRAMS),
        "all": board(rows),
        "held out": board([row for row in rows if row["case"]["program"] in HELD_OUT]),
        "said": said(rows),
    }
    for part in ("all", "held out"):
        print(part, *table(found, part), sep="\n")
    if args.output:
        args.output.write_text(written(found))


def said(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, list[str] | None]]:
    """By run and tool, each name once; None where the tool could not take the run."""
    found: dict[str, dict[str, list[str] | None]] = defaultdict(dict)
    for row in rows:
        if row["tool"] != NOTHING:
            names = None if row["trouble"] else list(dict.fromkeys(row["names"]))
            found[Case(**row["case"]).name][row["tool"]] = names
    return found


def written(found: dict[str, Any]) -> str:
    """As JSON, with a line for each run."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(by_tool)}" for name, by_tool in found["said"].items())
    rest = json.dumps({key: value for key, value in found.items() if key != "said"}, indent=1, ensure_ascii=False)
    return f'{rest[:-2]},\n "said": {{\n{lines}\n }}\n}}\n'


if __name__ == "__main__":
    main()
