"""A recorded step as data: instructions with slots, and the tape that runs them again with other parameters."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unstuck.objective._calls import STATISTICS, updates


class TapeError(RuntimeError):
    """The step cannot be replayed; the message says why.

    `doubted` is the program of earlier steps that were taken for good, where what is seen now speaks against them, too.
    """

    def __init__(self, message: str, *, doubted: "Program | None" = None) -> None:
        super().__init__(message)
        self.doubted = doubted


class Slot(NamedTuple):
    """Where a value lies: the parameters first, then what the instructions make."""

    at: int


class Constant(NamedTuple):
    """Where a tensor lies that no parameter touched: the batch, a mask, a buffer."""

    at: int


class Number(NamedTuple):
    """Where a number with a point lies that is another one at each step: a weight that Python computes anew."""

    at: int


class Place(NamedTuple):
    """Where in the script a call was made; empty where that is not known."""

    module: str  # the innermost, by its name in the model
    line: str  # file:line


class Slice(NamedTuple):
    """A slice whose ends may be tensors."""

    start: Any
    stop: Any
    step: Any


@dataclass(frozen=True, eq=False)
class Instruction:
    """A call with its arguments; `Slot` and `Constant` stand where tensors stood, `Number` where a number moves."""

    function: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    outputs: tuple[int, ...] = ()  # slots, in the order in which the tensors lie in the result
    random: bool = False  # whether it draws from the global generator
    grad: bool = True  # whether gradients were recorded
    autocast: tuple[str, torch.dtype, bool] | None = None  # device, type, whether casts are cached
    part: int = 0  # how many backward() calls came before
    expects: Any = None  # what it returned, where the script read a flag, a count or a shape that may steer it

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Instruction):
            return NotImplemented
        return self.function == other.function and same_literal(self._rest(), other._rest())

    def __hash__(self) -> int:
        return hash((self.name, self.outputs))

    def _rest(self) -> tuple[Any, ...]:
        settings = (self.outputs, self.random, self.grad, self.autocast, self.part, self.expects)
        return (self.name, self.args, self.kwargs, *settings)

    def slots(self) -> Iterator[int]:
        """The slots it reads."""
        for leaf in leaves((self.args, self.kwargs)):
            if type(leaf) is Slot:
                yield leaf.at

    def leaves(self) -> Iterator[Any]:
        """What stands at the leaves of its arguments."""
        return leaves((self.args, self.kwargs))

    def made(self) -> tuple[int, ...]:
        """The slots it fills."""
        return self.outputs


@dataclass(frozen=True)
class Program:
    """The instructions of a step. The steps of one loop share it: only their constants and numbers differ.

    `places` says where in the script they are, as the last step had it whose modules were followed, or another program
    that begins with the same ones; of the others it is not known. Programs that differ in nothing else are the same.
    """

    instructions: tuple[Instruction, ...]
    parameters: int  # how many slots are parameters
    size: int  # how many slots there are
    roots: tuple[int, ...]  # slots that backward() was called on
    overwritten: frozenset[int]  # constants that a call writes into: each replay takes a copy
    released: tuple[tuple[int, ...], ...]  # the slots that are of no more use after each instruction
    places: list[Place] = field(default_factory=list, compare=False)

    def reads(self) -> set[int]:
        """The parameters that take part."""
        return {slot for call in self.instructions for slot in call.slots() if slot < self.parameters}

    def place(self, k: int) -> str:
        """Where the call of instruction `k` was made, in a few words."""
        call, (module, line) = self.instructions[k].name, self.where(k)
        line = PurePath(line).name  # without its folder
        inside = ", ".join(x for x in ((call, line) if module else (line,)) if x)
        return f"{module or call} ({inside})" if inside else f"{call}()"

    def where(self, k: int) -> Place:
        """Where the call of instruction `k` was made."""
        return self.places[k] if k < len(self.places) else Place("", "")

    @functools.cached_property
    def moves(self) -> bool:
        """Whether numbers in it move from step to step."""
        return any(type(x) is Number for call in self.instructions for x in leaves((call.args, call.kwargs)))

    @functools.cached_property
    def floats(self) -> frozenset[float]:
        """The numbers with a point that its instructions take."""
        found = leaves(tuple((call.args, call.kwargs) for call in self.instructions))
        return frozenset(x for x in found if type(x) is float)


Observer = Callable[[Instruction, tuple[Any, ...], Any], None]
Foreseer = Callable[[Instruction, tuple[Any, ...], dict[str, Any]], None]


@dataclass(frozen=True, eq=False)
class Tape:
    """The loss of one recorded step as a function of the parameters.

    Where several processes took the step together, each with its share of the batch, it is the mean of their losses;
    the constants and states of the shares stand one after the other.
    """

    program: Program
    constants: tuple[Tensor, ...]
    versions: tuple[int | None, ...]  # of the constants kept by reference; None for copies
    states: tuple[Tensor, ...]  # of the generator, one for each instruction that draws
    loss: float  # as it was recorded
    step: int
    shares: int = 1
    numbers: tuple[float, ...] = ()  # what stands for each `Number`

    def replay(
        self, values: Sequence[Tensor], *, observe: Observer | None = None, foresee: Foreseer | None = None
    ) -> Tensor:
        """The loss (0-d) at `values`, one tensor a parameter; later ones that the step did not know are ignored.

        The global generators are left as they were. `observe(instruction, arguments, result)` sees every call after it
        was made, `foresee(instruction, arguments, keywords)` before it. Under `second_order` it takes kernels that have
        second derivatives. TapeError where the script would have taken another path with these values.
        """
        for tensor, version in zip(self.constants, self.versions, strict=True):
            if version is not None and tensor._version != version:
                raise TapeError("the batch of the step was overwritten in place after the step")
        shares = zip(*(self.of_shares(kept) for kept in (self.constants, self.states, self.numbers)), strict=True)
        losses = [self._loss(values, kept, drawn, numbers, observe, foresee) for kept, drawn, numbers in shares]
        return losses[0] if self.shares == 1 else torch.stack(losses).mean()

    def of_shares(self, kept: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """The constants, the states or the numbers, share by share."""
        each = len(kept) // self.shares
        return [kept[k * each : (k + 1) * each] for k in range(self.shares)]

    def _loss(
        self,
        values: Sequence[Tensor],
        kept: Sequence[Tensor],
        drawn: Sequence[Tensor],
        numbers: Sequence[float],
        observe: Observer | None,
        foresee: Foreseer | None,
    ) -> Tensor:
        program = self.program
        constants = [t.clone() if k in program.overwritten else t for k, t in enumerate(kept)]
        slots: list[Any] = [None] * program.size
        slots[: program.parameters] = values[: program.parameters]
        held = _Held(slots, constants, numbers)
        states = iter(drawn)
        with _own_generator((*values, *constants)), _Surroundings() as surroundings:
            for call, released in zip(program.instructions, program.released, strict=True):
                surroundings.enter(call)
                _step(call, held, next(states) if call.random else None, observe, foresee)
                for index in released:
                    slots[index] = None
        loss, *others = (slots[root].reshape(()) for root in program.roots)
        for other in others:
            loss = loss + other
        return loss

    @property
    def bytes(self) -> int:
        """What the tape keeps in memory, its shared copies counted in full."""
        return sum(t.numel() * t.element_size() for t in (*self.constants, *self.states))


def joined(tapes: Sequence[Tape]) -> Tape:
    """One step that several processes took together, each with its share of the batch, from their tapes of it.

    They have one program, and the loss is the plain mean of theirs: so DistributedDataParallel averages gradients.
    """
    first = tapes[0]
    if any(t.program is not first.program or t.step != first.step or t.shares != 1 for t in tapes):
        raise ValueError("tapes of one step and one program are needed, each of one share, got others")
    return Tape(
        program=first.program,
        constants=tuple(c for t in tapes for c in t.constants),
        versions=tuple(v for t in tapes for v in t.versions),
        states=tuple(s for t in tapes for s in t.states),
        numbers=tuple(x for t in tapes for x in t.numbers),
        loss=sum(t.loss for t in tapes) / len(tapes),
        step=first.step,
        shares=len(tapes),
    )


@contextlib.contextmanager
def _own_generator(values: Sequence[Tensor]) -> Iterator[None]:
    devices = sorted({v.device.index or 0 for v in values if v.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        yield


def generator_state(device: torch.device) -> Tensor:
    """The state of the global generator that random calls on `device` draw from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _restore(state: Tensor, device: torch.device) -> None:
    if state.shape != generator_state(device).shape:
        raise TapeError(f"the step drew its random numbers on another device than {device}, which cannot repeat them")
    torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)


