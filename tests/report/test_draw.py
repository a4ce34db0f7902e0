import math
import random

import pytest
import report_cases as cases

from unstuck.report import draw, draw_run
from unstuck.report._draw import smoothed, spread, stretches, thin


def test_a_trial_shows_the_measured_curve_of_every_arm_from_the_same_start():
    figure = draw(cases.TRIAL)
    measured = [trace.y for trace in figure.data if trace.hoverinfo == "skip"]
    assert measured == [arm.curve for arm in cases.TRIAL.arms]
    named = {trace.name: trace.line for trace in figure.data if trace.name}
    assert (named["control"].dash, named["control, weights perturbed"].dash) == ("solid", "dot")
    assert named["control"].color == named["control, weights perturbed"].color  # both are controls
    assert len({(line.color, line.dash) for line in named.values()}) == len(cases.TRIAL.arms)


def test_a_trial_names_each_arm_at_the_end_of_its_curve():
    figure = draw(cases.TRIAL)
    threads = [note for note in figure.layout.annotations if note.showarrow]
    assert {note.text.removeprefix("<b>").removesuffix("</b>") for note in threads} == {
        arm.remedy for arm in cases.TRIAL.arms
    }
    assert {note.x for note in threads} == {89}


def test_what_has_no_picture_says_how_to_add_one():
    with pytest.raises(TypeError, match="register"):
        draw(cases.BOUNCES)


def test_a_run_is_drawn_gap_by_gap_where_it_is_not_finite():
    figure = draw_run(cases.recorded(20, stuck_from=20, nan_from=12), cases.diverged().findings)
    loss = next(trace for trace in figure.data if trace.yaxis == "y")
    assert [i for i, v in enumerate(loss.y) if v is None] == list(range(12, 20))
    shaded = [(s.x0, s.x1) for s in figure.layout.shapes if s.type == "rect"]
    assert shaded == [(12, 19)] * 3  # loss, gradient and update; the rate stays finite


def test_the_step_of_each_finding_is_marked_once():
    figure = draw_run(cases.recorded(200), cases.cut().findings)
    marks = [s.x0 for s in figure.layout.shapes if s.type == "line"]
    assert marks == [0]
    assert any(n.text == "graph-cut, labels-shuffled · step 0" for n in figure.layout.annotations)


def test_an_axis_is_logarithmic_only_where_the_values_allow_and_need_it():
    steps = list(range(10))
    wide, flat = [10.0**-t for t in steps], [1.0 + 0.01 * t for t in steps]
    to_zero = [0.1 * (9 - t) for t in steps]
    figure = draw_run(cases.run_of({"loss": (steps, wide), "grad_norm": (steps, flat), "lr": (steps, to_zero)}))
    layout = figure.layout
    assert (layout.yaxis.type, layout.yaxis2.type, layout.yaxis3.type) == ("log", None, None)


@pytest.mark.parametrize("values", [[], [0.7], [math.nan] * 5, [0.0, 0.0], [1.0, math.inf, -math.inf]])
def test_few_or_broken_values_still_make_a_picture(values):
    run = cases.run_of({"loss": (list(range(len(values))), values)})
    drawn = draw_run(run, cases.bounces().findings).to_json()
    assert drawn is not None and "NaN" not in drawn and "Infinity" not in drawn


def test_thinning_keeps_the_extremes_and_the_first_value_that_is_not_finite():
    draw_number = random.Random(3)
    values = [draw_number.gauss(0, 1) for _ in range(100_000)]
    values[31_415], values[50_000], values[77_777] = 99.0, -99.0, math.nan
    kept = thin(values, 1500)
    assert len(kept) <= 1500 and kept == sorted(set(kept))
    assert {31_415, 50_000, 77_777} <= set(kept)


def test_smoothing_keeps_a_straight_line_and_forgets_one_wild_value():
    line = [0.5 * t for t in range(50)]
    assert smoothed(line)[4:-4] == pytest.approx(line[4:-4])
    wild = [*line[:25], 1e9, *line[26:]]
    assert all(abs(a - b) < 2 for a, b in zip(smoothed(wild), line, strict=True) if a is not None)
    assert smoothed([1.0, math.nan, 1.0]) == [1.0, None, 1.0]


def test_labels_move_apart_as_little_as_needed():
    assert spread([10.0, 100.0], 20) == [10.0, 100.0]
    assert spread([50.0, 50.0, 50.0], 20) == [30.0, 50.0, 70.0]
    assert spread([0.0, 10.0, 100.0], 20) == [-5.0, 15.0, 100.0]


def test_stretches_end_where_values_are_finite_again():
    assert stretches([math.nan, 1.0, math.inf, math.nan]) == [(0, 0), (2, 3)]
    assert stretches([1.0, 2.0]) == []
