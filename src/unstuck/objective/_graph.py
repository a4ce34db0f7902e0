"""The recorded calls as a graph that forgets what nobody can use any more, and its compilation into a tape.

A call points to the calls that it needs: those that made its arguments and those that wrote into their memory. Only
live tensors, reads and roots point to calls, so that an evaluation of a thousand batches inside a step leaves nothing.
"""

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from unstuck.objective._calls import SHAPES
from unstuck.objective._program import Constant, Instruction, Program, Slot, Tape, TapeError, leaves, map_leaves

COPY_LIMIT = 32 << 20  # bytes; a larger constant is kept by reference and its version watched
LOST = -2  # the version of a constant whose contents are gone; inference tensors, which have none, show -1


@dataclass(eq=False, slots=True)
class Taken:
    """A constant as it was when a call took it."""

    tensor: Tensor
    version: int
    before: Tensor | None = None  # its contents then, where something wrote into it later
    overwritten: bool = False  # whether a call of the step writes into it
    viewed: bool = False  # whether a recorded call returned a view of it
    base: "Taken | None" = None  # the copy of its memory, where views of it are written into
    __weakref__: Any = field(init=False, repr=False)


class Made(NamedTuple):
    """Tensor number `at` of those that a call returned."""

    call: "Call"
    at: int


@dataclass(eq=False, slots=True)
class Call:
    """One recorded call; tensors in its arguments stand as Slot (a parameter), Made or Taken."""

    index: int
    function: Callable[..., Any]
    name: str
    grad: bool
    autocast: tuple[str, torch.dtype, bool] | None
    part: int  # how many backward() calls came before
    epoch: int = 0  # the newest part that its arguments come from
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()
    needs: list["Call"] = field(default_factory=list)
    parameters: list[tuple[int, int, int]] = field(default_factory=list)  # slot, version, writes seen until then
    elastic: bool = False  # whether numbers that depend on the parameters decide the shape of the results
    state: Tensor | None = None  # of the generator, where it draws
    versions: tuple[int, ...] = ()  # of the tensors it returned
    expects: Any = None
    refusal: str | None = None


class Written(NamedTuple):
    """Memory that calls wrote into."""

    storage: StorageWeakRef
    by: Call  # the last of them
    base: Taken | None  # the copy of the memory, where it was a constant's
    tracked: bool  # whether what was written has a gradient


class Vault:
    """Copies of constants, one for each tensor and version: a data set that every step uses is copied once."""

    def __init__(self) -> None:
        self._copies: dict[int, tuple[int, Tensor]] = {}
        self._sources: dict[int, weakref.ref[Tensor]] = {}

    def copy(self, tensor: Tensor) -> tuple[Tensor, int | None]:
        """A copy that nobody writes into; a large tensor itself, with the version to watch."""
        version = version_of(tensor)
        if compact_bytes(tensor) > COPY_LIMIT and version >= 0:
            return tensor.detach(), version
        key = id(tensor)
        known = self._copies.get(key)
        if known is not None and known[0] == version:
            return known[1], None
        if known is None:  # a dead tensor takes its copy along, before its id can be given to another
            self._sources[key] = weakref.ref(tensor, functools.partial(_forget, weakref.ref(self), key))
        kept = copied(tensor)
        self._copies[key] = (version, kept)
        return kept, None

    def forget(self, key: int) -> None:
        del self._copies[key], self._sources[key]


def _forget(vault: weakref.ref[Vault], key: int, _: object) -> None:
    known = vault()  # a vault that its own references held would wait for the garbage collector
    if known is not None:
        known.forget(key)


