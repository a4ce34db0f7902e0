"""Recorded calls become a tape: numbered, or found to be the calls of a program that is known already."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unstuck.objective._graph import Call, Made, Taken, Vault, shared, version_of
from unstuck.objective._program import (
    Constant,
    Instruction,
    Program,
    Slice,
    Slot,
    TapeError,
    leaves,
    map_leaves,
    same_literal,
)

Copy = tuple[Tensor, int | None]  # a constant, and the version to watch where it is no copy


def compiled(
    kept: Sequence[Call],
    roots: Sequence[Call],
    parameters: Sequence[Tensor],
    vault: Vault,
    *,
    like: Program | None,
    numbers: Sequence[tuple[int, float]],
) -> tuple[Program, list[Copy]]:
    """The program of the calls `kept`, in their order, and its constants, copied.

    `like` is a program to share where the calls are the same. `numbers` are what the script read back, each with the
    index of the call: TapeError where a later call quotes one.
    """
    taken = None if like is None else _matched(like, kept, roots, len(parameters))
    if like is not None and taken is not None:
        if any(x in like.floats for _, x in numbers):
            _check_quotes(kept, numbers, like)
        return like, _copies(taken, parameters, vault)
    _check_quotes(kept, numbers, like)
    program, taken = _numbered(kept, roots, len(parameters))
    copies = _copies(taken, parameters, vault)
    if like is not None and like == program:  # it holds views of constants, which are only compared so
        return like, copies
    return program, copies


def _check_quotes(kept: Sequence[Call], numbers: Sequence[tuple[int, float]], like: Program | None) -> None:
    """TapeError where a call takes a number that was read back before, or seems to take one computed from it.

    That is a float that the same call of `like` did not take: it moves from step to step, as what was read does.
    """
    read: dict[float, int] = {}
    for index, x in numbers:
        if x != x or x.is_integer():
            continue
        for y in (x, -x, 1 - x, 1 / x, x * x):
            read.setdefault(y, index)
    if not read:
        return
    first = min(read.values())
    known = like.instructions if like is not None and len(like.instructions) == len(kept) else None
    for k, call in enumerate(kept):
        if call.index <= first:
            continue
        given = list(leaves((call.args, call.kwargs)))
        was = list(leaves((known[k].args, known[k].kwargs))) if known is not None else given
        if known is not None and (known[k].name != call.name or len(was) != len(given)):
            known, was = None, given
        for x, y in zip(given, was, strict=True):
            if type(x) is float and (read.get(x, call.index) < call.index or (type(y) is float and x != y)):
                raise TapeError(f"a number that was read back may go into a later call, {call.name}({x:.6g})")


def _matched(like: Program, kept: Sequence[Call], roots: Sequence[Call], parameters: int) -> list[Taken] | None:
    """The constants of the calls, if these are the instructions of a known program; else None."""
    if like.parameters != parameters or len(like.instructions) != len(kept) or len(like.roots) != len(roots):
        return None
    taken: list[Taken] = []
    places: dict[tuple[int, int], int] = {}
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
            or not _fits(call.args, known.args, taken, places)
            or not (call.kwargs == known.kwargs == () or _fits(call.kwargs, known.kwargs, taken, places))
        ):
            return None
    if tuple(_slot(root.args[0]) for root in roots) != like.roots:
        return None
    return taken if like.overwritten == {k for k, x in enumerate(taken) if x.overwritten} else None


def _fits(given: Sequence[Any], known: Sequence[Any], taken: list[Taken], places: dict[tuple[int, int], int]) -> bool:
    """Whether recorded arguments are those of an instruction; the constants among them are gathered."""
    if len(given) != len(known):
        return False
    for x, y in zip(given, known, strict=True):
        kind = type(x)
        if kind is Made:
            fits = type(y) is Slot and y.at == x.call.first + x.at
        elif kind is Taken:
            fits = type(y) is Constant and x.base is None and y.at == _place(x, taken, places)
        elif kind in _NESTED:
            fits = kind is type(y) and _fits(x, y, taken, places)
        else:
            fits = x is y or same_literal(x, y)
        if not fits:
            return False
    return True


_NESTED = (tuple, list, Slice)


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


def _copies(taken: Sequence[Taken], parameters: Sequence[Tensor], vault: Vault) -> list[Copy]:
    stored = {id(p.grad) for p in parameters}
    if any(id(x.tensor) in stored for x in taken):
        raise TapeError("the loss uses the stored gradient of a parameter")
    return [_kept(x, vault) for x in taken]


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