def _step(
    call: Instruction, held: "_Held", state: Tensor | None, observe: Observer | None, foresee: Foreseer | None
) -> None:
    args, kwargs = tuple([fill(a, held) for a in call.args]), {k: fill(v, held) for k, v in call.kwargs}
    if foresee is not None:
        foresee(call, args, kwargs)
    result = _run(call, args, kwargs, state)
    if observe is not None:
        observe(call, args, result)
    if call.expects is not None and result != call.expects:
        raise TapeError(f"with these weights the script would take another path ({call.name}() gives another answer)")
    if call.outputs:
        made = tensors(result)
        if len(made) != len(call.outputs):
            raise TapeError(f"with these weights {call.name}() returns {len(made)} tensors, not {len(call.outputs)}")
        for index, tensor in zip(call.outputs, made, strict=True):
            held.slots[index] = tensor


def _run(call: Instruction, args: tuple[Any, ...], kwargs: dict[str, Any], state: Tensor | None) -> Any:
    if state is not None:
        _restore(state, tensors((args, kwargs))[0].device)
    if call.name in STATISTICS and not updates(
        call.name, args, kwargs
    ):  # or a later call would write into what it saves
        args = (args[0], *(x.clone() if isinstance(x, Tensor) and not x.requires_grad else x for x in args[1:]))
        kwargs = {k: x.clone() if k.startswith("running_") and x is not None else x for k, x in kwargs.items()}
    # torch takes a view for a leaf if its base was written into and nobody has asked for its grad_fn since
    _ = getattr(args[0], "grad_fn", None) if args else None
    try:
        return _SMOOTH.get(call.name, call.function)(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        raise TapeError(f"with these weights {call.name}() fails: {error}") from error


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


_SMOOTH: dict[str, Callable[..., Any]] = {"_weight_norm": _weight_norm}  # torch's own has wrong second derivatives


class _Surroundings:
    """Gradient mode and automatic casts as they were around each call, whatever they are around the replay.

    The casts of one part of the step stay cached together, as under the script's own `with torch.autocast`: a weight
    that is used twice then gathers its gradient in the same precision.
    """

    def __init__(self) -> None:
        self._outer = contextlib.ExitStack()
        self._inner = contextlib.ExitStack()
        self._part: int | None = None
        self._now: tuple[Any, ...] = (True, None)
        self._held: set[str] = set()

    def __enter__(self) -> "_Surroundings":
        return self

    def __exit__(self, *_: object) -> None:
        self._inner.close()
        self._outer.close()

    def enter(self, call: Instruction) -> None:
        """Switches to what was on around `call`."""
        if call.part != self._part:
            self._inner.close()
            self._outer.close()
            self._part, self._now, self._held = call.part, (True, None), set()
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):  # around the replay, not around the step
                    self._hold(device)
        if self._now == (call.grad, call.autocast):
            return
        self._inner.close()
        self._now = (call.grad, call.autocast)
        if call.autocast is not None and call.autocast[0] not in self._held:
            self._hold(call.autocast[0])
        if not call.grad:
            self._inner.enter_context(torch.no_grad())
        if call.autocast is not None:
            device, dtype, cached = call.autocast
            self._inner.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=cached))

    def _hold(self, device: str) -> None:
        self._outer.enter_context(torch.autocast(device, enabled=False))  # the cache lives as long as the outermost
        self._held.add(device)


