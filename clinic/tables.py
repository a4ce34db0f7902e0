"""The scoreboard for a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

from clinic.board import SILENCE
from clinic.faults import STRENGTHS

Board = dict[str, Any]


def show(found: Board, console: Console) -> None:
    """Prints the board, its failures and the figures that sum it up."""
    for table in (faults(found), parts(found), words(found), hard(found), confused(found), exact(found), costs(found)):
        console.print(table)
    for line in found["failures"]:
        console.print(line, markup=False, highlight=False)
    for name, gap in found["gap"].items():
        console.print(f"{name}, below the calibrated ones: {gap}")
    ill, well = found["faulty"], found["healthy"]
    console.print(f"right cause first: {ill['first']} of {ill['runs']} faulty runs; among three: {ill['among three']}")
    console.print(f"a verdict costs: {found['cost']}")
    console.print(f"silent: {well['runs'] - well['alarmed']} of {well['runs']} healthy runs")


def faults(found: Board) -> Table:
    shown = Table("fault", *(f"{s}: first, of three" for s in STRENGTHS), "most often called", title="right causes")
    for code, strengths in found["faults"].items():
        cells = []
        for s in STRENGTHS:
            r = strengths.get(s)
            cells.append(f"{r['first']}/{r['runs']}  {r['among three']}/{r['runs']}" if r else "")
        called = [(said, n) for cause, said, n in found["confusion"] if cause == code][:3]
        shown.add_row(code, *cells, ", ".join(f"{said} {n}" for said, n in called))
    return shown


def parts(found: Board) -> Table:
    keys = ("runs", "first", "among three", "family", "healthy runs", "alarmed", "alarmed surely")
    shown = Table("programs", *keys, "right where it said PROVED, SHOWN, SUSPECT")
    for name, part in found["parts"].items():
        said = [f"{c['right']}/{c['said']}" for word, c in part["words"].items() if word != "CANNOT TELL"]
        shown.add_row(name, *(str(part[key]) for key in keys), "  ".join(said))
    return shown


def words(found: Board) -> Table:
    shown = Table("word of the first finding", "said", "right", "95 %", "right family")
    for word, c in found["words"].items():
        low, high = c["interval"]
        between = f"{low:.1%} to {high:.1%}" if c["said"] else ""
        shown.add_row(word, str(c["said"]), str(c["right"]), between, str(c["right family"]))
    return shown


def hard(found: Board) -> Table:
    shown = Table("hard to tell apart", "runs", "right", "called")
    group = None
    for row in found["hard to tell apart"]:
        if row["group"] != group:
            shown.add_section()
            group = row["group"]
        called = ", ".join(f"{said} {n}" for said, n in row["called"].items())
        shown.add_row(row["of"], str(row["runs"]), str(row["right"]), called)
    return shown


def confused(found: Board) -> Table:
    shown = Table("put in", "said first", "runs", title="what was taken for what")
    for cause, said, n in found["confusion"]:
        if cause != said and (cause, said) != ("healthy", SILENCE):
            shown.add_row(cause, said, str(n))
    return shown


def exact(found: Board) -> Table:
    keys = ("runs", "right", "with a place", "told on the way", "steps, median", "steps, worst")
    shown = Table("exact fault", *keys)
    for code, row in found["exact"].items():
        shown.add_row(code, *("" if row[key] is None else f"{row[key]:g}" for key in keys))
    return shown


def costs(found: Board) -> Table:
    keys = ("steps, median", "steps, worst", "seconds, median", "seconds, worst")
    shown = Table("cost of a verdict", *keys)
    for code, row in found["cost by fault"].items():
        shown.add_row(code, *(f"{row[key]:g}" for key in keys))
    return shown
