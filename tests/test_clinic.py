"""The clinic: what is put into its trainings is what it says, and a few of its cells from outside."""

import itertools
import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from clinic import ablation, agree, fingerprints, kept, pieces
from clinic.board import CALIBRATED, HELD_PROGRAMS, board, is_among_three, wilson
from clinic.cells import HERE, Case
from clinic.data import Data
from clinic.faults import FAULTS, STRENGTHS
from clinic.harm import judge
from clinic.healthy import OPTIMISERS, RATES, VARIANTS
from clinic.programs import HELD_OUT, PROGRAMS
from clinic.recordings import again, examine, folder_of, said_of
from clinic.rivals.board import board as side_by_side
from clinic.rivals.lines import Means
from clinic.rivals.log import logged
from clinic.rivals.meanings import MEANINGS
from clinic.score import SMOKE, ill, well
from clinic.train import prepared
from clinic.training import train
from rich.console import Console
from scipy.stats import binomtest
from torch import nn

PLACES = [(code, program) for code, fault in FAULTS.items() for program in fault.strengths]
EACH = [(code, program, strength) for code, program in PLACES for strength in STRENGTHS]
CHOSEN = [  # each fault once, the programs and the strengths in turn
    (fault.code, list(fault.strengths)[k % len(fault.strengths)], STRENGTHS[k % 3])
    for k, fault in enumerate(FAULTS.values())
]
CELLS = [("mlp", ""), ("tabular", "parameters-not-optimised"), ("regression", "dead-units")]


def run(steps=2, **choice):
    training = prepared(**choice)
    training.steps = min(training.steps, steps)
    return training, train(training, tell=lambda line: None)


# The corpus


def test_the_catalogue_is_whole():
    assert {fault.number for fault in FAULTS.values()} == set(range(1, 66))
    assert len(PROGRAMS) >= 8
    assert set(HELD_OUT) < set(PROGRAMS)


@pytest.mark.parametrize("fault", list(FAULTS.values()), ids=list(FAULTS))
def test_a_fault_applies_to_two_programs_or_says_why_not(fault):
    assert len(fault.strengths) >= 2 or fault.why_alone
    assert set(fault.strengths) <= set(PROGRAMS)
    for mild, _, severe in fault.strengths.values():
        assert mild != severe


@pytest.mark.parametrize(("code", "program", "strength"), CHOSEN, ids=[code for code, _, _ in CHOSEN])
def test_a_training_with_a_fault_runs(code, program, strength):
    training, ending = run(program=program, fault=code, strength=strength)
    assert ending.checks[-1].step == training.steps


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("place", PLACES, ids=" ".join)
def test_every_training_with_a_fault_runs(place):
    code, program = place
    for strength in STRENGTHS:
        run(program=program, fault=code, strength=strength)


def test_the_healthy_runs_are_three_hundred_with_all_look_alikes_and_eight_optimisers():
    cases = well(2)
    assert len({case.name for case in cases}) == len(cases)
    assert len(cases) >= (300 if len(RATES["LBFGS"]) > 5 else 200)
    assert {v.lookalike for v in VARIANTS.values()} == set(range(1, 16)) - {11}  # which is the GAN itself
    assert sum(len(RATES[o]) >= 5 for o in OPTIMISERS) >= 8


@pytest.mark.parametrize(("program", "target"), [("mlp", 0.95), ("tabular", 0.95), ("regression", 0.92)])
def test_a_healthy_training_reaches_its_target(program, target):
    _, ending = run(steps=1000, program=program)
    assert ending.score >= target


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("program", "target"),
    [("cnn", 0.75), ("gru", 0.93), ("autoencoder", 0.7), ("gan", 0.8), ("lstm", 0.3), ("transformer", 0.3)],
)
def test_every_healthy_training_reaches_its_target(program, target):
    _, ending = run(steps=10_000, program=program)
    assert ending.score >= target


# A fault changes what it says


def outputs(training):
    training.model.eval()
    with torch.no_grad():
        return training.model(training.held_out.x[:50])


