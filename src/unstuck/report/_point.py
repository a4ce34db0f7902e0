"""A point of the loss surface on a terminal."""

import math

from rich.console import Group, RenderableType
from rich.constrain import Constrain
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from unstuck.critical import CriticalPoint
from unstuck.report import _words as words
from unstuck.report._screen import WIDEST, Fitting, firm, table_of

# Terminal colours, as on the verdict's screen: a saddle or a maximum has a way down, the grey ones are no such point.
_BADGE = {
    "minimum": "bold reverse green",
    "saddle": "bold reverse magenta",
    "maximum": "bold reverse magenta",
    "degenerate": "bold reverse blue",
}
Row = tuple[str, str, str, str]  # quantity, value, error, what it means


def point_table(point: CriticalPoint, *, title: str = "") -> RenderableType:
    """The point as something `rich.print` shows: its kind, each number with its error, and the words for it."""
    head = Table.grid(padding=(0, 1, 0, 0))
    about = f"{words.printable(title)}  {words.count(len(point.direction), 'weight')}"
    badge = Text(f" {point.name} ", _BADGE.get(point.kind, "bold reverse"), no_wrap=True)
    head.add_row(badge, Text(about.strip(), "dim", overflow="fold"))
    roomy, tight = firm(_table(point), 0, 1, 2), firm(_table(point), 1, 2)
    told = Text(words.printable(point.gist), overflow="fold")
    return Constrain(Group(head, Padding(Group("", Fitting(roomy, tight), "", told), (0, 0, 0, 1))), WIDEST)


def _table(point: CriticalPoint) -> Table:
    table = table_of("Point", "value", "error", "what it means")
    table.columns[1].justify = "right"
    for name, value, error, meaning in (*_slope(point), *_ends(point), *_signs(point), *_rates(point)):
        table.add_row(Text(name), Text(value, "bold"), Text(error), Text(meaning))
    table.add_row(Text("products"), Text(f"{point.products:,}", "bold"), Text(""), _convergence(point))
    return table


def _slope(point: CriticalPoint) -> list[Row]:
    noise = point.noise
    error = "" if noise is None else f"± {words.rough(noise.stderr)}"
    said = "one batch: its sampling error is unknown"
    if noise is not None:
        said = f"sampling error over {noise.batches:,} batches"
    return [
        ("loss", words.figures(point.loss), "", "the mean over all batches"),
        ("gradient norm", words.figures(point.gradient_norm), error, said),
        (
            "promise",
            _percent(point.promise),
            "",
            f"what the best step takes off the loss; critical ≤ {_percent(point.promise_limit)}",
        ),
        ("reach", _percent(point.reach), "", "its length over that of θ; critical ≤ 0.001 %"),
    ]


def _ends(point: CriticalPoint) -> list[Row]:
    smallest, largest = ((float(point.values[k]), float(point.errors[k])) for k in (0, -1))
    return [
        ("smallest eigenvalue", words.measured(*smallest), f"± {words.rough(smallest[1])}", "of the Hessian"),
        ("largest eigenvalue", words.measured(*largest), f"± {words.rough(largest[1])}", "λmax, the sharpness"),
    ]


def _signs(point: CriticalPoint) -> list[Row]:
    count, positive = len(point.values), point.positive
    of = f"of all {count:,} eigenvalues" if point.complete else f"of the {count:,} computed eigenvalues"
    rows = [
        ("negative", f"{point.negative:,}", "", of),
        ("flat", f"{point.flat:,}", "", f"of these: |λ| ≤ {words.rough(point.zero)}, or ≤ its error"),
    ]
    if positive is not None:
        error = "" if point.complete else f"± {words.figures(float(f'{100 * positive.error:.2g}'))} %"
        rows.append(("positive", _percent(positive.estimate), error, "of all eigenvalues"))
    return rows


def _rates(point: CriticalPoint) -> list[Row]:
    plain, heavy = (point.rate_limit(momentum=beta) for beta in (0.0, 0.9))
    condition = "λmax / λmin"
    if math.isnan(point.condition):
        condition = "none: some eigenvalues are negative"
    elif math.isinf(point.condition):
        condition = "some eigenvalues are zero"
    limit = "2/λmax, of gradient descent" if plain < math.inf else "none: no curvature is positive"
    return [
        ("condition number", "–" if math.isnan(point.condition) else words.figures(point.condition), "", condition),
        ("rate limit", words.figures(plain), "", limit),
        ("with momentum 0.9", words.figures(heavy), "", "2(1 + 0.9)/λmax" if heavy < math.inf else ""),
    ]


def _convergence(point: CriticalPoint) -> Text:
    if point.converged:
        odds = "" if point.complete else f"; odds of an eigenvalue beyond these: {words.rough(100 * point.missed)} %"
        return Text(f"Hessian products; converged{odds}")
    return Text("NOT converged: allow more products", "bold red")


def _percent(share: float) -> str:
    return f"{words.figures(100 * share)} %" if math.isfinite(share) else words.figures(share)
