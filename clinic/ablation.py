"""What each piece of the diagnosis is worth: the kept trainings, diagnosed again with one piece at a time taken away.

python -m clinic.ablation                      every kept training; it goes on where it stopped
python -m clinic.ablation --program mlp
python -m clinic.ablation --docs               and writes the table into docs/clinic.md

The pieces are the trial of each hypothesis, each measured quantity, each exact check, each check of the validation,
and what the recorder looks at besides the loss. A piece that a run's diagnosis never asks for is not tried on it. It
trains nothing: `python -m clinic` keeps the trainings.
"""

import argparse
import functools
import inspect
import json
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from clinic import fingerprints, kept, pieces
from clinic.board import is_right
from clinic.cells import HERE, SCRIPTS, Case
from clinic.programs import PROGRAMS
from clinic.recordings import MAKE, RUNS, folder_of, kept_in, training_of
from unstuck.diagnosis import Diagnosis

RAW = HERE / "results" / "ablation.jsonl"
RESULT = HERE / "results" / "ablation.json"
PAGE = HERE.parent / "docs" / "clinic.md"
BEGIN, END = "<!-- python -m clinic.ablation --docs -->\n", "<!-- end of the table -->"
MOST = 15  # rows of the page's table
Row = dict[str, Any]


def ablated(case: Case, runs: Path = RUNS) -> Row:
    """The findings of a kept run, the pieces that they rest on, and what they become without each."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    run = pieces.Kept(folder_of(case, runs) / "run")
    whole, used = run.diagnosed()
    took = time.perf_counter() - began
    without = {}
    for piece, parts in pieces.PIECES.items():
        if parts & used:
            without[" ".join(piece)] = _findings_without(run, parts)
    return {
        "case": asdict(case),
        "findings": findings(whole),
        "without": without,
        "whole_seconds": round(took, 2),
        "seconds": round(time.perf_counter() - began, 2),
    }


def _findings_without(run: pieces.Kept, parts: frozenset[pieces.Piece]) -> list[Row]:
    try:
        return findings(run.diagnosed(parts)[0])
    except Exception as error:  # a diagnosis that cannot do without is one more answer
        return [{"code": f"{type(error).__name__}: {error}"[:200], "word": "FAILED"}]


def findings(diagnosis: Diagnosis) -> list[Row]:
    return [{"code": f.code, "word": f.word} for f in diagnosis.findings]


def worth(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Of each piece: how many verdicts are right, and how many healthy runs silent, with it and not without."""
    found = {}
    for name in map(" ".join, pieces.PIECES):
        pairs = [(row, {**row, "findings": row["without"][name]}) for row in rows if name in row["without"]]
        ill = [(is_right(a), is_right(b)) for a, b in pairs if a["case"]["fault"]]
        well = [(is_right(a), is_right(b)) for a, b in pairs if not a["case"]["fault"]]
        found[name] = {
            "used in": len(pairs),
            "right": _net(ill),
            "right, lost": ill.count((True, False)),
            "right, won": ill.count((False, True)),
            "silent": _net(well),
            "silent, lost": well.count((True, False)),
            "silent, won": well.count((False, True)),
            "other findings": sum(a["findings"] != b["findings"] for a, b in pairs),
            "failed": sum(any(f["word"] == "FAILED" for f in b["findings"]) for _, b in pairs),
        }
    return found


def _net(pairs: Iterable[tuple[bool, bool]]) -> int:
    return sum(a - b for a, b in pairs)


def sorted_by_worth(found: dict[str, dict[str, int]]) -> list[tuple[str, dict[str, int]]]:
    return sorted(found.items(), key=lambda item: (-item[1]["right"] - item[1]["silent"], -item[1]["other findings"]))


def table(found: dict[str, dict[str, int]]) -> Table:
    keys = ("used in", "right", "right, lost", "right, won", "silent", "silent, lost", "silent, won", "other findings")
    shown = Table("piece", *keys, "failed")
    for name, row in sorted_by_worth(found):
        if row["used in"]:
            shown.add_row(name, *(str(row[key]) for key in (*keys, "failed")))
    return shown


def page_with(result: Row, page: str) -> str:
    """The page with its table made anew."""
    head, _, rest = page.partition(BEGIN)
    tail = rest.partition(END)[2]
    lines = [
        f"Of {result['runs']} kept runs {result['right']} of {result['faulty']} faulty ones are called right, and "
        f"{result['silent']} of {result['healthy']} healthy ones stay silent.",
        "",
        "| without | used in | right verdicts | silent healthy runs |",
        "|---|---|---|---|",
    ]
    for name, row in sorted_by_worth(result["pieces"])[:MOST]:
        lines.append(f"| {name} | {row['used in']} | {-row['right']:+d} | {-row['silent']:+d} |")
    return head + BEGIN + "\n".join(lines) + "\n" + END + tail


def summary(rows: Sequence[Row]) -> Row:
    ill = [row for row in rows if row["case"]["fault"]]
    well = [row for row in rows if not row["case"]["fault"]]
    return {
        "environment": kept.environment(),
        "runs": len(rows),
        "faulty": len(ill),
        "right": sum(map(is_right, ill)),
        "healthy": len(well),
        "silent": sum(map(is_right, well)),
        "seconds": round(sum(row["seconds"] for row in rows)),
        "seconds, whole": round(sum(row["whole_seconds"] for row in rows)),
        "pieces": worth(rows),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", action="append", default=[], choices=(*PROGRAMS, *SCRIPTS), metavar="NAME")
    parser.add_argument("--runs", type=Path, default=RUNS, help="the folder of the kept trainings")
    parser.add_argument("--raw", type=Path, default=RAW, help="the file that keeps what was said")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULT, help="where to write the result as JSON")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/clinic.md")
    args = parser.parse_args(argv)

    began = time.perf_counter()
    console = Console(width=None if sys.stdout.isatty() else 150)
    by = fingerprints.digits(fingerprints.of_diagnosis(), *map(inspect.getsource, (pieces, sys.modules[__name__])))
    found = [(case, place) for case, place in kept_in(args.runs) if not args.program or case.program in args.program]
    if not found:
        parser.error(f"kept trainings are needed, {args.runs} has none of these programs: {MAKE}")
    named = [(case, f"{training_of(place)['training']}-{by}") for case, place in found]
    work = functools.partial(ablated, runs=args.runs)
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as executor:
        rows = kept.measure(named, work, args.raw, executor=executor, console=console)
    result = summary(rows)
    console.print(table(result["pieces"]))
    console.print(f"right: {result['right']} of {result['faulty']}; silent: {result['silent']} of {result['healthy']}")
    console.print(f"it took {time.perf_counter() - began:.0f} s; all rows together: {result['seconds']} s")
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    if args.docs:
        PAGE.write_text(page_with(result, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