@pytest.mark.parametrize("program", FAULTS["softmax-before-cross-entropy"].strengths)
def test_rows_behind_a_softmax_sum_to_one(program):
    training = prepared(program, fault="softmax-before-cross-entropy")
    torch.testing.assert_close(outputs(training).sum(-1), torch.ones(outputs(training).shape[:-1]))


@pytest.mark.parametrize("code", ["zero-init", "dead-units", "inputs-empty", "saddle"])
def test_outputs_no_longer_depend_on_the_inputs(code):
    assert outputs(prepared("mlp")).var(0).max() > 1e-3
    assert outputs(prepared("mlp", fault=code, strength="severe")).var(0).max() < 1e-12


@pytest.mark.parametrize("code", ["lr-diverges", "lr-too-small"])
def test_the_rate_is_changed_by_the_strength(code):
    for strength, factor in zip(STRENGTHS, FAULTS[code].strengths["mlp"], strict=True):
        assert prepared("mlp", fault=code, strength=strength).lr == pytest.approx(factor * prepared("mlp").lr)


def test_a_parameter_that_no_optimiser_knows_does_not_move():
    training = prepared("mlp", fault="parameters-not-optimised", strength="mild")
    training.steps = 2
    train(training, tell=lambda line: None)
    held = {id(p) for group in training.optimizer.param_groups for p in group["params"]}
    assert [name for name, p in training.model.named_parameters() if id(p) not in held] == ["head.weight", "head.bias"]


def test_no_gradient_comes_through_a_cut():
    training, _ = run(program="mlp", fault="graph-cut")
    assert [name for name, p in training.model.named_parameters() if p.grad is None] == ["body.0.weight", "body.0.bias"]


def test_weights_that_are_reset_end_each_epoch_where_one_epoch_leads():
    training = prepared("mlp", fault="weights-reset", strength="severe")
    start = training.model.head.weight.detach().clone()
    training.begin_epoch(training)
    assert torch.equal(training.model.head.weight, start)
    with torch.no_grad():
        training.model.head.weight.add_(1)
    training.begin_epoch(training)
    assert torch.equal(training.model.head.weight, start)


def test_a_row_that_is_not_finite_is_one_row():
    for strength, count in zip(STRENGTHS, FAULTS["non-finite-data"].strengths["mlp"], strict=True):
        x = prepared("mlp", fault="non-finite-data", strength=strength).train.x
        assert int((~x.isfinite()).any(1).sum()) == count


def test_held_out_classes_alone_are_numbered_otherwise():
    right, wrong = prepared("mlp"), prepared("mlp", fault="label-map-wrong")
    assert torch.equal(wrong.train.y, right.train.y)
    assert torch.equal(wrong.held_out.y, (right.held_out.y + 1) % 10)


@pytest.mark.parametrize(("strength", "share"), [("mild", 0.8), ("clear", 0.95), ("severe", 1.0)])
def test_shuffled_labels_keep_their_counts(strength, share):
    right, wrong = prepared("mlp"), prepared("mlp", fault="labels-shuffled", strength=strength)
    assert torch.equal(wrong.train.y.bincount(), right.train.y.bincount())
    kept_by_chance = 1 - share + share * 0.1
    assert (wrong.train.y == right.train.y).float().mean().item() == pytest.approx(kept_by_chance, abs=0.04)


def test_a_buffer_of_one_row_shuffles_nothing_and_every_row_comes_once():
    training = prepared("mlp", fault="not-shuffled", strength="severe")
    seen = torch.cat([batch.y for batch in training.batches(training)])
    assert torch.equal(seen, seen.sort().values)
    mixed = prepared("mlp", fault="not-shuffled", strength="mild")
    seen = torch.cat([batch.x for batch in mixed.batches(mixed)])
    assert torch.equal(seen.sum(0), mixed.train.x.sum(0)) or torch.allclose(
        seen.sum(0), mixed.train.x.sum(0), atol=1e-3
    )
    assert len(seen) == len(mixed.train)


