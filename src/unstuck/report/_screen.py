"""The verdict on a terminal."""

import math
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.constrain import Constrain
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from unstuck.diagnosis import CANNOT_TELL, PROVED, SHOWN, SUSPECT, Diagnosis, Finding, Trial
from unstuck.report import _words as words

# Terminal colours, not fixed ones: they follow the user's light or dark theme. Filled means that an experiment decided.
BADGE = {PROVED: "bold reverse red", SHOWN: "bold reverse blue", SUSPECT: "bold magenta", CANNOT_TELL: "bold dim"}
_BLOCKS = "▁▂▃▄▅▆▇█"
_NAME = 26  # columns for a name
LISTED = 5  # causes, up to which all of them are named
WIDEST = 104  # longer lines are hard to read


def screen(diagnosis: Diagnosis) -> RenderableType:
    """The diagnosis as something `rich.print` shows: each finding with evidence, rivals, trial and advice."""
    parts: list[RenderableType] = [_masthead(diagnosis)] if diagnosis.findings else [_quiet(diagnosis)]
    parts += [_finding(f) for f in diagnosis.findings]
    if diagnosis.not_checked:
        parts.append(_not_checked(diagnosis))
    return Constrain(Group(*parts), WIDEST)


def _quiet(diagnosis: Diagnosis) -> RenderableType:
    mark = ("✓ ", "bold green") if diagnosis.checked else ("? ", "bold")
    line = Text.assemble(mark, words.quiet_line(diagnosis), (f"  {words.took(diagnosis)}", "dim"))
    return Padding(line, (0, 0, 0, 1))


def _masthead(diagnosis: Diagnosis) -> RenderableType:
    took = f"  {words.count(diagnosis.steps, 'step')}, {words.took(diagnosis)}"
    line = Text.assemble((words.script(diagnosis), "bold"), (took, "dim"), overflow="fold")
    return Padding(line, (0, 0, 0, 1))


def _finding(finding: Finding) -> RenderableType:
    head = Table.grid(padding=(0, 1, 0, 0))
    since = f"  {words.since(finding).lower()}" + (f" in {words.printable(finding.where)}" if finding.where else "")
    cause = Text.assemble((words.printable(finding.code), "bold"), (since, "dim"), overflow="fold")
    head.add_row(Text(f" {finding.word} ", BADGE[finding.word], no_wrap=True), cause)
    body: list[RenderableType] = [Text(words.printable(finding.claim), overflow="fold")]
    if finding.evidence:
        body += ["", Fitting(firm(_evidence(finding), 1, 2, 3), _evidence(finding))]
    if finding.ruled_out:
        body += ["", _rivals(finding)]
    if finding.trial is not None:
        trial = finding.trial
        body += ["", Fitting(firm(_trial(trial), 0, 2, 3, 4), _trial(trial)), Text(words.protocol(trial), "dim")]
    if finding.advice:
        advice = Table.grid(padding=(0, 1))
        advice.add_row(Text("→", "bold green"), Text(words.printable(finding.advice), "bold", overflow="fold"))
        body += ["", advice]
    return Padding(Group(head, Padding(Group(*body), (0, 0, 0, 1))), (1, 0, 0, 0))


def table_of(*headings: str) -> Table:
    """An empty table, the first column for names."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column(Text(headings[0], "bold not dim"), overflow="fold", max_width=_NAME)
    for heading in headings[1:]:
        table.add_column(heading, overflow="fold")
    return table


def firm(table: Table, *columns: int) -> Table:
    """The table with columns of text that do not wrap, so that the others give way."""
    for column in (table.columns[i] for i in columns):
        lines = [line for cell in (column.header, *column.cells) for line in str(cell).splitlines()]
        column.no_wrap, column.min_width = True, max(map(cell_len, lines), default=0)
    return table


def _evidence(finding: Finding) -> Table:
    table = table_of("Evidence", "value", "interval", "n", "what it means")
    for column in (1, 3):
        table.columns[column].justify = "right"
    for e in finding.evidence:
        value = Text(words.figures(e.value), "bold")
        table.add_row(
            Text(words.printable(e.name)),
            value,
            Text(words.interval(e)) if words.interval(e) else Text("exact", "dim"),
            Text(f"{e.n:,}", "dim"),
            Text(words.printable(e.meaning)),
        )
    return table


def _rivals(finding: Finding) -> Table:
    table = table_of("Ruled out", "because")
    for r in finding.ruled_out:
        table.add_row(Text(words.printable(r.code)), Text(words.printable(r.because)))
    return table


def _trial(trial: Trial) -> Table:
    table = table_of("Trial", "loss", "ends", "interval, %", "")
    finite = sorted(x for arm in trial.arms for x in arm.curve if math.isfinite(x)) or [0.0]
    low, high = finite[len(finite) // 50], finite[-1 - len(finite) // 50]  # one wild batch must not flatten the rest
    for arm in trial.arms:
        style = "bold" if arm.accepted else ""
        curve = (*arm.curve, math.nan) if words.blew_up(arm, trial) else arm.curve
        table.add_row(
            Text(textwrap.fill(words.remedy(arm), _NAME).replace("\u00a0", " "), style),
            Spark(curve, low, high),
            Text(words.ends(arm, trial), style),
            Text("" if words.blew_up(arm, trial) else words.change_interval(arm)),
            Text(
                words.outcome(arm), "bold green" if arm.accepted else "red" if words.outcome(arm) == "worse" else "dim"
            ),
        )
    return table


def _not_checked(diagnosis: Diagnosis) -> RenderableType:
    listed = "; ".join(f"{_some(codes)} ({because})" for codes, because in words.not_checked(diagnosis))
    return Padding(Text(f"Not checked: {words.printable(listed)}.", "dim", overflow="fold"), (1, 0, 0, 1))


def _some(codes: Sequence[str]) -> str:
    """The first few of many: the report and the JSON have them all."""
    return ", ".join(codes) if len(codes) <= LISTED else f"{', '.join(codes[:3])} and {len(codes) - 3} more"


@dataclass(frozen=True, eq=False)
class Fitting:
    """The roomy table where it fits, else the tight one: a number is never cut off."""

    roomy: Table
    tight: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        needed = Measurement.get(console, options.update(width=10_000), self.roomy).minimum
        yield self.roomy if needed <= options.max_width else self.tight


@dataclass(frozen=True, eq=False)
class Spark:
    """A curve as a row of blocks between `low` and `high` on a log scale, as wide as its column; × is not finite."""

    values: Sequence[float]
    low: float
    high: float

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(8, len(self.values)), min(20, len(self.values)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.blocks(min(options.max_width, 20)), "cyan", no_wrap=True)

    def blocks(self, width: int) -> str:
        n = len(self.values)
        width = min(width, n)
        return "".join(self._block(self.values[i * n // width : (i + 1) * n // width]) for i in range(width))

    def _block(self, values: Sequence[float]) -> str:
        if not all(map(math.isfinite, values)):
            return "×"
        middle = min(max(statistics.median(values), self.low), self.high)
        low, high, middle = (math.log(x) if self.low > 0 else x for x in (self.low, self.high, middle))
        return _BLOCKS[min(7, int(8 * (middle - low) / (high - low)))] if high > low else _BLOCKS[0]
