"""The command as a shell sees it: exit status, stdout and stderr of a process of its own."""

import json
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.processes import command, fork, one_sentence, start, strictly, write

import unstuck.demo
from unstuck.diagnosis import HYPOTHESES
from unstuck.record import Run

LOOP = """
import sys
import torch
from torch import nn
from torch.nn import functional as F
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
def step(clear=True):
    x = torch.randn(16, 3)
    loss = F.cross_entropy(model(x), x.argmax(1))
    if clear:
        optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
"""


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# The status


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("", 0),
        ("sys.exit()", 0),
        ("sys.exit(0)", 0),
        ("sys.exit(3)", 3),
        ("sys.exit('the data are gone')", 1),
        ("raise OSError('the data are gone')", 1),
    ],
)
def test_the_status_of_the_script_passes_through(ending, status):
    write("train.py", LOOP + "for _ in range(5): step()\n" + ending)
    code, _, stderr = command("run", "train.py")
    assert code == status
    assert ("the data are gone" in stderr) == (status == 1)
    assert "in 5 steps" in stderr
    assert "unstuck/" not in stderr.replace("unstuck-runs/", "")


def test_check_gives_1_on_a_fault_that_is_shown_and_0_on_a_healthy_run():
    write("train.py", LOOP + "for _ in range(30): step(clear='--piled-up' not in sys.argv)\n")
    assert command("run", "--check", "train.py")[0] == 0
    code, _, stderr = command("run", "--check", "train.py", "--piled-up")
    assert (code, "zero-grad-missing" in stderr) == (1, True)
    assert command("run", "train.py", "--piled-up")[0] == 0
    write("ends.py", LOOP + "for _ in range(30): step(clear=False)\nsys.exit(5)")
    assert command("run", "--check", "ends.py")[0] == 5


def test_diagnose_tells_healthy_faulty_and_unknown_apart():
    write("train.py", LOOP + "for _ in range(30): step(clear='--piled-up' not in sys.argv)\n")
    command("run", "--out", "healthy", "train.py")
    command("run", "--out", "faulty", "train.py", "--piled-up")
    Path("lost").mkdir()
    steps = [{"kind": "step", "step": k, "time": 0.1 * k, "loss": 10.0**k, "lr": 0.1} for k in range(1, 40)]
    write("lost/log.jsonl", "".join(json.dumps(s) + "\n" for s in steps))
    assert [command("diagnose", name)[0] for name in ("healthy", "faulty", "lost")] == [0, 1, 2]
    for name, status in (("healthy", 0), ("faulty", 1), ("lost", 2)):
        for order in ((name, "--json"), ("--json", name), (name, "--json", "-")):
            code, stdout, _ = command("diagnose", *order)
            assert code == status
            check_schema(strictly(stdout))
        if name != "healthy":
            assert command("diagnose", name, "--json", f"{name}.json")[1] == ""
            assert strictly(Path(f"{name}.json").read_text()) == strictly(stdout)


# What the script sees


def test_arguments_that_look_like_options_reach_the_script():
    write("train.py", "import sys\nprint(sys.argv)")
    args = ["--epochs", "20", "--json", "x", "-v", "--help", "--", "--check", "*", "", "a b", "--out=5", "-"]
    code, stdout, _ = command("run", "train.py", *args)
    assert code == 0
    assert stdout == f"{['train.py', *args]}\n"


SEES = """
    '''A script with a docstring.'''
    from __future__ import annotations
    import inspect, os, pickle, sys
    from dataclasses import dataclass
    import sibling

    @dataclass
    class Point:
        x: int

    def show(*things):
        print(*things, sep='\\n')

    if __name__ == "__main__":
        show(__name__, __doc__, __file__, sys.argv, sys.path[0], os.getcwd(), __package__, __spec__)
        show(sorted(globals()), sys.modules["__main__"].Point is Point, sibling.WORD, Point.__module__)
        show(pickle.loads(pickle.dumps(Point(3))), inspect.getsource(show), Point.__annotations__, __builtins__)
        show(type(__loader__).__name__)
"""


@pytest.mark.parametrize("script", ["train.py", "./train.py", "sub/train.py", "sub/../sub/train.py"])
def test_the_script_sees_what_python_shows_it(script):
    write(script, SEES)
    write(Path(script).parent / "sibling.py", "WORD = 'found'")
    plain = subprocess.run([sys.executable, script, "-a"], capture_output=True, text=True, check=True)
    assert plain.stderr == ""
    code, stdout, _ = command("run", script, "-a")
    assert stdout.splitlines() == plain.stdout.splitlines()
    assert code == 0


