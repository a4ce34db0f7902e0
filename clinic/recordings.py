"""Trainings that are kept as run folders, so that a change of the diagnosis costs a diagnosis and no training.

What a user gets is measured: the first diagnosis is the one at the end of `unstuck run`. Where only the diagnosis has
changed since, the kept folder is diagnosed again, as `unstuck diagnose` does; `python -m clinic.agree` shows that the
two say the same. The folder of a cell holds the run, `training.json` (how it went, and by which sources) and
`said.json` (the diagnosis at its end).
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clinic import fingerprints
from clinic.cells import HERE, Case, forked
from unstuck import cli
from unstuck.diagnosis import Lookout, diagnose, dumps
from unstuck.diagnosis._exact import TOLD
from unstuck.record import Run

MAKE = "run `python -m clinic` first"  # which keeps them
RUNS = HERE / "results" / "runs"
Row = dict[str, Any]


def examine(case: Case, runs: Path = RUNS) -> Row:
    """What is said of a cell, as plain values; it is trained where no run of the same sources is kept."""
    place = folder_of(case, runs)
    training = known(place, fingerprints.of_training(case)) or train(case, place)
    if training["diagnosis"] == fingerprints.of_diagnosis():
        said, trouble, seconds = said_of(place), training["trouble"], training["verdict_seconds"]
    else:
        said, trouble, seconds = again(place)
    return {
        "case": asdict(case),
        "findings": [finding(f) for f in said.get("findings", ())],
        "steps": training["steps"],
        "seconds": training["seconds"],
        "step_seconds": training["step_seconds"],
        "verdict_seconds": seconds,
        "overhead": training["overhead"],
        "told": told_at(place / "run", said),
        **checks(case, said),
        "trouble": trouble,
    }


def folder_of(case: Case, runs: Path) -> Path:
    return runs / case.name.replace(" ", "_").replace("/", ".")


def known(place: Path, prints: str) -> Row | None:
    """How the kept training went, where it is of these sources and nothing went wrong."""
    training = training_of(place)
    return training if training.get("training") == prints and not training["trouble"] else None


def training_of(place: Path) -> Row:
    return _read(place / "training.json")


def said_of(place: Path) -> Row:
    """The diagnosis at the end of a kept training."""
    return _read(place / "said.json")


def train(case: Case, place: Path) -> Row:
    """Runs a cell through the command in a fork and keeps its folder, once it is whole."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".") as folder:
        new = Path(folder, "new")
        new.mkdir()

        def work():
            sys.argv = ["unstuck", "run", "--out", str(new / "run"), "--json", str(new / "said.json"), *case.command]
            cli.main()

        status, printed, wall = forked(work, new)
        said = _read(new / "said.json")
        ran = said.get("seconds", wall)
        training = {
            "case": asdict(case),
            "training": fingerprints.of_training(case),
            "diagnosis": fingerprints.of_diagnosis(),
            "steps": said.get("steps", 0),
            "seconds": round(ran, 3),
            "step_seconds": _a_step(new / "run"),
            "verdict_seconds": round(wall - ran, 3),
            "overhead": said.get("overhead", {}).get("share", "nan"),
            "trouble": "" if status == 0 and said else f"status {status}: {printed[-300:]}",
        }
        (new / "training.json").write_text(json.dumps(training))
        shutil.rmtree(place, ignore_errors=True)
        new.rename(place)
    return training


def _a_step(folder: Path) -> float:
    """Seconds from one optimiser step to the next, in the mean: what comes before the first is no part of it."""
    times = Run(folder).series("time")[1] if (folder / "log.jsonl").is_file() else []
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0


def again(place: Path) -> tuple[Row, str, float]:
    """Diagnoses a kept run in a fork: the diagnosis, what went wrong, and the seconds that it took."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "said.json")
        status, printed, wall = forked(lambda: out.write_text(dumps(diagnose(Run(place / "run")).to_json())), folder)
        said = _read(out)
    trouble = "" if status == 0 and said else f"diagnosed again: status {status}: {printed[-300:]}"
    return said, trouble, round(wall, 3)


def finding(f: Row) -> Row:
    """What the scoreboard wants to know of a finding."""
    accepted = [r for r in f["remedies"] if r["accepted"]]
    cure = min(accepted, key=lambda r: float(r["effect"]))["remedy"] if accepted else ""
    return {"code": f["code"], "word": f["word"], "step": f["step"], "where": f["where"], "cure": cure}


def checks(case: Case, said: Row) -> Row:
    """Whether a diagnosis can name the fault at all, and which causes stay open."""
    unjudged = [gap["code"] for gap in said.get("not_checked", ())]
    return {"known": case.fault in [*said.get("checked", ()), *unjudged], "not_checked": unjudged}


def told_at(folder: Path, said: Row) -> int | None:
    """The step whose record lets the exact facts tell the first finding, as they do while a run goes on; else None."""
    code = next((f["code"] for f in said.get("findings", ())), "")
    if code not in TOLD:
        return None
    run = Run(folder)
    for step in sorted({fact["step"] for fact in run.facts}):
        with tempfile.TemporaryDirectory() as short:
            Path(short, "log.jsonl").write_text("".join(_until(folder / "log.jsonl", step)))
            if any(f.code == code for f in Lookout().look(Run(short))):
                return step
    return None


def _until(log: Path, step: int) -> Iterator[str]:
    """The lines of a log up to a step."""
    with log.open() as file:
        for line in file:
            if json.loads(line).get("step", 0) > step:
                return
            yield line


def kept_in(runs: Path) -> list[tuple[Case, Path]]:
    """The cells whose training is kept, by name."""
    places = sorted(path.parent for path in runs.glob("[!.]*/training.json"))
    return [(Case(**training_of(place)["case"]), place) for place in places]


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _read(path: Path) -> Row:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
