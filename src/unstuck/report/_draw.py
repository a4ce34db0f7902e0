"""Pictures of results: `draw` knows a figure for each kind of result, and no result knows `draw`."""

import functools
import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from plotly import graph_objects as go

from unstuck.diagnosis import Arm, Finding, Trial
from unstuck.record import Run
from unstuck.report import _words as words

# Okabe and Ito's palette, without the hues too pale for a white page; a dash tells the arms apart where colours do not.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#808080"
_REMEDIES = ((BLUE, "solid"), (VERMILION, "dash"), (GREEN, "dashdot"), (PURPLE, "longdash"), (ORANGE, "longdashdot"))
_PANELS = {
    "loss": "Loss",
    "grad_norm": "Gradient norm ‖∇L‖",
    "update_ratio": "Relative update ‖Δθ‖ / ‖θ‖",
    "lr": "Learning rate",
}
_LONGEST = 30  # characters of a label at a curve's end
_GAPS = 50  # shaded stretches without finite values; more would only be slow
SMOOTHED_FROM = 100  # steps: fewer are few enough to see
_POINTS = 1500  # per curve: more than the pixels of a screen
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"


@functools.singledispatch
def draw(result: object) -> go.Figure:
    """The picture of a result, as a plotly figure; teach it your own with `@draw.register`."""
    raise TypeError(f"no picture is known for {type(result).__name__}: add one with @draw.register")


@draw.register
def _(trial: Trial) -> go.Figure:
    """The loss of every arm from the same start: faint as measured, strong smoothed."""
    figure, height = go.Figure(), 400
    trends = [smoothed(arm.curve) for arm in trial.arms]
    every = sorted(x for arm in trial.arms for x in arm.curve if math.isfinite(x))
    cut = len(every) // 50  # a few wild batches must not flatten the rest
    axis = _axis([*every[cut : len(every) - cut], *(x for trend in trends for x in trend if x is not None)])
    last = max((len(arm.curve) for arm in trial.arms), default=0)
    for arm, look, trend in zip(trial.arms, looks(trial), trends, strict=True):
        at, name = list(range(len(arm.curve))), plain(arm.remedy)
        faint = {"width": 1, "color": look[0]}
        figure.add_scatter(x=at, y=finite(arm.curve), mode="lines", line=faint, opacity=0.25, hoverinfo="skip")
        line = {"width": 3 if arm.accepted else 2, "color": look[0], "dash": look[1]}
        figure.add_scatter(x=at, y=trend, mode="lines", line=line, name=name, hovertemplate="%{y:.3g}")
    if trial.cooldown:
        edge = {"x0": trial.steps, "x1": trial.steps + trial.cooldown, "y0": 0, "y1": 1}
        paper = {"xref": "x", "yref": "paper", "layer": "below"}
        figure.add_shape(type="rect", fillcolor=GREY, opacity=0.1, line={"width": 0}, **edge, **paper)
        figure.add_annotation(x=trial.steps, y=1, text="cool-down", xshift=4, **_NOTE)
    longest = max((len(arm.remedy) for arm in trial.arms), default=0)
    layout = _layout(height, right=48 + 7 * min(longest, _LONGEST))
    inside = height - layout["margin"]["t"] - layout["margin"]["b"]
    for note in _end_labels(trial.arms, looks(trial), trends, axis, inside):
        figure.add_annotation(**note)
    figure.update_layout(layout, hovermode="x unified")
    figure.update_xaxes(title=_title("step of the trial"), range=[0, max(last - 1, 1)], **_GRID)
    figure.update_yaxes(title=_title("loss"), **axis, **_GRID)
    return figure


def looks(trial: Trial) -> list[tuple[str, str]]:
    """Colour and dash of each arm: grey for control (solid) and null (dotted), a hue for each remedy."""
    remedies = iter(_REMEDIES * len(trial.arms))
    fixed = {"control": (GREY, "solid"), "null": (GREY, "dot")}
    return [fixed.get(arm.role) or next(remedies) for arm in trial.arms]


