"""The scoreboard: what the cells of the clinic say of the diagnosis."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from statistics import median
from typing import Any

from rich.table import Table

from clinic.cells import SCRIPTS
from clinic.faults import FAULTS, STRENGTHS
from clinic.programs import HELD_OUT

Row = dict[str, Any]

SILENCE = "—"
SURE = ("PROVED", "SHOWN")
WORDS = ("PROVED", "SHOWN", "SUSPECT", "CANNOT TELL")
HARD_PAIRS = (
    ("lr-bounces", "noise-floor"),
    ("lr-too-small", "plateau"),
    ("lr-too-small", "vanishing-gradient"),
    ("plateau", "vanishing-gradient"),
    ("saddle", "poor-minimum"),
    ("saddle", "plateau"),
    ("poor-minimum", "plateau"),
    ("labels-shuffled", "overfitting"),
    ("dead-units", "parameters-not-optimised"),
    ("dead-units", "killed"),
)
ENDS_AS = {("heldout/autoencoder", "lr-diverges"): "killed"}  # behind a sigmoid no squared error can blow up


def expected(row: Row) -> str:
    case = row["case"]
    return ENDS_AS.get((case["program"], case["fault"]), case["fault"])


def told(row: Row) -> list[str]:
    """The codes of the findings in their order; what cannot tell a cause is none."""
    return [f["code"] for f in row["findings"] if f["word"] != "CANNOT TELL"]


def first(row: Row) -> str:
    return next(iter(told(row)), SILENCE)


def is_held_out(row: Row) -> bool:
    return row["case"]["program"] in (*HELD_OUT, *SCRIPTS)


def family(code: str) -> str:
    return FAULTS[code].family if code in FAULTS else code


def faulty(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["case"]["fault"]]


def healthy(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if not row["case"]["fault"]]


def recall(rows: Sequence[Row]) -> dict[str, int]:
    """Of so many faulty runs: the right cause first, among the first three, its family first."""
    return {
        "runs": len(rows),
        "first": sum(first(row) == expected(row) for row in rows),
        "among three": sum(expected(row) in told(row)[:3] for row in rows),
        "family": sum(family(first(row)) == family(expected(row)) for row in rows),
    }


def false_alarms(rows: Sequence[Row]) -> dict[str, int]:
    """Of so many healthy runs: those with any finding that names a cause, and those that a finding was sure of."""
    return {
        "runs": len(rows),
        "alarmed": sum(bool(told(row)) for row in rows),
        "sure": sum(any(f["word"] in SURE for f in row["findings"]) for row in rows),
    }


def frequencies(rows: Iterable[Row]) -> dict[str, dict[str, int]]:
    """How often the first finding is right when it says a word; on a healthy run no finding is."""
    counts = {word: {"said": 0, "right": 0, "right family": 0} for word in WORDS}
    for row in rows:
        if row["findings"]:
            found, cause = row["findings"][0], expected(row)
            count = counts[found["word"]]
            count["said"] += 1
            count["right"] += found["code"] == cause
            count["right family"] += bool(cause) and family(found["code"]) == family(cause)
    return counts


def confusion(rows: Iterable[Row]) -> dict[str, dict[str, int]]:
    """What was put in, and what came first."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        counts[expected(row) or "healthy"][first(row)] += 1
    return {cause: dict(found.most_common()) for cause, found in sorted(counts.items())}


