"""A recorded program as a net of wires: who makes a value, who uses it, what a loss is given."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from unstuck.diagnosis._case import LOSSES, Case, distinct
from unstuck.diagnosis._findings import SHOWN, Evidence, Finding
from unstuck.objective import Constant, Instruction, Program, Slot, Tape

MOST = 4  # tapes that one check replays
SAME = frozenset(  # calls that hand on the numbers they are given
    "reshape view flatten unflatten squeeze unsqueeze permute transpose movedim swapaxes contiguous clone float double "
    "to type half bfloat16 t T mT __getitem__ view_as reshape_as".split()
)
RECURRENT = frozenset("lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell".split())
WITH_WEIGHT = frozenset("linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split())


class Wires:
    """Who makes and who uses each value of a program."""

    def __init__(self, program: Program, tapes: Sequence[Tape]) -> None:
        self.program, self.tapes = program, tapes
        self.maker: dict[int, int] = {}  # by slot: which instruction
        self.users: dict[int, list[int]] = {}
        for k, call in enumerate(program.instructions):
            for slot in call.slots():
                self.users.setdefault(slot, []).append(k)
            self.maker.update(dict.fromkeys(call.outputs, k))

    def calls(self, names: Any) -> Iterator[tuple[int, Instruction]]:
        return ((k, c) for k, c in enumerate(self.program.instructions) if c.name in names)

    @cached_property
    def of_any_size(self) -> bool:
        """Whether a batch may hold more or fewer rows: the state of a recurrent call is made for those that it had.

        On the CPU such a call reads past the end of a state that is too small.
        """
        return not any(True for _ in self.calls(RECURRENT))

    def source(self, x: Any) -> Instruction | None:
        """The call that made a value, before it was reshaped."""
        while type(x) is Slot and x.at in self.maker:
            call = self.program.instructions[self.maker[x.at]]
            if call.name not in SAME:
                return call
            x = call.args[0] if call.args else None
        return None

    @cached_property
    def live(self) -> frozenset[int]:
        """The slots that a loss depends on which backward() was called on."""
        found = set(self.program.roots)
        for call in reversed(self.program.instructions):
            if not found.isdisjoint(call.outputs):
                found.update(call.slots())
        return frozenset(found)

    @cached_property
    def entering(self) -> frozenset[int]:
        """The constants that meet a parameter in a call: what enters a first layer."""
        return frozenset(
            x.at
            for call in self.program.instructions
            if any(slot < self.program.parameters for slot in call.slots())
            for x in call.leaves()
            if type(x) is Constant
        )

    @cached_property
    def recent(self) -> tuple[Tape, ...]:
        """The latest few tapes, each batch once."""
        return distinct(self.tapes[-4 * MOST :])[-MOST:]


def wires(case: Case) -> list[Wires]:
    """Of each program among the tapes, the most usual first."""
    tapes: dict[int, list[Tape]] = {}
    for tape in case.tapes:
        tapes.setdefault(id(tape.program), []).append(tape)
    return [Wires(each[0].program, each) for each in sorted(tapes.values(), key=len, reverse=True)]


def argument(call: Instruction, k: int, name: str, default: Any = None) -> Any:
    """An argument of a call, by its place or its name."""
    return call.args[k] if k < len(call.args) else dict(call.kwargs).get(name, default)


def losses(w: Wires, names: Any = LOSSES) -> Iterator[tuple[int, Instruction, Any, Any]]:
    """The known losses that training follows: which instruction, the call, its outputs and its targets."""
    for k, call in w.calls(names):
        if call.grad and not w.live.isdisjoint(call.outputs):
            yield k, call, argument(call, 0, "input"), argument(call, 1, "target")


def observed(tape: Tape, weights: Sequence[Tensor], look: Callable[[int, Any, Any], Any]) -> list[Any]:
    """What `look(k, arguments, result)` makes of each instruction, in the first share of the step."""
    found: list[Any] = []
    with torch.no_grad():
        tape.replay(weights, observe=lambda _, args, made: found.append(look(len(found), args, made)))
    return found[: len(tape.program.instructions)]


def exchanged(
    program: Program, places: Collection[int], change: Callable[[Tensor, int], Tensor]
) -> Callable[[Tape], Tape]:
    """Gives the steps of a program other constants at some places: `change(constant, place)`, rank by rank."""

    def step(tape: Tape) -> Tape:
        if tape.program is not program:
            return tape
        each = len(tape.constants) // tape.shares
        fresh = tuple(change(c, k % each) if k % each in places else c for k, c in enumerate(tape.constants))
        return replace(tape, constants=fresh, versions=(None,) * len(fresh))

    return step


def shown(code: str, where: str, claim: str, advice: str, *evidence: Evidence, step: int = 1) -> Finding:
    return Finding(code, SHOWN, step, where, claim, advice, evidence)
