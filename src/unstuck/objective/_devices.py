"""Tapes that were recorded on another device, for a machine that has only a CPU."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from unstuck.objective._program import Instruction, Program, Tape, map_leaves

_ELSEWHERE = re.compile(r"(cuda|xpu|mps|mtia|hpu|npu)(:\d+)?")  # a device by its name
_MOVES = frozenset(("cuda", "xpu"))  # calls named after the device that they move to


def on_cpu(tapes: Sequence[Tape]) -> tuple[list[Tape], str]:
    """The tapes with the CPU in the place of every device that they name, and why some were left out.

    Their constants lie on the CPU already. Automatic casts are those of the CPU, which differ in few functions. What a
    generator of another device drew cannot be drawn here: such a tape is left out.
    """
    programs: dict[int, Program] = {}
    found, because = [], ""
    drawn_here = torch.get_rng_state().shape
    for tape in tapes:
        if any(state.shape != drawn_here for state in tape.states):
            because = "the steps drew their random numbers, as dropout does, on a device that is not here"
            continue
        program = programs.get(id(tape.program))
        if program is None:
            calls = tuple(map(_moved, tape.program.instructions))
            program = programs[id(tape.program)] = replace(tape.program, instructions=calls)
        found.append(replace(tape, program=program))
    return found, because


def _moved(call: Instruction) -> Instruction:
    args = map_leaves(_here, call.args) if call.name != "einsum" else call.args  # "cuda" are indices there
    kwargs = tuple((k, _device(v) if k == "device" else map_leaves(_here, v)) for k, v in call.kwargs)
    autocast = None if call.autocast is None else ("cpu", *call.autocast[1:])
    if call.name in _MOVES:  # x.cuda() and its kin
        args, kwargs = (args[0], "cpu"), ()
        return replace(call, function=torch.Tensor.to, name="to", args=args, kwargs=kwargs, autocast=autocast)
    if call.name == "to" and len(args) > 1:
        args = (args[0], _device(args[1]), *args[2:])
    kwargs = tuple((k, False if k == "pin_memory" else v) for k, v in kwargs)
    return replace(call, args=args, kwargs=kwargs, autocast=autocast)


def _here(x: Any) -> Any:
    """A literal, or the CPU where it names another device."""
    if type(x) is torch.device:
        return x if x.type in ("cpu", "meta") else torch.device("cpu")
    if type(x) is str:
        return "cpu" if _ELSEWHERE.fullmatch(x) else x.replace("torch.cuda.", "torch.")  # as in x.type(...)
    return x


def _device(x: Any) -> Any:
    """The argument that says where to; a bare number counts the devices of a GPU's kind."""
    return "cpu" if type(x) is int else map_leaves(_here, x)
