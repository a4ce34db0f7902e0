"""A recorded step as data: instructions with slots, and the tape that runs them again with other parameters."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


class TapeError(RuntimeError):
    """The step cannot be replayed; the message says why."""


class Slot(NamedTuple):
    """Where a value lies: the parameters first, then what the instructions make."""

    at: int


class Constant(NamedTuple):
    """Where a tensor lies that no parameter touched: the batch, a mask, a buffer."""

    at: int


class Slice(NamedTuple):
    """A slice whose ends may be tensors."""

    start: Any
    stop: Any
    step: Any


@dataclass(frozen=True)
class Instruction:
    """A call with its arguments; `Slot` and `Constant` stand where tensors stood."""

    function: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    outputs: tuple[int, ...] = ()  # slots, in the order in which the tensors lie in the result
    written: int | None = None  # the slot under which the first argument goes on, where the call writes into it
    random: bool = False  # whether it draws from the global generator
    grad: bool = True  # whether gradients were recorded
    autocast: tuple[str, torch.dtype] | None = None
    expects: bool | int | None = None  # what it returned, where the script read a flag or a count that may steer it

    def slots(self) -> Iterator[int]:
        """The slots it reads."""
        for leaf in leaves((self.args, self.kwargs)):
            if type(leaf) is Slot:
                yield leaf.at

    def made(self) -> tuple[int, ...]:
        """The slots it fills."""
        return self.outputs if self.written is None else (self.written,)


@dataclass(frozen=True)
class Program:
    """The instructions of a step. The steps of one loop share it: only their constants differ."""

    instructions: tuple[Instruction, ...]
    parameters: int  # how many slots are parameters
    size: int  # how many slots there are
    roots: tuple[int, ...]  # slots that backward() was called on
    overwritten: frozenset[int]  # constants that a call writes into: each replay takes a copy
    released: tuple[tuple[int, ...], ...]  # the slots that are of no more use after each instruction

    def reads(self) -> set[int]:
        """The parameters that take part."""
        return {slot for call in self.instructions for slot in call.slots() if slot < self.parameters}


Observer = Callable[[Instruction, tuple[Any, ...], Any], None]


@dataclass(frozen=True, eq=False)
class Tape:
    """The loss of one recorded step as a function of the parameters."""

    program: Program
    constants: tuple[Tensor, ...]
    versions: tuple[int | None, ...]  # of the constants kept by reference; None for copies
    states: tuple[Tensor, ...]  # of the generator, one for each instruction that draws
    loss: float  # as it was recorded
    step: int

    def replay(self, values: Sequence[Tensor], *, observe: Observer | None = None) -> Tensor:
        """The loss (0-d) at `values`, one tensor a parameter; later ones that the step did not know are ignored.

        The global generator is left as it was. `observe(instruction, arguments, result)` sees every call.
        TapeError where the script would have taken another path with these values.
        """
        for tensor, version in zip(self.constants, self.versions, strict=True):
            if version is not None and tensor._version != version:  # noqa: SLF001
                raise TapeError("the batch of the step was overwritten in place after the step")
        program = self.program
        constants = [t.clone() if k in program.overwritten else t for k, t in enumerate(self.constants)]
        slots: list[Any] = [None] * program.size
        slots[: program.parameters] = values[: program.parameters]
        states = iter(self.states)
        with _own_generator(values), sdpa_kernel(SDPBackend.MATH):
            for call, released in zip(program.instructions, program.released, strict=True):
                _run(call, slots, constants, next(states) if call.random else None, observe)
                for index in released:
                    slots[index] = None
        return (
            torch.stack([slots[root] for root in program.roots]).sum()
            if len(program.roots) > 1
            else slots[program.roots[0]]
        )

    @property
    def bytes(self) -> int:
        """What the tape keeps in memory, its shared copies counted in full."""
        return sum(t.numel() * t.element_size() for t in (*self.constants, *self.states))


@contextlib.contextmanager
def _own_generator(values: Sequence[Tensor]) -> Iterator[None]:
    devices = sorted({v.device.index or 0 for v in values if v.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        yield


def generator_state(device: torch.device) -> Tensor:
    """The state of the global generator that random calls on `device` draw from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _run(
    call: Instruction, slots: list[Any], constants: list[Tensor], state: Tensor | None, observe: Observer | None
) -> None:
    args = tuple(fill(a, slots, constants) for a in call.args)
    kwargs = {k: fill(v, slots, constants) for k, v in call.kwargs}
    if state is not None:
        device = tensors((args, kwargs))[0].device
        torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)
    with _context(call):
        result = call.function(*args, **kwargs)
    if observe is not None:
        observe(call, args, result)
    if call.expects is not None and result != call.expects:
        raise TapeError(f"with these weights the script would take another path ({call.name}() gives another answer)")
    if call.written is not None:
        slots[call.written] = args[0]
    for index, tensor in zip(call.outputs, tensors(result), strict=False):
        slots[index] = tensor


def _context(call: Instruction) -> contextlib.AbstractContextManager[Any]:
    if call.autocast is None and call.grad:
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    if not call.grad:
        stack.enter_context(torch.no_grad())
    if call.autocast is not None:
        stack.enter_context(torch.autocast(call.autocast[0], dtype=call.autocast[1]))
    return stack


def fill(x: Any, slots: Sequence[Any], constants: Sequence[Tensor]) -> Any:
    """An argument with the tensors back in their places."""
    kind = type(x)
    if kind is Slot:
        return slots[x.at]
    if kind is Constant:
        return constants[x.at]
    if kind is Slice:
        start, stop, step = (fill(y, slots, constants) for y in x)
        return slice(start, stop, step)
    if kind is tuple:
        return tuple(fill(y, slots, constants) for y in x)
    if kind is list:
        return [fill(y, slots, constants) for y in x]
    return x


def tensors(x: Any) -> list[Tensor]:
    """The tensors in a result or an argument, in a fixed order."""
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, (tuple, list)):
        return [t for y in x for t in tensors(y)]
    if isinstance(x, dict):
        return [t for y in x.values() for t in tensors(y)]
    if isinstance(x, slice):
        return tensors((x.start, x.stop, x.step))
    return []


def leaves(x: Any) -> Iterator[Any]:
    """What stands at the leaves of an encoded argument."""
    if isinstance(x, (tuple, list)) and type(x) not in (Slot, Constant):
        for y in x:
            yield from leaves(y)
    else:
        yield x


def map_leaves(f: Callable[[Any], Any], x: Any) -> Any:
    """An encoded argument with `f` applied to its slots and constants."""
    kind = type(x)
    if kind in (Slot, Constant):
        return f(x)
    if kind is Slice:
        return Slice(*(map_leaves(f, y) for y in x))
    if kind is tuple:
        return tuple(map_leaves(f, y) for y in x)
    if kind is list:
        return [map_leaves(f, y) for y in x]
    return x
