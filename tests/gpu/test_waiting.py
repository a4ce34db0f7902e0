"""In an ordinary step the watcher does not wait for the GPU: readings stay there until they are read some at a time."""

import contextlib
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from gpu_programs import PROGRAMS

import unstuck

STEPS = 1500
# These wait by themselves, or copy from the CPU: what is the watcher's share cannot be told.
WAITING = {"float16 with a scaler", "embedding on the cpu", "data on the cpu"}


@contextlib.contextmanager
def waits(device):
    """The places that wait for the device inside, as torch tells them."""
    found = []
    if device.type != "cuda":
        yield found
        return
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, _, file, line, *__: (
            found.append(f"{Path(file).name}:{line}") if "synchroniz" in str(message) else None
        )
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", sorted(set(PROGRAMS) - WAITING))
def test_only_recording_and_reading_back_wait(name, device, tmp_path):
    torch.manual_seed(0)
    step, _ = PROGRAMS[name](device)
    step(0)  # what torch sets up at a first step may wait
    with waits(device) as found:
        step(1)
    own = set(found)  # where the program waits by itself
    count = STEPS if device.type == "cuda" else STEPS // 10
    ordinary, stated = Counter(), Counter()
    kinds = Counter()
    with unstuck.watch(folder=tmp_path / "run") as run:
        watcher = run._live
        step, _ = PROGRAMS[name](device)
        for k in range(count):
            heard, steps, waiting = run.heard, watcher.steps, len(watcher._journal._waiting)
            with waits(device) as found:
                step(k)
            read = len(watcher._journal._waiting) != waiting + watcher.steps - steps
            kind = "recorded" if run.heard > heard else "read" if read else ""
            kinds[kind or "ordinary"] += 1
            ours = [place for place in found if place not in own]
            kept = [place for place in ours if place.startswith("_state.py")]  # a rate on the device, with the weights
            stated.update(ours if kind else kept)
            ordinary.update([] if kind else [place for place in ours if place not in kept])
    print(f"\n{name}: steps {dict(kinds)}; waits at {dict(stated.most_common(12))}")
    assert ordinary == {}
    assert kinds["ordinary"] > count // 3 or device.type != "cuda"
    assert not [e for e in run.of("fact") if e["code"] == "watcher-failed"]
    steps, losses = run.series("loss")
    assert len(losses) >= count
    assert steps == sorted(steps)
