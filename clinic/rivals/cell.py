"""One training with one tool, in a process of its own."""

import dataclasses
import hashlib
import json
import os
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clinic import train
from clinic.board import told
from clinic.cells import Case, forked
from clinic.rivals.tools import ATTACH
from clinic.training import Training
from unstuck import cli

RAN = "ran.json"


@dataclass(frozen=True)
class Cell(Case):
    tool: str = ""

    @property
    def name(self) -> str:
        return f"{self.tool}: {super().name}"

    @property
    def case(self) -> Case:
        return Case(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Case)})


def examine(cell: Cell) -> dict[str, Any]:
    """What the tool said of the run, what the run took of the processor, and where its weights ended."""
    with tempfile.TemporaryDirectory() as folder:

        def work():
            os.chdir(folder)
            (by_unstuck if cell.tool == "Unstuck" else by_rival)(cell, Path(folder))

        status, printed, _ = forked(work, folder)
        ran, said = (Path(folder, name) for name in (RAN, "said.json"))
        row = json.loads(ran.read_text()) if ran.exists() else {}
        row |= json.loads(said.read_text()) if said.exists() else {}
    trouble = "" if status == 0 and "names" in row else f"status {status}: {''.join(printed.strip().splitlines()[-1:])}"
    return {"case": dataclasses.asdict(cell.case), "tool": cell.tool, **row, "trouble": trouble}


def by_rival(cell: Cell, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training = prepared(cell.case)
        said = ATTACH[cell.tool](training, folder)
        timed(training, folder)
        began = time.perf_counter()
        names = said()
    keep(folder, names, time.perf_counter() - began)


def by_unstuck(cell: Cell, folder: Path) -> None:
    """By its command, as a user would."""
    out = folder / "diagnosis.json"
    command = ["-m", "clinic.rivals.alone", json.dumps(dataclasses.asdict(cell.case))]
    sys.argv = ["unstuck", "run", "--out", str(folder / "run"), "--json", str(out), *command]
    began = time.perf_counter()
    try:
        cli.main()
    except SystemExit as stop:
        if stop.code:
            raise
    found = json.loads(out.read_text())
    keep(folder, told(found), time.perf_counter() - began - float(found["seconds"]))


def prepared(case: Case) -> Training:
    words = dataclasses.asdict(case)
    return train.prepared(words.pop("program"), **words | {"strength": case.strength or "clear"})


def timed(training: Training, folder: Path) -> None:
    """Trains, and keeps the processor's seconds and the digits of the weights."""
    began = time.process_time()
    train.train(training, tell=lambda line: None)
    seconds = time.process_time() - began
    with torch.no_grad():
        weights = b"".join(p.float().contiguous().numpy().tobytes() for p in training.model.parameters())
    row = {"seconds": round(seconds, 4), "weights": hashlib.sha256(weights).hexdigest()[:16]}
    (folder / RAN).write_text(json.dumps(row))


def keep(folder: Path, names: list[str], seconds: float) -> None:
    (folder / "said.json").write_text(json.dumps({"names": names, "verdict_seconds": round(seconds, 3)}))
