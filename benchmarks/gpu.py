"""What watching costs on a GPU: one training, unwatched and watched, in two processes that take turns.

python benchmarks/gpu.py                        every program, in some two minutes on an H100
python benchmarks/gpu.py --programs mlp,lstm
python benchmarks/gpu.py --device cpu --quick   whether it runs at all, on small models; nothing is kept

A turn is a block of steps between two torch.cuda.synchronize(), of some 0.2 s; the other process waits meanwhile, and
the watcher does not count that. Overhead is the time of a watched block over that of the unwatched one beside it, less
one: the median and the 95th percentile over blocks, and the ratio of the sums. Noise is the same of unwatched blocks
in a row. What the first steps take, which are all recorded, is told apart, with start and stop. Numbers go to gpu.json
beside this file, by program.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unstuck
from environment import environment

PLACE = Path(__file__).with_suffix(".json")
BLOCK = 0.2  # seconds of a turn
FIRST = 30  # steps before the first turn
EVERY = 20  # steps that are all recorded, for the cost of a tape
COUNTED = 200  # steps, or as many as take some 4 s, in which waiting is counted
Row = dict[str, Any]
Step = Callable[[int], Tensor]


# Programs


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        parts = self.attend(self.first(x)).split(width, dim=2)
        q, k, v = (p.view(rows, length, self.heads, width // self.heads).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(y.transpose(1, 2).reshape(rows, length, width))
        return x + self.feed(self.second(x))


class GPT(nn.Module):
    def __init__(self, vocabulary: int, length: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        logits = self.head(self.norm(self.blocks(self.tokens(ids) + self.places(places))))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = nn.LSTM(64, 256, num_layers=2, batch_first=True), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x)[0][:, -1])


def classifier(model: nn.Module, shape: Sequence[int], rows: int, device: torch.device) -> tuple[Step, nn.Module]:
    model = model.to(device)
    x, y = torch.randn(16 * rows, *shape, device=device), torch.randint(0, 10, (16 * rows,), device=device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(k: int) -> Tensor:
        at = slice(rows * (k % 16), rows * (k % 16 + 1))
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x[at]), y[at])
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, model


def mlp(device: torch.device, *, small: bool) -> tuple[Step, nn.Module]:
    layers = (nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    return classifier(nn.Sequential(*layers), (64,), 128, device)


def cnn(device: torch.device, *, small: bool) -> tuple[Step, nn.Module]:
    layers: list[nn.Module] = []
    into = 3
    for out in (8, 16) if small else (64, 128, 256, 256):
        layers += [nn.Conv2d(into, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        layers += [nn.Conv2d(out, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        into = out
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(into, 10))
    return classifier(model, (3, 32, 32), 16 if small else 128, device)


def lstm(device: torch.device, *, small: bool) -> tuple[Step, nn.Module]:
    return classifier(Recurrent(), (10 if small else 64, 64), 16 if small else 64, device)


def gpt(
    device: torch.device, shape: tuple[int, int, int, int, int], rows: int, *, compiled: bool = False
) -> tuple[Step, nn.Module]:
    model = GPT(*shape).to(device)
    vocabulary, length = shape[:2]
    ids = torch.randint(0, vocabulary, (16, rows, length + 1), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    forward: Any = torch.compile(model) if compiled else model

    def step(k: int) -> Tensor:
        batch = ids[k % 16]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = forward(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, model


def gpt_10m(device: torch.device, *, small: bool) -> tuple[Step, nn.Module]:
    return gpt(device, (64, 32, 64, 2, 2), 4) if small else gpt(device, (256, 256, 320, 8, 5), 32)


def gpt_120m(device: torch.device, *, small: bool) -> tuple[Step, nn.Module]:
    return gpt(device, (512, 32, 128, 3, 4), 4) if small else gpt(device, (50304, 512, 768, 12, 12), 16)


def gpt_10m_compiled(device: torch.device, *, small: bool) -> tuple[Step, nn.Module]:
    shape = (64, 32, 64, 2, 2) if small else (256, 256, 320, 8, 5)
    return gpt(device, shape, 4 if small else 32, compiled=True)


PROGRAMS = {  # the compiled one last: a process that has compiled something records no tapes
    "mlp": mlp,
    "cnn": cnn,
    "lstm": lstm,
    "gpt-10m": gpt_10m,
    "gpt-120m": gpt_120m,
    "gpt-10m-compiled": gpt_10m_compiled,
}


# A process that trains, watched or not, when it is told to


class Training:
    def __init__(self, device: torch.device, *, watched: bool, small: bool) -> None:
        self.device, self.watched, self.small = device, watched, small
        self.block = contextlib.ExitStack()
        self.run: Any = None
        self.count = 0

    def begin(self, name: str) -> Row:
        """Builds a program and takes its first steps."""
        torch.manual_seed(0)
        self.losses: list[Tensor] = []
        self.count = 0
        began = self._clock()
        if self.watched:
            folder = Path(self.block.enter_context(tempfile.TemporaryDirectory()))
            self.run = self.block.enter_context(unstuck.watch(folder=folder / "run"))
        start = self._clock() - began
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.step, self.model = PROGRAMS[name](self.device, small=self.small)
        self.size = sum(p.nbytes for p in self.model.parameters())
        one = self._timed(1)
        return {"start_s": start, "one_s": one, "first_s": self._timed(FIRST - 1), "parameters": self.size // 4}

    def turn(self, steps: int) -> float:
        """The seconds of a block of steps."""
        return self._timed(steps)

    def wait(self) -> contextlib.AbstractContextManager[None]:
        """Around the time in which the other one has its turn."""
        return contextlib.nullcontext() if self.run is None else self.run.paused()

    def end(self, steps: int) -> Row:
        """What can be told after the last turn, and what ending takes."""
        row: Row = {"peak": self._peak(), "held": self._held(), "waits": self._waits(steps), "counted": steps}
        row["losses"] = torch.stack(self.losses).double().cpu().tolist()
        if self.run is not None:
            row |= {"said": self.run.overhead, "heard": self.run.heard, "steps": self.run.steps}
            row["tape"] = self._tape()
            began = self._clock()
            run, self.run = self.run, None
            self.block.close()
            row["stop_s"] = self._clock() - began
            row["refusals"] = run._live._deck.refusals  # noqa: SLF001
            row["recorded_s"] = self._recorded()
        self.step = self.model = None  # type: ignore[assignment]
        return row

    def _timed(self, steps: int) -> float:
        began = self._clock()
        for _ in range(steps):
            self.losses.append(self.step(self.count))
            self.count += 1
        return self._clock() - began

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0

    def _held(self) -> int:
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    def _waits(self, steps: int) -> Row:
        """Where the process waits for the device in so many steps, as torch tells it."""
        if self.device.type != "cuda":
            self._timed(steps)
            return {}
        places: Counter[str] = Counter()
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, _, file, line, *__: places.update(  # type: ignore[assignment]
                [f"{Path(file).name}:{line}"] if "synchroniz" in str(message) else []
            )
            torch.cuda.set_sync_debug_mode("warn")
            try:
                for _ in range(steps):
                    self.losses.append(self.step(self.count))
                    self.count += 1
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return dict(places.most_common())

    def _tape(self) -> Row | None:
        """What it takes to replay a tape with its gradient."""
        memory = self.run.memory()
        if memory is None or not memory.tapes:
            return None
        values = [w.detach().clone().requires_grad_(w.is_floating_point()) for w in memory.states[-1].weights]
        seconds = []
        for tape in memory.tapes[-8:]:
            began = self._clock()
            torch.autograd.grad(tape.replay(values), values, allow_unused=True)
            seconds.append(self._clock() - began)
        kb = statistics.median(t.bytes for t in memory.tapes) / 1e3
        where = str(memory.states[-1].weights[0].device)
        return {"kept": len(memory.tapes), "kb": kb, "replay_s": statistics.median(seconds), "where": where}

    def _recorded(self) -> float:
        """The seconds of a step that is recorded, and checked now and then."""
        with tempfile.TemporaryDirectory() as folder, unstuck.watch(folder=Path(folder) / "run", budget=1e9):
            self._timed(FIRST)
            return self._timed(EVERY) / EVERY


def serve(turns: Connection, device: str, watched: bool, small: bool) -> None:  # noqa: FBT001
    training = Training(torch.device(device), watched=watched, small=small)
    turns.send("ready")
    while True:
        with training.wait():
            name, *given = turns.recv()
        if name == "bye":
            return
        try:
            said = getattr(training, name)(*given)
        except Exception as error:
            traceback.print_exc()
            training.run = None
            with contextlib.suppress(Exception):
                training.block.close()
            said = error
        with training.wait():
            turns.send(said if not isinstance(said, Exception) else f"{type(said).__name__}: {said}"[:500])


# The measurement


def ask(processes: Sequence[Connection], *what: Any) -> list[Any]:
    """Asks all at once, and waits for all."""
    for process in processes:
        process.send(what)
    said = [process.recv() for process in processes]
    failed = next((s for s in said if isinstance(s, str)), None)
    if failed is not None:
        raise RuntimeError(failed)
    return said


def program(name: str, pair: Sequence[Connection], given: argparse.Namespace) -> Row:
    plain, watched = pair
    began = ask(pair, "begin", name)
    (step,) = (s / 10 for s in ask([plain], "turn", 10))
    ask([watched], "turn", 10)
    steps = max(1, round(BLOCK / step))
    blocks: list[tuple[float, float]] = []
    for k in range(given.blocks):
        order = [plain, watched] if k % 2 == 0 else [watched, plain]  # A B B A: neither is always the second
        seconds = [ask([process], "turn", steps)[0] for process in order]
        blocks.append((seconds[0], seconds[1]) if k % 2 == 0 else (seconds[1], seconds[0]))
    ends = [ask([process], "end", min(COUNTED, max(10, round(4 / step))))[0] for process in pair]
    ratios = [w / p - 1 for p, w in blocks]
    bare = [p for p, _ in blocks]
    size = 4 * began[0]["parameters"]
    unwatched = statistics.median(bare) / steps
    tape = ends[1]["tape"]
    return {
        "parameters": began[0]["parameters"],
        "step_ms": 1e3 * unwatched,
        "steps": steps,
        "blocks": len(blocks),
        "overhead": {
            "median": statistics.median(ratios),
            "95th percentile": sorted(ratios)[min(len(ratios) - 1, round(0.95 * (len(ratios) - 1)))],
            "of the sums": sum(w for _, w in blocks) / sum(bare) - 1,
            "said": ends[1]["said"],
        },
        "noise": statistics.median(abs(b / a - 1) for a, b in itertools.pairwise(bare)),
        "first_extra_s": began[1]["first_s"] - began[0]["first_s"],
        "start_s": began[1]["start_s"],
        "stop_s": ends[1]["stop_s"],
        "memory": {
            "peak_extra": (ends[1]["peak"] - ends[0]["peak"]) / size,
            "held_extra": (ends[1]["held"] - ends[0]["held"]) / size,
            "unwatched_peak": ends[0]["peak"] / size,
        },
        "waits": {"steps": ends[0]["counted"], "unwatched": ends[0]["waits"], "watched": ends[1]["waits"]},
        "tape": None
        if tape is None
        else tape | {"record": ends[1]["recorded_s"] / unwatched - 1, "replay": tape["replay_s"] / unwatched},
        "heard": ends[1]["heard"],
        "refusals": ends[1]["refusals"],
        "identical": ends[0]["losses"] == ends[1]["losses"],
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", default=",".join(PROGRAMS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--blocks", type=int, default=24, help="pairs of blocks")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds after which no program is begun")
    parser.add_argument("--quick", action="store_true", help="small models and few blocks; nothing is kept")
    given = parser.parse_args()
    if given.quick:
        given.blocks = 4
    return given


def main() -> None:
    given = arguments()
    began = time.perf_counter()
    around = {"when": datetime.now(UTC).isoformat(timespec="seconds")} | environment(os.getloadavg()[0], "numpy")
    around |= {"device": "cpu"}
    if given.device == "cuda":
        around |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    pair = []
    for watched in (False, True):
        ours, theirs = multiprocessing.Pipe()
        options = (theirs, given.device, watched, given.quick)
        multiprocessing.get_context("spawn").Process(target=serve, args=options, daemon=True).start()
        pair.append(ours)
    for process in pair:
        process.recv()
    found: dict[str, Row] = {}
    for name in given.programs.split(","):
        if time.perf_counter() - began > given.limit:
            print(f"{name}: left out, the time is over", flush=True)
            continue
        try:
            found[name] = program(name, pair, given)
        except RuntimeError as error:
            found[name] = {"failed": str(error)}
        print(f"{name} ({time.perf_counter() - began:.0f} s): {json.dumps(found[name])}", flush=True)
        if not given.quick:
            keep({name: found[name] | {"environment": around}})
    for process in pair:
        process.send(("bye",))


def keep(rows: dict[str, Row]) -> None:
    known = json.loads(PLACE.read_text()) if PLACE.is_file() else {}
    PLACE.write_text(json.dumps({"programs": {**known.get("programs", {}), **rows}}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
