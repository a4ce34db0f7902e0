"""The log on disk: what a strict parser of another make reads, whatever happened to the writer."""

import gc
import json
import math
import os
import random
import resource
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.processes import fork
from torch import nn

import unstuck
from unstuck.record import Run, _log, new_folder
from unstuck.record._log import NAME, Log, read_log

SOURCE = Path(unstuck.__file__).parent


def strict_lines(folder):
    """The records as a parser reads them that knows no NaN."""

    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    text = (folder / NAME).read_bytes()
    assert text.endswith(b"\n")
    return [json.loads(line, parse_constant=refuse) for line in text.decode().split("\n")[:-1]]


def three_steps(model, optimizer, scale=1.0):
    for _ in range(3):
        (scale * model(torch.randn(4, 3))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_every_line_is_strict_json_and_a_loss_that_is_no_number_comes_back(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1), betas=(0.9, 0.99))
    with unstuck.watch(folder=tmp_path / "run") as run:
        three_steps(model, optimizer)
        three_steps(model, optimizer, scale=math.inf)
        three_steps(model, optimizer, scale=math.nan)
    lines = strict_lines(tmp_path / "run")
    assert [r["kind"] for r in lines].count("step") == 9
    losses = [r["loss"] for r in lines if r["kind"] == "step"]
    assert all(isinstance(x, float) and math.isfinite(x) for x in losses[:3])
    assert losses[3] in ("inf", "nan")
    assert losses[6:] == ["nan"] * 3
    steps, read = run.series("loss")
    assert steps == list(range(1, 10))
    assert read[:3] == losses[:3]
    assert all(math.isnan(x) for x in read[6:])
    assert read[3] == float(losses[3]) or math.isnan(read[3])


def test_what_is_no_text_is_written_as_an_escape(tmp_path):
    log = Log(tmp_path)
    log.write("start", argv=["\udcff", "λ", "\u2028", 'say "so"\n'])
    log.close()
    (line,) = strict_lines(tmp_path)
    assert line["argv"] == ["\udcff", "λ", "\u2028", 'say "so"\n']


@pytest.mark.parametrize("tail", [b'{"kind": "step", "st', b"\xff\xfe", b'{"kind": "step"}', b"{"])
def test_a_torn_last_line_is_ignored_in_reading_and_cut_off_in_opening(tmp_path, tail):
    log = Log(tmp_path)
    log.write("step", step=1)
    log.close()
    with (tmp_path / NAME).open("ab") as file:
        file.write(tail)
    assert Run(tmp_path).steps == 1
    assert len(Run(tmp_path).events) == 1
    log = Log(tmp_path)
    log.write("step", step=2)
    log.close()
    assert [r["step"] for r in strict_lines(tmp_path)] == [1, 2] == [e["step"] for e in Run(tmp_path).events]


@pytest.mark.parametrize("line", [b"\xff\xff\n", b"3\n", b"[]\n", b"{}\n", b"\n", b'{"kind": \n'])
def test_what_follows_a_broken_line_is_not_trusted(tmp_path, line):
    (tmp_path / NAME).write_bytes(b'{"kind": "step", "step": 1}\n' + line + b'{"kind": "step", "step": 2}\n')
    assert Run(tmp_path).steps == 1


def test_a_log_is_read_on_from_where_it_was_read_to(tmp_path):
    log = Log(tmp_path)
    run = Run(tmp_path)
    for step in range(1, 5):
        log.write("step", step=step, loss=1.0)
        log.flush()
        assert run.steps == step == len(run.of("step")) == len(run.series("loss")[0])
    assert read_log(tmp_path / NAME)[0] == run.events
    log.close()


def test_an_empty_log_is_a_run_without_steps(tmp_path):
    (tmp_path / NAME).touch()
    run = Run(tmp_path)
    assert (run.steps, run.events, run.script, run.outcome, run.memory()) == (0, [], "", "cut off", None)


def test_two_runs_never_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len({new_folder("same") for _ in range(20)}) == 20
    racing = [fork(lambda: [print(new_folder("x")) for _ in range(300)]) for _ in range(2)]
    assert [one.wait() for one in racing] == [0, 0]
    folders = [name for one in racing for name in one.stdout.split()]
    assert len(set(folders)) == len(folders) == 600
    model = nn.Linear(3, 2)
    with unstuck.watch(model, folder="mine"):
        pass
    before = (tmp_path / "mine" / NAME).read_bytes()
    with pytest.raises(ValueError, match="mine holds one"), unstuck.watch(model, folder="mine"):
        pass
    assert (tmp_path / "mine" / NAME).read_bytes() == before


