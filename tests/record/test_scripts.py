"""Scripts as their authors write them, run as they are: watched or not, they do and say the same."""

import runpy
import sys
import textwrap
from pathlib import Path

import pytest
from script_runs import SCRIPTS, WATCHED, no_alarm, process, said, same_tensors, silent_and_unchanged
from tests.processes import command, fork, start, write

from unstuck.record import Run, run_module

RUNS = {  # what the default run can afford: a few steps, enough to come to every line
    "char_gpt": "--steps 30",
    "char_gpt bfloat16": "--steps 12 --dtype bfloat16",
    "mingpt": "--steps 30",
    "makemore": "--steps 25 --num-workers 1",
    "makemore bigram": "--steps 60 --type bigram --num-workers 0 -l 0.1",
    "makemore_mlp": "--steps 300",
    "sine_lbfgs": "--steps 1",
    "word_lm": "--epochs 2 --steps 120",
    "word_lm tied": "--epochs 2 --tied",
    "word_lm manual": "--epochs 2 --steps 12 --manual",
    "dcgan": "--niter 1 --steps 12",
    "vae": "--epochs 2 --steps 12",
    "actor_critic": "--steps 8",
    "actor_critic reinforce": "--steps 8 --reinforce",
    "digits_cnn": "--epochs 2 --steps 8",
    "ddpm": "--steps 30",
    "self_supervised": "--epochs 2 --steps 12",
    "self_supervised simclr": "--epochs 2 --steps 8 --simclr",
    "ppo": "--steps 2 --num-steps 32",
    "gcn": "--epochs 30",
    "detection": "--epochs 2 --steps 8",
    "notebook": "--steps 6",
    "fine_tune": "--epochs 2 --steps 10",
    "fine_tune plateau": "--epochs 2 --steps 10 --schedule plateau",
    "fine_tune sequential": "--epochs 2 --steps 10 --schedule sequential",
    "amp": "--steps 30",
    "amp bfloat16": "--steps 30 --pure",
    "amp float16": "--steps 40 --fp16",
}
WHOLE = {  # each to its end
    "char_gpt": "",
    "mingpt": "--num-workers 1",
    "makemore": "",
    "makemore_mlp": "",
    "sine_lbfgs": "",
    "word_lm": "",
    "word_lm manual": "--manual",
    "dcgan": "",
    "vae": "",
    "actor_critic reinforce": "--reinforce",
    "digits_cnn": "",
    "ddpm": "",
    "self_supervised": "",
    "self_supervised simclr": "--simclr",
    "ppo": "",
    "gcn": "",
    "detection": "",
    "notebook": "",
    "fine_tune": "",
    "fine_tune cosine": "--schedule cosine",
    "amp bfloat16": "--pure",
    "amp float16": "--fp16",
    "compiled": "--steps 60 --backend eager",
    "compiled whole": "--steps 60 --backend eager --whole",
}
BY_HAND = ("makemore_mlp", "word_lm manual")  # no torch.optim: there is nothing to watch, which is said


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def plainly(script, args):
    """A process that runs a script as Python does, but for the import of torch."""

    def work():
        sys.argv = [str(script), *args]
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")

    return fork(work)


@pytest.mark.parametrize("case", RUNS)
def test_a_public_script_says_and_computes_the_same_when_watched(case):
    script = SCRIPTS / f"{case.split()[0]}.py"
    args = RUNS[case].split()
    plain = plainly(script, [*args, "--save", "plain.pt"])
    assert plain.wait() == 0, plain.stderr
    watched = start("run", "--out", "here", script, *args, "--save", "watched.pt")
    assert watched.wait() == 0, watched.stderr
    assert said(watched.stdout) == said(plain.stdout)
    assert len(said(plain.stdout)) > 0
    same_tensors("plain.pt", "watched.pt")
    no_alarm(watched.stderr, plain.stderr, by_hand=case in BY_HAND)
    if case not in BY_HAND:
        assert Run("here").outcome == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("case", WHOLE)
def test_a_public_script_that_runs_to_its_end_raises_no_alarm(case):
    silent_and_unchanged(SCRIPTS / f"{case.split()[0]}.py", WHOLE[case].split(), by_hand=case in BY_HAND)


