"""What watching costs on healthy programs.

python benchmarks/watch.py                              every program, the memory of a large model, the peers
python benchmarks/watch.py --programs gru,loader --parts programs
python benchmarks/watch.py --quick                      short runs; nothing is kept
python benchmarks/watch.py --profile gru                where a watched run spends its time

The overhead is that of one watched training in which the watcher is paused at every other block of 0.1 s: what the
blocks with it take over those without, less one, from the first step on, by processor time and by the clock, and with
its standard error. Two processes of their own can be compared as well, and take turns so that other work on the machine
slows both alike; but where the memory of each comes to lie alone makes one some percent quicker than its twin, watched
or not. So a pair of them only shows that both compute the same, and what start and stop take. Numbers go to watch.json
beside this file, by program.
"""

import argparse
import contextlib
import cProfile
import gc
import json
import math
import multiprocessing
import os
import pstats
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

import unstuck
import watch_peers
from environment import environment
from healthy import PROGRAMS
from watch_peers import ALL

PLACE = Path(__file__).with_suffix(".json")
PARTS = ["programs", "memory", "peers"]
BLOCK = 0.1  # seconds of a turn
CLASSES = {"steps of 5 ms and more": (5.0, math.inf), "steps of 0.5 to 5 ms": (0.5, 5.0)}
PROMISED = {  # by class: statistic and the share that it may reach
    "steps of 5 ms and more": {"median": 0.02, "95th percentile": 0.05},
    "steps of 0.5 to 5 ms": {"median": 0.05},
}
Row = dict[str, Any]


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    if given.profile:
        profile(given.profile, given.seconds)
        return
    around = {"when": datetime.now(UTC).isoformat(timespec="seconds")}
    around |= environment(os.getloadavg()[0], "numpy", "scikit-learn")
    found: dict[str, Row] = {}
    for name in given.programs if "programs" in given.parts else ():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = program(name, Path(folder), given) | {"environment": around}
        print(f"{name}: {_percent(found[name]['overhead'])}", file=sys.stderr, flush=True)
        keep(given, programs={name: found[name]})
    memory = resident() if "memory" in given.parts else {}
    keep(given, memory=memory)
    peers: dict[str, dict[str, Row]] = {}
    for kind, name, row in watch_peers.measured(given.programs, given.peers if "peers" in given.parts else []):
        print(f"{kind}, {name}: {row}", file=sys.stderr, flush=True)
        peers.setdefault(kind, {})[name] = row
        keep(given, peers=peers)
    console = Console(width=None if sys.stdout.isatty() else 170)
    for shown in (table(found), peers_table(found, peers), *_memory_line(memory), *verdicts(found)):
        console.print(shown, highlight=False)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=_among(PROGRAMS), default=list(PROGRAMS), help=f"of {','.join(PROGRAMS)}")
    parser.add_argument("--peers", type=_among(watch_peers.PEERS), default=list(watch_peers.PEERS), help="or none")
    parser.add_argument("--parts", type=_among(PARTS), default=PARTS, help=f"of {','.join(PARTS)}")
    parser.add_argument("--repeats", type=int, default=1, help="watched runs of each program")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each, half of them paused")
    parser.add_argument(
        "--quick", action="store_true", help="one run of 8 seconds, no memory, no peers; nothing is kept"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", choices=list(PROGRAMS), help="profile a watched run of one program instead")
    given = parser.parse_args()
    if given.quick:
        given.repeats, given.seconds, given.parts = 1, 8.0, ["programs"]
    return given


def _among(names: Any) -> Any:
    def chosen(text: str) -> list[str]:
        parts = [] if text == "none" else text.split(",")
        wrong = [p for p in parts if p not in names]
        if wrong:
            raise argparse.ArgumentTypeError(f"some of {','.join(names)} were needed, got {wrong[0]}")
        return parts

    return chosen


def program(name: str, folder: Path, given: argparse.Namespace) -> Row:
    """The watched runs of one program, a pair that is compared step by step, and what its tapes cost."""
    (trial,) = in_turns(name, 40, 40, [None])
    step = statistics.median(trial["wall"][10:])
    block = max(1, round(BLOCK / step))
    runs, loads = [], []
    for k in range(given.repeats):
        loads.append(round(os.getloadavg()[0], 2))
        runs.append(apart(alternated, name, folder / f"{k}", given.seconds, block))
    steps = max(200, min(4000, round(given.seconds / 8 / step)))
    both = in_turns(name, steps, block, [None, folder / "pair"])
    bare, every = in_turns(name, 200, block, [None, folder / "every"], budget=1e9)
    return {
        "step_ms": statistics.median(r["plain_ms"] for r in runs),
        "overhead": statistics.median(r["cpu"] for r in runs),
        "runs": runs,
        "loads": loads,
        "pair": pair(*both, folder / "pair"),
        "tape": apart(tape, name, every, bare, folder / "every"),
    }


def alternated(name: str, folder: Path, seconds: float, block: int) -> Row:
    """One watched run, paused at every other block: seconds of both kinds of blocks, and what the watcher says."""
    with tempfile.TemporaryDirectory() as warm:  # what a process does once belongs to no run
        run(name, 10, Path(warm) / "run", None)
    torch.manual_seed(0)
    random.seed(0)
    gc.collect()
    spent: dict[bool, list[tuple[float, float]]] = {True: [], False: []}  # by whether it watches: by both clocks
    with unstuck.watch(folder=folder) as watched:
        step = PROGRAMS[name]()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            first = len(spent[True]) % 2 == 0  # A B B A: neither is always the second
            for watches in (first, not first):
                with contextlib.nullcontext() if watches else watched.paused():
                    wall, cpu = time.perf_counter(), time.process_time()
                    for _ in range(block):
                        step()
                    spent[watches].append((time.process_time() - cpu, time.perf_counter() - wall))
    on, off = (np.array(spent[watches]) for watches in (True, False))
    half = len(on) // 2
    ratios = np.log(on[:, 0] / off[:, 0])
    return {
        "cpu": on[:, 0].sum() / off[:, 0].sum() - 1,
        "wall": on[:, 1].sum() / off[:, 1].sum() - 1,
        "cpu_second_half": on[half:, 0].sum() / off[half:, 0].sum() - 1,
        "cpu_median_block": np.median(on[:, 0]) / np.median(off[:, 0]) - 1,
        "error": ratios.std(ddof=1) / math.sqrt(len(ratios)),
        "plain_ms": 1e3 * float(np.median(off[:, 1])) / block,
        "said": watched.overhead,
        "steps": watched.steps,
        "heard": watched.heard,
        "looked": watched.looked,
    }


def in_turns(name: str, steps: int, block: int, folders: Sequence[Path | None], **options: float) -> list[Row]:
    """The same training in one process for each folder (None: unwatched), one block of steps after the other."""
    processes = [child(run, name, steps, folder, block=block, **options) for folder in folders]
    order = processes
    for _ in range(0, steps, block):
        for process in order:
            process.send("go")
            said(process)
        order = order[::-1]  # A B B A: neither is always the second
    for process in processes:
        process.send("end")
    return [said(process) for process in processes]


def child(function: Callable[..., Row], *args: Any, **options: Any) -> Connection:
    """Starts `function(*args, turns, **options)` in a fork, and waits until it is ready."""
    ours, theirs = multiprocessing.Pipe()

    def work() -> None:
        ours.close()
        theirs.send(function(*args, theirs, **options))

    multiprocessing.get_context("fork").Process(target=work, daemon=True).start()
    theirs.close()
    said(ours)
    return ours


def said(process: Connection) -> Any:
    try:
        return process.recv()
    except EOFError:
        raise SystemExit("a run ended early: see above") from None


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """What the function finds in a process of its own: this one stays as new."""

    def work(turns: Connection) -> Any:
        turns.send("ready")
        return function(*args)

    return said(child(work))


def run(
    name: str, steps: int, folder: Path | None, turns: Connection | None, *, block: int = 0, **options: float
) -> Row:
    """One run: seconds of each step by both clocks, losses, and what the watcher says of itself.

    With `turns` it waits before each block of steps; the watcher does not count the waiting.
    """
    if turns is not None:
        with tempfile.TemporaryDirectory() as warm:  # what a process does once belongs to no run
            run(name, 10, Path(warm) / "run", None)
        turns.send("ready")
    torch.manual_seed(0)
    random.seed(0)
    gc.collect()
    wall, cpu, losses = [], [], []
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        watched = None if folder is None else stack.enter_context(unstuck.watch(folder=folder, **options))
        start = time.perf_counter() - began
        step = PROGRAMS[name]()
        for k in range(steps):
            if turns is not None and k % block == 0:
                with contextlib.nullcontext() if watched is None else watched.paused():
                    if k:
                        turns.send("done")
                    turns.recv()
            w, c = time.perf_counter(), time.process_time()
            losses.append(step())
            cpu.append(time.process_time() - c)
            wall.append(time.perf_counter() - w)
        if turns is not None:
            with contextlib.nullcontext() if watched is None else watched.paused():
                turns.send("done")
                turns.recv()
        began = time.perf_counter()
    stop = time.perf_counter() - began
    row = {"wall": wall, "cpu": cpu, "losses": [float(x) for x in losses], "start": start, "stop": stop}
    return row if watched is None else row | {"said": watched.overhead, "heard": watched.heard, "steps": watched.steps}


def pair(plain: Row, watched: Row, folder: Path) -> Row:
    first, last = (statistics.fmean(losses) for losses in (plain["losses"][:20], plain["losses"][-20:]))
    return {
        "cpu": sum(watched["cpu"]) / sum(plain["cpu"]) - 1,
        "steps": len(plain["losses"]),
        "worst_extra_ms": 1e3 * (max(watched["cpu"]) - max(plain["cpu"])),
        "start_s": watched["start"],
        "stop_s": watched["stop"],
        "log_mb": (folder / "log.jsonl").stat().st_size / 1e6,
        "folder_mb": sum(p.stat().st_size for p in folder.iterdir()) / 1e6,
        "identical": watched["losses"] == plain["losses"] and watched["steps"] >= len(plain["losses"]),
        "loss": [first, last],
    }


def tape(name: str, every: Row, bare: Row, folder: Path) -> Row | None:
    """What one tape costs to record and to replay, in steps; None where no step was recorded."""
    memory = unstuck.Run(folder).memory()
    if memory is None or not memory.tapes:
        return None
    step = PROGRAMS[name]()
    values = [w.detach().clone().requires_grad_(w.is_floating_point()) for w in memory.states[-1].weights]
    steps, replays = [], []
    for kept in memory.tapes[-20:]:
        c = time.process_time()
        step()
        steps.append(time.process_time() - c)
        c = time.process_time()
        torch.autograd.grad(kept.replay(values), values, allow_unused=True)
        replays.append(time.process_time() - c)
    return {
        "recorded": every["heard"],
        "record": (sum(every["cpu"]) - sum(bare["cpu"])) / max(every["heard"], 1) / statistics.fmean(bare["cpu"]),
        "replay": statistics.median(replays) / statistics.median(steps),
        "kept": len(memory.tapes),
        "kb": statistics.median(t.bytes for t in memory.tapes) / 1e3,
    }


def large(kind: str) -> Row:
    """The peak of resident memory in training 20 million parameters with Adam, before and after the end of the run."""
    torch.manual_seed(0)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        block = contextlib.ExitStack()
        run = block.enter_context(unstuck.watch(folder=Path(folder) / "run")) if kind == "watched" else None
        layers = [nn.Linear(784, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10)]
        model = nn.Sequential(*layers)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        for _ in range(160):
            x, y = torch.randn(16, 784), torch.randint(0, 10, (16,))
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        training = _peak()
        block.close()
        size = sum(p.nbytes for p in model.parameters())
        return {
            "parameters": size // 4,
            "training": training / size,
            "end": _peak() / size,
            "heard": None if run is None else run.heard,
        }


def _peak() -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def resident() -> Row:
    """Extra memory in multiples of the parameters, while training and with saving at the end."""
    plain, watched = (apart(large, kind) for kind in ("plain", "watched"))
    return {
        "parameters": plain["parameters"],
        "unwatched": plain["end"],
        "extra_training": watched["training"] - plain["training"],
        "extra_at_the_end": watched["end"] - plain["end"],
        "heard": watched["heard"],
    }


def of_class(found: dict[str, Row], name: str) -> list[Row]:
    low, high = CLASSES[name]
    return [r for row in found.values() if low <= row["step_ms"] < high for r in row["runs"]]


def verdicts(found: dict[str, Row]) -> list[str]:
    lines = []
    for name in CLASSES:
        runs = of_class(found, name)
        if not runs:
            continue
        for statistic, promised in PROMISED[name].items():
            shares = {clock: reached(runs, clock, statistic) for clock in ("cpu", "wall")}
            word = "kept" if shares["cpu"] <= promised else "missed"
            lines.append(
                f"{name}, {len(runs)} runs: {statistic} {_percent(shares['cpu'])} by processor time,"
                f" {_percent(shares['wall'])} by the clock; promised {100 * promised:.0f} %: {word}"
            )
    different = [n for n, row in found.items() if not row["pair"]["identical"]]
    lines.append(f"losses differ, watched and unwatched: {', '.join(different) or 'nowhere, bit for bit'}")
    rising = [n for n, row in found.items() if n != "adversarial" and row["pair"]["loss"][1] > row["pair"]["loss"][0]]
    return [*lines, *(f"the loss of {n} does not fall: its figures are not those of a healthy run" for n in rising)]


def reached(runs: list[Row], clock: str, statistic: str) -> float:
    values = [r[clock] for r in runs]
    return float(np.quantile(values, 0.5 if statistic == "median" else 0.95))


def table(found: dict[str, Row]) -> Table:
    shown = Table(title="Watching healthy programs", box=box.SIMPLE)
    heads = ("program", "step", "processor time", "±", "clock", "2nd half", "median block", "it says", "start", "stop")
    for head in (*heads, "worst step", "looked at", "recorded", "record a tape", "replay it", "same"):
        shown.add_column(head, justify="left" if head == "program" else "right")
    for name, row in found.items():
        middle = {k: statistics.median(r[k] for r in row["runs"]) for k in row["runs"][0]}
        cost, both = row["tape"], row["pair"]
        shown.add_row(
            name,
            f"{row['step_ms']:.2f} ms",
            _percent(middle["cpu"]),
            f"{100 * middle['error']:.1f}",
            *(_percent(middle[k]) for k in ("wall", "cpu_second_half", "cpu_median_block", "said")),
            f"{1e3 * both['start_s']:.0f} ms",
            f"{1e3 * both['stop_s']:.0f} ms",
            f"{both['worst_extra_ms']:+.0f} ms",
            f"{middle['looked']:.0f} of {middle['steps']:.0f}",
            f"{middle['heard']:.0f}",
            *(("none", "") if cost is None else (f"{cost[k]:.2f} steps" for k in ("record", "replay"))),
            "yes" if both["identical"] else "NO",
        )
    return shown


def peers_table(found: dict[str, Row], peers: dict[str, dict[str, Row]]) -> Table | str:
    """The peers' seconds and ours as multiples of the unwatched run's."""
    names = sorted({program for rows in peers.values() for program in rows}, key=[*PROGRAMS, ALL].index)
    if not names:
        return "no peer was measured"
    shown = Table(title="Processor time of the steps, as a multiple of the unwatched run's", box=box.SIMPLE)
    for head in ("program", "unstuck", *peers):
        shown.add_column(head, justify="left" if head == "program" else "right")
    for name in names:
        ours = f"{1 + found[name]['overhead']:.3f} ×" if name in found else ""
        shown.add_row(name, ours, *(_cell(rows.get(name)) for rows in peers.values()))
    return shown


def _cell(row: Row | None) -> str:
    if row is None or "failed" in row:
        return "" if row is None else row["failed"]
    return f"{row['ratio']:.2f} ×" + ("" if row["identical"] else ", other losses")


def _memory_line(memory: Row) -> list[str]:
    if not memory:
        return []
    extra = max(memory["extra_training"], memory["extra_at_the_end"])
    return [
        f"memory beyond the unwatched run's, in parameters ({memory['parameters'] / 1e6:.0f} million, Adam):"
        f" {memory['extra_training']:+.2f} while training, {memory['extra_at_the_end']:+.2f} with the end;"
        f" promised +1.2: {'kept' if extra <= 1.2 else 'missed'}"
    ]


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %"


def profile(name: str, seconds: float) -> None:
    """Prints the functions in which a watched run spends most of its own time."""
    steps = max(50, round(seconds / statistics.median(run(name, 30, None, None)["wall"][10:])))
    own = cProfile.Profile()
    with tempfile.TemporaryDirectory() as folder:
        run(name, 10, Path(folder) / "warm", None)
        own.enable()
        run(name, steps, Path(folder) / "run", None)
        own.disable()
    print(f"{name}: {steps} steps")
    pstats.Stats(own).strip_dirs().sort_stats("tottime").print_stats(25)
    pstats.Stats(own).strip_dirs().sort_stats("cumtime").print_stats(
        "_watch|_hooks|_deck|_pulses|_log|_state|_record", 40
    )


def keep(given: argparse.Namespace, **parts: dict[str, Any]) -> None:
    """Writes what was just measured over what the file holds of it."""
    if given.quick:
        return
    known = json.loads(PLACE.read_text(encoding="utf-8")) if PLACE.is_file() else {}
    for name, part in parts.items():
        known[name] = known.get(name, {}) | part
    known["verdicts"] = verdicts(known["programs"])
    PLACE.write_text(json.dumps(_short(known), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _short(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: _short(v) for k, v in x.items()}
    if isinstance(x, list):
        return [_short(v) for v in x]
    return float(f"{x:.5g}") if isinstance(x, float) else x


if __name__ == "__main__":
    main()
