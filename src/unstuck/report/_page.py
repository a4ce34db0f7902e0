"""One self-contained HTML file: verdict, evidence against rivals, the trial, the run's curves, the data."""

import functools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from plotly import graph_objects as go
from plotly.offline import get_plotlyjs

from unstuck.diagnosis import CANNOT_TELL, PROVED, SHOWN, SUSPECT, Arm, Diagnosis, Finding, Trial
from unstuck.record import Run
from unstuck.report import _words as words
from unstuck.report._draw import SMOOTHED_FROM, draw, draw_run, looks, stretches
from unstuck.report._html import Html, join, json_script, tag

_MEANING = {
    PROVED: "a remedy won its trial against a control",
    SHOWN: "decided by an experiment, or by what PyTorch guarantees",
    SUSPECT: "measured in passing only, no experiment decided",
    CANNOT_TELL: "something needed to decide is missing",
}
_LONG = 110  # characters of a claim: more are set smaller
# Nothing may be loaded from anywhere; the browser enforces it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"


def page(diagnosis: Diagnosis, run: Run) -> str:
    """The diagnosis and the run as one HTML file that opens from disk and loads nothing."""
    figures: dict[str, go.Figure] = {}
    articles = [_finding(f, i, figures) for i, f in enumerate(diagnosis.findings)] or [_healthy(diagnosis)]
    body = [
        _masthead(diagnosis, run),
        tag("main", *articles, _run(run, diagnosis, figures), _checked(diagnosis), _environment(run), _data(diagnosis)),
    ]
    drawn = {name: json.loads(figure.to_json() or "") for name, figure in figures.items()}
    scripts = [
        json_script(diagnosis.to_json(), "diagnosis-data"),
        json_script(drawn, "figures"),
        tag("script", Html(get_plotlyjs())) if figures else "",
        tag("script", _asset("page.js")),
    ]
    title = f"{_title(diagnosis)} · {Path(diagnosis.script).name}"
    head = [
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        tag("title", words.printable(title)),
        tag("style", _asset("page.css")),
    ]
    return (
        f"<!doctype html>\n{tag('html', tag('head', *head), tag('body', *body, *scripts), attrs={'lang': 'en-GB'})}\n"
    )


@functools.cache
def _asset(name: str) -> Html:
    return Html((files("unstuck.report") / name).read_text(encoding="utf-8"))


def _title(diagnosis: Diagnosis) -> str:
    if not diagnosis.findings:
        return "No fault found" if diagnosis.checked else "Cannot tell"
    return f"{diagnosis.findings[0].word.capitalize()}: {diagnosis.findings[0].code}"


def _masthead(diagnosis: Diagnosis, run: Run) -> Html:
    started = str(run.header.get("started", ""))[:16].replace("T", " ")
    facts = [
        words.count(diagnosis.steps, "step"),
        words.took(diagnosis),
        started,
    ]
    rest = [f for i, f in enumerate(diagnosis.findings) if i]
    links = [tag("a", f.code, attrs={"href": f"#finding-{i}"}) for i, f in enumerate(diagnosis.findings)]
    links += [tag("a", "the run", attrs={"href": "#run"}), tag("a", "data", attrs={"href": "#data"})]
    return tag(
        "header",
        tag("p.brand", tag("b", "Unstuck"), " ", tag("code", words.script(diagnosis))),
        tag("p.facts", " · ".join(fact for fact in facts if fact)),
        tag("nav", *links, attrs={"aria-label": "On this page"}) if rest else "",
    )


def _healthy(diagnosis: Diagnosis) -> Html:
    word = "HEALTHY" if diagnosis.checked else CANNOT_TELL
    return tag(
        "article.verdict",
        tag("p.eyebrow", _badge(word)),
        tag("h1", words.quiet_line(diagnosis)),
    )


def _badge(word: str) -> Html:
    return tag(f"span.badge.{word.lower().replace(' ', '-')}", word)


def _finding(finding: Finding, i: int, figures: dict[str, go.Figure]) -> Html:
    name = f"finding-{i}"
    where = [" in ", tag("code", words.printable(finding.where))] if finding.where else []
    verdict = [
        tag("p.eyebrow", _badge(finding.word), " ", tag("code.cause", words.printable(finding.code))),
        tag(
            ("h2" if i else "h1") + (".long" if len(finding.claim) > _LONG else ""),
            words.printable(finding.claim),
            attrs={"id": name},
        ),
        tag(
            "p.since",
            words.since(finding),
            *where,
            f". {finding.word.capitalize()}: {_MEANING[finding.word]}.",
        ),
    ]
    if finding.advice:
        verdict.append(tag("p.advice", tag("b", "What to do"), " ", words.printable(finding.advice)))
    parts = [tag("div.verdict", *verdict)]
    level = "h3" if i else "h2"
    if finding.evidence:
        parts.append(_section("Evidence", level, _evidence(finding)))
    if finding.ruled_out:
        parts.append(_section("Ruled out", level, _rivals(finding)))
    if finding.trial is not None:
        figures[f"trial-{i}"] = draw(finding.trial)
        parts.append(_section("The trial", level, _trial(finding.trial, f"trial-{i}")))
    return tag("article", *parts, attrs={"aria-labelledby": name})