@pytest.mark.slow
@pytest.mark.parametrize("leave", [[], ["--leave"]])
def test_two_ranks_under_torchrun_compute_the_same_and_write_a_log_each(leave):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--no-python"]
    script = [SCRIPTS / "ddp.py", *leave, "--save"]
    plain = process(*torchrun, sys.executable, *script, "plain.pt")
    watched = process(*torchrun, sys.executable, "-c", WATCHED, "run", *script, "watched.pt")
    assert (plain.returncode, watched.returncode) == (0, 0), plain.stderr + watched.stderr
    assert watched.stdout == plain.stdout
    same_tensors("plain.pt", "watched.pt")
    (run,) = (Run(folder) for folder in Path("unstuck-runs").iterdir())
    assert [rank.steps for rank in run.ranks.values()] == [256, 256]
    memory = run.memory()
    assert {t.shares for t in memory.tapes} == ({1} if memory.apart else {2})  # where one rank is slow
    assert "PROVED" not in watched.stderr
    assert "SHOWN" not in watched.stderr


# What a script may do to its process

LOOP = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

def train(steps=5):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(torch.ones(4, 3)) - 1).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()
"""

HABITS = {  # run in forks of this process
    "sys.exit(3)": "import sys; print(train()); sys.exit(3)",
    "os._exit": "import os, sys; print(train()); sys.stdout.flush(); os._exit(7)",
    "a fork that ends at the end": """
        import os
        child = os.fork()
        if child:
            os.waitpid(child, 0)
        print(train())
    """,
    "a fork that exits": """
        import os, sys
        if not os.fork():
            train(50)
            sys.exit(5)
        print(os.wait()[1], train())
    """,
    "signals": """
        import os, signal
        signal.signal(signal.SIGTERM, lambda *_: print("term"))
        signal.signal(signal.SIGINT, lambda *_: print("int"))
        train()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        print(train())
    """,
    "an alarm": """
        import signal, time
        signal.signal(signal.SIGALRM, lambda *_: print("alarm"))
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        train()
        time.sleep(0.1)
        print(train())
    """,
    "another folder": """
        import os
        from pathlib import Path
        os.makedirs("there", exist_ok=True)
        os.chdir("there")
        Path("loss").write_text(str(train()))
    """,
    "a folder that is gone": """
        import os
        os.makedirs("gone")
        os.chdir("gone")
        train()
        os.rmdir("../gone")
        print(train())
    """,
    "logging": """
        import logging, sys
        logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(name)s %(message)s", force=True)
        logging.captureWarnings(True)
        logging.info("loss %s", train())
    """,
    "warnings are errors": "import warnings; warnings.simplefilter('error'); print(train())",
    "stdout is teed": """
        import sys
        class Tee:
            def __init__(self, to):
                self.to = to
            def write(self, text):
                self.to.write(text.upper())
            def flush(self):
                self.to.flush()
        sys.stdout = Tee(sys.stdout)
        print("loss", train())
    """,
    "gradients off at the end": "print(train()); torch.set_grad_enabled(False)",
    "another default device": "print(train()); torch.set_default_device('meta')",
    "another default dtype": "torch.set_default_dtype(torch.float64); model.double(); print(train())",
    "a thread trains": """
        import threading
        thread = threading.Thread(target=lambda: print(train()))
        thread.start()
        thread.join()
    """,
    "fork of multiprocessing": """
        import multiprocessing as mp
        context = mp.get_context("fork")
        def work(queue):
            queue.put((__name__, train(50)))
        if __name__ == "__main__":
            train()
            queue = context.SimpleQueue()
            child = context.Process(target=work, args=(queue,))
            child.start()
            print(queue.get(), train())
            child.join()
    """,
}
PROCESSES = {  # what is about the process itself, its start or its end
    "stdout is a file": """
        import sys
        sys.stdout = sys.stderr = open("out.txt", "w")
        print(train())
    """,
    "reads stdin": "import sys; print(input('name? '), sys.stdin.read(), train())",
    "excepthook": """
        import sys
        sys.excepthook = lambda kind, *_: print("mine:", kind.__name__)
        train()
        raise KeyError(1)
    """,
    "excepthook that exits": """
        import sys
        def hook(*_):
            print("mine")
            sys.exit(9)
        sys.excepthook = hook
        train()
        raise KeyError(1)
    """,
    "excepthook that fails": """
        import sys
        def hook(*_):
            1 / 0
        sys.excepthook = hook
        print(train())
        raise KeyError(1)
    """,
    "atexit": "import atexit, sys; atexit.register(lambda: print('bye', sys.argv[0][-8:])); print(train())",
    "atexit in another folder": """
        import atexit, os, pickle
        from pathlib import Path
        class Mine:
            pass
        @atexit.register
        def save():
            Path("end").write_bytes(pickle.dumps(Mine()))
            print(os.getcwd()[-5:])
        os.makedirs("there", exist_ok=True)
        os.chdir("there")
        print(train())
    """,
    "a spawned child": """
        import multiprocessing as mp
        context = mp.get_context("spawn")
        def work(queue):
            train()
            queue.put((__name__, train()))
        if __name__ == "__main__":
            queue = context.SimpleQueue()
            child = context.Process(target=work, args=(queue,))
            child.start()
            print(queue.get(), train())
            child.join()
    """,
    "a pool": """
        import multiprocessing as mp
        from concurrent.futures import ProcessPoolExecutor
        def work(k):
            return k + round(train(), 6)
        if __name__ == "__main__":
            train()
            with ProcessPoolExecutor(1, mp.get_context("spawn")) as pool:
                print(list(pool.map(work, range(3))))
    """,
    "itself again": """
        import subprocess, sys
        if len(sys.argv) == 1:
            train()
            print(subprocess.run([sys.executable, sys.argv[0], "again"], capture_output=True, text=True).stdout)
        else:
            print(train())
    """,
}


def same_habit(script, plain, watched):
    """`plain` and `watched` run the script and give status, stdout and stderr."""
    code, stdout, stderr = plain()
    written = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file() and "process-" not in str(path)}
    status, out, err = watched()
    assert (status, out) == (code, stdout), err
    assert {path: path.read_bytes() for path in written} == written
    assert err.startswith(stderr)
    ours = err.removeprefix(stderr)
    assert "Warning" not in ours
    assert "failed" not in ours
    assert ("No fault found" in ours) == ("os._exit" not in script.read_text())
    (folder,) = Path("unstuck-runs").iterdir()  # one run, where the command was given
    run = Run(folder)
    steps = [e["step"] for e in run.of("step")]
    # one process has written it; os._exit takes what waits to be written along
    assert steps in (list(range(1, 6)), list(range(1, 11))) or "os._exit" in script.read_text()
    assert run.of("fact") == []


@pytest.mark.parametrize("habit", HABITS)
def test_what_a_script_does_has_the_effect_that_it_has_unwatched(habit):
    script = write("a folder/train it.py", LOOP + textwrap.dedent(HABITS[habit]))

    def ended(running):
        return running.wait(), running.stdout, running.stderr

    same_habit(script, lambda: ended(plainly(script, [])), lambda: ended(start("run", script)))


@pytest.mark.slow
@pytest.mark.parametrize("habit", PROCESSES)
def test_what_a_script_does_to_its_process_has_the_effect_that_it_has_unwatched(habit):
    script = write("a folder/train it.py", LOOP + textwrap.dedent(PROCESSES[habit]))

    def ended(*args):
        done = process(sys.executable, *args, stdin="Ada\nrest")
        return done.returncode, done.stdout, done.stderr

    same_habit(script, lambda: ended(script), lambda: ended("-c", WATCHED, "run", script))


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_the_workers_of_a_loader_that_train_themselves_write_no_line(context):
    script = write(
        "train.py",
        f"""
