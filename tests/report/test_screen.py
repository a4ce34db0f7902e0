import io
import math
from dataclasses import replace

import pytest
import report_cases as cases
from rich.console import Console

from unstuck.diagnosis import Arm, Diagnosis, Evidence, Trial
from unstuck.report import screen
from unstuck.report._screen import Spark
from unstuck.report._words import figures, interval


def shown(diagnosis: Diagnosis, width: int = 80, *, terminal: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=terminal, color_system="standard" if terminal else None
    )
    console.print(screen(diagnosis))
    return console.file.getvalue()  # type: ignore[attr-defined]


def words(text: str) -> str:
    return " ".join(text.split())


def with_arms(*arms: Arm) -> Diagnosis:
    finding = replace(cases.BOUNCES, trial=Trial(arms, steps=60, cooldown=30, held_out=True))
    return replace(cases.bounces(), findings=(finding,))


@pytest.mark.parametrize("width", [80, 120])
def test_each_number_of_a_finding_is_on_the_screen(width):
    text = shown(cases.bounces(), width)
    for number in ("0.41", "[0.36, 0.47]", "1.12", "[1.04, 1.21]", "−0.004", "[−0.03, 0.021]", "480", "−0.31"):
        assert number in text
    for rival in cases.BOUNCES.ruled_out:
        assert rival.code in text
    assert "since step 124" in text and "60 recorded steps" in words(text) and "over 30 steps" in words(text)


def test_an_effect_is_told_as_a_change_of_the_loss():
    text = shown(cases.bounces())
    row = next(line for line in text.splitlines() if "learning rate ÷ 4" in line)
    assert "38% lower" in row and "[−45, −30]" in row and "✓ accepted" in row  # ratios 0.62, 0.55 and 0.70
    null = next(line for line in text.splitlines() if "perturbed" in line)
    assert "1% higher" in null and "[−6, +8]" in null and "accepted" not in null


def test_arms_that_diverge_or_cannot_be_compared_say_so():
    arms = [Arm("control", "control", 0.0, 0.0, 0.0, False, (1.0, 0.9))]
    arms += [Arm("to infinity", "remedy", math.inf, math.inf, math.inf, False, (1.0, math.inf))]
    arms += [Arm("to nowhere", "remedy", math.nan, math.nan, math.nan, False, (1.0, 0.9))]
    arms += [Arm("far up", "remedy", math.log(12.0), math.log(9.0), math.log(16.0), False, 90 * (11.0,))]
    lines = {line.strip()[:8]: line for line in shown(with_arms(*arms)).splitlines()}
    assert "blows up" in lines["to infin"] and "worse" in lines["to infin"] and "×" in lines["to infin"]
    assert "not comparable" in lines["to nowhe"] and "[" not in lines["to nowhe"]
    assert "12 times as high" in lines["far up  "]


def test_the_word_is_readable_without_colour_and_coloured_with_it():
    for diagnosis in (cases.bounces(), cases.cut(), cases.diverged()):
        plain, coloured = shown(diagnosis), shown(diagnosis, terminal=True)
        assert "\x1b" not in plain and "\x1b[" in coloured
        for finding in diagnosis.findings:
            assert f"{finding.word}  {finding.code}" in plain


def test_a_healthy_run_takes_one_line():
    text = shown(cases.healthy())
    assert text.count("\n") == 1 and "No fault found in 600 steps: 8 causes checked." in text


def test_a_run_of_which_nothing_was_checked_is_not_called_healthy():
    text = shown(replace(cases.healthy(), checked=()))
    assert "Nothing could be told" in text and "No fault" not in text


@pytest.mark.parametrize("width", [40, 80, 120])
def test_long_names_are_folded_and_never_cut(width):
    long = "a-code-name-" * 12
    ruled_out = (replace(cases.BOUNCES.ruled_out[0], code=long),)
    evidence = (replace(cases.BOUNCES.evidence[0], name=long),)
    arm = replace(cases.TRIAL.arms[1], remedy=long)
    trial = replace(cases.TRIAL, arms=(cases.TRIAL.arms[0], arm))
    finding = replace(cases.BOUNCES, code=long, where=long, ruled_out=ruled_out, evidence=evidence, trial=trial)
    text = shown(Diagnosis(long, 600, 38.4, 0.014, (finding,), cases.CAUSES, {long: "missing"}), width)
    assert max(map(len, text.splitlines())) <= width  # every character of ours is one column wide
    assert text.count("c") >= 7 * 12  # the c of each code- in each of the seven places: none was cropped
    for number in ("0.41", "0.36,", "0.47]", "[−45,", "−30]"):
        assert number in text


def test_control_characters_of_a_script_do_not_reach_the_terminal():
    finding = replace(cases.BOUNCES, where="fc\x1b]0;owned\x07", claim="one\nclaim \x1b[2J")
    text = shown(replace(cases.bounces(), script="\x1b[31mtrain.py", findings=(finding,)))
    assert "\x1b" not in text and "\x07" not in text


def test_markup_in_names_is_text():
    assert "[red]fc[/red]" in shown(replace(cases.cut(), findings=(replace(cases.CUT, where="[red]fc[/red]"),)))


def test_a_spark_falls_with_its_curve_and_marks_what_is_not_finite():
    curve = [math.exp(-t / 10) for t in range(80)]
    assert Spark(curve, curve[-1], curve[0]).blocks(8) == "█▇▆▅▄▃▂▁"  # equal steps of ln loss
    assert Spark([1.0, math.nan, math.inf, 2.0], 1.0, 2.0).blocks(4) == "▁××█"
    assert Spark([0.3, 0.3], 0.3, 0.3).blocks(2) == "▁▁"
    assert Spark([0.0, 1.0], 0.5, 1.0).blocks(2) == "▁█"  # a loss of zero has no logarithm


def test_numbers_are_written_as_by_hand():
    written = {0.0: "0", 0.41: "0.41", 12345.0: "12,300", 999.9: "1,000", 2.13e-5: "2.13×10⁻⁵", -1e6: "−10⁶"}
    assert {x: figures(x) for x in written} == written
    assert [figures(x) for x in (math.nan, math.inf, -math.inf, -0.0)] == ["NaN", "∞", "−∞", "0"]


def test_causes_that_one_reason_leaves_unchecked_share_it():
    text = shown(replace(cases.cut(), not_checked=dict.fromkeys(("saddle", "lr-bounces"), "mend graph-cut first")), 120)
    assert "Not checked: saddle, lr-bounces (mend graph-cut first)." in text


def test_a_control_that_blew_up_leaves_no_percentage():
    arms = [Arm("goes on", "control", 0.0, 0.0, 0.0, False, (1.0, 40.0, 900.0))]
    arms += [Arm("learning rate ÷ 1,000", "remedy", -math.inf, -math.inf, -math.inf, True, (1.0, 0.5))]
    control, row = (
        next(line for line in shown(with_arms(*arms)).splitlines() if name in line) for name in ("goes on", "÷ 1,000")
    )
    assert "stays finite" in row and "accepted" in row and "%" not in row and "∞" not in row
    assert "blows up" in control and "×" in control


def test_an_interval_too_narrow_for_its_digits_is_given_as_an_error():
    assert interval(Evidence("λη", 25.9, 25.8997, 25.9002, 6, "")) == "± 3×10⁻⁴"
    assert interval(Evidence("λη", 25.9, 25.8, 26.1, 6, "")) == "[25.8, 26.1]"
    assert interval(Evidence.exact("λη", 25.9, "")) == ""
