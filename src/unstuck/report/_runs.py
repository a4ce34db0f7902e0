"""The runs of a folder as a table on a terminal."""

from collections.abc import Sequence
from pathlib import PurePath

from rich.console import RenderableType
from rich.text import Text

from unstuck.diagnosis import Diagnosis
from unstuck.record import Summary
from unstuck.report import _words as words
from unstuck.report._screen import BADGE, Fitting, firm, table_of


def runs_table(runs: Sequence[tuple[Summary, Diagnosis | None]]) -> RenderableType:
    """Runs and what their diagnosis says, where there is one, as something `rich.print` shows.

    On a narrow terminal without time and script, which the name of a run tells as well.
    """
    rows = [_row(run, known) for run, known in runs]
    roomy = table_of("Run", "when (UTC)", "script", "steps", "time", "outcome", "verdict")
    tight = table_of("Run", "steps", "time", "outcome", "verdict")
    for row in rows:
        roomy.add_row(*row)
        tight.add_row(row[0], *row[3:])
    for column in (*roomy.columns[3:5], *tight.columns[1:3]):
        column.justify = "right"
    return Fitting(firm(roomy, 0, 1, 2, 3, 4, 5, 6), firm(tight, 0, 1, 2))


def _row(run: Summary, known: Diagnosis | None) -> list[Text]:
    return [
        Text(words.printable(run.folder.name)),
        Text(run.started[:16].replace("T", " ")),
        Text(words.printable(PurePath(run.script).name)),
        Text(f"{run.steps:,}"),
        Text(words.duration(run.seconds)),
        Text(words.printable(run.outcome.partition(" by unstuck: ")[0])),  # the verdict says at which fault
        _verdict(known),
    ]


def _verdict(known: Diagnosis | None) -> Text:
    if known is None:
        return Text("–", "dim")
    if not known.findings:
        return Text("✓ no fault found", "green") if known.checked else Text("cannot tell", "dim")
    first = known.findings[0]
    more = f" and {len(known.findings) - 1} more" if len(known.findings) > 1 else ""
    return Text.assemble((first.word, BADGE[first.word].replace("reverse ", "")), f" {first.code}{more}")