class _Held(NamedTuple):
    """What stands for the names in a program while it runs."""

    slots: list[Any]
    constants: list[Tensor]
    numbers: Sequence[float]


def fill(x: Any, held: _Held) -> Any:
    """An argument with the tensors back in their places."""
    kind = type(x)
    if kind is Slot:
        return held.slots[x.at]
    if kind is Constant:
        return held.constants[x.at]
    if kind is Number:
        return held.numbers[x.at]
    if kind is Slice:
        start, stop, step = (fill(y, held) for y in x)
        return slice(start, stop, step)
    if kind is tuple:
        return tuple([fill(y, held) for y in x])
    if kind is list:
        return [fill(y, held) for y in x]
    return x


def tensors(x: Any) -> list[Tensor]:
    """The tensors in a result or an argument, in a fixed order."""
    if isinstance(x, Tensor):
        return [x]
    found: list[Tensor] = []
    _collect((x,), found)
    return found


def _collect(items: Any, found: list[Tensor]) -> None:
    for x in items:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (tuple, list)):
            _collect(x, found)
        elif isinstance(x, dict):
            _collect(x.values(), found)
        elif type(x) is slice:
            _collect((x.start, x.stop, x.step), found)


def leaves(x: Any) -> Iterator[Any]:
    """What stands at the leaves of an encoded argument."""
    if type(x) in (tuple, list, Slice):
        for y in x:
            yield from leaves(y)
    else:
        yield x


def same_literal(a: Any, b: Any) -> bool:
    """Whether two encoded values are the same: 1, 1.0 and True are not, nor are 0.0 and -0.0, but two NaN are."""
    kind = type(a)
    if kind is not type(b):
        return False
    if kind in (tuple, list, Slice, torch.Size):
        return len(a) == len(b) and all(map(same_literal, a, b))
    if kind is float or kind is complex:
        return a == b if a and a == a else repr(a) == repr(b)
    return bool(a == b)


def map_leaves(f: Callable[[Any], Any], x: Any) -> Any:
    """An encoded argument with `f` applied to its leaves."""
    kind = type(x)
    if kind is Slice:
        return Slice(*(map_leaves(f, y) for y in x))
    if kind is tuple:
        return tuple([map_leaves(f, y) for y in x])
    if kind is list:
        return [map_leaves(f, y) for y in x]
    return f(x)