def test_the_traceback_is_the_one_that_python_prints():
    write(
        "train.py",
        LOOP
        + """
class Broken(Exception):
    pass

def forward():
    try:
        return F.cross_entropy(model(torch.randn(4, 5)), torch.zeros(4).long())
    except RuntimeError as error:
        raise Broken("the shapes") from error

def main():
    for _ in range(3):
        step()
    try:
        F.cross_entropy(model(torch.randn(4, 3)), torch.full((4,), 99))
    except IndexError:
        try:
            (model(torch.randn(4, 3)) * 2).backward()
        except RuntimeError:
            forward()

main()
""",
    )
    plain = subprocess.run([sys.executable, "train.py"], capture_output=True, text=True)
    code, _, stderr = command("run", "train.py")
    assert code == plain.returncode == 1
    assert plain.stderr.count("Traceback") == 4
    assert stderr.startswith(plain.stderr)
    assert stderr[len(plain.stderr) :].count("\n") < 8


def test_the_traceback_of_the_first_call_is_the_one_that_python_prints():
    """A module that has hooks of its own shows them, and no other."""
    write(
        "train.py",
        LOOP
        + """
model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5), nn.Linear(3, 2))
model[0].register_forward_hook(lambda *_: None)
try:
    model(torch.randn(4, 3))
except RuntimeError:
    model(torch.randn(4, 5))
""",
    )
    plain = subprocess.run([sys.executable, "train.py"], capture_output=True, text=True)
    assert plain.stderr.count("in inner") == 1
    _, _, stderr = command("run", "train.py")
    assert stderr.startswith(plain.stderr)


def test_the_excepthook_of_the_script_is_asked():
    write(
        "train.py", "import sys\nsys.excepthook = lambda kind, *_: print('mine:', kind.__name__)\nraise KeyError(1)\n"
    )
    code, stdout, _ = command("run", "train.py")
    assert (code, stdout) == (1, "mine: KeyError\n")


def test_the_workers_of_a_loader_write_no_log():
    write(
        "train.py",
        LOOP
        + """
class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 24
    def __getitem__(self, k):
        w = nn.Parameter(torch.ones(3))
        torch.optim.SGD([w], lr=0.1).step()
        w.sum().backward()
        return torch.randn(3) + w.detach()

if __name__ == "__main__":
    for x in torch.utils.data.DataLoader(Data(), batch_size=8, num_workers=2, multiprocessing_context="fork"):
        optimizer.zero_grad()
        F.cross_entropy(model(x), x.argmax(1)).backward()
        optimizer.step()
""",
    )
    code, _, stderr = command("run", "--out", "here", "train.py")
    assert code == 0, stderr
    run = Run("here")
    assert (run.steps, len(run.of("optimizer")), run.of("fact")) == (3, 1, [])
    assert len(run.memory().tapes) == 3


@pytest.mark.parametrize("program", ["mlp", "cnn", "gru", "gan"])
def test_the_programs_of_the_clinic_print_what_they_print_unwatched(program):
    pytest.importorskip("sklearn.datasets")
    args = [program, "--steps", "60"]

    def work():
        sys.argv = ["clinic.train", *args]
        runpy.run_module("clinic.train", run_name="__main__")

    plain, watched = fork(work), start("run", "-m", "clinic.train", *args)
    assert [plain.wait(), watched.wait()] == [0, 0]
    assert watched.out.read_bytes() == plain.out.read_bytes()
    assert len(plain.stdout) > 20


# The JSON


def number(x):
    return (isinstance(x, (int, float)) and not isinstance(x, bool)) or x in ("nan", "inf", "-inf")