def test_the_same_few_batches_come_again():
    training = prepared("mlp", fault="same-batch", strength="severe")
    first, second = itertools.islice(training.batches(training), 2)
    assert torch.equal(first.x, second.x)


def test_a_half_gradient_of_a_small_loss_is_mostly_zero():
    training, _ = run(program="mlp", fault="fp16-underflow", strength="severe")
    full, _ = run(program="mlp")
    zeros = [(t.model.body[0].weight.grad == 0).float().mean().item() for t in (training, full)]
    assert zeros[0] > zeros[1] + 0.3


def test_an_update_below_the_precision_leaves_most_weights_as_they_are():
    training = prepared("mlp", fault="update-below-precision", strength="severe")
    before = training.model.body[0].weight.detach().clone()
    training.steps = 1
    train(training, tell=lambda line: None)
    same = training.model.body[0].weight == before
    assert same.float().mean() > 0.5
    assert training.model.body[0].weight.grad.abs().sum() > 0


def test_a_kick_leaves_a_layer_dead_that_the_same_steps_without_it_do_not():
    def worst(strength):
        training, _ = run(steps=60, program="mlp", fault="killed", strength=strength)
        x, shares = training.train.x, []
        with torch.no_grad():
            for stage in training.model.body:
                x = stage(x)
                shares += [(x == 0).all(0).float().mean().item()] if isinstance(stage, nn.ReLU) else []
        return max(shares)

    assert worst("clear") >= 0.9
    assert worst("harmless") < 0.5


def test_a_leak_is_told_by_the_rows_that_no_training_saw():
    training = prepared("mlp", fault="leakage")
    known = {tuple(row.tolist()) for row in training.train.x}
    shared = [tuple(row.tolist()) in known for row in training.held_out.x]
    assert sum(shared) / len(shared) == pytest.approx(0.5, abs=0.1)


# The harm rule


def ending(score=0.9, loss=0.1, honest=None, first=100):
    checks = [(50, 0.0), (first, score)]
    return {"score": score, "loss": loss, "honest": score if honest is None else honest, "checks": checks}


@pytest.mark.parametrize(
    ("end", "harm"),
    [
        (ending(), ""),
        (ending(score=0.885), ""),
        (ending(score=0.879), "score steps"),
        (ending(loss=0.22), ""),
        (ending(loss=0.24), "loss"),
        (ending(first=199), ""),
        (ending(first=200), "steps"),
        (ending(honest=0.87), "dishonest"),
        ({"error": "shapes"}, "raises"),
    ],
)
def test_harm_is_two_points_or_twice_the_loss_or_twice_the_steps(end, harm):
    assert judge([end] * 3, [ending()] * 3)["harm"] == harm


def test_harm_is_judged_by_the_median():
    rows = [ending(score=0.1), ending(), ending()]
    assert judge(rows, [ending()] * 3)["harm"] == ""
    assert judge([rows[0], rows[0], ending()], [ending()] * 3)["harm"].startswith("score")


# What is kept


def test_a_cell_that_is_kept_is_not_run_again_unless_its_sources_have_changed(tmp_path):
    ran = []

    def work(case):
        ran.append(case.name)
        return {"name": case.name}

    def measure(prints):
        with ThreadPoolExecutor(1) as executor:
            return kept.measure(
                [(Case("mlp", seed=k), prints) for k in (0, 1)],
                work,
                tmp_path / "cells.jsonl",
                executor=executor,
                console=Console(quiet=True),
            )

    assert [row["name"] for row in measure("a")] == ["mlp 0", "mlp 1"]
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write('{"key": "torn')
    measure("a")
    assert ran == ["mlp 0", "mlp 1"]
    measure("b")
    assert ran == ["mlp 0", "mlp 1"] * 2


def test_a_fingerprint_tells_strengths_apart_but_not_seeds():
    def of(strength, seed):
        return fingerprints.of_case(Case("mlp", fault="lr-too-small", strength=strength, seed=seed))

    assert of("mild", 0) == of("mild", 1) != of("clear", 0)


