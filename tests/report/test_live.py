"""The live screen: its curves are those of the numbers, and it keeps to its rows."""

import io
import math
import re
from types import SimpleNamespace

import pytest
from rich.console import Console
from tests.report.report_cases import bounces, healthy, run_of

from unstuck.report import LiveScreen
from unstuck.report._live import LEAST, ROWS, Curve, plot


def heights(lines):
    """The highest dot of each column of a plot, counted from its foot."""
    found = []
    for k in range(2 * len(lines[0])):
        column = []
        for y, line in enumerate(lines):
            code = 0 if line[k // 2] == " " else ord(line[k // 2]) - 0x2800
            bits = (0x01, 0x02, 0x04, 0x40) if k % 2 == 0 else (0x08, 0x10, 0x20, 0x80)
            column += [4 * y + d for d, bit in enumerate(bits) if code & bit]
        found.append(4 * len(lines) - 1 - min(column) if column else None)
    return found


def test_a_straight_line_is_drawn_straight_from_its_foot_to_its_top():
    lines, low, high = plot([float(k) for k in range(10, 30)], 10, 5)
    assert (low, high) == (10.0, 29.0)
    assert heights(lines) == list(range(20))


def test_a_wide_range_is_drawn_by_its_logarithm():
    lines, low, high = plot([10.0**-k for k in range(20)], 10, 5)
    assert (low, high) == (1e-19, 1.0)
    falling = heights(lines)
    assert all(abs(a - (19 - k)) <= 1 for k, a in enumerate(falling)), falling


def test_what_is_not_finite_leaves_a_gap():
    lines, low, high = plot([1.0, 2.0, math.nan, math.inf, 3.0, 4.0], 3, 5)
    assert (low, high) == (1.0, 4.0)
    assert [h is None for h in heights(lines)] == [False, False, True, True, False, False]
    assert plot([math.nan], 3, 5)[0] == plot([], 3, 5)[0] == []


def test_a_curve_keeps_the_mean_of_equally_many_values_in_bounded_memory():
    curve = Curve(points=8)
    for k in range(1 << 12):
        curve.add(float(k))
    each = (1 << 12) // len(curve.values)
    assert len(curve.values) in range(4, 8)
    assert curve.values == [each * k + (each - 1) / 2 for k in range(len(curve.values))]
    assert curve.last == (1 << 12) - 1


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("known", ["nothing", "healthy", "faulty"])
def test_the_screen_is_as_many_rows_of_no_more_than_the_width(columns, known):
    series = {name: (list(range(1, 400)), [1 / k for k in range(1, 400)]) for name in ("loss", "grad_norm", "lr")}
    diagnosis = {"nothing": None, "healthy": healthy(), "faulty": bounces()}[known]
    findings = () if diagnosis is None else diagnosis.findings
    screen = LiveScreen(Console(file=io.StringIO(), force_terminal=True, width=columns, height=24))
    run = run_of(series)
    screen._follow(run)
    panel = screen._panel(run, SimpleNamespace(diagnosis=diagnosis, findings=findings), columns - 1)
    plain = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in panel]
    assert len(plain) == ROWS
    assert max(map(len, plain)) <= columns - 1
    assert "399 steps" in plain[0]
    assert "0.00251" in plain[1], "the last loss, 1/399"
    for finding in findings[:2]:
        assert any(f" {finding.word}  {finding.code}" in line for line in plain)


def test_a_terminal_that_is_too_small_or_none_is_not_drawn_on():
    def usable(rows, columns, terminal=True):
        file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        console = Console(file=file, force_terminal=terminal, width=columns, height=rows)
        return LiveScreen(console).usable

    rows, columns = LEAST
    assert usable(rows, columns)
    assert not usable(rows - 1, columns)
    assert not usable(rows, columns - 1)
    assert not usable(rows, columns, terminal=False)
    latin = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="latin-1"), force_terminal=True, width=80, height=24)
    assert not LiveScreen(latin).usable


def test_control_characters_of_a_script_do_not_reach_the_terminal():
    run = run_of({"loss": ([1], [1.0])}, header={"script": "a\x1b[2Jb.py"})
    screen = LiveScreen(Console(file=io.StringIO(), force_terminal=True, width=80, height=24))
    screen._follow(run)
    title = screen._panel(run, SimpleNamespace(diagnosis=None, findings=()), 79)[0]
    assert "\x1b[2J" not in title
    assert "b.py" in title
