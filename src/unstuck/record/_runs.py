"""The folders of runs: a new one for each, and a list of them by the first and the last lines of their logs."""

import datetime
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unstuck.record._log import NAME, loose, read_log
from unstuck.record._ranks import own_rank, ranked, shared_folder

FOLDER = Path("unstuck-runs")
ENDS = 1 << 16  # bytes read at both ends of a log: a long one is not read whole to be listed
SILENT = 300.0  # seconds without a line, after which a run without an end counts as cut off


@dataclass(frozen=True)
class Summary:
    """A run in a line of a list."""

    folder: Path
    started: str  # ISO 8601, UTC; "" where the log has no start
    script: str
    argv: tuple[str, ...]
    steps: int
    seconds: float
    outcome: str  # as Run.outcome, or "going on"


def runs(below: str | Path = FOLDER) -> list[Summary]:
    """The runs in the folders below `below`, newest first."""
    found = [_summary(log) for log in Path(below).glob(f"*/{NAME}")]
    return sorted(found, key=lambda run: (run.started, run.folder.name), reverse=True)


def new_folder(name: str) -> Path:
    """Makes a folder for a run, named after the time and the script; no other run has it.

    Ranks that train together get one folder.
    """
    rank = own_rank()
    if rank is not None:
        return shared_folder(FOLDER, name, ranked(NAME, rank))
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    folder = FOLDER / f"{stamp}-{name}"
    for k in range(2, 1000):
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            folder = FOLDER / f"{stamp}-{name}-{k}"
        except OSError:
            break  # the log will say so
    return folder


def records_since(folder: Path, start: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The records of a run's log from byte `start` on, and the byte where they end: to follow it in bounded memory."""
    log = folder / NAME
    return read_log(log, start) if log.is_file() else ([], start)


def _summary(log: Path) -> Summary:
    records = _records(log)
    first: dict[str, Any] = next((e for e in records if e["kind"] == "start"), {})
    steps = [e["step"] for e in records if e["kind"] == "step"]
    last = {k: v for e in records for k, v in e.items() if k in ("time", "outcome")}
    going_on = bool(records) and time.time() - log.stat().st_mtime < SILENT
    return Summary(
        folder=log.parent,
        started=str(first.get("started", "")),
        script=str(first.get("script", "")),
        argv=tuple(map(str, first.get("argv", ()))),
        steps=max(steps, default=0),
        seconds=float(last.get("time", 0.0)),
        outcome=str(last.get("outcome", "going on" if going_on else "cut off")),
    )


def _records(log: Path) -> list[dict[str, Any]]:
    """The whole records within the first and the last bytes of a log."""
    with log.open("rb") as file:
        head = file.read(ENDS)
        file.seek(max(0, log.stat().st_size - ENDS))
        lines = (head + b"\n" + file.read()).splitlines(keepends=True)
    return [record for line in lines if (record := _record(line)) is not None]


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = loose(json.loads(line)) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) and "kind" in record else None
