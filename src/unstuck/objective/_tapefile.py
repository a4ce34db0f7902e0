"""Tapes on disk: plain lists, numbers and tensors, read back without running anything that the file names.

A function is written as its dotted name below `torch` and looked up among the functions that torch lets a mode see, so
that a file from elsewhere cannot call anything else.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import get_overridable_functions, resolve_name

from unstuck.objective._program import Constant, Instruction, Program, Slice, Slot, Tape, TapeError

_MARK = "#"  # opens an encoded value that JSON-like types cannot carry


def pack(tapes: Sequence[Tape]) -> dict[str, Any]:
    """The tapes as values for torch.save and torch.load(weights_only=True); TapeError names what cannot be written."""
    programs: dict[int, int] = {}
    packed: list[Any] = []
    for tape in tapes:
        if id(tape.program) not in programs:
            programs[id(tape.program)] = len(packed)
            packed.append(_pack_program(tape.program))
    steps = [
        {
            "program": programs[id(t.program)],
            "constants": list(t.constants),
            "states": list(t.states),
            "loss": t.loss,
            "step": t.step,
        }
        for t in tapes
    ]
    return {"programs": packed, "tapes": steps}


def unpack(data: Mapping[str, Any]) -> list[Tape]:
    """The tapes that `pack` packed."""
    programs = [_unpack_program(p) for p in data["programs"]]
    return [
        Tape(
            program=programs[t["program"]],
            constants=tuple(t["constants"]),
            versions=(None,) * len(t["constants"]),
            states=tuple(t["states"]),
            loss=t["loss"],
            step=t["step"],
        )
        for t in data["tapes"]
    ]


def _pack_program(program: Program) -> dict[str, Any]:
    return {
        "calls": [_pack_call(c) for c in program.instructions],
        "parameters": program.parameters,
        "size": program.size,
        "roots": list(program.roots),
        "overwritten": sorted(program.overwritten),
        "released": [list(r) for r in program.released],
    }


def _unpack_program(data: Mapping[str, Any]) -> Program:
    return Program(
        instructions=tuple(_unpack_call(c) for c in data["calls"]),
        parameters=data["parameters"],
        size=data["size"],
        roots=tuple(data["roots"]),
        overwritten=frozenset(data["overwritten"]),
        released=tuple(tuple(r) for r in data["released"]),
    )


def _pack_call(call: Instruction) -> list[Any]:
    dotted = resolve_name(call.function)
    if dotted is None or _functions().get(dotted) is None:
        raise TapeError(f"the call {call.name}() has no public name in torch: the tape cannot be written to disk")
    autocast = None if call.autocast is None else [call.autocast[0], _encode(call.autocast[1])]
    kwargs = [[k, _encode(v)] for k, v in call.kwargs]
    flags = [call.written, call.random, call.grad, autocast, call.expects]
    return [dotted, call.name, _encode(call.args), kwargs, list(call.outputs), flags]


def _unpack_call(data: Sequence[Any]) -> Instruction:
    dotted, name, args, kwargs, outputs, (written, random, grad, autocast, expects) = data
    function = _functions().get(dotted)
    if function is None:
        raise TapeError(f"the tape calls {dotted}, which this torch does not have")
    return Instruction(
        function=function,
        name=name,
        args=_decode(args),
        kwargs=tuple((k, _decode(v)) for k, v in kwargs),
        outputs=tuple(outputs),
        written=written,
        random=random,
        grad=grad,
        autocast=None if autocast is None else (autocast[0], _decode(autocast[1])),
        expects=expects,
    )


@functools.cache
def _functions() -> dict[str, Callable[..., Any]]:
    functions = [f for group in get_overridable_functions().values() for f in group]
    return {name: f for f in functions if (name := resolve_name(f)) is not None}


def _encode(x: Any) -> Any:
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    if type(x) is list:
        return [_encode(y) for y in x]
    for kind, tag in ((Slot, "slot"), (Constant, "constant"), (Slice, "slice"), (tuple, "tuple")):
        if isinstance(x, kind):
            return [_MARK, tag, *(_encode(y) for y in x)]
    if x is Ellipsis:
        return [_MARK, "ellipsis"]
    if isinstance(x, (torch.dtype, torch.layout, torch.memory_format)):
        return [_MARK, "torch", str(x).removeprefix("torch.")]
    if isinstance(x, torch.device):
        return [_MARK, "device", str(x)]
    raise TapeError(f"an argument of type {type(x).__name__} cannot be written to disk")


def _decode(x: Any) -> Any:
    if not isinstance(x, list):
        return x
    if not x or x[0] != _MARK:
        return [_decode(y) for y in x]
    tag, rest = x[1], [_decode(y) for y in x[2:]]
    match tag:
        case "slot":
            return Slot(*rest)
        case "constant":
            return Constant(*rest)
        case "slice":
            return Slice(*rest)
        case "tuple":
            return tuple(rest)
        case "ellipsis":
            return Ellipsis
        case "torch":
            return getattr(torch, rest[0])
        case "device":
            return torch.device(rest[0])
    raise TapeError(f"the tape holds a value of unknown kind {tag!r}")
