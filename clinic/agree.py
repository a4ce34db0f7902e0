"""Does a kept run, diagnosed again, get the diagnosis that `unstuck run` ended with?

python -m clinic.agree                          every kept training that the present sources have diagnosed
python -m clinic.agree --runs FOLDER --output agree.json

The status is 1 where any finding differs.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console

from clinic import fingerprints, kept
from clinic.recordings import MAKE, RUNS, again, kept_in, said_of, training_of

SAME, NUMBERS, FINDINGS = "the same to the last digit", "the same findings, other numbers", "other findings"


def names(said: dict[str, Any]) -> list[tuple[str, str, int, str]]:
    """What a reader takes away: code, word, step and place of each finding."""
    return [(f["code"], f["word"], f["step"], f["where"]) for f in said.get("findings", ())]


def verdict(first: dict[str, Any], second: dict[str, Any]) -> str:
    """How two diagnoses of one run compare."""
    if names(first) != names(second):
        return FINDINGS
    return SAME if first == second else NUMBERS


def compare(place: Path) -> dict[str, Any]:
    """A kept run beside its second diagnosis."""
    first = said_of(place)
    second, trouble, seconds = again(place)
    compared = verdict(first, second)
    shown = [" ".join(map(str, name)) for said in (first, second) for name in names(said)] if compared != SAME else []
    return {"run": place.name, "verdict": compared, "shown": shown, "trouble": trouble, "seconds": seconds}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=RUNS, help="the folder of the kept trainings")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output", type=Path, help="where to write the comparison as JSON")
    args = parser.parse_args(argv)

    began, said_by = time.perf_counter(), fingerprints.of_diagnosis()
    places = [place for _, place in kept_in(args.runs) if training_of(place)["diagnosis"] == said_by]
    if not places:
        parser.error(f"trainings that the present sources have diagnosed are needed, {args.runs} has none: {MAKE}")
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as executor:
        rows = list(executor.map(compare, places))
    console = Console(width=None if sys.stdout.isatty() else 150)
    for row in rows:
        if row["verdict"] != SAME or row["trouble"]:
            console.print(f"{row['run']}: {row['verdict']}: {row['shown']} {row['trouble']}", markup=False)
    counts = Counter(row["verdict"] for row in rows)
    for compared in (SAME, NUMBERS, FINDINGS):
        console.print(f"{compared}: {counts[compared]} of {len(rows)} runs")
    took = time.perf_counter() - began
    console.print(f"it took {took:.0f} s")
    if args.output:
        found = {"environment": kept.environment(), "runs": len(rows), "seconds": round(took), **counts}
        args.output.write_text(
            json.dumps({**found, "differ": [r for r in rows if r["verdict"] != SAME]}, indent=1) + "\n"
        )
    return int(counts[FINDINGS] > 0)


if __name__ == "__main__":
    sys.exit(main())
