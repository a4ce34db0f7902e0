"""What of a run can be replayed, of one rank or of all ranks together."""

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from unstuck.objective import Program, Tape, TapeError, joined, on_cpu, unpack
from unstuck.record._devices import read
from unstuck.record._evaluations import Evaluation, unpack_evaluations
from unstuck.record._state import State, shelf, shelved, unpack_state

MOST = 8  # ranks that one process replays
LEAST = 30  # steps of all ranks, or a quarter of those of one: a trial would learn fewer by heart


@dataclass(frozen=True, eq=False)
class Memory:
    """What of a run can be replayed: its last tapes and the states that go with them."""

    names: tuple[str, ...]  # of the parameters
    tapes: tuple[Tape, ...]  # oldest first
    states: tuple[State, ...]  # the first, the latest finite ones and the last, by step
    left_out: str = ""  # why steps of another device cannot be replayed on this machine
    evaluations: tuple[Evaluation, ...] = ()  # what the script evaluated without gradients, on this rank
    rows: Tensor | None = None  # hashes of those that were trained on, as far as they are known
    passed: tuple[State, ...] = ()  # the weights at some steps between the first and the latest ones
    apart: str = ""  # why these are the tapes of one rank, with its share of the batch, where several trained together


def read_memory(tapes: Path, rank: int | None) -> Memory | None:
    """The memory of one rank, or None where it left none that can be read."""
    if not tapes.is_file():
        return None
    try:
        on_disk = shelf(tapes.parent, rank)
        data, moved = read(tapes, on_disk)
        states = [*(unpack_state(s, moved=moved) for s in data["states"]), *shelved(on_disk, moved=moved)]
        known = {s.step: s for s in reversed(states) if len(s.weights) == len(data["names"])}
        kept, left_out = on_cpu(unpack(data)) if moved else (unpack(data), "")
        states = [known[step] for step in sorted(known)]
        heard = unpack_evaluations(data.get("evaluations", ()))  # which the first versions did not have
        names, rows = tuple(data["names"]), data.get("rows")
        passed = [unpack_state(s, moved=moved) for s in data.get("passed", ())]
        return Memory(names, tuple(kept), tuple(states), left_out, heard, rows, tuple(passed))
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, LookupError, TypeError, TapeError):
        return None  # damaged, or of another version: the log still stands


def whole(own: Memory, others: Sequence[Memory | None]) -> Memory:
    """The memory of a rank with the shares of all ranks in each step, where they trained one network together.

    DistributedDataParallel averages the gradients with the same weight for each rank, so the loss is the plain mean.
    """
    found = [m for m in others if m is not None]
    reason = "not all ranks left recorded steps" if len(found) < len(others) else _differ(own, found)
    if reason:
        return replace(own, apart=reason)
    tapes = tuple(_together([own, *found]))
    if len(tapes) < min(LEAST, len(own.tapes) / 4):
        return replace(
            own, apart=f"{f'only {len(tapes)}' if tapes else 'none'} of the steps were recorded on all ranks"
        )
    rows = [m.rows for m in (own, *found) if m.rows is not None]
    return replace(own, tapes=tapes, rows=torch.cat(rows).unique() if rows else None)


def _differ(own: Memory, others: Sequence[Memory]) -> str:
    """Why ranks do not train one network together."""
    if any(m.names != own.names for m in others):
        return "the ranks train different parameters"
    for m in others:
        there = {s.step: s for s in m.states if s.step}
        common = [(s, there[s.step]) for s in own.states if s.step in there]
        if not common:
            return "the ranks kept no weights of the same step, to be compared"
        if not all(_same(a, b) for a, b in common):
            return "the weights of the ranks differ"
    return ""


def _same(a: State, b: State) -> bool:
    pairs = zip(a.weights, b.weights, strict=True)
    return all(x.shape == y.shape and torch.allclose(x, y, 0, 0, equal_nan=True) for x, y in pairs)


def _together(memories: Sequence[Memory]) -> Iterator[Tape]:
    """The steps that all ranks recorded, with one program."""
    programs: list[Program] = []
    ranks = [{t.step: replace(t, program=_known(t.program, programs)) for t in m.tapes} for m in memories]
    for step in sorted(set(ranks[0]).intersection(*ranks[1:])):
        tapes = [tapes[step] for tapes in ranks]
        if all(t.program is tapes[0].program for t in tapes):
            yield joined(tapes)


def _known(program: Program, programs: list[Program]) -> Program:
    """The same program that was met before, if there is one."""
    same = next((p for p in programs if p is program or p == program), None)
    if same is None:
        programs.append(program)
    return program if same is None else same