def test_a_fingerprint_sees_what_the_change_of_a_fault_calls():
    found = "".join(fingerprints.sources(FAULTS["overfitting"].change))
    assert "def few_rows_and_many_units" in found
    assert "def noisy_labels" in found
    assert "class CutBeforeHead" in fingerprints.sources(FAULTS["graph-cut"].value("mlp", "clear"))[0]
    assert fingerprints.sources(0.5) == ["0.5"]


def test_a_fingerprint_of_a_room_is_that_of_its_code_and_of_the_rooms_that_it_uses(tmp_path, monkeypatch):
    for room, text in {
        "record": "from unstuck.objective import x\n",
        "objective": "x = 1\n",
        "optim": "y = 1\n",
    }.items():
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text(text)
    monkeypatch.setattr(fingerprints.unstuck, "__file__", str(tmp_path / "__init__.py"))

    def after(room, text):
        (tmp_path / room / "__init__.py").write_text(text)
        fingerprints.of_room.cache_clear()
        return fingerprints.of_room("record")

    try:
        before = after("objective", "x = 1\n")
        assert after("objective", "x = 1  # the same\n") == before
        assert after("optim", "y = 2\n") == before
        assert after("objective", "x = 2\n") != before
    finally:
        fingerprints.of_room.cache_clear()


# The scoreboard


def row(program, fault, *findings, strength="clear", trouble="", variant="", open_causes=(), told=None):
    case = {
        "program": program,
        "fault": fault,
        "strength": strength if fault else "",
        "variant": variant,
        "optimiser": "",
        "seed": 0,
    }
    found = [{"code": code, "word": word, "cure": "", "step": 1, "where": "w"} for code, word in findings]
    return {
        "key": f"{program} {fault} x",
        "case": case,
        "findings": found,
        "trouble": trouble,
        "known": fault == "saddle",
        "not_checked": list(open_causes),
        "told": told,
        "steps": 100,
        "seconds": 1.0,
        "step_seconds": 0.005,
        "verdict_seconds": 0.5,
        "overhead": 0.1,
    }


def test_the_board_counts_what_a_reader_would():
    found = board(
        [
            row("mlp", "saddle", ("saddle", "PROVED")),
            row("mlp", "saddle", ("zero-init", "SHOWN"), ("saddle", "SUSPECT")),
            row("lstm", "saddle", ("graph-cut", "SHOWN")),
            row("lstm", "lr-bounces"),
            row("mlp", ""),
            row("lstm", "", ("saddle", "SUSPECT")),
            row("mlp", "", ("unknown", "CANNOT TELL")),
        ]
    )
    assert found["faulty"] == {"runs": 4, "first": 1, "among three": 2, "family": 2}
    assert found["of causes that it knows"]["runs"] == 3
    assert found["healthy"] == {"runs": 3, "alarmed": 1, "sure": 0}
    assert found["parts"][HELD_PROGRAMS]["runs"] == 2
    assert found["parts"][HELD_PROGRAMS]["alarmed"] == 1
    assert found["parts"][CALIBRATED]["words"]["PROVED"]["right"] == 1
    assert found["words"]["SHOWN"] == {"said": 2, "right": 0, "right family": 1, "interval": [0.0, 0.658]}
    assert found["words"]["SUSPECT"]["said"] == 1
    assert ["saddle", "zero-init", 1] in found["confusion"]
    assert ["healthy", "—", 2] in found["confusion"]
    assert sum(n for _, _, n in found["confusion"]) == 7
    assert found["gap"][HELD_PROGRAMS] == {"plain": 0.5, "same faults": 0.5}
    assert found["cost"]["steps, median"] == 100
    assert found["cost by fault"]["saddle"]["steps, worst"] == 100
    assert len(found["failures"]) == 1
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(("hits", "of"), [(0, 10), (3, 7), (51, 53), (80, 80)])
def test_the_interval_of_a_share_is_that_of_scipy(hits, of):
    exact = binomtest(hits, of).proportion_ci(method="wilson")
    assert wilson(hits, of) == pytest.approx([exact.low, exact.high], abs=1e-3)


