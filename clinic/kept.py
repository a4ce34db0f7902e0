"""Results that are kept, one JSON object a line: whoever stops and starts again goes on where he was."""

import json
import os
import platform
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from clinic.cells import Case

Row = dict[str, Any]
Some = TypeVar("Some", bound=Case)


def environment() -> dict[str, Any]:
    return {"torch": torch.__version__, "python": platform.python_version(), "cpus": os.cpu_count()}


def load(path: Path) -> dict[str, Row]:
    """The last row of each key; a line that was cut off by a crash is left out."""
    rows = {}
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            rows[row["key"]] = row
    return rows


def measure(
    cases: Iterable[tuple[Some, str]],
    work: Callable[[Some], Row],
    path: Path,
    *,
    executor: Executor,
    console: Console,
) -> list[Row]:
    """The row of every case, each given with its fingerprint: read from the file, or worked out and added to it."""
    known = load(path)
    wanted = {f"{case.name} {prints}": case for case, prints in cases}
    missing = {key: case for key, case in wanted.items() if key not in known}
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        path.open("a") as file,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        task = bar.add_task("cells", total=len(missing))
        futures = {executor.submit(work, case): key for key, case in missing.items()}
        try:
            for future in as_completed(futures):
                row = {"key": futures[future], **future.result()}
                known[row["key"]] = row
                file.write(json.dumps(row) + "\n")
                file.flush()
                bar.update(task, advance=1, description=row["key"].rsplit(" ", 1)[0])
        finally:
            for future in futures:  # those that wait, where one has failed or the user has had enough
                future.cancel()
    return [known[key] for key in wanted]