def test_a_folder_that_cannot_be_made_costs_the_log_and_one_warning(tmp_path):
    (tmp_path / "file").touch()
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.weight.clone()
    with (
        pytest.warns(UserWarning, match="not recorded") as said,
        unstuck.watch(folder=tmp_path / "file" / "run") as run,
    ):
        three_steps(model, optimizer)
    assert len(said) == 1
    assert not torch.equal(before, model.weight)
    assert (run.steps, run.memory()) == (0, None)


def test_a_folder_that_is_deleted_on_the_way_costs_one_warning(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="is gone") as said, unstuck.watch(folder=tmp_path / "run"):
        three_steps(model, optimizer)
        (tmp_path / "run" / NAME).unlink()
        (tmp_path / "run").rmdir()
        three_steps(model, optimizer)
    assert len(said) == 1
    assert not (tmp_path / "run").exists()


def test_warnings_that_are_errors_do_not_stop_the_training(tmp_path):
    (tmp_path / "file").touch()
    model = nn.Linear(3, 2)
    with unstuck.watch(model, folder=tmp_path / "file" / "run"):  # pytest makes warnings errors here
        three_steps(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(("room", "laps"), [(1500, 20), (4000, 3)])  # too little for the log; for the tapes
def test_a_full_disk_costs_one_warning(tmp_path, monkeypatch, room, laps):
    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        model = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with unstuck.watch(folder="run") as run:
            for _ in range(laps):
                three_steps(model, optimizer)
        print(run.steps)

    monkeypatch.chdir(tmp_path)
    done = fork(work)
    assert done.wait() == 0, done.stderr
    assert done.stderr.count("UserWarning") == 1, done.stderr
    assert not Path("run/tapes.part").exists()
    assert int(done.stdout) == Run("run").steps > 0


def test_a_forked_process_writes_nothing(tmp_path, monkeypatch):
    def work():
        model = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with unstuck.watch(folder="run"):
            three_steps(model, optimizer)
            child = fork(lambda: three_steps(model, optimizer))
            assert child.wait() == 0, child.stderr
            if not os.fork():
                three_steps(model, optimizer)
                sys.exit(0)  # leaves the block like the parent does
            os.wait()
            three_steps(model, optimizer)

    monkeypatch.chdir(tmp_path)
    done = fork(work)
    assert done.wait() == 0, done.stderr
    lines = strict_lines(Path("run"))
    assert [r["step"] for r in lines if r["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [r["outcome"] for r in lines if r["kind"] == "end"] == ["finished"]


def test_the_log_does_not_wait_for_the_end(tmp_path):
    began = time.monotonic()
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with unstuck.watch(folder=tmp_path / "run") as run:
        three_steps(model, optimizer)
        assert (tmp_path / "run" / NAME).stat().st_size > 0
        assert len(run.series("loss")[0]) == 3 == len(Run(tmp_path / "run").series("loss")[0])
        assert 0 < run.seconds <= time.monotonic() - began


class Counted:
    """A file that notes what each system call wrote."""

    def __init__(self, file):
        self.file, self.calls = file, []

    def write(self, data):
        self.calls.append(bytes(data))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_lines_wait_for_each_other_and_facts_for_nothing(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(_log, "monotonic", lambda: now[0])
    log = Log(tmp_path)
    log._file = file = Counted(log._file)

    def counts():
        return [call.count(b"\n") for call in file.calls]

    log.write("start")
    assert counts() == [1]
    for step in range(150):
        log.write("step", step=step)
    assert counts() == [1, 64, 64]
    log.write("fact", code="x")
    assert counts() == [1, 64, 64, 23]
    now[0] += 0.1
    log.write("step", step=150)
    now[0] += 0.09
    log.write("step", step=151)
    assert counts() == [1, 64, 64, 23]
    now[0] += 0.02
    log.write("step", step=152)
    assert counts() == [1, 64, 64, 23, 3]
    log.write("step", step=153)
    log.write("end")
    assert counts() == [1, 64, 64, 23, 3, 2]
    log.close()
    assert all(call.endswith(b"\n") for call in file.calls)
    assert [r["step"] for r in strict_lines(tmp_path) if r["kind"] == "step"] == list(range(154))


def test_a_line_is_what_the_standard_library_makes_of_it(tmp_path):
    values = {
        "plain": [1, -2.5e-300, True, None, 'λ\n\u2028"', {"a": [0.1, {}]}, []],
        "numpy": np.float64(0.1),
        "large": 10**30,
        "none": None,
        "bad": [math.nan, {"deep": (-math.inf, math.inf)}],
        "text": "nan is no number",
    }
    log = Log(tmp_path)
    for chosen in (values, {k: v for k, v in values.items() if k != "bad"}, {}):
        log.write("step", **chosen)
    log.close()
    bad = {**values, "bad": ["nan", {"deep": ["-inf", "inf"]}]}
    good = {k: v for k, v in values.items() if k != "bad"}
    expected = [json.loads(json.dumps({"kind": "step", **v}, allow_nan=False)) for v in (bad, good, {})]
    assert strict_lines(tmp_path) == expected
    read = Run(tmp_path).events
    assert repr(read[0]["bad"]) == "[nan, {'deep': [-inf, inf]}]"
    assert read[1:] == expected[1:]


def test_threads_that_write_at_once_lose_and_tear_nothing(tmp_path):
    log = Log(tmp_path)
    count, writers = 5000, 4

    def work(number):
        for step in range(count):
            log.write("step", step=step, thread=number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    lines = strict_lines(tmp_path)
    assert len(lines) == writers * count
    for number in range(writers):
        assert [r["step"] for r in lines if r["thread"] == number] == list(range(count))


@pytest.mark.parametrize("block", [1, 700, 1 << 20])  # bytes that are read together
def test_a_series_is_what_a_scan_over_all_lines_gives(tmp_path, monkeypatch, block):
    monkeypatch.setattr(_log, "BLOCK", block)
    draw = random.Random(0)
    choices = [1, 0.25, -3e-7, math.nan, math.inf, None, True, "words", "inf-nan", [1.0], {"w": 2.0}]
    log, run = Log(tmp_path), Run(tmp_path)
    expected = {name: [] for name in ("always", "late", "rare", "mixed", "step")}
    for step in range(1, 600):
        values = {"step": step, "always": draw.random(), "mixed": draw.choice(choices)}
        if step > 300:
            values["late"] = draw.random()
        if step % 10 == 0:
            values["rare"] = step
        log.write("step", **values)
        if draw.random() < 0.1:
            log.write("fact", code="x", step=step, always=2.0)
        for name, found in expected.items():
            if isinstance(values.get(name), (int, float)):
                found.append((step, float(values[name])))
        if draw.random() < 0.05:
            log.flush()
            assert run.steps == step
            assert run.series("rare")[0] == list(range(10, step + 1, 10))
    log.close()
    for name, found in expected.items():
        assert repr(list(zip(*run.series(name), strict=True))) == repr(found)
    assert run.series("unheard of") == ([], [])
    assert [e for e in run.events if e["kind"] == "fact"] == run.of("fact")
    assert repr([e for e in run.events if e["kind"] == "step"]) == repr(run.of("step"))


@pytest.mark.slow
def test_a_million_steps_are_read_in_less_than_ten_seconds(tmp_path):
    log = Log(tmp_path)
    draw = random.Random(0).random
    for step in range(1, 1_000_001):
        loss = draw() if step < 900_000 else math.nan  # which is written as a word
        log.write("step", step=step, time=draw(), optimizer=0, lr=0.1, grad_norm=draw(), loss=loss, backwards=1)
    log.close()
    began = time.process_time()
    run = Run(tmp_path)
    assert run.steps == len(run.series("loss")[1]) == 1_000_000
    assert time.process_time() - began < 10


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "budget", "count"), [(1, 0.02, 20_000), (7, 1.0, 5_000)])  # of the batches
def test_what_the_watcher_holds_does_not_grow_with_the_number_of_steps(tmp_path, sizes, budget, count):
    def steps(count):
        for k in range(count):
            optimizer.zero_grad()
            model(torch.randn(2 + k % sizes, 3)).square().mean().backward()
            optimizer.step()

    def held():
        gc.collect()
        found = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, f"{SOURCE}/*")])
        return sum(trace.size for trace in found.statistics("filename"))

    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with unstuck.watch(folder=tmp_path / "run", budget=budget) as run:
        steps(1000)
        tracemalloc.start(1)
        try:
            steps(1000)
            before = held()
            steps(count)
            after = held()
        finally:
            tracemalloc.stop()
    assert run.steps == 2000 + count
    assert after - before < count + 64 * 400  # a byte a step is too much; up to 64 lines wait