import torch
from torch import nn
class Data(torch.utils.data.Dataset):
    def __init__(self):
        self.model = nn.Linear(3, 3)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
    def __len__(self):
        return 16
    def __getitem__(self, k):
        self.optimizer.zero_grad()
        self.model(torch.ones(3)).sum().backward()
        self.optimizer.step()
        return torch.ones(3) * k
if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    loader = torch.utils.data.DataLoader(Data(), batch_size=4, num_workers=2, multiprocessing_context="{context}")
    for x in loader:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
""",
    )
    code, _, stderr = command("run", "--out", "here", script)
    assert code == 0, stderr
    run = Run("here")
    assert [e["step"] for e in run.of("step")] == [1, 2, 3, 4]
    assert len(run.of("optimizer")) == 1
    assert run.of("fact") == []


# Modules

SEES = """
'''A module with a docstring.'''
import inspect, os, pickle, sys
from dataclasses import dataclass
try:
    from . import sibling
except ImportError:
    import sibling

@dataclass
class Point:
    x: int

def show(*things):
    print(*things, sep='\\n')

if __name__ == "__main__":
    show(__name__, __doc__, __file__, sys.argv, sys.path[0], os.getcwd(), __package__, __spec__.name, __spec__.origin)
    show(sorted(globals()), sys.modules["__main__"].Point is Point, sibling.WORD, Point.__module__, __cached__)
    show(pickle.loads(pickle.dumps(Point(3))), inspect.getsource(show), type(__loader__).__name__, __builtins__)
