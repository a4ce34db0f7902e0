"""`unstuck run` while the script runs, the list of its runs, and a run that is examined without its script."""

import os
import pty
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from clinic.train import prepared
from clinic.training import train
from tests.processes import command, fork, one_sentence, start, strictly, write
from torch.nn import functional as F

import unstuck
from unstuck import record
from unstuck.record import Run

fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
LOOP = """
import sys, time
import torch
from torch import nn
from torch.nn import functional as F
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
def train(seconds, clear=True, scale=1.0):
    end, steps = time.monotonic() + seconds, 0
    while time.monotonic() < end or steps < 20:
        steps += 1
        x = torch.randn(16, 3)
        loss = scale * F.cross_entropy(model(x), x.argmax(1))
        if clear:
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        time.sleep(0.002)
"""
FOREVER = 100


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def warnings_in(stderr):
    return [line for line in stderr.splitlines() if re.match(r"unstuck: step \d+: ", line)]


# A line for each fault


def test_a_fault_that_is_shown_on_the_way_is_one_line_on_stderr():
    write("train.py", LOOP + "train(1.5, clear=False)\nprint('done')\n")
    code, stdout, stderr = command("run", "train.py")
    assert (code, stdout) == (0, "done\n")
    (line,) = warnings_in(stderr)
    assert "SHOWN zero-grad-missing" in line
    assert "train.py:" in line


def test_a_healthy_script_gets_no_line():
    write("train.py", LOOP + "train(1.5)\n")
    assert warnings_in(command("run", "train.py")[2]) == []


def test_a_loss_that_is_not_finite_names_the_first_tensor_and_the_step():
    write(
        "train.py",
        LOOP + "train(0.3)\nwith torch.no_grad(): model[2].bias[1] = float('nan')\nprint('broken')\ntrain(1.2)\n",
    )
    code, _, stderr = command("run", "--out", "here", "train.py")
    assert code == 0
    (line,) = warnings_in(stderr)
    first = next(e["step"] for e in Run("here").of("step") if e["loss"] != e["loss"])
    assert (
        f"The loss is nan since step {first}, and the first number that is not finite is in the weights of 2.bias"
        in (line)
    )
    assert f"since step {first}" in stderr.partition(line)[2], "the verdict says it too"


# The end at a fault


def test_stop_ends_the_run_at_a_fault_with_status_1_past_the_scripts_except():
    write(
        "train.py",
        LOOP
        + "try:\n    train(100, clear=False)\nexcept Exception:\n    print('caught')\nfinally:\n    print('tidied')\n",
    )
    code, stdout, stderr = command("run", "--stop", "--out", "here", "train.py")
    assert (code, stdout) == (1, "tidied\n")
    assert Run("here").outcome == "stopped by unstuck: zero-grad-missing"
    assert f"stopped at step {Run('here').steps}: zero-grad-missing" in stderr
    assert " SHOWN  zero-grad-missing" in stderr
    assert "Traceback" not in stderr
    assert Run("here").memory() is not None


def test_stop_names_the_cause_of_a_loss_that_is_not_finite():
    loop = LOOP.replace("lr=0.1", "lr=1e4").replace("F.cross_entropy(model(x), x.argmax(1))", "F.mse_loss(model(x), x)")
    write("train.py", loop + "train(100)\n")
    code, _, stderr = command("run", "--stop", "--out", "here", "train.py")
    assert code == 1
    assert Run("here").outcome == "stopped by unstuck: lr-diverges", stderr
    assert stderr.count(" PROVED  lr-diverges") == 1


def test_stop_leaves_a_healthy_script_alone():
    write("train.py", LOOP + "train(1.2)\nsys.exit(3)\n")
    assert command("run", "--stop", "train.py")[0] == 3


# Signals


@pytest.mark.parametrize("handled", [False, True])
def test_a_termination_ends_the_script_as_python_would_with_the_run_folder_whole(handled):
    own = "import signal\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n" if handled else ""
    write("train.py", LOOP + own + "train(0.5)\nprint('ready', flush=True)\ntrain(100)\n")
    running = start("run", "--out", "here", "train.py")
    running.until("ready")
    running.send(signal.SIGTERM)
    assert running.wait() == (7 if handled else -signal.SIGTERM)
    assert Run("here").outcome == ("left with status 7" if handled else "terminated")
    assert Run("here").memory().states[-1].step >= Run("here").steps - 1
    assert not list(Path("here").glob("*.part"))
    assert ("steps" in running.stderr) == handled