def _section(title: str, level: str, *content: str) -> Html:
    return tag("section", tag(level, title), *content)


def _table(kind: str, headings: Sequence[str], rows: Sequence[Html]) -> Html:
    head = [tag("th", text, attrs={"scope": "col"}) for text in headings]
    return tag("div.scroll", tag(f"table.{kind}", tag("thead", tag("tr", *head)), tag("tbody", *rows)))


def _row(head: str, *cells: Html) -> Html:
    return tag("tr", tag("th", head, attrs={"scope": "row"}), *cells)


def _evidence(finding: Finding) -> Html:
    rows = [
        _row(
            words.printable(e.name),
            tag("td.number", tag("b", words.figures(e.value))),
            tag("td.interval", words.interval(e) or "exact"),
            tag("td.number.n", f"{e.n:,}"),
            tag("td", words.printable(e.meaning)),
        )
        for e in finding.evidence
    ]
    return _table("evidence", ("Quantity", "Value", "Interval", "n", "What it means"), rows)


def _rivals(finding: Finding) -> Html:
    rows = [
        _row(tag("code", words.printable(r.code)), tag("td", words.printable(r.because))) for r in finding.ruled_out
    ]
    return _table("rivals", ("Rival cause", "Because"), rows)


def _trial(trial: Trial, name: str) -> Html:
    caption = "Loss of each arm: faint as measured, strong smoothed."
    label = f"Curves of {words.count(len(trial.arms), 'arm')}; the table below gives where each ended."
    widest = _widest(trial)
    rows = [_arm(arm, look, trial, widest) for arm, look in zip(trial.arms, looks(trial), strict=True)]
    low, high = (tag("span", f"{sign}{size:,}%") for sign, size in zip("−+", widest[1:], strict=True))
    scale = tag("span.scale", low, tag("span", "0"), high)
    headings = ("Arm", "Ends", "Interval, %", scale, "Outcome")
    return join(
        [
            tag("p", words.protocol(trial)),
            _figure(name, label, caption),
            _table("arms", headings, rows),
            tag(
                "p.note",
                "Bars: the change against the control with its 95% interval. Grey band: the same for the null arm, the "
                "control from minutely perturbed weights. An accepted remedy ends at least 5% lower, and its interval "
                "lies below 0.",
            ),
        ]
    )


def _widest(trial: Trial) -> tuple[float, int, int]:
    """Half the width of the scale of effects, as a ln-ratio, and in per cent to either side."""
    ends = [abs(x) for arm in trial.arms for x in (arm.low, arm.high) if math.isfinite(x)]
    half = math.log(next((r for r in (1.25, 1.5, 2, 3, 4, 5, 10) if math.log(r) > max(ends, default=0.0)), 20))
    return half, round(-words.percent(-half)), round(words.percent(half))


def _arm(arm: Arm, look: tuple[str, str], trial: Trial, widest: tuple[float, int, int]) -> Html:
    sample = Html(
        f'<svg class="look" width="28" height="10" aria-hidden="true"><line x1="0" x2="28" y1="5" y2="5" '
        f'stroke="{look[0]}" stroke-width="3" stroke-dasharray="{_DASHES[look[1]]}"/></svg>'
    )
    blown = words.blew_up(arm, trial)
    outcome = words.outcome(arm)
    kind = "accepted" if arm.accepted else "worse" if outcome == "worse" else "plain"
    return _row(
        tag("span.arm", sample, tag("span", words.remedy(arm))),
        tag("td.change", words.ends(arm, trial)),
        tag("td.interval", "" if blown else words.change_interval(arm)),
        tag("td.forest", _forest(replace(arm, effect=math.nan) if blown else arm, look[0], trial, widest[0])),
        tag(f"td.outcome.{kind}", outcome),
    )


_DASHES = {
    "solid": "none",
    "dot": "2 3",
    "dash": "7 4",
    "dashdot": "7 3 2 3",
    "longdash": "11 4",
    "longdashdot": "11 3 2 3",
}


