"""Looks at a run on its way: they change nothing, an error in them does no harm, and one of them may end the run."""

import itertools
import math

import pytest
import torch
from torch import nn

import unstuck
from unstuck.diagnosis import PROVED, SHOWN, Lookout
from unstuck.diagnosis import _lookout as lookouts
from unstuck.record import Stopped, _moments


@pytest.fixture
def clock(monkeypatch):
    """A tick after every step."""
    monkeypatch.setattr(_moments, "APART", 0.0)


def train(steps, *, lr=0.1, clear=True, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in range(steps):
        x = torch.randn(32, 6)
        if clear:
            optimizer.zero_grad()
        nn.functional.mse_loss(model(x), x[:, :3]).backward()
        optimizer.step()
        yield model
    yield model, torch.get_rng_state()


def last(generator):
    *_, (model, state) = generator
    return [p.detach().clone() for p in model.parameters()], state


def test_a_tick_that_diagnoses_computes_and_draws_leaves_weights_and_generator_bit_for_bit(tmp_path, clock):
    plain, generator = last(train(40))
    seen = []

    def tick(run):
        seen.append(run.steps)
        (torch.ones(3, requires_grad=True) ** 2).sum().backward()
        if run.steps % 20 == 0:
            run.diagnose()

    with unstuck.watch(folder=tmp_path / "run", budget=1e9, tick=tick) as run:  # every step is recorded
        watched, watched_generator = last(train(40))
    assert seen == list(range(1, 41))
    assert all(map(torch.equal, plain, watched))
    assert torch.equal(generator, watched_generator)
    assert [e["step"] for e in run.of("step")] == list(range(1, 41))
    assert [t.step for t in run.memory().tapes] == list(range(1, 41)), "a tick costs no step its tape"


def test_ticks_come_at_most_twice_a_second(tmp_path, monkeypatch):
    now = itertools.count(step=0.01)  # seconds: each reading of the clock takes a hundredth
    seen = []
    ticks = _moments.Ticks(lambda run: seen.append(moment), unstuck.Run.__new__(unstuck.Run))
    ticks._run._live = None
    moment = 0.0
    monkeypatch.setattr(_moments.time, "perf_counter", lambda: moment)
    for _ in range(1000):
        moment = next(now)
        ticks()
    assert all(b - a >= 0.5 for a, b in itertools.pairwise(seen))
    assert len(seen) == pytest.approx(20, abs=1)


def test_an_error_in_a_tick_ends_the_ticks_and_not_the_run(tmp_path, clock):
    seen = []

    def tick(run):
        seen.append(run.steps)
        raise ArithmeticError("broken")

    with pytest.warns(UserWarning, match="ArithmeticError: broken") as said:  # noqa: SIM117
        with unstuck.watch(folder=tmp_path / "run", tick=tick) as run:
            last(train(5))
    assert (len(said), seen, run.steps, run.outcome) == (1, [1], 5, "finished")


def test_stopped_passes_an_except_of_exceptions_and_is_the_outcome(tmp_path, clock):
    def tick(run):
        if run.steps == 3:
            raise Stopped("my-reason")

    with pytest.raises(Stopped, match="my-reason"):  # noqa: SIM117
        with unstuck.watch(folder=tmp_path / "run", tick=tick) as run:
            try:
                last(train(10))
            except Exception:
                raise AssertionError("caught") from None
    assert (run.steps, run.outcome) == (3, "stopped by unstuck: my-reason")
    assert run.memory().states[-1].step == 3


def test_the_cost_of_ticks_is_told_and_thins_no_recording(tmp_path, clock):
    def tick(run):
        end = _moments.time.perf_counter() + 0.2
        while _moments.time.perf_counter() < end:
            pass

    last(train(1))  # what a process does once, in seconds of imports, belongs to no run
    with unstuck.watch(folder=tmp_path / "run", tick=tick) as run:
        last(train(15))  # three seconds of ticks: more than recording may take for itself
    assert len(run.memory().tapes) == 15
    assert run.overhead > 0.5
    assert run.seconds < 2


def looks(tmp_path, steps, **options):
    """What a lookout tells at each step."""
    lookout, told = Lookout(), {}

    def tick(run):
        for finding in lookout.look(run):
            told.setdefault(finding.code, []).append((run.steps, finding))

    with unstuck.watch(folder=tmp_path / "run", tick=tick):
        last(train(steps, **options))
    return told


def test_an_exact_fault_is_told_once_and_a_healthy_run_is_not(tmp_path, clock):
    told = looks(tmp_path / "faulty", 20, clear=False)
    assert list(told) == ["zero-grad-missing"]
    ((step, finding),) = told["zero-grad-missing"]
    assert (step <= 3, finding.word) == (True, SHOWN)
    assert looks(tmp_path / "healthy", 20) == {}


def test_a_loss_that_is_not_finite_is_told_with_its_step(tmp_path, clock):
    told = looks(tmp_path, 60, lr=1e6)
    ((step, finding),) = told["non-finite"]
    losses = dict(zip(*unstuck.Run(tmp_path / "run").series("loss"), strict=True))
    assert step == finding.step == next(k for k, x in losses.items() if not math.isfinite(x))


def test_a_look_reads_no_log(tmp_path, clock):
    def tick(run):
        Lookout().look(run)
        assert run._events == [], "its memory does not grow with the steps"

    with unstuck.watch(folder=tmp_path / "run", tick=tick):
        last(train(30, clear=False))


def test_whole_diagnoses_come_when_they_are_due_and_keep_to_their_share(tmp_path, clock, monkeypatch):
    moment, made = 0.0, []

    def diagnosis(run, progress):
        nonlocal moment
        made.append(moment)
        moment += 3.0
        return unstuck.Diagnosis("", run.steps, 0.0, 0.0, (), ())

    monkeypatch.setattr(lookouts.time, "perf_counter", lambda: moment)
    monkeypatch.setattr(lookouts, "diagnose", diagnosis)
    with unstuck.watch(folder=tmp_path / "run") as run:
        last(train(1))
        lookout = Lookout(whole=True)
        while moment < 5000:
            lookout.look(run)
            moment += 0.5
    assert made[0] == lookouts.FIRST
    assert all(3 * (k + 1) <= lookouts.WHOLE_SHARE * at for k, at in enumerate(made) if k)
    assert all(b >= lookouts.WIDER * a for a, b in itertools.pairwise(made))
    assert len(made) > 5


def test_a_whole_diagnosis_tells_the_cause_as_soon_as_the_loss_is_not_finite(tmp_path, clock):
    lookout, told = Lookout(whole=True), []

    def tick(run):
        told.extend((f.word, f.code) for f in lookout.look(run))

    with unstuck.watch(folder=tmp_path / "run", tick=tick):
        last(train(150, lr=1.0))
    assert told == [(PROVED, "lr-diverges"), (SHOWN, "non-finite")]
