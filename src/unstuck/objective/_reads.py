"""Numbers that a script reads back from a step, and what may come of them.

What is read from the step's own values depends on its weights. Where it decides what the step computes after it, or
goes into that, the tape is refused, unless a replay can see that the answer is the same. Three things are taken to be
the script's own doing, and no function of the weights:

* what is read from values of an earlier step. A weight of the loss that Python computes from the last loss, or a branch
  that it takes on it, is given when the step begins, as a detached hidden state is; it stays what it was in a replay.
* what is read after a backward(), and no later call quotes: that is for the log.
* what an evaluation without gradients reads before the forward pass begins, and no later call quotes.

So a branch that Python takes on a number from an earlier backward() of the same step is not seen.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from unstuck.objective._calls import SHAPES
from unstuck.objective._graph import Call, ancestors
from unstuck.objective._program import Number, Program, TapeError, leaves, same_literal

QUOTED = 64  # numbers of one reading that are looked for in later calls
Read = tuple[int, float]  # a number that was read, after which call


def floats_in(x: Any) -> list[float]:
    """The first of the numbers with a point in what was read back; NaN where there is none."""
    found: list[float] = []
    todo = [x]
    while todo and len(found) < QUOTED:
        y = todo.pop()
        if isinstance(y, float):
            found.append(y)
        elif isinstance(y, np.ndarray):
            todo += y.ravel()[:QUOTED].tolist()
        elif isinstance(y, list):
            todo += y[:QUOTED]
    return found or [float("nan")]


def steering(reads: Sequence[Call], roots: Sequence[Call], kept: set[Call]) -> set[Call]:
    """`kept` with the reads that may have steered what follows; TapeError where what they read was no flag.

    A truth value or a shape steers all that follows. A number that is read after the last call of a loss, or of a value
    whose backward() has run, is taken to be for the log.
    """
    for read in reversed(reads):
        end = min((root.index for root in roots if root.index > read.index), default=0)
        if isinstance(read.expects, bool) or read.name in SHAPES:
            end = roots[-1].index
        elif read.epoch < read.part:
            continue
        if not any(read.index < call.index < end for call in kept):
            continue
        if read.expects is None:
            raise TapeError(f"the forward pass reads a number back ({read.name}()), which may steer what follows")
        kept = kept | ancestors([read])
    return kept


def check_quotes(
    kept: Sequence[Call], reads: Sequence[Read], like: Program | None, *, doubted: Program | None = None
) -> None:
    """TapeError where a call takes a number that was read back before, or seems to take one computed from it.

    That is a float that the same call of `like` did not take: it moves from step to step, as what was read does. One
    that a call took before anything was read is the script's own.
    """
    if not reads:
        return
    quoted = _quotes(reads)
    first = min([index for index, _ in reads])
    known = like.instructions if like is not None and len(like.instructions) == len(kept) else None
    for k, call in enumerate(kept):
        if call.index <= first:
            continue
        given = list(leaves((call.args, call.kwargs)))
        was = list(leaves((known[k].args, known[k].kwargs))) if known is not None else given
        if known is not None and (known[k].name != call.name or len(was) != len(given)):
            known, was = None, given
        for x, y in zip(given, was, strict=True):
            moves = type(x) is float and _moves(x, y) and not _taken_before(x, first, kept)
            if moves or (type(x) is float and quoted.get(x, call.index) < call.index):
                because = f"a number that was read back may go into a later call, {call.name}({x:.6g})"
                raise TapeError(because, doubted=doubted if moves else None)


def _quotes(reads: Sequence[Read]) -> dict[float, int]:
    """What a script may have made of the numbers that it read, by itself telling; and after which call it could."""
    found: dict[float, int] = {}
    for index, x in reads:
        if x == x and not x.is_integer():
            for y in (x, -x, 1 - x, 1 / x, x * x):
                found.setdefault(y, index)
    return found


def _moves(x: float, y: Any) -> bool:
    """Whether a number is another one than in a known program."""
    return type(y) is Number or (type(y) is float and not same_literal(x, y))


def _taken_before(x: float, index: int, kept: Sequence[Call]) -> bool:
    """Whether a call up to the one of this index took a number."""
    early = (call for call in kept if call.index <= index)
    return any(type(y) is float and same_literal(x, y) for call in early for y in leaves((call.args, call.kwargs)))
