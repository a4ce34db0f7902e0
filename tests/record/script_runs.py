"""Scripts run as they are, plain and watched, in processes of their own; and what must then be the same."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tests.processes import one_sentence

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "clinic" / "scripts"
WATCHED = "import sys; from unstuck.cli import main; sys.exit(main())"


def tensors(x):
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, dict):
        for value in x.values():
            yield from tensors(value)
    elif isinstance(x, (list, tuple)):
        for value in x:
            yield from tensors(value)


def same_tensors(one, other):
    one, other = ([*tensors(torch.load(path, weights_only=False))] for path in (one, other))
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def said(text):
    """What a script prints, without its timings, which stand in lines of their own."""
    return [line for line in text.splitlines() if not line.startswith("time ")]


def no_alarm(stderr, plain, *, by_hand):
    """What the watched run says beside what the script says: that all is well, in three lines."""
    ours = stderr.removeprefix(plain)
    if by_hand:
        assert "no step of a torch.optim optimiser was seen" in one_sentence(ours)
        return
    assert "No fault found in" in ours, ours
    assert "Warning" not in ours
    assert not any(word in ours for word in ("PROVED", "SHOWN", "SUSPECT", "CANNOT TELL", "Traceback", "failed"))


def process(*args, env=None, stdin=""):
    variables = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(list(map(str, args)), capture_output=True, text=True, env=variables, input=stdin)


def silent_and_unchanged(script, args, *, by_hand=False):
    """Runs a script to its end twice, as Python does and watched."""
    ways = (script, *args, "--save", "plain.pt"), ("-c", WATCHED, "run", script, *args, "--save", "watched.pt")
    with ThreadPoolExecutor() as pool:  # beside each other: a framework takes long to import
        plain, watched = pool.map(lambda way: process(sys.executable, *way), ways)
    assert (plain.returncode, watched.returncode) == (0, 0), plain.stderr + watched.stderr
    assert said(watched.stdout) == said(plain.stdout)
    assert len(said(plain.stdout)) > 0
    same_tensors("plain.pt", "watched.pt")
    no_alarm(watched.stderr, plain.stderr, by_hand=by_hand)
