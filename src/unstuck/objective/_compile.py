"""Recorded calls become a tape: numbered, or found to be the calls of a program that is known already."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unstuck.objective._graph import Call, Made, Taken, Vault, shared, version_of
from unstuck.objective._places import Names, line_of, names_of
from unstuck.objective._program import (
    Constant,
    Instruction,
    Number,
    Place,
    Program,
    Slice,
    Slot,
    TapeError,
    map_leaves,
    same_literal,
)
from unstuck.objective._reads import Read, check_quotes

Copy = tuple[Tensor, int | None]  # a constant, and the version to watch where it is no copy


class Compiled(NamedTuple):
    """A program with what stands in it for one step."""

    program: Program
    taken: list[Taken]  # the constants
    numbers: list[float]


def compiled(
    kept: Sequence[Call], roots: Sequence[Call], parameters: int, *, like: Sequence[Program], reads: Sequence[Read]
) -> Compiled:
    """The program of the calls `kept`, in their order: one of those `like` it, where there is one.

    Where only numbers with a point differ from a known program, these are no part of the one that is returned: they
    move from step to step, and each step has its own. TapeError where a number that was read back may be one of them.
    """
    near: tuple[Program, Match] | None = None
    for known in reversed(like):
        match = _matched(known, kept, roots, parameters)
        if match is not None and not match.moved:
            if reads and (known.moves or any(x in known.floats for _, x in reads)):
                check_quotes(kept, reads, known)
            return Compiled(known, match.taken, match.numbers)
        near = near or (None if match is None else (known, match))
    if near is not None:
        known, match = near
        check_quotes(kept, reads, known, doubted=known)
        return _loosened(known, kept, match.taken)
    check_quotes(kept, reads, like[-1] if like else None)
    program, taken = _numbered(kept, roots, parameters)
    _inherit_places(program, like)
    return Compiled(next((p for p in like if p == program), program), taken, [])  # views of constants are compared so


def constants(taken: Sequence[Taken], parameters: Sequence[Tensor], vault: Vault) -> list[Copy]:
    """Copies of the constants of a step; TapeError where one is no longer what the step took."""
    stored = {id(p.grad) for p in parameters}
    if any(id(x.tensor) in stored for x in taken):
        raise TapeError("the loss uses the stored gradient of a parameter")
    return [_kept(x, vault) for x in taken]


def put_places(program: Program, kept: Sequence[Call], names: Names) -> None:
    """Notes where in the script the calls of a program were made."""
    modules = names_of([call.inside for call in kept], names)
    waiting = list(reversed(kept))
    program.places.clear()
    for made in program.instructions:
        call = waiting[-1] if waiting else None
        if call is not None and call.function == made.function and _outputs(call) == made.outputs:
            program.places.append(Place(modules.get(id(call.inside), ""), line_of(call.spot)))
            waiting.pop()
        else:  # a view of a constant, which no call made
            program.places.append(Place("", ""))


def _inherit_places(program: Program, like: Sequence[Program]) -> None:
    """Takes the places of the calls with which a known program begins as well."""
    for known in like:
        pairs = zip(program.instructions, known.instructions, known.places, strict=False)
        same = [place for ours, theirs, place in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
        if len(same) > len(program.places):
            program.places[:] = same


def _outputs(call: Call) -> tuple[int, ...]:
    return tuple(range(call.first, call.first + call.count))


class Match:
    """What a recorded step puts in the places of a known program. `moved` says whether floats of the program differ."""

    def __init__(self) -> None:
        self.taken: list[Taken] = []
        self.places: dict[tuple[int, int], int] = {}
        self.numbers: list[float] = []
        self.moved = False

    def fits(self, given: Sequence[Any], known: Sequence[Any]) -> bool:
        """Whether recorded arguments are those of an instruction."""
        if len(given) != len(known):
            return False
        for x, y in zip(given, known, strict=True):
            kind = type(x)
            if kind is Made:
                fits = type(y) is Slot and y.at == x.call.first + x.at
            elif kind is Taken:
                fits = type(y) is Constant and x.base is None and y.at == _place(x, self.taken, self.places)
            elif kind in _NESTED:
                fits = kind is type(y) and self.fits(x, y)
            elif kind is float:
                fits = self._number(x, y)
            else:
                fits = x is y or same_literal(x, y)
            if not fits:
                return False
        return True

    def _number(self, x: float, y: Any) -> bool:
        if type(y) is Number:
            self.numbers.append(x)
            return True
        if type(y) is not float:
            return False
        self.moved = self.moved or not same_literal(x, y)
        return True


_NESTED = (tuple, list, Slice)


def _matched(like: Program, kept: Sequence[Call], roots: Sequence[Call], parameters: int) -> Match | None:
    """What the calls put in the places of a known program, if they are its instructions but for numbers; else None."""
    if like.parameters != parameters or len(like.instructions) != len(kept) or len(like.roots) != len(roots):
        return None
    match = Match()
    slot = parameters
    for call, known in zip(kept, like.instructions, strict=True):
        call.first = slot
        slot += call.count
        if (
            call.function != known.function
            or call.name != known.name
            or call.count != len(known.outputs)
            or call.grad is not known.grad
            or call.autocast != known.autocast
            or call.part != known.part
            or (call.state is not None) is not known.random
            or not same_literal(call.expects, known.expects)
            or not match.fits(call.args, known.args)
            or not (call.kwargs == known.kwargs == () or match.fits(call.kwargs, known.kwargs))
        ):
            return None
    if tuple(_slot(root.args[0]) for root in roots) != like.roots:
        return None
    return match if like.overwritten == {k for k, x in enumerate(match.taken) if x.overwritten} else None


def _loosened(known: Program, kept: Sequence[Call], taken: list[Taken]) -> Compiled:
    """A known program with a `Number` where a recorded step has another float, and what stands there in the step."""
    numbers: list[float] = []

    def loose(given: Any, was: Any) -> Any:
        kind = type(was)
        if kind in _NESTED:
            parts = [loose(x, y) for x, y in zip(given, was, strict=True)]
            return Slice(*parts) if kind is Slice else tuple(parts) if kind is tuple else parts
        if kind is Number or (kind is float and not same_literal(given, was)):
            numbers.append(given)
            return Number(len(numbers) - 1)
        return was

    pairs = zip(kept, known.instructions, strict=True)
    calls = [replace(was, args=loose(x.args, was.args), kwargs=loose(x.kwargs, was.kwargs)) for x, was in pairs]
    return Compiled(replace(known, instructions=tuple(calls), places=list(known.places)), taken, numbers)


def _slot(x: Made | Slot) -> int:
    return x.at if isinstance(x, Slot) else x.call.first + x.at


def _place(x: Taken, taken: list[Taken], places: dict[tuple[int, int], int]) -> int:
    """The place of a constant among those `taken`, at the end for a new one."""
    key = (id(x.tensor), x.version) if x.before is None else (id(x.before), 0)
    place = places.setdefault(key, len(taken))
    if place == len(taken):
        taken.append(x)
    return place


def _numbered(kept: Sequence[Call], roots: Sequence[Call], parameters: int) -> tuple[Program, list[Taken]]:
    """A new program, and its constants."""
    taken: list[Taken] = []
    places: dict[tuple[int, int], int] = {}
    views: dict[int, Slot] = {}
    calls: list[Instruction] = []
    size = parameters

    def number(x: Any) -> Any:
        if type(x) is Made:
            return Slot(x.call.first + x.at)
        if type(x) is Taken and x.base is not None:
            return views[id(x)] if id(x) in views else view(x)
        return Constant(_place(x, taken, places)) if type(x) is Taken else x

    def view(x: Taken) -> Slot:
        nonlocal size
        args = (number(x.base), tuple(x.tensor.shape), x.tensor.stride(), x.tensor.storage_offset())
        views[id(x)] = Slot(size)
        size += 1
        calls.append(Instruction(torch.as_strided, "as_strided", args, (), (views[id(x)].at,)))
        return views[id(x)]

    for call in kept:
        args, kwargs = map_leaves(number, call.args), map_leaves(number, call.kwargs)
        call.first, size = size, size + call.count
        made, drawn = tuple(range(call.first, size)), call.state is not None
        settings = (call.grad, call.autocast, call.part, call.expects)
        calls.append(Instruction(call.function, call.name, args, kwargs, made, drawn, *settings))
    ends = tuple(_slot(root.args[0]) for root in roots)
    overwritten = frozenset(k for k, x in enumerate(taken) if x.overwritten)
    return Program(tuple(calls), parameters, size, ends, overwritten, _released(calls, ends, parameters)), taken


def _kept(taken: Taken, vault: Vault) -> Copy:
    if taken.before is not None:
        return (vault.same(taken.tensor, taken.before) if taken.shared else taken.before), None
    if taken.shared:
        raise TapeError("an input of the step shares its memory with NumPy and is too large to be copied")
    if version_of(taken.tensor) != taken.version:
        raise TapeError("an input of the step was overwritten in place before the step ended")
    if shared(taken.tensor):
        raise TapeError("an input of the step shares its memory with NumPy, which may have written into it")
    return vault.copy(taken.tensor)


def _released(calls: Sequence[Instruction], roots: Sequence[int], parameters: int) -> tuple[tuple[int, ...], ...]:
    last: dict[int, int] = {}
    for k, call in enumerate(calls):
        last.update(dict.fromkeys((*call.slots(), *call.made()), k))
    released: list[list[int]] = [[] for _ in calls]
    for slot, k in last.items():
        if slot >= parameters and slot not in roots:
            released[k].append(slot)
    return tuple(tuple(slots) for slots in released)
