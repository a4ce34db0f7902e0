"""The screen of a run that goes on: loss, pulses and what is suspected, below whatever the script prints.

The last rows of the terminal are taken out of its scrolling region, and the screen is drawn there. So the script's own
streams stay as they are: no proxy stands between it and the terminal, and its progress bars run on above.
"""

import io
import itertools
import math
import os
import time
from collections import deque
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, Protocol

from rich.console import Console
from rich.text import Text

from unstuck.diagnosis import Diagnosis, Finding
from unstuck.record import Run, records_since
from unstuck.report import _words as words
from unstuck.report._screen import BADGE, Spark

ROWS = 10  # of the screen: one to part it from the script's own, five for the curves, four for the findings
CURVES = 5
LEAST = 20, 60  # rows and columns of a terminal that is large enough
_PULSES = {"grad_norm": "gradient norm", "update_ratio": "relative update", "lr": "rate"}
_SPEED = 10  # looks over which the speed is taken
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of a braille cell: left and right column, from above


class Known(Protocol):
    """What a screen needs of whoever looks at the run."""

    diagnosis: Diagnosis | None

    @property
    def findings(self) -> tuple[Finding, ...]: ...


class Curve:
    """A series in bounded memory: no more than `points` means, each of equally many values."""

    def __init__(self, points: int = 480) -> None:
        self.last = math.nan
        self._points = points
        self._means: list[float] = []
        self._every = 1
        self._sum, self._count = 0.0, 0

    def add(self, value: float) -> None:
        self.last = value
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count < self._every:
            return
        self._means.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self._means) == self._points:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._every *= 2

    @property
    def values(self) -> list[float]:
        return self._means


