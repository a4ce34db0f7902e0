"""The harm rule: what is put in counts as a fault only where the run ends worse than the healthy one.

python -m clinic.harm                                     everything, five seeds: hours; it goes on where it stopped
python -m clinic.harm --fault lr-bounces --program mlp    one fault on one program
python -m clinic.harm --table                             what is known, without a run

A fault does harm where, in the median over the seeds, two points of the held-out score are lost, or the final training
loss is more than twice the healthy one and 0.03, or the healthy target takes twice as many steps, or the validation
tells two points more than is true. What does none of this is an equivalent mutant.
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from clinic import fingerprints, kept
from clinic.cells import HERE, Case
from clinic.faults import FAULTS, HARMLESS, STRENGTHS
from clinic.programs import PROGRAMS
from clinic.train import prepared
from clinic.training import train

RAW = HERE / "results" / "harm.jsonl"
TABLE = HERE / "results" / "harm.json"

POINTS = 0.02  # of the score


def endings(case: Case) -> dict[str, Any]:
    """How an unwatched training ends."""
    torch.set_num_threads(1)
    try:
        ending = train(
            prepared(
                case.program,
                fault=case.fault,
                strength=case.strength,
                variant=case.variant,
                optimiser=case.optimiser,
                seed=case.seed,
            ),
            tell=lambda line: None,
        )
    except (RuntimeError, ValueError) as error:
        return {"error": str(error)[:200]}
    checks = [(c.step, round(_number(c.score, -1e9), 4)) for c in ending.checks]
    every = max(len(checks) // 40, 1)
    return {
        "score": _number(ending.score, -1e9),
        "loss": _number(ending.loss, 1e9),
        "honest": _number(ending.honest, -1e9),
        "checks": checks[::every],
    }


def _number(x: float, otherwise: float) -> float:
    return float(x) if math.isfinite(x) else otherwise


def steps_to(row: dict[str, Any], target: float) -> float:
    return next((step for step, score in row["checks"] if score >= target), math.inf)


def judge(rows: Sequence[dict[str, Any]], healthy: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The medians of a fault's runs beside those of healthy ones, and the harm in words; "" where there is none."""
    if any("error" in row for row in rows):
        return {"harm": "raises", "error": next(row["error"] for row in rows if "error" in row)}
    score, loss, honest = (median(row[key] for row in rows) for key in ("score", "loss", "honest"))
    well, low = (median(row[key] for row in healthy) for key in ("score", "loss"))
    target = well - POINTS
    took, usual = (median(steps_to(row, target) for row in some) for some in (rows, healthy))
    harms = []
    if score <= well - POINTS:
        harms.append("score")
    if loss > 2 * low + 0.03:
        harms.append("loss")
    if took >= 2 * usual:
        harms.append("steps")
    if score - honest >= POINTS:
        harms.append("dishonest")
    return {
        "harm": " ".join(harms),
        "seeds": len(rows),
        "score": [round(score, 4), round(well, 4)],
        "loss": [round(loss, 4), round(low, 4)],
        "steps": [_shown(took), _shown(usual)],
    }


def _shown(x: float) -> float | str:
    return x if math.isfinite(x) else "never"


def baseline(code: str, program: str, seed: int) -> Case:
    if FAULTS[code].harmless is not None:
        return Case(program, fault=code, strength=HARMLESS, seed=seed)
    return Case(program, seed=seed)


def chosen(faults: Sequence[str], programs: Sequence[str], strengths: Sequence[str]) -> Iterable[tuple[str, str, str]]:
    for code, fault in FAULTS.items():
        for program in fault.strengths:
            if (not faults or code in faults) and (not programs or program in programs):
                yield from ((code, program, strength) for strength in STRENGTHS if strength in strengths)


def needed(triples: Iterable[tuple[str, str, str]], seeds: int) -> list[Case]:
    """Seed by seed, so that all is known roughly before anything is known well."""
    triples = list(triples)
    cases: dict[Case, None] = {}
    for seed in range(seeds):
        for code, program, strength in triples:
            cases[baseline(code, program, seed)] = None
            cases[Case(program, fault=code, strength=strength, seed=seed)] = None
    return list(cases)


def judged(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Every verdict that the kept rows allow: by fault and strength, then by program."""
    found: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for code, program, strength in chosen((), (), STRENGTHS):
        pairs = []
        for seed in range(100):
            cases = (Case(program, fault=code, strength=strength, seed=seed), baseline(code, program, seed))
            pair = [rows.get(f"{case.name} {fingerprints.of_case(case)}") for case in cases]
            if None in pair:
                break
            pairs.append(pair)
        if pairs:
            verdict = judge([a for a, _ in pairs], [b for _, b in pairs])
            found[f"{code} {strength}"][program] = verdict
    return dict(found)


def table(verdicts: dict[str, dict[str, dict[str, Any]]]) -> Table:
    shown = Table("fault", "program", "seeds", "score", "loss", "steps to target", "harm")
    for name, by_program in verdicts.items():
        for program, v in by_program.items():
            pairs = [" / ".join(map(str, v[key])) if key in v else "" for key in ("score", "loss", "steps")]
            shown.add_row(name, program, str(v.get("seeds", "")), *pairs, v["harm"] or "equivalent mutant")
    return shown


def mutants() -> set[str]:
    """What the kept table calls equivalent: fault, strength and program."""
    if not TABLE.exists():
        return set()
    verdicts = json.loads(TABLE.read_text())["verdicts"]
    return {f"{name} {program}" for name, by in verdicts.items() for program, v in by.items() if not v["harm"]}


def written(verdicts: dict[str, dict[str, dict[str, Any]]]) -> str:
    """As JSON, a line a fault and strength."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(by_program)}" for name, by_program in verdicts.items())
    return f'{{"environment": {json.dumps(kept.environment())},\n"verdicts": {{\n{lines}\n}}}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault", action="append", default=[], choices=tuple(FAULTS), metavar="CODE")
    parser.add_argument("--program", action="append", default=[], choices=tuple(PROGRAMS))
    parser.add_argument("--strength", action="append", default=[], choices=STRENGTHS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--raw", type=Path, default=RAW)
    args = parser.parse_args()

    console = Console(width=None if Console().is_terminal else 150)
    wanted = list(chosen(args.fault, args.program, args.strength or STRENGTHS))
    if not args.table:
        cases = ((case, fingerprints.of_case(case)) for case in needed(wanted, args.seeds))
        with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as executor:
            kept.measure(cases, endings, args.raw, executor=executor, console=console)
    verdicts = judged(kept.load(args.raw))
    names = {f"{code} {strength}" for code, _, strength in wanted}
    programs = {program for _, program, _ in wanted}
    console.print(
        table({n: {p: v for p, v in by.items() if p in programs} for n, by in verdicts.items() if n in names})
    )
    if args.raw == RAW:
        TABLE.write_text(written(verdicts))


if __name__ == "__main__":
    main()
