import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise

import pytest
import report_cases as cases

from unstuck.diagnosis import Diagnosis
from unstuck.report import page

EVIL = "</script><script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)>&amp;\u2028"
CASES = {
    "bounces": (cases.bounces(), cases.recorded()),
    "cut": (cases.cut(), cases.recorded(200)),
    "healthy": (cases.healthy(), cases.recorded()),
    "diverged": (cases.diverged(), cases.recorded(20, stuck_from=20, nan_from=12)),
    "one step": (cases.healthy(), cases.recorded(1)),
    "no step": (replace(cases.healthy(), steps=0, checked=()), cases.run_of({}, header={})),
}


class Read(HTMLParser):
    """The elements of a page as a browser would find them: (tag, attributes, text)."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))
        if tag != "meta":
            self._open.append(len(self.elements) - 1)

    def handle_endtag(self, tag):
        assert self.elements[self._open.pop()][0] == tag, "the elements are properly nested"

    def handle_data(self, data):
        for i in self._open:
            self.elements[i][2].append(data)

    def texts(self, tag: str) -> list[str]:
        return ["".join(text) for name, _, text in self.elements if name == tag]

    def by_id(self, name: str) -> str:
        return next("".join(text) for _, attrs, text in self.elements if attrs.get("id") == name)


def evil() -> Diagnosis:
    arms = tuple(replace(arm, remedy=EVIL) for arm in cases.TRIAL.arms)
    finding = replace(
        cases.BOUNCES,
        code=EVIL,
        where=EVIL,
        claim=EVIL,
        advice=EVIL,
        evidence=(replace(cases.BOUNCES.evidence[0], name=EVIL, meaning=EVIL),),
        ruled_out=(replace(cases.BOUNCES.ruled_out[0], code=EVIL, because=EVIL),),
        trial=replace(cases.TRIAL, arms=arms),
    )
    return Diagnosis(EVIL, 600, 38.4, 0.014, (finding,), (EVIL,), {EVIL: EVIL})


@pytest.fixture(scope="module", params=CASES)
def case(request) -> tuple[Diagnosis, str, Read]:
    diagnosis, run = CASES[request.param]
    text = page(diagnosis, run)
    return diagnosis, text, Read(text)


def test_nothing_is_loaded_from_anywhere(case):
    _, _, read = case
    for tag, attrs, _ in read.elements:
        assert not {"src", "srcset", "action", "data", "poster"} & attrs.keys(), tag
        assert attrs.get("href", "#").startswith("#")
    style = "".join(read.texts("style"))
    assert "url(" not in style and "@import" not in style
    policy = next(attrs["content"] for _, attrs, _ in read.elements if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none'") and "http" not in policy.replace("http-equiv", "")


def test_the_json_inside_is_the_diagnosis(case):
    diagnosis, _, read = case
    assert json.loads(read.by_id("diagnosis-data")) == diagnosis.to_json()
    assert json.loads(read.by_id("diagnosis")) == diagnosis.to_json()  # the one a reader copies


def test_a_reader_of_the_outline_finds_one_title_and_no_skipped_level(case):
    _, _, read = case
    levels = [int(tag[1]) for tag, _, _ in read.elements if re.fullmatch(r"h\d", tag)]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert next(attrs for tag, attrs, _ in read.elements if tag == "html")["lang"] == "en-GB"


def test_every_figure_has_data_a_caption_and_a_label(case):
    _, _, read = case
    plots = [attrs for _, attrs, _ in read.elements if attrs.get("class") == "plot"]
    figures = json.loads(read.by_id("figures"), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [plot["id"] for plot in plots] == list(figures)
    assert all(plot["role"] == "img" and plot["aria-label"] for plot in plots)
    assert len(read.texts("figcaption")) == len(read.texts("figure")) == len(plots)
    ids = [attrs["id"] for _, attrs, _ in read.elements if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_a_finding_is_told_with_its_numbers():
    read = Read(page(*CASES["bounces"]))
    assert read.texts("h1") == [cases.BOUNCES.claim]
    cells = read.texts("td") + read.texts("th")
    for text in ("0.41", "[0.36, 0.47]", "38% lower", "[−45, −30]", "✓ accepted", "[−6, +8]", "chance alone"):
        assert text in cells
    for rival in cases.BOUNCES.ruled_out:
        assert rival.code in cells and rival.because in cells


def test_the_interval_of_an_effect_is_drawn_where_it_belongs():
    text = page(*CASES["bounces"])
    row = next(part for part in text.split("<tr>") if "learning rate ÷\u00a04" in part and "forest" in part)
    line = re.search(r'<line x1="([\d.]+)%" x2="([\d.]+)%"', row)
    dot = re.search(r'<circle cx="([\d.]+)%"', row)
    assert line and dot
    ends = [float(x) / 50 - 1 for x in (line[1], dot[1], line[2])]  # on a scale from a half to twice the loss
    assert ends == pytest.approx([math.log(r) / math.log(2) for r in (0.55, 0.62, 0.70)], abs=2e-4)


def test_what_comes_from_the_script_stays_text():
    header = {"script": EVIL, "argv": [EVIL], "started": EVIL, EVIL: EVIL}
    run = cases.run_of({"loss": ([1, 2], [1.0, 0.5])}, header=header, outcome=EVIL)
    innocent, read = Read(page(*CASES["bounces"])), Read(page(evil(), run))
    assert len(read.texts("script")) == len(innocent.texts("script"))
    assert not read.texts("img")
    assert read.texts("h1") == [EVIL.replace("\u2028", " ")]
    assert json.loads(read.by_id("diagnosis-data")) == evil().to_json()
    assert json.loads(read.by_id("diagnosis")) == evil().to_json()
    labels = json.dumps(json.loads(read.by_id("figures")))
    assert "<script" not in labels and "<img" not in labels  # plotly reads tags in its labels


def test_a_run_that_went_nan_says_from_which_step():
    read = Read(page(*CASES["diverged"]))
    assert "not finite from step 12 on." in read.texts("figcaption")[0]


def test_a_long_run_makes_no_larger_page_than_a_short_one():
    long = page(cases.healthy(), cases.recorded(40_000))
    assert len(long) - len(page(cases.healthy(), cases.recorded(1_500))) < 100_000


def _contrast(a: str, b: str) -> float:
    """The contrast ratio of WCAG 2.2, between 1 and 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_all_text_has_the_contrast_that_accessibility_asks_for(theme):
    css = (files("unstuck.report") / "page.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", css, flags=re.S)
    colours = dict(re.findall(r"--(\w+): (#\w{6});", blocks[theme]))
    for text in ("ink", "soft", "blue", "warm", "purple", "green"):
        assert _contrast(colours[text], colours["paper"]) >= 4.5
        assert _contrast(colours[text], colours["tint"]) >= 4.5
    for filled in ("blue", "warm", "green"):
        assert _contrast(colours["on"], colours[filled]) >= 4.5