def test_a_forked_process_of_the_script_ends_at_once_by_a_termination():
    write(
        "train.py",
        LOOP
        + """
import os, signal
train(0.2)
child = os.fork()
if not child:
    time.sleep(100)
os.kill(child, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""",
    )
    code, stdout, _ = command("run", "--out", "here", "train.py")
    assert (code, stdout) == (0, "-15\n")
    assert [e["outcome"] for e in Run("here").of("end")] == ["finished"]


# The live screen


def on_a_terminal(*args, columns=80, rows=24, stdout=None):
    """The exit status and what a terminal of this size gets on stderr, and on stdout where that is no file."""
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    words = [sys.executable, "-c", "from unstuck.cli import main; main()", *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    process = subprocess.Popen(words, stdout=stdout or there, stderr=there, stdin=there, env=environment)
    os.close(there)
    seen = b""
    while True:
        try:
            data = os.read(here, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        seen += data
    os.close(here)
    return process.wait(), seen.decode()


def test_the_live_screen_draws_below_the_scripts_own_output_and_leaves_the_terminal_as_it_was():
    write("train.py", LOOP + "train(1.2)\nprint('by the script')\ntrain(0.8)\n")
    code, seen = on_a_terminal("run", "--live", "train.py")
    assert code == 0, seen
    assert "\x1b[1;14r" in seen, "the last ten of 24 rows are kept from scrolling"
    assert seen.rindex("\x1b[r") > seen.rindex("\x1b[1;14r"), "and given back"
    assert seen.count("\x1b7") == seen.count("\x1b8"), "the cursor is put back"
    for word in ("train.py", "loss", "gradient norm", "relative update", "rate", "watching", "steps/s"):
        assert word in seen
    assert "by the script\r\n" in seen
    drawn = [int(row) for row in re.findall(r"\x1b\[(\d+);1H", seen)]
    assert set(drawn) == set(range(15, 25)), "only there"


def test_the_live_screen_keeps_out_of_a_stdout_that_is_a_file():
    write(
        "train.py", LOOP + "print('a\\rb', end='')\ntrain(1)\nprint(type(sys.stdout).__name__, sys.stdout.isatty())\n"
    )
    with Path("out").open("wb") as file:
        code, seen = on_a_terminal("run", "--live", "train.py", stdout=file)
    assert (code, Path("out").read_bytes()) == (0, b"a\rbTextIOWrapper False\n")
    assert "gradient norm" in seen


@pytest.mark.parametrize("size", [None, (80, 12), (40, 24)])
def test_without_room_for_it_the_live_screen_says_so_and_the_script_runs(size):
    write("train.py", LOOP + "train(0.7, clear=False)\nprint('done')\n")
    if size is None:
        code, stdout, stderr = command("run", "--live", "train.py")
        assert stdout == "done\n"
    else:
        code, stderr = on_a_terminal("run", "--live", "train.py", columns=size[0], rows=size[1])
    assert code == 0
    assert "--live needs a terminal" in " ".join(stderr.split())
    assert "zero-grad-missing" in stderr
    assert "\x1b7" not in stderr


# Modules and options


@pytest.mark.skipif(not hasattr(record, "run_module"), reason="this build runs scripts only")
def test_a_module_runs_as_python_runs_it_and_gets_all_that_follows():
    write("package/__init__.py", "")
    write("package/train.py", LOOP + "train(0.1)\nprint(__name__, __package__, sys.argv[1:])\n")
    code, stdout, stderr = command("run", "--out", "here", "-m", "package.train", "--live", "-m", "x")
    assert code == 0, stderr
    assert stdout == "__main__ package ['--live', '-m', 'x']\n"
    assert Run("here").steps > 0


@pytest.mark.parametrize("text", ["fast", "-1%", "300%", "nan"])
def test_a_budget_that_is_no_share_is_one_sentence(text):
    write("train.py", "print('ran')")
    code, stdout, stderr = command("run", f"--budget={text}", "train.py")
    assert (code, stdout) == (2, "")
    assert text in one_sentence(stderr)


# The list of runs


def test_the_runs_are_listed_newest_first_with_their_verdict():
    write("train.py", LOOP + "train(0.2, clear='--piled-up' not in sys.argv)\nsys.exit('--ends' in sys.argv and 5)\n")
    assert command("runs")[:2] == (0, "")
    assert "unstuck run SCRIPT" in one_sentence(command("runs")[2])
    command("run", "train.py", "--piled-up")
    command("run", "--out", "unstuck-runs/9-undiagnosed", "train.py", "--ends")
    Path("unstuck-runs/9-undiagnosed/diagnosis.json").unlink()
    code, stdout, stderr = command("runs")
    assert (code, stderr) == (0, "")
    head, newest, oldest = stdout.splitlines()
    assert head.split()[:2] == ["Run", "when"]
    assert ("left with status 5" in newest, "–" in newest) == (True, True)
    assert ("finished" in oldest, "SHOWN zero-grad-missing" in oldest) == (True, True)
    first, second = strictly(command("runs", "--json")[1])
    assert (first["folder"], first["verdict"], first["outcome"]) == (
        "unstuck-runs/9-undiagnosed",
        None,
        "left with status 5",
    )
    assert second["verdict"] == {"status": 1, "findings": [{"code": "zero-grad-missing", "word": "SHOWN"}]}
    assert (second["script"], second["argv"], second["steps"]) == (
        "train.py",
        ["--piled-up"],
        Run(second["folder"]).steps,
    )


def test_a_run_is_found_by_its_folder_by_its_name_and_as_the_latest():
    write("train.py", LOOP + "train(0.2, clear=False)\n")
    command("run", "train.py")
    (folder,) = Path("unstuck-runs").iterdir()
    for arguments in ([], [folder.name], [str(folder)], [str(folder.resolve())]):
        code, stdout, _ = command("diagnose", *arguments, "--json")
        assert (code, strictly(stdout)["steps"]) == (1, Run(folder).steps)
        assert command("report", *arguments)[0] == 0
    code, stdout, stderr = command("diagnose", "no-such-run")
    assert (code, stdout) == (2, "")
    assert "no-such-run" in one_sentence(stderr)


# A run examined without its script


def test_a_run_is_examined_without_its_script_as_the_scripts_own_objective_would_be():
    pytest.importorskip("sklearn.datasets")
    steps = 56  # two epochs of 28 batches of 50: together the training set, twice
    arguments = ["mlp", "--steps", str(steps)]
    watched = fork(lambda: record.run_module("clinic.train", arguments, folder=Path("here"), budget=1e9))  # all steps
    assert watched.wait() == 0
    training = prepared("mlp")
    training.steps = steps
    train(training, tell=lambda line: None)
    model, x, y = training.model, training.train.x, training.train.y
    own = unstuck.Objective(model, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), [(x, y)])

    recorded = Run("here").objective()
    assert recorded.names == own.names
    assert recorded.weight == steps
    assert torch.equal(recorded.point, own.point)
    assert recorded.value().item() == pytest.approx(own.value().item(), rel=1e-6)
    torch.testing.assert_close(recorded.gradient(), own.gradient(), rtol=1e-4, atol=1e-7)

    code, stdout, stderr = command("examine", "here", "--json", "--tol", "1e-4")
    assert code == 0, stderr
    assert f"here: the mean over {steps} recorded steps" in stderr
    point, direct = strictly(stdout), unstuck.examine(own, tol=1e-4, generator=torch.Generator().manual_seed(0))
    assert point["kind"] == direct.kind
    error = 2e-4 * float(direct.values[-1])  # of both, at this tolerance
    for end in (0, -1):
        assert point["eigenvalues"][end]["value"] == pytest.approx(float(direct.values[end]), abs=error)


def test_full_batch_steps_are_computed_once_and_count_each():
    write(
        "train.py",
        LOOP
        + "x = torch.randn(16, 3)\nfor _ in range(9):\n    F.mse_loss(model(x), x).backward()\n    optimizer.step()\n"
        "    optimizer.zero_grad()\n",
    )
    command("run", "--out", "here", "train.py")
    objective = Run("here").objective()
    assert (len(objective.terms), objective.weight) == (1, 9)


def test_a_run_that_kept_no_step_cannot_be_examined_and_says_why():
    write("train.py", LOOP + "train(0.2)\n")
    command("run", "train.py")
    (folder,) = Path("unstuck-runs").iterdir()
    (folder / "tapes.pt").unlink()
    code, stdout, stderr = command("examine", folder.name)
    assert (code, stdout) == (2, "")
    assert "recorded steps were needed" in one_sentence(stderr)
