"""The runs of a folder as a table on a terminal."""

from collections.abc import Sequence
from pathlib import PurePath

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from unstuck.diagnosis import Diagnosis
from unstuck.record import Summary
from unstuck.report import _words as words
from unstuck.report._screen import BADGE, Fitting, firm, table_of


def runs_table(runs: Sequence[tuple[Summary, Diagnosis | None]]) -> RenderableType:
    """Runs and what their diagnosis says, where there is one, as something `rich.print` shows."""
    return Fitting(firm(_table(runs), 0, 1, 2, 3, 4, 5), firm(_table(runs), 3, 4))


def _table(runs: Sequence[tuple[Summary, Diagnosis | None]]) -> Table:
    table = table_of("Run", "when (UTC)", "script", "steps", "time", "outcome", "verdict")
    for column in (3, 4):
        table.columns[column].justify = "right"
    for run, known in runs:
        table.add_row(
            Text(words.printable(run.folder.name)),
            Text(run.started[:16].replace("T", " ")),
            Text(words.printable(PurePath(run.script).name)),
            Text(f"{run.steps:,}"),
            Text(words.duration(run.seconds)),
            Text(words.printable(run.outcome)),
            _verdict(known),
        )
    return table


def _verdict(known: Diagnosis | None) -> Text:
    if known is None:
        return Text("–", "dim")
    if not known.findings:
        return Text("✓ no fault found", "green") if known.checked else Text("cannot tell", "dim")
    first = known.findings[0]
    more = f" and {len(known.findings) - 1} more" if len(known.findings) > 1 else ""
    return Text.assemble((first.word, BADGE[first.word].replace("reverse ", "")), f" {first.code}{more}")
