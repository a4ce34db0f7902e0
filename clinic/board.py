"""The scoreboard: what the cells of the clinic say of the diagnosis."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from clinic.cells import SCRIPTS
from clinic.faults import FAULTS, STRENGTHS
from clinic.programs import HELD_OUT
from unstuck.diagnosis._exact import EXACT

Row = dict[str, Any]

SILENCE = "—"
SURE = ("PROVED", "SHOWN")
WORDS = ("PROVED", "SHOWN", "SUSPECT", "CANNOT TELL")
FEW = 3  # names that a reader is left with
EDGE = "edge-of-stability"  # a healthy look-alike
HARD = (  # to tell apart, by design
    ("lr-bounces", "noise-floor", EDGE),
    ("lr-too-small", "plateau", "vanishing-gradient"),
    ("saddle", "poor-minimum", "plateau"),
    ("labels-shuffled", "overfitting"),
    ("dead-units", "parameters-not-optimised", "killed"),
)
ENDS_AS = {("heldout/autoencoder", "lr-diverges"): "killed"}  # behind a sigmoid no squared error can blow up
CALIBRATED, HELD_PROGRAMS, HELD_SCRIPTS = "calibrated", "held-out programs", "held-out scripts"


# A row


def expected(row: Row) -> str:
    case = row["case"]
    return ENDS_AS.get((case["program"], case["fault"]), case["fault"])


def told(row: Row) -> list[str]:
    """The codes of the findings in their order; what cannot tell a cause is none."""
    return [f["code"] for f in row["findings"] if f["word"] != "CANNOT TELL"]


def first(row: Row) -> str:
    return next(iter(told(row)), SILENCE)


def is_right(row: Row) -> bool:
    """Whether the cause that was put in comes first; of a healthy run, whether it is silent."""
    return first(row) == (expected(row) or SILENCE)


def is_among_three(row: Row) -> bool:
    """Whether the right cause is one of the first three findings, or of at most three names that a reader is left with.

    These are the findings and the causes that the diagnosis could not check. It lists those in no order of weight, so
    that of more than three none counts.
    """
    left = dict.fromkeys([*told(row), *row["not_checked"]])
    return expected(row) in told(row)[:FEW] or (len(left) <= FEW and expected(row) in left)


def part_of(row: Row) -> str:
    program = row["case"]["program"]
    return HELD_PROGRAMS if program in HELD_OUT else HELD_SCRIPTS if program in SCRIPTS else CALIBRATED


def family(code: str) -> str:
    return FAULTS[code].family if code in FAULTS else code


def faulty(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["case"]["fault"]]


def healthy(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if not row["case"]["fault"]]


# What many rows say


def recall(rows: Sequence[Row]) -> dict[str, int]:
    """Of so many faulty runs: the right cause first, among three, its family first."""
    return {
        "runs": len(rows),
        "first": sum(map(is_right, rows)),
        "among three": sum(map(is_among_three, rows)),
        "family": sum(family(first(row)) == family(expected(row)) for row in rows),
    }


def false_alarms(rows: Sequence[Row]) -> dict[str, int]:
    """Of so many healthy runs: those with any finding that names a cause, and those that a finding was sure of."""
    return {
        "runs": len(rows),
        "alarmed": sum(bool(told(row)) for row in rows),
        "sure": sum(any(f["word"] in SURE for f in row["findings"]) for row in rows),
    }


def precision(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """How often the first finding is right when it says a word; on a healthy run no finding is."""
    counts = {word: Counter(said=0, right=0, family=0) for word in WORDS}
    for row in rows:
        if row["findings"]:
            found, cause = row["findings"][0], expected(row)
            count = counts[found["word"]]
            count["said"] += 1
            count["right"] += found["code"] == cause
            count["family"] += bool(cause) and family(found["code"]) == family(cause)
    return {
        word: {
            "said": count["said"],
            "right": count["right"],
            "right family": count["family"],
            "interval": wilson(count["right"], count["said"]),
        }
        for word, count in counts.items()
    }


def wilson(hits: int, of: int) -> list[float]:
    """The 95 % interval of a share (Wilson 1927): it holds at 0 and at 1, and where few were counted."""
    if not of:
        return [0.0, 1.0]
    z, p = 1.96, hits / of
    middle, reach = p + z * z / (2 * of), z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    scale = 1 + z * z / of
    return [round(max(middle - reach, 0) / scale, 3), round(min((middle + reach) / scale, 1), 3)]


def confusion(rows: Iterable[Row]) -> list[list[Any]]:
    """What was put in, what came first, and how often, most frequent first."""
    counts = Counter((expected(row) or "healthy", first(row)) for row in rows)
    return [[cause, said, n] for (cause, said), n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def hard_groups(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For causes that are hard to tell apart: how often each is told rightly, and how often it is called another."""
    named = [(_look(row), row) for row in rows]
    shown = []
    for group in HARD:
        for code in group:
            mine = [row for look, row in named if look == code]
            called = Counter(first(row) for row in mine if not is_right(row) and first(row) in group)
            right = sum(map(is_right, mine))
            shown.append({"group": list(group), "of": code, "runs": len(mine), "right": right, "called": dict(called)})
    return shown