def draw_run(run: Run, findings: Sequence[Finding] = ()) -> go.Figure:
    """The run's curves above each other over one axis of steps, with the step of each finding marked."""
    drawn = {name: series for name in _PANELS if (series := run.series(name))[0]}
    figure, rows, gap = go.Figure(), max(len(drawn), 1), 0.09
    share = (1 - gap * (rows - 1)) / rows
    for row, (name, (steps, values)) in enumerate(drawn.items()):
        top = 1 - row * (share + gap)
        axis = f"y{row + 1 if row else ''}"
        _panel(figure, steps, values, axis)
        place = {"domain": [max(0.0, top - share), top], "anchor": "x", **_axis(values), **_GRID}
        figure.update_layout({axis.replace("y", "yaxis"): place})
        figure.add_annotation(x=0, y=top, text=f"<b>{_PANELS[name]}</b>", **{**_NOTE, "xref": "paper", "yshift": 20})
    last = max((steps[-1] for steps, _ in drawn.values()), default=run.steps)
    marked: dict[int, list[str]] = {}
    for finding in findings:
        marked.setdefault(finding.step, []).append(plain(finding.code))
    layout = _layout(0, right=16)
    layout["margin"]["t"] = 34 + 18 * len(marked)
    layout["height"] = layout["margin"]["t"] + layout["margin"]["b"] + 140 * rows
    for line, (step, codes) in enumerate(sorted(marked.items())):
        lift = 26 + 18 * line  # each label on a line of its own, above the titles
        mark = {"x0": step, "x1": step, "y0": 0, "y1": 1 + (lift + 9) / (140 * rows), "yref": "paper"}
        figure.add_shape(type="line", line={"color": VERMILION, "width": 1.5, "dash": "dot"}, **mark)
        left = step > last / 2
        side = {
            "xanchor": "right" if left else "left",
            "xshift": -5 if left else 5,
            "yanchor": "middle",
            "yshift": lift,
        }
        figure.add_annotation(x=step, y=1, text=f"{', '.join(codes)} · step {step:,}", **{**_NOTE, **side})
    figure.update_layout(layout, hovermode="x unified")
    bottom = f"y{rows if rows > 1 else ''}"
    figure.update_xaxes(title=_title("step"), range=[-0.01 * last, 1.01 * last or 1], anchor=bottom, **_GRID)
    return figure


def _title(text: str) -> dict[str, Any]:
    return {"text": text, "font": {"size": 13}, "standoff": 10}


_NOTE: dict[str, Any] = {
    "yref": "paper",
    "showarrow": False,
    "xanchor": "left",
    "yanchor": "top",
    "align": "left",
    "font": {"size": 12},
}
_GRID: dict[str, Any] = {
    "gridcolor": "#e4e4e0",
    "zeroline": False,
    "ticks": "outside",
    "ticklen": 6,
    "tickcolor": "rgba(0,0,0,0)",
}