def pairs(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For the pairs that are hard by design: how many runs of either, and how often one is called the other."""
    shown = []
    for a, b in HARD_PAIRS:
        either = [row for row in rows if expected(row) in (a, b)]
        swapped = sum(first(row) in (a, b) and first(row) != expected(row) for row in either)
        shown.append({"pair": [a, b], "runs": len(either), "right": recall(either)["first"], "swapped": swapped})
    return shown


def cost(rows: Sequence[Row]) -> dict[str, float]:
    """Seconds from the end of a run to its verdict, and in steps of the run itself."""
    seconds = sorted(row["verdict_seconds"] for row in rows)
    steps = sorted(row["verdict_seconds"] * row["steps"] / max(row["seconds"], 1e-9) for row in rows if row["steps"])
    if not steps:
        return {}
    return {
        "seconds, median": round(median(seconds), 2),
        "seconds, nine of ten": round(seconds[int(0.9 * (len(seconds) - 1))], 2),
        "steps, median": round(median(steps)),
        "steps, nine of ten": round(steps[int(0.9 * (len(steps) - 1))]),
    }


def board(rows: Sequence[Row], mutants: Collection[str] = ()) -> dict[str, Any]:
    """Everything that the cells say, as plain values. `mutants` did no harm, and are counted by themselves."""
    equivalent = [row for row in rows if _place(row) in mutants]
    rows = [row for row in rows if _place(row) not in mutants]
    ill, well = faulty(rows), healthy(rows)
    by_fault = {}
    for code in FAULTS:
        of_code = [row for row in ill if row["case"]["fault"] == code]
        strengths = {s: [row for row in of_code if row["case"]["strength"] == s] for s in STRENGTHS}
        by_fault[code] = {s: recall(some) for s, some in strengths.items() if some}
    parts = {"calibration": [], "held out": []}
    for row in rows:
        parts["held out" if is_held_out(row) else "calibration"].append(row)
    return {
        "faulty": recall(ill),
        "of causes that it knows": recall([row for row in ill if row["known"]]),
        "seeds": len({row["case"]["seed"] for row in rows}),
        "healthy": false_alarms(well),
        "parts": {name: {**recall(faulty(p)), **_named(false_alarms(healthy(p)))} for name, p in parts.items()},
        "equivalent mutants": recall(equivalent),
        "strengths": {s: recall([row for row in ill if row["case"]["strength"] == s]) for s in STRENGTHS},
        "words": frequencies(rows),
        "faults": {code: found for code, found in by_fault.items() if found},
        "confusion": confusion(rows),
        "hard pairs": pairs(ill),
        "cost": cost(rows),
        "failures": failures(rows),
    }


def _place(row: Row) -> str:
    """Of a fault, as the table of harm names it."""
    case = row["case"]
    return f"{case['fault']} {case['strength']} {case['program']}"


def _named(alarms: dict[str, int]) -> dict[str, int]:
    return {"healthy runs": alarms["runs"], "alarmed": alarms["alarmed"], "alarmed surely": alarms["sure"]}


def failures(rows: Iterable[Row]) -> list[str]:
    """The cells that went wrong otherwise than by a miss: false alarms, and runs that watching has hurt."""
    shown = []
    for row in rows:
        name = row["key"].rsplit(" ", 1)[0]
        if not row["case"]["fault"] and told(row):
            shown.append(f"{name}: {row['findings'][0]['word']} {first(row)}")
        if row["trouble"]:
            shown.append(f"{name}: {row['trouble']}")
    return shown


def tables(found: dict[str, Any]) -> list[Table]:
    """The board for a terminal."""
    return [_faults(found), _parts(found), _words(found), _pairs(found)]


def _faults(found: dict[str, Any]) -> Table:
    shown = Table("fault", *(f"{s}: first, of three" for s in STRENGTHS), "most often called", title="right causes")
    for code, strengths in found["faults"].items():
        cells = []
        for s in STRENGTHS:
            r = strengths.get(s)
            cells.append(f"{r['first']}/{r['runs']}  {r['among three']}/{r['runs']}" if r else "")
        called = list(found["confusion"].get(code, {}).items())[:3]
        shown.add_row(code, *cells, ", ".join(f"{what} {n}" for what, n in called))
    return shown


def _parts(found: dict[str, Any]) -> Table:
    keys = ("runs", "first", "among three", "family", "healthy runs", "alarmed", "alarmed surely")
    shown = Table("programs", *keys)
    for name, part in found["parts"].items():
        shown.add_row(name, *(str(part[key]) for key in keys))
    return shown


def _words(found: dict[str, Any]) -> Table:
    shown = Table("word of the first finding", "said", "right", "right family")
    for word, count in found["words"].items():
        shown.add_row(word, *(str(count[key]) for key in ("said", "right", "right family")))
    return shown


def _pairs(found: dict[str, Any]) -> Table:
    shown = Table("hard pair", "runs", "right", "one for the other")
    for pair in found["hard pairs"]:
        shown.add_row(" / ".join(pair["pair"]), *(str(pair[key]) for key in ("runs", "right", "swapped")))
    return shown