def memory_of(tensor: Tensor) -> int:
    """Where the memory that a tensor lies in begins, the same for tensors that share it through numpy; 0 for none."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0


def version_of(tensor: Tensor) -> int:
    """How often the tensor was written into; -1 where torch does not count."""
    return -1 if tensor.is_inference() else tensor._version


def versions_of(given: Sequence[Tensor]) -> list[int]:
    """The versions of several tensors."""
    try:
        return [t._version for t in given]
    except RuntimeError:
        return [version_of(t) for t in given]


def _compact(tensor: Tensor) -> Tensor:
    """The tensor without the repetitions of expand()."""
    if tensor.layout is not torch.strided or 0 not in tensor.stride():
        return tensor
    return tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]


def compact_bytes(tensor: Tensor) -> int:
    """The memory of a copy."""
    compact = _compact(tensor.detach())
    return compact.numel() * compact.element_size()


def copied(tensor: Tensor) -> Tensor:
    """A copy of the same shape and strides, expanded where the original is."""
    with torch.inference_mode(mode=False):
        compact = _compact(tensor.detach())
        return compact.clone() if compact.shape == tensor.shape else compact.clone().expand(tensor.shape)


def ancestors(calls: Iterable[Call]) -> set[Call]:
    """The calls and all that they need."""
    found: set[Call] = set()
    todo = list(calls)
    while todo:
        call = todo.pop()
        if call not in found:
            found.add(call)
            todo.extend(call.needs)
    return found


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


def quoted(numbers: Iterable[float], kept: Iterable[Call]) -> float | None:
    """A number that the script read back and gave to a later call."""
    read = {x for x in numbers if not x.is_integer()}
    if read:
        for call in kept:
            for leaf in leaves((call.args, tuple(v for _, v in call.kwargs))):
                if isinstance(leaf, float) and leaf in read:
                    return leaf
    return None


def compile_tape(
    kept: Sequence[Call], roots: Sequence[Call], losses: Sequence[Tensor], parameters: Sequence[Tensor], vault: Vault
) -> Tape:
    """The tape of the calls `kept`, in their order, with the constants copied."""
    leaves_count = len(parameters)
    made: dict[tuple[int, int], int] = {}
    constants: dict[tuple[int, int], int] = {}
    taken: list[Taken] = []
    views: dict[int, Slot] = {}
    calls: list[Instruction] = []

    def number(x: Any) -> Any:
        if type(x) is Made:
            return Slot(made[x.call.index, x.at])
        if type(x) is Taken and x.base is not None:
            return views[id(x)] if id(x) in views else view(x)
        if type(x) is Taken:
            key = (id(x.tensor), x.version) if x.before is None else (id(x.before), 0)
            if key not in constants:
                constants[key] = len(taken)
                taken.append(x)
            return Constant(constants[key])
        return x

    def slot() -> int:
        return leaves_count + len(made)

    def view(x: Taken) -> Slot:
        args = (number(x.base), tuple(x.tensor.shape), x.tensor.stride(), x.tensor.storage_offset())
        views[id(x)] = Slot(slot())
        made[-id(x), 0] = slot()
        calls.append(Instruction(torch.as_strided, "as_strided", args, (), (views[id(x)].at,)))
        return views[id(x)]

    def instruction(call: Call) -> Instruction:
        args, kwargs = map_leaves(number, call.args), map_leaves(number, call.kwargs)
        outputs = tuple(range(slot(), slot() + len(call.versions)))
        made.update({(call.index, k): slot for k, slot in enumerate(outputs)})
        drawn = call.state is not None
        return Instruction(
            call.function, call.name, args, kwargs, outputs, drawn, call.grad, call.autocast, call.part, call.expects
        )

    for call in kept:
        calls.append(instruction(call))
    ends = tuple(number(root.args[0]).at for root in roots)
    copies = _copies(taken, parameters, vault)
    overwritten = frozenset(k for k, x in enumerate(taken) if x.overwritten)
    size = leaves_count + len(made)
    return Tape(
        program=Program(tuple(calls), leaves_count, size, ends, overwritten, _released(calls, ends, leaves_count)),
        constants=tuple(tensor for tensor, _ in copies),
        versions=tuple(version for _, version in copies),
        states=tuple(call.state for call in kept if call.state is not None),
        loss=float(sum(losses)),
        step=0,
    )


def _copies(taken: Sequence[Taken], parameters: Sequence[Tensor], vault: Vault) -> list[tuple[Tensor, int | None]]:
    stored = {id(p.grad) for p in parameters if p.grad is not None}
    if any(id(x.tensor) in stored for x in taken):
        raise TapeError("the loss uses the stored gradient of a parameter")
    return [_kept(x, vault) for x in taken]


def _kept(taken: Taken, vault: Vault) -> tuple[Tensor, int | None]:
    if taken.before is not None:
        return taken.before, None
    if version_of(taken.tensor) != taken.version:
        raise TapeError("an input of the step was overwritten in place before the step ended")
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