class LiveScreen:
    """Draws the run on the last rows of a terminal, in a `with` block; `usable` says whether the terminal can."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._curves = {name: Curve() for name in ("loss", *_PULSES)}
        self._read = 0  # bytes of the log
        self._seen: deque[tuple[float, int]] = deque(maxlen=_SPEED)
        self._size: os.terminal_size | None = None  # of the terminal that it is drawn on
        self._began = time.perf_counter()

    @property
    def shown(self) -> bool:
        """Whether it is on the terminal."""
        return self._size is not None

    @property
    def usable(self) -> bool:
        if not self._console.is_terminal or not self._console.encoding.startswith("utf"):
            return False
        size = self._terminal()
        return size.lines >= LEAST[0] and size.columns >= LEAST[1]

    def show(self, run: Run, known: Known) -> None:
        """Draws the run as it stands."""
        self._follow(run)
        if self.usable:
            self._draw(self._panel(run, known, self._terminal().columns - 1))

    def note(self, text: str, share: float) -> None:
        """Says in the last row how far a diagnosis is, during which nothing else moves."""
        if self._size is not None:
            line = words.printable(f" diagnosing, {share:.0%}: {text}")[: self._size.columns - 1]
            self._write(f"\x1b7\x1b[{self._size.lines};1H\x1b[2K{line}\x1b8")

    def close(self) -> None:
        """Gives the rows back, empty, and the whole terminal to the script again."""
        if self._size is not None:
            first, self._size = self._size.lines - ROWS + 1, None
            empty = "".join(f"\x1b[{first + k};1H\x1b[2K" for k in range(ROWS))
            self._write(f"\x1b7\x1b[r{empty}\x1b8")

    def __enter__(self) -> "LiveScreen":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _follow(self, run: Run) -> None:
        records, self._read = records_since(run.folder, self._read)
        for e in records:
            if e["kind"] == "step" and e.get("optimizer", 0) == 0:  # the loss of another, in a GAN, is of another kind
                for name, curve in self._curves.items():
                    if e.get(name) is not None:
                        curve.add(float(e[name]))
        self._seen.append((time.perf_counter(), run.taken))

    def _panel(self, run: Run, known: Known, width: int) -> list[str]:
        lines = [self._title(run, width), *self._curve_rows(run, width)]
        lines += told(known, width)[: ROWS - len(lines)]
        out = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=self._colours())
        return [rendered(out, line) for line in lines] + [""] * (ROWS - len(lines))

    def _title(self, run: Run, width: int) -> Text:
        (then, before), (now, steps) = self._seen[0], self._seen[-1]
        speed = f"   {words.figures((steps - before) / (now - then))} steps/s" if steps > before else ""
        took = words.duration(time.perf_counter() - self._began)
        line = Text.assemble(("── ", "dim"), (words.printable(PurePath(run.script).name), "bold"))
        line.append(f"   {words.count(steps, 'step')}{speed}   {took} ", "dim")
        line.truncate(width)
        return line.append("─" * (width - line.cell_len), "dim")

    def _curve_rows(self, run: Run, width: int) -> list[Text]:
        right = 40
        loss = self._curves["loss"].values
        drawn, low, high = plot(loss, width - right - 12, CURVES)
        labels = [words.figures(high), "", "loss", "", words.figures(low)] if drawn else [""] * CURVES
        rows = []
        for k in range(CURVES):
            line = Text(f" {labels[k]:>8} ", "bold" if labels[k] == "loss" else "dim")
            line.append("│" if drawn else " ", "dim").append(
                f"{drawn[k] if drawn else '':{width - right - 12}}", "cyan"
            )
            rows.append(line)
        pulses = [(name, self._curves[key]) for key, name in _PULSES.items()]
        for line, (name, curve) in zip(rows[1:], pulses, strict=False):
            finite = [x for x in curve.values if math.isfinite(x)] or [0.0]
            spark = Spark(curve.values, min(finite), max(finite)).blocks(12) if curve.values else ""
            line.append(f"  {name:<15} ", "bold").append(f"{words.figures(curve.last):<10}").append(spark, "cyan")
        last = self._curves["loss"].last
        rows[0].append(f"  {'loss':<15} ", "bold").append(words.figures(last) if drawn else "not seen yet")
        rows[4].append(f"  {'watching':<15} ", "bold").append(f"{100 * run.overhead:.1f} % of the time")
        return rows

    def _draw(self, lines: Sequence[str]) -> None:
        size = self._terminal()
        top = size.lines - ROWS
        make_room = ""
        if size != self._size:
            erase = "" if self._size is None else "\x1b7\x1b[r\x1b8\x1b[J"
            down = "\x1bD" * ROWS  # keeps the column, which a line feed does not
            make_room = f"{erase}{down}\x1b[{ROWS}A\x1b7\x1b[1;{top}r\x1b8"
            self._size = size
        rows = "".join(f"\x1b[{top + 1 + k};1H\x1b[2K{line}" for k, line in enumerate(lines))
        self._write(f"{make_room}\x1b7{rows}\x1b8")

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()

    def _terminal(self) -> os.terminal_size:
        try:
            return os.get_terminal_size(self._console.file.fileno())
        except (OSError, ValueError):  # a stream that is no file
            return os.terminal_size(self._console.size)

    def _colours(self) -> Any:
        return self._console.color_system


def rendered(out: Console, line: Text) -> str:
    with out.capture() as captured:
        out.print(line, end="", no_wrap=True, overflow="ellipsis", crop=True)
    return captured.get()


def told(known: Known, width: int) -> list[Text]:
    """What is found and suspected, most certain first: two lines each, the second its claim."""
    lines: list[Text] = []
    for f in known.findings:
        since = f"  {words.since(f).lower()}" + (f" in {words.printable(f.where)}" if f.where else "")
        lines.append(Text.assemble(" ", (f" {f.word} ", BADGE[f.word]), " ", (f.code, "bold"), (since, "dim")))
        lines.append(Text("   " + words.printable(f.claim)))
    if not lines and known.diagnosis is not None:
        lines.append(Text.assemble((" ✓ ", "bold green"), words.quiet_line(known.diagnosis)))
    elif not lines:
        lines.append(Text(" No exact fault so far. A whole diagnosis comes after 20 seconds.", "dim"))
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return lines


def plot(values: Sequence[float], width: int, height: int) -> tuple[list[str], float, float]:
    """A curve in braille, `height` lines of `width` cells, and the values at its foot and top.

    On a log scale where the values are positive and span more than a factor of 5. What is not finite leaves a gap.
    """
    columns = 2 * width
    n = len(values)
    cuts = [k * n // columns for k in range(columns + 1)]
    points = [_mean(values[a : max(a + 1, b)]) for a, b in itertools.pairwise(cuts)] if n else []
    finite = [x for x in points if math.isfinite(x)]
    if not finite:
        return [], math.nan, math.nan
    low, high = min(finite), max(finite)
    bent = low > 0 and high > 5 * low
    foot, top = (math.log(low), math.log(high)) if bent else (low, high)
    cells = [[0] * width for _ in range(height)]
    dots = 4 * height - 1
    before: int | None = None
    for column, x in enumerate(points):
        if not math.isfinite(x):
            before = None
            continue
        share = ((math.log(x) if bent else x) - foot) / (top - foot) if top > foot else 0.5
        row = dots - round(share * dots)
        last = row if before is None else before
        for y in range(min(row, last), max(row, last) + 1):
            cells[y // 4][column // 2] |= _DOTS[column % 2][y % 4]
        before = row
    return ["".join(chr(0x2800 + c) if c else " " for c in line) for line in cells], low, high


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