def check_schema(data):
    """The form laid down for version 1; more keys may come, none may go."""
    words = ("PROVED", "SHOWN", "SUSPECT", "CANNOT TELL")
    assert data["version"] == 1
    assert isinstance(data["script"], str)
    assert type(data["steps"]) is int
    assert number(data["seconds"])
    assert number(data["overhead"]["share"])
    assert all(isinstance(code, str) for code in data["checked"])
    for gap in data["not_checked"]:
        assert isinstance(gap["code"], str)
        assert gap["because"]
    assert not set(data["checked"]) & {gap["code"] for gap in data["not_checked"]}
    assert [words.index(f["word"]) for f in data["findings"]] == sorted(
        words.index(f["word"]) for f in data["findings"]
    )
    for finding in data["findings"]:
        assert all(isinstance(finding[key], str) for key in ("code", "where", "claim"))
        assert finding["claim"]
        assert type(finding["step"]) is int
        for e in finding["evidence"]:
            assert isinstance(e["name"], str)
            assert all(map(number, (e["value"], e["low"], e["high"])))
            assert type(e["n"]) is int
        for rival in finding["ruled_out"]:
            assert isinstance(rival["code"], str)
            assert rival["because"]
        for arm in finding["remedies"]:
            assert isinstance(arm["remedy"], str)
            assert all(map(number, (arm["effect"], arm["low"], arm["high"])))
            assert type(arm["accepted"]) is bool


def test_the_json_has_the_form_that_is_laid_down():
    write(
        "train.py",
        LOOP
        + """
if '--nan' in sys.argv:
    with torch.no_grad():
        model[0].weight.fill_(float('nan'))
if '--fast' in sys.argv:
    optimizer.param_groups[0]['lr'] = 1e3
for _ in range(120): step('--piled-up' not in sys.argv)
""",
    )
    for option in ("--none", "--nan", "--fast", "--piled-up"):
        code, stdout, _ = command("run", "--json", f"{option}.json", "train.py", option)
        assert (code, stdout) == (0, "")
        data = strictly(Path(f"{option}.json").read_text())
        check_schema(data)
        assert (data["script"], data["steps"]) == ("train.py", 120)
        if option != "--nan":
            assert bool(data["findings"]) == (option != "--none")
        told = {*data["checked"], *(gap["code"] for gap in data["not_checked"])}
        assert {h.code for h in HYPOTHESES} <= told | {f["code"] for f in data["findings"]} | {
            r["code"] for f in data["findings"] for r in f["ruled_out"]
        }


def test_json_is_written_also_where_nothing_was_trained():
    write("train.py", "print('nothing')")
    code, stdout, stderr = command("run", "--json", "-", "train.py")
    assert code == 0
    assert "no step" in one_sentence(stderr)
    check_schema(strictly(stdout.removeprefix("nothing\n")))


def test_the_report_is_one_file_that_loads_nothing():
    write("train.py", LOOP + "for _ in range(30): step(clear=False)\n")
    command("run", "--out", "here", "train.py")
    code, stdout, _ = command("report", "here", "-o", "page.html")
    assert (code, stdout) == (0, "page.html\n")
    html = Path("page.html").read_text()
    assert "zero-grad-missing" in html
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)|@import", html)
    (Path("here") / "diagnosis.json").unlink()
    assert command("report", "here")[:2] == (0, "here/report.html\n")


# What is wrong with what was given


def test_a_script_that_does_not_exist_or_does_not_compile_is_one_sentence():
    code, stdout, stderr = command("run", "nowhere.py")
    assert (code, stdout) == (2, "")
    assert "nowhere.py" in one_sentence(stderr)
    Path("folder").mkdir()
    assert command("run", "folder")[0] == 2
    write("torn.py", "import torch\nfor\n")
    code, _, stderr = command("run", "torn.py")
    assert code == 2
    assert "line 2" in one_sentence(stderr)
    Path("binary.py").write_bytes(b"\0\1\2\xff")
    code, _, stderr = command("run", "binary.py")
    assert code == 2
    assert "binary.py" in one_sentence(stderr)
    assert not Path("unstuck-runs").exists()


def test_a_script_that_raises_at_once_shows_its_traceback_and_one_sentence():
    write("train.py", "import sys\n1 / 0\n")
    plain = subprocess.run([sys.executable, "train.py"], capture_output=True, text=True)
    code, _, stderr = command("run", "train.py")
    assert code == 1
    assert stderr.startswith(plain.stderr)
    assert "no step" in one_sentence(stderr[len(plain.stderr) :])


def test_a_folder_that_holds_no_run_is_one_sentence():
    Path("empty").mkdir()
    for args in (("empty",), ("nowhere",), ()):
        for verb in ("diagnose", "report"):
            code, stdout, stderr = command(verb, *args)
            assert (code, stdout) == (2, "")
            assert "unstuck run" in one_sentence(stderr)
    write("blank/log.jsonl", "")
    code, _, stderr = command("diagnose", "blank")
    assert code == 2
    assert "blank" in one_sentence(stderr)


