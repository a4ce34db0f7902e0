"""The tools side by side: what their verdicts on the same runs are worth, and what the runs cost."""

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from clinic.board import expected, family
from clinic.rivals.meanings import causes, families

Row = dict[str, Any]
NOTHING = "nothing"
GAUGES = ("Cockpit",)  # which name no fault


def board(rows: Sequence[Row]) -> dict[str, Any]:
    """By tool, over the cells that ran without one."""
    bare = {place(row): row for row in rows if row["tool"] == NOTHING and not row["trouble"]}
    tools = list(dict.fromkeys(row["tool"] for row in rows if row["tool"] != NOTHING))
    return {tool: column([row for row in rows if row["tool"] == tool and place(row) in bare], bare) for tool in tools}


def place(row: Row) -> tuple[str, ...]:
    return tuple(map(str, row["case"].values()))


def column(rows: Sequence[Row], bare: dict[tuple[str, ...], Row]) -> dict[str, Any]:
    ran = [row for row in rows if not row["trouble"]]
    ill = [row for row in ran if row["case"]["fault"]]
    well = [row for row in ran if not row["case"]["fault"]]
    ratios = [row["seconds"] / bare[place(row)]["seconds"] for row in well]
    return {
        "healthy": {"runs": len(well), "alarmed": sum(bool(row["names"]) for row in well)},
        "faulty": {
            "runs": len(ill),
            "alarmed": sum(bool(row["names"]) for row in ill),
            "first": sum(right(row, row["names"][:1]) for row in ill),
            "family": sum(half_right(row, row["names"][:1]) for row in ill),
            "anywhere": sum(right(row, row["names"]) for row in ill),
        },
        "not run": sorted({f"{row['case']['program']}: {row['trouble']}" for row in rows if row["trouble"]}),
        "not run, cells": len(rows) - len(ran),
        "ratio": round(median(ratios), 3) if ratios else None,
        "verdict seconds": round(median(row["verdict_seconds"] for row in ran), 3) if ran else None,
        "same weights": sum(row["weights"] == bare[place(row)]["weights"] for row in ran),
        "cells": len(ran),
    }


def right(row: Row, names: Iterable[str]) -> bool:
    return any(expected(row) in causes(row["tool"], name) for name in names)


def half_right(row: Row, names: Iterable[str]) -> bool:
    return any(family(expected(row)) in families(row["tool"], name) for name in names)


def table(found: dict[str, Any], part: str) -> list[str]:
    """In Markdown, for the page."""
    head = (
        "tool",
        "false alarms, healthy runs",
        "any alarm, faulty runs",
        "right cause first",
        "right family first",
        "right cause anywhere",
        "not run",
        "time of the run",
        "same weights",
    )
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for tool, c in found[part].items():
        name = f"{tool} {found['versions'][tool]}"
        lines.append(f"| {' | '.join([name, *figures(tool, c)])} |")
    return lines


def figures(tool: str, c: dict[str, Any]) -> list[str]:
    ill, well = c["faulty"], c["healthy"]
    said = ["names none"] * 5
    if tool not in GAUGES:
        said = [share(well["alarmed"], well["runs"])]
        said += [share(ill[key], ill["runs"]) for key in ("alarmed", "first", "family", "anywhere")]
    return [*said, str(c["not run, cells"]), f"× {c['ratio']:.2f}", f"{c['same weights']} of {c['cells']}"]


def share(count: int, of: int) -> str:
    return f"{count} of {of} ({count / of:.0%})"