def _forest(arm: Arm, colour: str, trial: Trial, half: float) -> Html:
    """The effect with its interval on a common ln scale; percentages keep it sharp at any width."""

    def at(effect: float) -> str:
        return f"{50 + 50 * max(-1.0, min(1.0, effect / half)):.2f}%"

    parts = [
        f'<line class="band" x1="{at(null.low)}" x2="{at(null.high)}" y1="50%" y2="50%"/>'
        for null in trial.arms
        if null.role == "null" and not math.isnan(null.low + null.high)
    ]
    parts.append('<line class="zero" x1="50%" x2="50%" y1="0" y2="100%"/>')
    if arm.role != "control" and math.isfinite(arm.effect):
        parts.append(
            f'<line x1="{at(arm.low)}" x2="{at(arm.high)}" y1="50%" y2="50%" stroke="{colour}" stroke-width="3"/>'
        )
        parts.append(f'<circle cx="{at(arm.effect)}" cy="50%" r="5" fill="{colour}"/>')
    return Html(f'<svg width="100%" height="34" aria-hidden="true">{"".join(parts)}</svg>')


def _figure(name: str, label: str, caption: str) -> Html:
    plot = tag("div.plot", attrs={"id": name, "role": "img", "aria-label": label})
    without = tag("noscript", "The curves need JavaScript; every number of the verdict is in the tables.")
    return tag("figure", plot, without, tag("figcaption", caption))


def _run(run: Run, diagnosis: Diagnosis, figures: dict[str, go.Figure]) -> Html:
    heading = tag("h2", "The run", attrs={"id": "run"})
    steps, loss = run.series("loss")
    if not any(run.series(name)[0] for name in ("loss", "grad_norm", "update_ratio", "lr")):
        return tag("section", heading, tag("p", "No step was recorded, so there is no curve to show."))
    figures["run-curves"] = draw_run(run, diagnosis.findings)
    caption = "Faint: every step. Strong: smoothed. " if run.steps >= SMOOTHED_FROM else ""
    caption += "Drag over a curve to zoom, double-click to see it whole again."
    gaps = stretches(loss)
    if gaps:
        onward = "on" if gaps[-1] == (gaps[0][0], len(loss) - 1) else "on, with finite values in between"
        caption += f" Shaded: the loss is not finite from step {steps[gaps[0][0]]:,} {onward}."
    marked = ", ".join(f"{words.printable(f.code)} at step {f.step:,}" for f in diagnosis.findings)
    label = f"Curves of {words.count(run.steps, 'step')}." + (f" Marked: {marked}." if marked else "")
    return tag("section", heading, _figure("run-curves", label, caption))


def _checked(diagnosis: Diagnosis) -> Html:
    parts = [tag("h2", "What was checked")]
    parts.append(_codes(diagnosis.checked) if diagnosis.checked else tag("p", "No cause could be checked."))
    if diagnosis.not_checked:
        parts.append(tag("h3", "Not checked"))
        for listed, because in words.not_checked(diagnosis):
            parts += [tag("p", words.printable(because)), _codes(listed)]
    return tag("section", *parts)


def _codes(codes: Sequence[str]) -> Html:
    return tag("ul.codes", *(tag("li", tag("code", words.printable(code))) for code in codes))


def _environment(run: Run) -> Html:
    header = dict(run.header)
    named = {
        "Script": header.pop("script", ""),
        "Arguments": " ".join(map(str, header.pop("argv", ()))),
        "Started": header.pop("started", ""),
        "Ended": run.outcome,
        "Recorded in": run.folder,
    }
    rest = {name: value for name, value in header.items() if name not in ("kind", "version")}
    entries = {str(name): str(value) for name, value in {**named, **rest}.items()}
    pairs = [
        tag("div", tag("dt", words.printable(name)), tag("dd", tag("code", words.printable(text))))
        for name, text in entries.items()
        if text
    ]
    return tag("section", tag("h2", "Environment"), tag("dl", *pairs))


def _data(diagnosis: Diagnosis) -> Html:
    return tag(
        "section",
        tag("h2", "Data", attrs={"id": "data"}),
        tag(
            "details",
            tag("summary", "The diagnosis as JSON"),
            tag("button", "Copy", attrs={"type": "button", "data-copy": "diagnosis"}),
            tag("pre", pretty(diagnosis.to_json()), attrs={"id": "diagnosis", "tabindex": "0"}),
        ),
    )


def pretty(data: Any) -> str:
    """Indented JSON with lists of plain values on one line. A newline never occurs inside a JSON string."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, indent=2)
    return re.sub(r"\[\n *([^\[\]{}]*?)\n *\]", lambda found: "[" + re.sub(r"\n *", " ", found[1]) + "]", text)
