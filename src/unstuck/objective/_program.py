"""A recorded step as data: instructions with slots, and the tape that runs them again with other parameters."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unstuck.objective._calls import STATISTICS, updates


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


@dataclass(frozen=True, eq=False)
class Instruction:
    """A call with its arguments; `Slot` and `Constant` stand where tensors stood."""

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

    def made(self) -> tuple[int, ...]:
        """The slots it fills."""
        return self.outputs


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

    @functools.cached_property
    def floats(self) -> frozenset[float]:
        """The numbers with a point that its instructions take."""
        found = leaves(tuple((call.args, call.kwargs) for call in self.instructions))
        return frozenset(x for x in found if type(x) is float)


Observer = Callable[[Instruction, tuple[Any, ...], Any], None]


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

    def replay(self, values: Sequence[Tensor], *, observe: Observer | None = None) -> Tensor:
        """The loss (0-d) at `values`, one tensor a parameter; later ones that the step did not know are ignored.

        The global generators are left as they were. `observe(instruction, arguments, result)` sees every call. Under
        `second_order` it takes kernels that have second derivatives.
        TapeError where the script would have taken another path with these values.
        """
        for tensor, version in zip(self.constants, self.versions, strict=True):
            if version is not None and tensor._version != version:
                raise TapeError("the batch of the step was overwritten in place after the step")
        shares = zip(self.of_shares(self.constants), self.of_shares(self.states), strict=True)
        losses = [self._loss(values, constants, states, observe) for constants, states in shares]
        return losses[0] if self.shares == 1 else torch.stack(losses).mean()

    def of_shares(self, kept: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """The constants, or the states, share by share."""
        each = len(kept) // self.shares
        return [kept[k * each : (k + 1) * each] for k in range(self.shares)]

    def _loss(
        self, values: Sequence[Tensor], kept: Sequence[Tensor], drawn: Sequence[Tensor], observe: Observer | None
    ) -> Tensor:
        program = self.program
        constants = [t.clone() if k in program.overwritten else t for k, t in enumerate(kept)]
        slots: list[Any] = [None] * program.size
        slots[: program.parameters] = values[: program.parameters]
        states = iter(drawn)
        with _own_generator((*values, *constants)), _Surroundings() as surroundings:
            for call, released in zip(program.instructions, program.released, strict=True):
                surroundings.enter(call)
                _run(call, slots, constants, next(states) if call.random else None, observe)
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


def _run(
    call: Instruction, slots: list[Any], constants: list[Tensor], state: Tensor | None, observe: Observer | None
) -> None:
    args = tuple(fill(a, slots, constants) for a in call.args)
    kwargs = {k: fill(v, slots, constants) for k, v in call.kwargs}
    if state is not None:
        _restore(state, tensors((args, kwargs))[0].device)
    if call.name in STATISTICS and not updates(
        call.name, args, kwargs
    ):  # or a later call would write into what it saves
        args = (args[0], *(x.clone() if isinstance(x, Tensor) and not x.requires_grad else x for x in args[1:]))
        kwargs = {k: x.clone() if k.startswith("running_") and x is not None else x for k, x in kwargs.items()}
    try:
        result = _SMOOTH.get(call.name, call.function)(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        raise TapeError(f"with these weights {call.name}() fails: {error}") from error
    if observe is not None:
        observe(call, args, result)
    if call.expects is not None and result != call.expects:
        raise TapeError(f"with these weights the script would take another path ({call.name}() gives another answer)")
    if call.outputs:
        made = tensors(result)
        if len(made) != len(call.outputs):
            raise TapeError(f"with these weights {call.name}() returns {len(made)} tensors, not {len(call.outputs)}")
        for index, tensor in zip(call.outputs, made, strict=True):
            slots[index] = tensor


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
