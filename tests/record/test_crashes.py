"""What a run folder holds after a kill, and what the training notices of a folder that is taken away: nothing."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from tests.processes import command, fork, start, write
from torch import nn

import unstuck
from unstuck.record import Run, new_folder
from unstuck.record._log import NAME, Log, read_log
from unstuck.record._run import TAPES

LOOP = """
    import sys
    import torch
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(1, {steps}):
        {accident}
        x = torch.randn(16, 3)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(step, loss.item().hex(), flush=True)
    for p in model.parameters():
        print([x.hex() for x in p.flatten().tolist()])
    sys.exit(3)
"""


def whole_lines(path):
    """The records of the lines that are complete, by another way than ours: line by line, and strictly."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_bytes().split(b"\n")[:-1]]


def unwatched(script):
    return fork(lambda: exec(script.read_text(), {"__name__": "__main__"}))


def block(folder):
    """A training that saves its tapes again and again, as a diagnosis on the way does."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with unstuck.watch(folder=folder) as run:
        for step in range(10**7):
            model(torch.randn(4, 3)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 3 == 0:
                run.memory()


def killed(folder, lines, seconds, *, as_command):
    """A training that is killed so many seconds after its log had so many lines."""
    if as_command:
        training = start("run", "--out", folder, write("train.py", LOOP.format(steps=10**7, accident="pass")))
    else:
        training = fork(lambda: block(folder))
    while not (folder / NAME).is_file() or (folder / NAME).read_bytes().count(b"\n") < lines:
        time.sleep(0.001)
    time.sleep(seconds)
    training.send(signal.SIGKILL)
    assert training.wait() == -signal.SIGKILL
    return training


def check_what_is_left(folder):
    """Holds the folder of a killed run to its promises; how many steps it has."""
    log = folder / NAME
    told, size = whole_lines(log), log.stat().st_size
    steps = [r["step"] for r in told if r["kind"] == "step"]
    assert steps == list(range(1, len(steps) + 1))
    run = Run(folder)
    assert run.steps == len(steps) == len(run.series("time")[0])
    assert run.series("loss")[1] == [r["loss"] for r in told if r["kind"] == "step"]
    assert run.of("step") == [r for r in told if r["kind"] == "step"]
    assert run.outcome == "cut off"
    memory = run.memory()
    assert (memory is None) == (not (folder / TAPES).exists())
    assert memory is None or memory.states[-1].step >= memory.tapes[-1].step
    diagnosis = run.diagnose()
    assert (diagnosis.steps, diagnosis.findings) == (len(steps), ())
    writer = Log(folder)
    writer.write("end", outcome="sealed")
    writer.close()
    assert whole_lines(log) == [*told, {"kind": "end", "outcome": "sealed"}]
    assert run.outcome == "sealed"
    assert log.stat().st_size <= size + len('{"kind":"end","outcome":"sealed"}\n')
    return len(steps)


@pytest.mark.parametrize("kills", [6, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("as_command", [False, True])
def test_a_run_that_is_killed_at_any_moment_is_read_to_its_last_line(tmp_path, monkeypatch, kills, as_command):
    monkeypatch.chdir(tmp_path)
    draw = random.Random(kills)
    steps, saved = [], 0
    for k in range(kills):
        folder = tmp_path / str(k)
        lines = draw.choice((0, draw.randrange(90)))
        training = killed(folder, lines, 0.1 * draw.random(), as_command=as_command)
        steps.append(check_what_is_left(folder))
        saved += (folder / TAPES).exists()
        if as_command and steps[-1]:  # what the script has printed was not lost by much
            assert abs(training.stdout.count("\n") - steps[-1]) <= 65
    assert max(steps) > 20
    assert saved == 0 if as_command else saved > 0


def test_a_log_that_is_cut_at_any_byte_is_read_to_its_last_whole_line(tmp_path):
    log = Log(tmp_path / "whole")
    log.write("start", script="λ.py", argv=["a\nb", "\udcff", "}\n{"])
    for step in range(1, 4):
        log.write("step", step=step, time=0.5 * step, optimizer=0, loss=float("nan") if step == 2 else 1 / step)
    log.write("fact", code="x", step=3, rows=[1, [2.5, {"deep": float("inf")}]])
    log.close()
    data = (tmp_path / "whole" / NAME).read_bytes()
    ends = [k + 1 for k, byte in enumerate(data) if byte == 10]
    records = read_log(tmp_path / "whole" / NAME)[0]
    assert len(ends) == len(records) == 5
    cut = tmp_path / NAME
    for size in range(len(data) + 1):
        cut.write_bytes(data[:size])
        whole = sum(end <= size for end in ends)
        found, end = read_log(cut)
        assert repr(found) == repr(records[:whole])
        assert end == max((e for e in ends if e <= size), default=0)
        run = Run(tmp_path)
        assert run.steps == sum(r["kind"] == "step" for r in records[:whole])
        writer = Log(tmp_path)
        writer.write("step", step=99)
        writer.close()
        assert cut.read_bytes() == data[:end] + b'{"kind":"step","step":99}\n'
        assert run.steps == 99 or size > end


def test_twenty_runs_that_start_at_the_same_moment_never_mix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    moment = time.time() + 2.0

    def train(number):
        torch.manual_seed(number)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01 * (number + 1))
        time.sleep(max(moment - time.time(), 0.0))
        with unstuck.watch() as run:
            for _ in range(5):
                model(torch.randn(4, 3)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        print(run.folder)

    trainings = [fork(lambda number=number: train(number)) for number in range(20)]
    assert [one.wait() for one in trainings] == [0] * 20
    folders = [one.stdout.strip() for one in trainings]
    assert len(set(folders)) == 20 == len(list(Path("unstuck-runs").iterdir()))
    for number, folder in enumerate(folders):
        told = whole_lines(Path(folder) / NAME)
        assert [r["kind"] for r in told].count("start") == [r["kind"] for r in told].count("end") == 1
        assert [r["step"] for r in told if r["kind"] == "step"] == [1, 2, 3, 4, 5]
        assert {r["lr"] for r in told if r.get("lr")} == {0.01 * (number + 1)}


ACCIDENTS = {
    "nothing": "pass",
    "deleted": "shutil.rmtree(run)",
    "moved away": "run.rename('elsewhere')",
    "replaced by a file": "shutil.rmtree(run); run.write_text('mine')",
    "replaced by a folder": "shutil.rmtree(run); run.mkdir()",
    "its log deleted": "(run / 'log.jsonl').unlink()",
    "another working directory": "os.mkdir('there'); os.chdir('there')",
}


@pytest.mark.parametrize("name", ACCIDENTS)
def test_a_folder_that_is_taken_away_changes_neither_a_bit_nor_the_status(tmp_path, monkeypatch, name):
    accident = f"""
        import contextlib, os, pathlib, shutil
        run = pathlib.Path('run')
        if step == 20:
            with contextlib.suppress(FileNotFoundError):
                {ACCIDENTS[name]}
    """
    program = LOOP.format(steps=40, accident=accident.strip())
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    outputs = []
    for folder in (plain, watched):
        folder.mkdir()
        monkeypatch.chdir(folder)
        script = write("train.py", program)
        if folder == plain:
            done = unwatched(script)
            outputs.append((done.wait(), done.stdout))
        else:
            status, out, err = command("run", "--out", "run", script)
            outputs.append((status, out))
    assert outputs[0] == outputs[1]
    assert outputs[0][0] == 3
    assert len(outputs[0][1].splitlines()) == 39 + 4
    fine = name in ("nothing", "another working directory")
    assert err.count("UserWarning") == (0 if fine else 1), err
    assert ("not recorded any further" in err) == (not fine)
    if fine:
        assert "39 steps" in err
        assert Run(watched / "run").diagnose().steps == 39
    if name == "replaced by a file":
        assert (watched / "run").read_text() == "mine"
    if name in ("deleted", "replaced by a folder"):
        assert not (watched / "run" / NAME).exists()


def test_a_log_that_came_in_the_place_of_ours_is_not_written_to(tmp_path):
    ours = Log(tmp_path / "run")
    ours.write("start", script="ours.py")
    shutil.rmtree(tmp_path / "run")
    theirs = Log(tmp_path / "run")
    theirs.write("start", script="theirs.py")
    with pytest.warns(UserWarning, match="is gone"):
        ours.write("end", outcome="finished")
    theirs.close()
    assert [r["script"] for r in whole_lines(tmp_path / "run" / NAME)] == ["theirs.py"]


@contextlib.contextmanager
def mounted(folder, options):
    folder.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip("only root may mount a disk")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("options", ["size=4k", "size=32k", "ro"])
def test_a_disk_that_is_full_or_read_only_costs_one_warning(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    script = write("train.py", LOOP.format(steps=200, accident="pass"))
    plain = unwatched(script)
    with mounted(tmp_path / "disk", options):
        status, out, err = command("run", "--out", "disk/run", script)
        left = whole_lines(Path("disk/run") / NAME) if options != "ro" else []
        read = Run("disk/run").steps if options != "ro" else 0
        parts = list(Path("disk").glob("*/*.part"))
    assert (plain.wait(), plain.stdout) == (status, out)
    assert status == 3
    assert err.count("UserWarning") == 1, err
    assert not parts
    assert [r["step"] for r in left if r["kind"] == "step"] == list(range(1, read + 1))
    assert (read == 0) == (options == "ro")


def test_what_a_full_disk_cuts_off_is_taken_back_to_a_whole_line(tmp_path):
    log = Log(tmp_path)
    real = log._file

    class Full:
        """A disk with room for the half of what comes."""

        def write(self, data):
            return real.write(data[: len(data) // 2 - 1])

        def __getattr__(self, name):
            return getattr(real, name)

    log.write("start", script="a.py")
    for step in range(10):
        log.write("step", step=step)
    log._file = Full()
    with pytest.warns(UserWarning, match="the disk is full") as said:
        log.close()
    log.write("step", step=11)
    assert len(said) == 1
    assert [r.get("step") for r in whole_lines(tmp_path / NAME)] == [None, 0, 1, 2, 3]
    assert (tmp_path / NAME).read_bytes().endswith(b"\n")


def test_without_a_working_directory_the_block_still_trains(tmp_path, monkeypatch):
    def work():
        gone = tmp_path / "gone"
        gone.mkdir()
        os.chdir(gone)
        gone.rmdir()
        model = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with unstuck.watch() as run:
            model(torch.randn(4, 3)).square().mean().backward()
            optimizer.step()
        print(run.steps, bool(new_folder("x")))

    monkeypatch.chdir(tmp_path)
    done = fork(work)
    assert done.wait() == 0, done.stderr
    assert done.stdout == "0 True\n"
    assert done.stderr.count("UserWarning") == 1
