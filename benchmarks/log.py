"""What the log costs: a line to write, a million steps to read, a step on disk and in memory.

python benchmarks/log.py                 measures, and writes benchmarks/log.json
python benchmarks/log.py --steps 100000  with a shorter log, and writes nothing

Lines are written in rounds, in turn with the plain way, which encodes a record with json.dumps and writes it at once;
the fastest round of each counts, since other work on the machine only ever adds. A log is read in a process of its own:
as a Run, with the series of the loss, and as a list of dictionaries. Times are those of one core (the process's own and
the system's on its behalf), so that other work on the machine does not count; reading also has those of the clock.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from environment import environment
from unstuck.record import Run
from unstuck.record._log import NAME, Log, read_log, strict

STEPS = 1_000_000
ROUNDS, LINES = 7, 20_000
PLACE = Path(__file__).with_suffix(".json")

Writer = Callable[..., None]


def records(count: int) -> Iterator[dict[str, Any]]:
    """Steps as the watcher writes them."""
    draw = random.Random(0).random
    for step in range(1, count + 1):
        more = {} if step % 10 else {"update_ratio": draw() * 1e-3, "weight_norm": 10 * draw()}
        yield {
            "step": step,
            "time": 0.005 * (step + draw()),
            "optimizer": 0,
            "lr": 0.001,
            "grad_norm": draw(),
            "loss": draw(),
            "backwards": 1,
            **more,
        }


def plainly(folder: Path) -> tuple[Writer, Callable[[], None]]:
    """A line at once, by the standard library alone."""
    file = (folder / "plain.jsonl").open("ab", buffering=0)

    def write(kind: str, **values: Any) -> None:
        line = json.dumps({"kind": kind, **strict(values)}, allow_nan=False, ensure_ascii=False)
        file.write(line.encode(errors="backslashreplace") + b"\n")

    return write, file.close


def as_log(folder: Path) -> tuple[Writer, Callable[[], None]]:
    log = Log(folder)
    return log.write, log.close


def microseconds(way: Callable[[Path], tuple[Writer, Callable[[], None]]], steps: list[dict[str, Any]]) -> float:
    """Of one line in the mean, with the system calls."""
    with tempfile.TemporaryDirectory() as folder:
        write, close = way(Path(folder))
        began = time.process_time()
        for values in steps:
            write("step", **values)
        close()
        return 1e6 * (time.process_time() - began) / len(steps)


def resident(peak: str = "VmRSS") -> int:
    """Bytes of this process, as Linux tells them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(peak))


def read(folder: Path, way: str) -> dict[str, float]:
    """Seconds, and bytes a step of what stays and of the most that there was, of one way to read."""
    before = resident()
    began, clock = time.process_time(), time.perf_counter()
    if way == "run":
        kept = Run(folder)
        steps = kept.steps
        assert len(kept.series("loss")[1]) == steps
    else:
        kept, _ = read_log(folder / NAME)
        steps = len(kept)
    return {
        "core_seconds": round(time.process_time() - began, 2),
        "clock_seconds": round(time.perf_counter() - clock, 2),
        "kept_bytes_a_step": round((resident() - before) / steps),
        "peak_bytes_a_step": round((resident("VmHWM") - before) / steps),
    }


def measure(count: int) -> dict[str, Any]:
    steps = list(records(LINES))
    ways = {"log": as_log, "plain": plainly}
    rounds = [{name: microseconds(way, steps) for name, way in ways.items()} for _ in range(ROUNDS)]
    lines = {name: min(one[name] for one in rounds) for name in ways}
    with tempfile.TemporaryDirectory() as name:
        log = Log(Path(name))
        for values in records(count):
            log.write("step", **values)
        log.close()
        size = (Path(name) / NAME).stat().st_size
        reads = {way: json.loads(told(name, way)) for way in ("run", "dictionaries")}
    return {
        "steps": count,
        "microseconds_a_line": {name: round(us, 2) for name, us in lines.items()},
        "disk_bytes_a_step": round(size / count),
        "read": reads,
    }


def told(folder: str, way: str) -> str:
    return subprocess.run(
        [sys.executable, __file__, "--read", folder, way], check=True, capture_output=True, text=True
    ).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--read", nargs=2, metavar=("FOLDER", "WAY"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.read:
        print(json.dumps(read(Path(given.read[0]), given.read[1])))
        return
    load = os.getloadavg()[0]
    result = {**measure(given.steps), "environment": environment(load)}
    print(json.dumps(result, indent=1))
    if given.steps == STEPS:
        PLACE.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
