"""The processes of one training, as torchrun starts them: which one this is, and the folder that they share."""

import contextlib
import functools
import hashlib
import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from unstuck.record._log import NAME

TAIL = 1 << 16  # bytes that hold the last line of a log
SHARED = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")  # the same on all ranks


def ranks() -> int:
    """How many processes train together, from the environment that torchrun makes."""
    with contextlib.suppress(ValueError):
        return max(int(os.environ.get("WORLD_SIZE", "1")), 1)
    return 1


def own_rank() -> int | None:
    """The rank of this process; None where it is the only one."""
    with contextlib.suppress(ValueError):
        return None if ranks() == 1 else max(int(os.environ.get("RANK", "0")), 0)
    return None


def in_pieces(parameter: Tensor) -> bool:
    """Whether this process has only a piece of a parameter, or its numbers only at times: a DTensor, FSDP.

    Then numbers of it are not to be asked for: the ranks would have to talk, or the memory may be gone.
    """
    if hasattr(parameter, "placements") or getattr(parameter, "_fsdp_flattened", False):
        return True
    strided = parameter.layout is torch.strided and parameter.numel() > 0
    return strided and parameter.untyped_storage().nbytes() == 0


def sharded(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimiser moves pieces of parameters."""
    return any(in_pieces(p) for g in getattr(optimizer, "param_groups", ()) for p in g["params"])


def ranked(name: str, rank: int | None) -> str:
    """The file of a rank in the run folder: `log.jsonl` is that of the first, `log-rank1.jsonl` that of the next."""
    path = Path(name)
    return f"{path.stem}-rank{rank}{path.suffix}" if rank else name


def logs_of_ranks(folder: Path) -> dict[int, Path]:
    """The logs in a run folder, by the rank that wrote them."""
    found = {0: folder / NAME} if (folder / NAME).is_file() else {}
    for path in folder.glob(ranked(NAME, 1).replace("1", "*")):
        number = path.stem.rpartition("rank")[2]
        if number.isdecimal():
            found[int(number)] = path
    return dict(sorted(found.items()))


def wait_for_ends(logs: Sequence[Path], seconds: float = 5.0) -> None:
    """Waits for the end of other ranks' logs, as long as they are still being written."""
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up and any(map(functools.partial(_goes_on, seconds), logs)):
        time.sleep(0.02)


def _goes_on(seconds: float, log: Path) -> bool:
    try:
        with log.open("rb") as file:
            there = os.fstat(file.fileno())
            file.seek(-min(there.st_size, TAIL), os.SEEK_END)
            ended = file.read().rpartition(b"\n{")[2].startswith(b'"kind":"end"')
    except OSError:
        return False
    return not ended and there.st_mtime > time.time() - seconds


def shared_folder(parent: Path, name: str, file: str) -> Path:
    """A folder below `parent` that all ranks name alike without talking, and where this one has no `file` yet.

    The name follows from what torchrun tells every rank. Where that may be the same for the next job (no `--rdzv-id`
    is given), the process that started the ranks counts as well, so that each machine has a folder of its own.
    """
    told = [os.environ.get(word, "") for word in SHARED]
    if told[0] in ("", "none"):
        told.append(_process(os.getppid()))
    key = hashlib.sha256("\n".join(told).encode(errors="replace")).hexdigest()[:8]
    names = itertools.chain([f"{name}-{key}"], (f"{name}-{key}-{k}" for k in itertools.count(2)))
    # Path.exists raises where a folder cannot be looked into
    return next(parent / n for n in names if not os.path.exists(parent / n / file))  # noqa: PTH110


def _process(pid: int) -> str:
    """The process, and where Linux tells it, when it started: a number is given again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return f"{pid} {fields[19]}"
    except (OSError, IndexError, ValueError):
        return str(pid)