@pytest.mark.parametrize(
    ("findings", "open_causes", "among"),
    [
        (["a", "b", "saddle"], [], True),
        (["a", "b", "c", "saddle"], [], False),
        (["a"], ["b", "saddle"], True),
        (["a"], ["b", "saddle", "c"], False),  # four names are no help, in whatever order they are listed
        ([], ["saddle"], True),
        ([], [], False),
    ],
)
def test_among_three_is_what_a_reader_is_left_with(findings, open_causes, among):
    found = row("mlp", "saddle", *((code, "SHOWN") for code in findings), open_causes=open_causes)
    assert is_among_three(found) == among


def test_of_causes_that_are_hard_to_tell_apart_each_is_counted():
    rows = [
        row("mlp", "lr-bounces", ("lr-bounces", "PROVED")),
        row("mlp", "noise-floor", ("lr-bounces", "PROVED")),
        row("mlp", "", variant="edge-of-stability"),
        row("mlp", "", ("lr-bounces", "SUSPECT"), variant="edge-of-stability"),
    ]
    found = {r["of"]: (r["runs"], r["right"], r["called"]) for r in board(rows)["hard to tell apart"] if r["runs"]}
    assert found == {
        "lr-bounces": (1, 1, {}),
        "noise-floor": (1, 0, {"lr-bounces": 1}),
        "edge-of-stability": (2, 1, {"lr-bounces": 1}),
    }


def test_of_an_exact_fault_the_steps_and_the_place_are_counted():
    rows = [
        row("mlp", "graph-cut", ("graph-cut", "SHOWN"), told=3),
        row("cnn", "graph-cut", ("graph-cut", "SHOWN"), told=5),
        row("gru", "graph-cut"),
    ]
    assert board(rows)["exact"]["graph-cut"] == {
        "runs": 3,
        "right": 2,
        "with a place": 2,
        "told on the way": 2,
        "steps, median": 3,
        "steps, worst": 4,
    }


def test_equivalent_mutants_are_counted_by_themselves():
    rows = [row("mlp", "saddle", ("saddle", "PROVED")), row("lstm", "saddle"), row("mlp", "")]
    found = board(rows, {"saddle clear lstm"})
    assert found["faulty"] == {"runs": 1, "first": 1, "among three": 1, "family": 1}
    assert found["equivalent mutants"] == {"runs": 1, "first": 0, "among three": 0, "family": 0}
    assert found["healthy"]["runs"] == 1


# Cells from outside


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize(("program", "fault"), CELLS, ids=[f"{p} {f}" for p, f in CELLS])
def test_the_cause_that_was_put_in_comes_first(runs, program, fault):
    cell = examine(ill_case(program, fault), runs)
    assert cell["trouble"] == ""
    assert [f["code"] for f in cell["findings"]][:1] == ([fault] if fault else [])
    assert math.isfinite(cell["overhead"])
    assert json.loads(json.dumps(cell)) == cell


def ill_case(program, fault):
    return Case(program, fault=fault, strength="clear" if fault else "")


@pytest.mark.parametrize(("program", "fault"), CELLS, ids=[f"{p} {f}" for p, f in CELLS])
def test_a_kept_run_diagnosed_again_gets_the_same_diagnosis(runs, program, fault):
    case = ill_case(program, fault)
    examine(case, runs)
    said, trouble, _ = again(folder_of(case, runs))
    assert trouble == ""
    assert said == said_of(folder_of(case, runs))
    assert agree.verdict(said, said_of(folder_of(case, runs))) == agree.SAME


