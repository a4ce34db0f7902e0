"""runmedic, as `runmedic diagnose run.jsonl --json` reads a log afterwards."""

import contextlib
import io
import json
from pathlib import Path

from runmedic import cli

from clinic.rivals.lines import Lines
from clinic.rivals.log import logged
from clinic.training import Training


def attach(t: Training, folder: Path):
    lines = Lines(folder / "run.jsonl")
    logged(t, lines.write)

    def said() -> list[str]:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            cli.main(["diagnose", str(lines.close()), "--json"])
        found = [f for run in json.loads(printed.getvalue()) for f in run["findings"]]
        return [f["check"] for f in found if f["severity"] in ("critical", "warning")]

    return said