def test_a_log_that_is_cut_in_the_middle_of_a_line_is_read_up_to_it():
    write("train.py", LOOP + "for _ in range(30): step(clear=False)\n")
    command("run", "--out", "here", "train.py")
    log = Path("here/log.jsonl")
    data = log.read_bytes()
    log.write_bytes(data[: data.index(b'"step":21') + 3])
    Path("here/tapes.pt").write_bytes(Path("here/tapes.pt").read_bytes()[:1000])
    code, stdout, stderr = command("diagnose", "here", "--json")
    assert code == 1, stderr
    assert strictly(stdout)["steps"] == 20
    assert "Traceback" not in stderr


def test_options_that_cannot_be_met_are_one_sentence_before_the_script_runs():
    write("train.py", LOOP + "print('ran')\nstep()")
    command("run", "--out", "here", "train.py")
    for args in (("--out", "here"), ("--json", "no/such/folder.json")):
        code, stdout, stderr = command("run", *args, "train.py")
        assert (code, stdout) == (2, "")
        one_sentence(stderr)
    code, _, stderr = command("demo", "no-such-fault")
    assert code == 2
    assert "no-such-fault" in one_sentence(stderr)
    assert command("no-such-verb")[0] == 2


def test_a_folder_that_cannot_be_written_leaves_the_script_its_status():
    Path("file").touch()
    write("train.py", LOOP + "for _ in range(3): step()\nsys.exit(3)")
    code, _, stderr = command("run", "--out", "file/run", "train.py")
    assert code == 3
    assert "Traceback" not in stderr
    assert stderr.count("UserWarning") == 1


def test_the_demonstration_lists_its_faults():
    code, stdout, stderr = command("demo", "--list")
    assert (code, stderr) == (0, "")
    assert [line.split()[0] for line in stdout.splitlines()] == list(unstuck.demo.FAULTS)


# Interruptions

ENDLESS = LOOP + "for k in range(10**7):\n    step({clear})\n    if k == {ready}: print('ready', flush=True)\n"


def test_an_interrupt_ends_the_script_with_a_diagnosis():
    write("train.py", ENDLESS.format(clear="False", ready=40))
    running = start("run", "--out", "here", "train.py")
    running.until("ready")
    running.send(signal.SIGINT)
    assert running.wait() == 130
    assert "zero-grad-missing" in running.stderr
    assert "Traceback" not in running.stderr
    assert Run("here").outcome == "interrupted"


def test_a_second_interrupt_leaves_at_once():
    bounces = ENDLESS.replace("lr=0.1", "lr=1.0").replace("SGD", "Adam")  # its diagnosis takes a trial
    write("train.py", bounces.format(clear="True", ready=400))
    running = start("run", "--out", "here", "train.py")
    running.until("ready")
    running.send(signal.SIGINT)
    running.until("diagnosing")
    began = time.monotonic()
    running.send(signal.SIGINT)
    assert running.wait() == 130
    assert time.monotonic() - began < 2
    assert "Traceback" not in running.stderr
    assert not Path("here/diagnosis.json").exists()


def test_a_script_that_handles_its_interrupt_goes_its_own_way():
    handled = ENDLESS.format(clear="True", ready=10).replace("for k", "try:\n  for k").replace("\n    ", "\n      ")
    write(
        "train.py",
        handled.replace("\ntry", "\ntry", 1) + "except KeyboardInterrupt:\n  print('saved')\n  sys.exit(4)\n",
    )
    running = start("run", "--out", "here", "train.py")
    running.until("ready")
    running.send(signal.SIGINT)
    assert running.wait() == 4
    assert running.stdout.endswith("saved\n")


def test_explain_tells_of_a_cause_and_lists_them_all():
    code, told, _ = command("explain", "lr-bounces")
    assert code == 0
    assert told.startswith("lr-bounces\n\nLooks like a loss that falls")
    assert "Cure: a lower rate" in told
    code, listed, _ = command("explain")
    assert code == 0
    assert {"lr-bounces", "overfitting", "graph-cut", "unknown"} <= {line.split(" ")[0] for line in listed.splitlines()}


def test_explain_knows_what_was_meant():
    code, out, err = command("explain", "lr-bounce")
    assert (code, out) == (2, "")
    assert err.startswith("unstuck: the code of a cause was needed, got 'lr-bounce': did you mean lr-bounces")