"""


def as_module(module, *args):
    """Status, stdout and stderr of a module run by Python, and watched; without the lines of `python -m` itself."""
    done = process(sys.executable, "-m", module, *args)
    lines = [line for line in done.stderr.splitlines() if "<frozen runpy>" not in line]
    running = fork(lambda: sys.exit(run_module(module, args).status))
    return (done.returncode, done.stdout, lines), (running.wait(), running.stdout, running.stderr.splitlines())


@pytest.mark.parametrize("module", ["task", "pack.task", "pack.inner.task", "pack"])
def test_a_module_sees_what_python_shows_it(module):
    for folder in ("", "pack", "pack/inner"):
        write(Path(folder) / "sibling.py", "WORD = 'found'")
        write(Path(folder) / "task.py", SEES)
        if folder:
            write(Path(folder) / "__init__.py", "import sys; print('imported with', sys.argv)")
    write("pack/__main__.py", SEES)
    plain, watched = as_module(module, "-a", "b c")
    assert watched == plain
    assert plain[0] == 0


def test_a_module_that_trains_is_watched_and_ends_as_it_would():
    write("pack/__init__.py", "")
    write("pack/net.py", LOOP)
    write("pack/train.py", "import sys\nfrom .net import train\nprint(train())\nsys.exit(int(sys.argv[1]))")
    before = sys.argv, sys.path[:], sys.modules["__main__"]
    try:
        done = run_module("pack.train", ["3"], folder=Path("here"))
    finally:
        for name in ("pack.net", "pack"):
            sys.modules.pop(name, None)
    assert (done.status, done.interrupted, done.run.steps) == (3, False, 5)
    assert (done.run.header["script"], done.run.header["argv"]) == ("pack.train", ["3"])
    assert (sys.argv, sys.path, sys.modules["__main__"]) == before


@pytest.mark.parametrize("ending", ["1 / 0", "raise SystemExit('gone')", "import no_such_thing", "raise ValueError(1)"])
def test_a_module_that_fails_shows_its_own_lines_only(ending):
    write("pack/__init__.py", "")
    write("pack/train.py", ending)
    plain, watched = as_module("pack.train")
    assert watched == plain
    assert plain[0] == 1


@pytest.mark.parametrize("ending", ["import sys; sys.exit(4)", "raise OSError('gone')"])
def test_a_package_that_fails_on_the_way_ends_as_it_does_unwatched(ending):
    write("pack/__init__.py", "print('importing')\n" + ending)
    write("pack/train.py", "print('never')")
    plain, watched = as_module("pack.train")
    assert watched == plain
    assert not Path("unstuck-runs").exists()


NOT_RUN = ["nowhere", "pack.nowhere", "nowhere.at", "pack", "torn", ".train", "", "__main__", "sys"]


@pytest.mark.parametrize("module", NOT_RUN)
def test_a_module_that_cannot_be_run_is_one_sentence_before_anything_runs(module):
    write("pack/__init__.py", "")
    write("torn.py", "for\n")
    with pytest.raises(ValueError, match="module") as refusal:
        run_module(module)
    assert "\n" not in str(refusal.value)
    assert not Path("unstuck-runs").exists()
    sys.modules.pop("pack", None)


@pytest.mark.slow
def test_the_child_of_a_module_that_spawns_imports_it_by_its_name():
    write("pack/__init__.py", "")
    write("pack/net.py", LOOP)
    spawns = textwrap.dedent(PROCESSES["a spawned child"])
    write("pack/train.py", "from .net import train\n" + spawns)
    (code, out, _), watched = as_module("pack.train")
    assert watched[:2] == (code, out)
    assert "__mp_main__" in out
