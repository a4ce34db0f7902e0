"""Tapes on disk: plain lists, numbers and tensors, read back without running anything that the file names.

A function is written as its dotted name below `torch` and looked up among the functions that torch lets a mode see, so
that a file from elsewhere cannot call anything else.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import _VF
from torch.nn import functional
from torch.overrides import get_overridable_functions, resolve_name

from unstuck.objective._program import Constant, Instruction, Number, Place, Program, Slice, Slot, Tape, TapeError

_MARK = "#"  # opens an encoded value that JSON-like types cannot carry
_UNDERSCORED = (  # internal functions that torch.nn and torch.distributions call in sight
    "_weight_norm _pack_padded_sequence _pad_packed_sequence _is_all_true _is_any_true _standard_gamma "
    "_sample_dirichlet _safe_softmax _euclidean_dist _foreach_norm _foreach_mul _foreach_add _foreach_pow"
).split()

_UNLISTED = ("hardsigmoid", "hardswish")  # which torch lets a mode see and does not list


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
            "constants": [
                c if version is None else c.clone() for c, version in zip(t.constants, t.versions, strict=True)
            ],
            "states": list(t.states),
            "loss": t.loss,
            "step": t.step,
            "shares": t.shares,
            "numbers": list(t.numbers),
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
            shares=t.get("shares", 1),
            numbers=tuple(t.get("numbers", ())),  # which the first versions did not have
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
        "places": [list(place) for place in program.places],
    }


def _unpack_program(data: Mapping[str, Any]) -> Program:
    return Program(
        instructions=tuple(_unpack_call(c) for c in data["calls"]),
        parameters=data["parameters"],
        size=data["size"],
        roots=tuple(data["roots"]),
        overwritten=frozenset(data["overwritten"]),
        released=tuple(tuple(r) for r in data["released"]),
        places=[Place(*place) for place in data.get("places", ())],
    )


def _pack_call(call: Instruction) -> list[Any]:
    dotted = _names().get(call.function)
    if dotted is None:
        raise TapeError(f"the call {call.name}() has no public name in torch: the tape cannot be written to disk")
    kwargs = [[k, _encode(v)] for k, v in call.kwargs]
    flags = [call.random, call.grad, _encode(call.autocast), call.part, _encode(call.expects)]
    return [dotted, call.name, _encode(call.args), kwargs, list(call.outputs), flags]


def _unpack_call(data: Sequence[Any]) -> Instruction:
    dotted, name, args, kwargs, outputs, (random, grad, autocast, part, expects) = data
    function = _functions().get(dotted)
    if function is None:
        raise TapeError(f"the tape calls {dotted}, which this torch does not have")
    return Instruction(
        function=function,
        name=name,
        args=_decode(args),
        kwargs=tuple((k, _decode(v)) for k, v in kwargs),
        outputs=tuple(outputs),
        random=random,
        grad=grad,
        autocast=_decode(autocast),
        part=part,
        expects=_decode(expects),
    )


@functools.cache
def _functions() -> dict[str, Callable[..., Any]]:
    """The functions that a file may name: those that torch lets a mode see, except what reads memory or files."""
    functions = [f for group in get_overridable_functions().values() for f in group]
    known = {name: f for f in functions if (name := resolve_name(f)) is not None}
    builtins = vars(_VF)["vf"]
    names = [n for n in dir(builtins) if not n.startswith(("_", "from", "empty"))]
    more = {f"torch.{n}": getattr(builtins, n) for n in (*names, *_UNDERSCORED)}
    more |= {f"torch.nn.functional.{n}": getattr(functional, n) for n in _UNLISTED}
    return more | known


@functools.cache
def _names() -> dict[Callable[..., Any], str]:
    return {f: name for name, f in _functions().items()}


def _encode(x: Any) -> Any:
    if x is None or isinstance(x, (bool, int, float, complex, str)):
        return x
    if type(x) is list:
        return [_encode(y) for y in x]
    for kind, tag in ((Slot, "slot"), (Constant, "constant"), (Number, "number"), (Slice, "slice"), (tuple, "tuple")):
        if isinstance(x, kind):
            return [_MARK, tag, *(_encode(y) for y in x)]
    if isinstance(x, range):
        return [_MARK, "range", x.start, x.stop, x.step]
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
    make = _KINDS.get(x[1])
    if make is None:
        raise TapeError(f"the tape holds a value of unknown kind {x[1]!r}")
    return make(*(_decode(y) for y in x[2:]))


def _of_torch(name: str) -> Any:
    found = getattr(torch, name, None)
    if not isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
        raise TapeError(f"the tape holds torch.{name}, which is no type or layout")
    return found


_KINDS: dict[str, Callable[..., Any]] = {
    "slot": Slot,
    "constant": Constant,
    "number": Number,
    "slice": Slice,
    "range": range,
    "tuple": lambda *items: items,
    "ellipsis": lambda: ...,
    "torch": _of_torch,
    "device": torch.device,
}