def test_only_what_records_a_run_makes_it_train_again(runs, monkeypatch):
    case = ill_case("tabular", "parameters-not-optimised")
    training = folder_of(case, runs) / "training.json"
    first = examine(case, runs)
    trained = training.stat().st_mtime_ns
    monkeypatch.setattr(fingerprints, "of_diagnosis", lambda: "another")
    second = examine(case, runs)
    assert training.stat().st_mtime_ns == trained
    assert {**second, "verdict_seconds": 0} == {**first, "verdict_seconds": 0}
    monkeypatch.setattr(fingerprints, "of_training", lambda case: "another")
    assert examine(case, runs)["findings"] == first["findings"]
    assert training.stat().st_mtime_ns > trained


def test_a_training_that_was_cut_short_is_not_kept(tmp_path, monkeypatch):
    def interrupted(work, folder):
        (folder / "run").mkdir()
        (folder / "run" / "log.jsonl").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr("clinic.recordings.forked", interrupted)
    with pytest.raises(KeyboardInterrupt):
        examine(Case("mlp"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_exact_fault_is_told_within_two_steps(runs):
    found = examine(ill_case("tabular", "parameters-not-optimised"), runs)
    assert 1 <= found["told"] <= found["findings"][0]["step"] + 2
    assert found["findings"][0]["where"]


# Pieces taken away


def test_what_rests_on_a_piece_is_computed_again_without_it_and_the_rest_is_not():
    notes, done = pieces.Notes({}), []

    def inner(without):
        done.append("inner")
        notes.use(("quantity", "inner"))
        return 1

    def outer(without):
        done.append("outer")
        notes.use(("quantity", "outer"))
        return 1 + notes.recall("inner", lambda: inner(without), without)

    def asked(*pieces_away):
        done.clear()
        without = frozenset(("quantity", name) for name in pieces_away)
        assert notes.recall("outer", lambda: outer(without), without) == 2
        return list(done)

    assert asked() == ["outer", "inner"]
    assert notes.stack[0] == {("quantity", "outer"), ("quantity", "inner")}
    assert asked() == asked("another") == []
    assert asked("inner") == ["outer", "inner"]
    assert asked("outer") == ["outer"]
    assert asked() == []


def test_the_worth_of_a_piece_is_what_is_lost_without_it(runs):
    case = ill_case("regression", "dead-units")
    examine(case, runs)
    found = ablation.ablated(case, runs)
    assert [(f["code"], f["word"]) for f in found["findings"]] == [("dead-units", "PROVED")]
    assert found["without"]["trial dead-units"][0] == {"code": "dead-units", "word": "SHOWN"}
    worth = ablation.worth([found])
    assert worth["quantity dead units"]["right"] == 1
    assert worth["trial dead-units"]["right"] == 0
    assert worth["validation leakage"]["used in"] == 0


def test_what_is_remembered_changes_no_diagnosis(runs):
    case = Case("mlp")
    examine(case, runs)
    folder = folder_of(case, runs) / "run"
    run = pieces.Kept(folder)
    _, used = run.diagnosed()
    for parts in [pieces.NONE, *(p for p in pieces.PIECES.values() if p & used)]:
        assert run.diagnosed(parts)[0].to_json() == pieces.Kept(folder).diagnosed(parts)[0].to_json()
    assert run.diagnosed()[0].to_json() == said_of(folder_of(case, runs))


def test_the_table_of_the_page_stands_between_its_marks():
    result = ablation.summary([])
    once = ablation.page_with(result, ablation.PAGE.read_text(encoding="utf-8"))
    assert ablation.page_with(result, once) == once
    assert once.startswith(ablation.PAGE.read_text(encoding="utf-8").partition(ablation.BEGIN)[0])


def test_what_is_smoked_is_part_of_the_whole():
    assert {case.name for case in SMOKE} <= {case.name for case in (*ill((), STRENGTHS, 1), *well(1))}
    assert isinstance(prepared("mlp").train, Data)
    assert isinstance(prepared("mlp").model, nn.Module)


# The rivals


def said(tool, fault, *names, seconds=1.0, trouble="", weights="same"):
    numbers = {"seconds": seconds, "verdict_seconds": 0.1, "weights": weights}
    return {"case": row("mlp", fault)["case"], "tool": tool, "names": list(names), "trouble": trouble, **numbers}


def test_the_rivals_are_counted_on_the_runs_that_they_could_watch():
    found = side_by_side(
        [
            said("nothing", ""),
            said("nothing", "saddle"),
            said("nothing", "lr-bounces"),
            said("runmedic", "", "overfitting", seconds=3.0),
            said("runmedic", "saddle", "divergence", "no_learning"),
            said("runmedic", "lr-bounces", "divergence", weights="other"),
            said("Unstuck", "", seconds=1.5),
            said("Unstuck", "saddle", "zero-init", "saddle"),
            said("Unstuck", "lr-bounces", trouble="it fell over"),
        ]
    )
    assert found["runmedic"]["healthy"] == {"runs": 1, "alarmed": 1}
    assert found["runmedic"]["faulty"] == {"runs": 2, "alarmed": 2, "first": 1, "family": 1, "anywhere": 1}
    assert found["runmedic"]["ratio"] == 3.0
    assert (found["runmedic"]["same weights"], found["runmedic"]["cells"]) == (2, 3)
    assert found["Unstuck"]["faulty"] == {"runs": 1, "alarmed": 1, "first": 0, "family": 1, "anywhere": 1}
    assert found["Unstuck"]["not run, cells"] == 1


def test_what_a_rival_says_means_causes_of_the_catalogue():
    measured = json.loads((HERE / "rivals/results.json").read_text())
    for tool, names in MEANINGS.items():
        for name, codes in names.items():
            assert codes, (tool, name)
            assert set(codes) <= set(FAULTS), (tool, name)
        assert {name for by_tool in measured["said"].values() for name in by_tool[tool] or ()} <= set(names)


def test_a_logged_training_is_the_training_and_its_numbers_are_those_of_the_loop(monkeypatch):
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", nn.utils.clip_grad_norm_)  # which the log puts itself around
    told = []
    plain, _ = run(steps=30, program="mlp")
    training = prepared("mlp")
    training.steps = 30
    logged(training, lambda step, **values: told.append((step, values)))
    ending = train(training, tell=lambda line: None)
    assert all(torch.equal(p, q) for p, q in zip(plain.model.parameters(), training.model.parameters(), strict=True))
    steps = [values for _, values in told if "loss" in values]
    assert len(steps) == 30
    assert {values["lr"] for values in steps} == {0.2}
    grads = torch.cat([p.grad.flatten() for p in training.model.parameters()])
    assert steps[-1]["grad_norm"] == pytest.approx(grads.norm().item())
    held_out = [values["eval_loss"] for _, values in told if "eval_loss" in values]
    assert len(held_out) == len(ending.checks)
    with torch.no_grad():
        outputs = training.model(training.held_out.x)
    assert held_out[-1] == pytest.approx(nn.functional.cross_entropy(outputs, training.held_out.y).item())


def test_the_logged_norm_of_a_clipped_gradient_is_that_before(monkeypatch):
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", nn.utils.clip_grad_norm_)
    told = []
    training = prepared("mlp")
    training.steps, training.clip = 1, 1e-3
    logged(training, lambda step, **values: told.append(values))
    train(training, tell=lambda line: None)
    assert told[0]["grad_norm"] > 0.1


def test_a_log_of_means_has_each_loss_once(tmp_path):
    lines = Means(tmp_path / "run.jsonl", 2)
    for step, loss in enumerate([1.0, 3.0, 5.0, 9.0], start=1):
        lines.write(step, loss=loss, lr=0.1 * step)
    lines.write(4, eval_loss=2.0)
    kept_lines = [json.loads(line) for line in lines.close().read_text().splitlines()]
    assert [line.get("loss") for line in kept_lines] == [2.0, 7.0, None]
    assert kept_lines[1] == {"step": 4, "loss": 7.0, "lr": 0.4}