def _layout(height: int, *, right: int) -> dict[str, Any]:
    return {
        "template": "none",
        "height": height,
        "margin": {"l": 64, "r": right, "t": 28, "b": 48},
        "font": {"family": _FONT, "size": 13, "color": "#4a4f57"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": False,
        "hoverlabel": {"bgcolor": "#1b1f24", "font": {"color": "#ffffff", "family": _FONT}},
    }


def _panel(figure: go.Figure, steps: Sequence[int], values: Sequence[float], axis: str) -> None:
    """One series: faint as measured, strong smoothed, shaded where it is not finite."""
    kept = thin(values, _POINTS)
    x, y = [steps[i] for i in kept], finite([values[i] for i in kept])
    smooth = len(values) >= SMOOTHED_FROM and len(set(y)) > len(y) / 2  # a schedule is drawn as it is
    line = {"width": 1 if smooth else 2, "color": BLUE, "shape": "linear"}
    name = {"hovertemplate": "%{y:.3g}", "name": "", "yaxis": axis}
    marks = "lines" if len(kept) > 1 else "markers"
    figure.add_scatter(x=x, y=y, mode=marks, line=line, marker={"color": BLUE}, opacity=0.4 if smooth else 1, **name)
    if smooth:
        at = np.linspace(0, len(values) - 1, min(len(values), 400)).astype(int).tolist()
        trend = smoothed(values, at=at, width=len(values) // 40)
        hide = {"hoverinfo": "skip", "yaxis": axis}
        figure.add_scatter(x=[steps[i] for i in at], y=trend, mode="lines", line={"width": 2.5, "color": BLUE}, **hide)
    gaps = stretches(values)
    if not gaps:
        return
    for first, end in gaps[:_GAPS]:
        place = {"x0": steps[first], "x1": steps[end], "y0": 0, "y1": 1, "yref": f"{axis} domain", "layer": "below"}
        figure.add_shape(type="rect", fillcolor=VERMILION, opacity=0.12, line={"width": 0}, **place)
    first = steps[gaps[0][0]]
    late = first - steps[0] > 0.7 * (steps[-1] - steps[0])
    note = {"text": ["not finite"], "textposition": "bottom left" if late else "bottom right"}
    cross = {"marker": {"symbol": "x", "size": 9, "color": VERMILION}, "cliponaxis": False, "hoverinfo": "skip"}
    top = max((v for v in y if v is not None), default=1.0)
    figure.add_scatter(x=[first], y=[top], yaxis=axis, mode="markers+text", **cross, **note)


def thin(values: Sequence[float], most: int) -> list[int]:
    """Indices of at most `most` values that keep the outline: of each part the lowest, highest and first non-finite."""
    if len(values) <= most:
        return list(range(len(values)))
    edges = np.linspace(0, len(values), most // 3 + 1).astype(int)
    kept: set[int] = set()
    for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        part = np.asarray(values[a:b], dtype=float)
        good = np.isfinite(part)
        if good.any():
            kept |= {a + int(np.where(good, part, np.inf).argmin()), a + int(np.where(good, part, -np.inf).argmax())}
        if not good.all():
            kept.add(a + int(good.argmin()))
    return sorted(kept)


def stretches(values: Sequence[float]) -> list[tuple[int, int]]:
    """First and last index of each stretch of values that are not finite."""
    bad = np.concatenate([[False], ~np.isfinite(np.asarray(values, dtype=float)), [False]])
    edges = np.flatnonzero(bad[1:] != bad[:-1])
    return [(int(a), int(b) - 1) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def smoothed(values: Sequence[float], *, at: Sequence[int] | None = None, width: int = 9) -> list[float | None]:
    """The mean of the middle half of the `width` values around each index (fewer at the ends): one wild batch does not
    move it. A gap where the value itself is not finite."""
    array, half = np.asarray(values, dtype=float), max(1, width // 2)
    smooth: list[float | None] = []
    for i in range(len(array)) if at is None else at:
        near = array[max(0, i - half) : i + half + 1]
        near = np.sort(near[np.isfinite(near)])
        cut = len(near) // 4
        smooth.append(float(near[cut : len(near) - cut].mean()) if math.isfinite(array[i]) else None)
    return smooth


def finite(values: Sequence[float]) -> list[float | None]:
    """JSON has no NaN and no infinity: a gap instead."""
    return [float(v) if math.isfinite(v) else None for v in values]


def plain(text: str) -> str:
    """The text so that plotly, which reads a few HTML tags in its labels, reads none in it."""
    return html.escape(words.printable(text), quote=False)


def _axis(values: Sequence[float]) -> dict[str, Any]:
    """A log axis where all values are positive and they span a factor of four, with ticks at 1, 2 and 5."""
    good = [v for v in values if math.isfinite(v)]
    low, high = min(good, default=0.0), max(good, default=1.0)
    if low > 0 and high / low >= 4:
        a, b = math.log10(low), math.log10(high)
        pad = 0.04 * (b - a)
        digits = (1, 2, 5) if b - a < 2.5 else (1,)
        decades = range(math.floor(a), math.ceil(b) + 1)
        every = max(1, len(decades) // 6)
        ticks = [d * 10.0**k for k in decades if k % every == 0 for d in digits]
        labels = [words.power(t) if t >= 1e4 else words.figures(t) for t in ticks]
        return {"type": "log", "range": [a - pad, b + pad], "tickvals": ticks, "ticktext": labels}
    pad = 0.06 * (high - low) or abs(high) or 1.0
    floor = 0.0 if 0 <= low < 0.5 * high else low - pad
    return {"range": [floor, high + pad], "nticks": 5}


def _end_labels(
    arms: Sequence[Arm],
    styles: Sequence[tuple[str, str]],
    trends: Sequence[Sequence[float | None]],
    axis: dict[str, Any],
    height: int,
) -> list[dict[str, Any]]:
    """A label at the end of each curve, moved apart where curves end together, with a thread to its curve."""
    bottom, top = axis["range"]
    ends = []
    for arm, (colour, _), trend in zip(arms, styles, trends, strict=True):
        step = max((i for i, v in enumerate(trend) if v is not None), default=None)
        if step is None:
            continue
        y = trend[step] or 0.0
        y = math.log10(y) if axis.get("type") == "log" else y
        ends.append((height * (top - y) / (top - bottom), y, step, arm, colour))
    ends.sort(key=lambda end: end[0])
    places = spread([end[0] for end in ends], gap=21)
    notes = []
    for (pixel, y, step, arm, colour), place in zip(ends, places, strict=True):
        text = plain(arm.remedy if len(arm.remedy) <= _LONGEST else f"{arm.remedy[: _LONGEST - 1]}…")
        text = f"<b>{text}</b>" if arm.accepted else text
        thread = {"showarrow": True, "arrowhead": 0, "arrowwidth": 1.2, "arrowcolor": colour}
        shift = {"ax": 22, "ay": place - pixel, "xanchor": "left", "yanchor": "middle", "font": {"size": 12}}
        notes.append({"x": step, "y": y, "xref": "x", "yref": "y", "text": text, **thread, **shift})
    return notes


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Sorted places moved as little as needed (least squares) so that neighbours are `gap` apart."""
    blocks: list[tuple[float, int]] = []  # (mean of place − rank·gap, size): pool adjacent violators
    for rank, place in enumerate(places):
        mean, size = place - rank * gap, 1
        while blocks and blocks[-1][0] > mean:
            other, n = blocks.pop()
            mean, size = (mean * size + other * n) / (size + n), size + n
        blocks.append((mean, size))
    means = [mean for mean, size in blocks for _ in range(size)]
    return [mean + rank * gap for rank, mean in enumerate(means)]