def _look(row: Row) -> str:
    return EDGE if row["case"]["variant"] == EDGE else expected(row)


def exact(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Of the faults that need no threshold: how often right, with a place, and after how many steps at the latest.

    The steps are those from the first that is wrong to the one whose record is enough. They are known of the
    faults that are told while a run goes on; the others are read from recorded steps when it has ended.
    """
    found = {}
    for code in EXACT:
        mine = [row for row in rows if expected(row) == code]
        right = [row for row in mine if is_right(row)]
        steps = sorted(row["told"] - row["findings"][0]["step"] for row in right if row["told"] is not None)
        if mine:
            found[code] = {
                "runs": len(mine),
                "right": len(right),
                "with a place": sum(bool(row["findings"][0]["where"]) for row in right),
                "told on the way": len(steps),
                "steps, median": median(steps) if steps else None,
                "steps, worst": max(steps, default=None),
            }
    return found


def cost(rows: Sequence[Row]) -> dict[str, float]:
    """Of a verdict, once the run has ended: in seconds, and in steps of the run itself."""
    seconds = sorted(row["verdict_seconds"] for row in rows)
    steps = sorted(row["verdict_seconds"] / row["step_seconds"] for row in rows if row["step_seconds"])
    if not steps:
        return {}
    return {
        "seconds, median": round(median(seconds), 2),
        "seconds, worst": round(seconds[-1], 2),
        "steps, median": round(median(steps)),
        "steps, nine of ten": round(steps[int(0.9 * (len(steps) - 1))]),
        "steps, worst": round(steps[-1]),
    }


def by_fault(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """The recall by fault and strength."""
    found = {}
    for code in FAULTS:
        mine = [row for row in rows if row["case"]["fault"] == code]
        strengths = {s: [row for row in mine if row["case"]["strength"] == s] for s in STRENGTHS}
        if mine:
            found[code] = {s: recall(some) for s, some in strengths.items() if some}
    return found


def costs(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """The cost of a verdict by fault."""
    mine = {code: [row for row in rows if row["case"]["fault"] == code] for code in FAULTS} | {"healthy": healthy(rows)}
    return {code: found for code, some in mine.items() if (found := cost(some))}


def part(rows: Sequence[Row]) -> dict[str, Any]:
    """The figures of some programs."""
    alarms = false_alarms(healthy(rows))
    return {
        **recall(faulty(rows)),
        "healthy runs": alarms["runs"],
        "alarmed": alarms["alarmed"],
        "alarmed surely": alarms["sure"],
        "words": precision(rows),
    }


def gap(parts: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, float]]:
    """How much more often the right cause comes first on calibrated programs than on others, of faulty runs.

    Not every fault fits every program, so it is also taken over the faults and strengths that both have, each of which
    counts the same.
    """
    found = {}
    for name in (HELD_PROGRAMS, HELD_SCRIPTS):
        ours, theirs = faulty(parts[CALIBRATED]), faulty(parts[name])
        if not ours or not theirs:
            continue
        (a, b), shared = (_shares(ours), _shares(theirs)), _shares(ours).keys() & _shares(theirs).keys()
        found[name] = {"plain": round(fmean(map(is_right, ours)) - fmean(map(is_right, theirs)), 3)}
        if shared:
            found[name]["same faults"] = round(fmean(a[key] - b[key] for key in shared), 3)
    return found


def _shares(rows: Iterable[Row]) -> dict[tuple[str, str], float]:
    """How often the right cause comes first, by fault and strength."""
    found: dict[tuple[str, str], list[bool]] = {}
    for row in rows:
        found.setdefault((row["case"]["fault"], row["case"]["strength"]), []).append(is_right(row))
    return {key: fmean(some) for key, some in found.items()}


def board(rows: Sequence[Row], mutants: Collection[str] = ()) -> dict[str, Any]:
    """Everything that the cells say, as plain values. `mutants` did no harm, and are counted by themselves."""
    equivalent = [row for row in rows if _place(row) in mutants]
    rows = [row for row in rows if _place(row) not in mutants]
    ill, well = faulty(rows), healthy(rows)
    parts = {name: [row for row in rows if part_of(row) == name] for name in (CALIBRATED, HELD_PROGRAMS, HELD_SCRIPTS)}
    return {
        "faulty": recall(ill),
        "of causes that it knows": recall([row for row in ill if row["known"]]),
        "seeds": len({row["case"]["seed"] for row in rows}),
        "healthy": false_alarms(well),
        "parts": {name: part(some) for name, some in parts.items()},
        "gap": gap(parts),
        "equivalent mutants": recall(equivalent),
        "strengths": {s: recall([row for row in ill if row["case"]["strength"] == s]) for s in STRENGTHS},
        "words": precision(rows),
        "faults": by_fault(ill),
        "confusion": confusion(rows),
        "hard to tell apart": hard_groups(rows),
        "exact": exact(ill),
        "cost": cost(rows),
        "cost by fault": costs(rows),
        "failures": failures(rows),
    }


def _place(row: Row) -> str:
    """Of a fault, as the table of harm names it."""
    case = row["case"]
    return f"{case['fault']} {case['strength']} {case['program']}"


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
