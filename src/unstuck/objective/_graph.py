"""The recorded calls as a graph that forgets what nobody can use any more.

A call points to the calls that it needs: those that made its arguments and those that wrote into their memory. Only
live tensors, reads and roots point to calls, so that an evaluation of a thousand batches inside a step leaves nothing.
"""

import functools
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from unstuck.objective._calls import autocast
from unstuck.objective._places import Inside, Spot

COPY_LIMIT = 32 << 20  # bytes; a larger constant is kept by reference and its version watched
LOST = -2  # the version of a constant whose contents are gone; inference tensors, which have none, show -1


class Taken:
    """A constant as it was when a call took it."""

    __slots__ = ("__weakref__", "base", "before", "overwritten", "shared", "tensor", "version", "viewed")

    def __init__(
        self, tensor: Tensor, version: int, before: Tensor | None = None, *, overwritten: bool = False
    ) -> None:
        self.tensor = tensor
        self.version = version
        self.before = before  # its contents then, where something wrote into it later or may do so unseen
        self.overwritten = overwritten  # whether a call of the step writes into it
        self.shared = False  # whether NumPy sees its memory
        self.viewed = False  # whether a recorded call returned a view of it
        self.base: Taken | None = None  # the copy of its memory, where views of it are written into


class Made:
    """Tensor number `at` of those that a call returned, at the version that it had then."""

    __slots__ = ("at", "call", "shares", "version")

    def __init__(self, call: "Call", at: int, version: int) -> None:
        self.call = call
        self.at = at
        self.version = version
        self.shares = False  # whether its memory is a constant's


class Call:
    """One recorded call; tensors in its arguments stand as Slot (a parameter), Made or Taken."""

    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()
    grad = True
    epoch = 0  # the newest part that its arguments come from
    touches = False  # whether it takes a parameter
    changes: Sequence[tuple[int, int, int]] = ()  # slot, version, writes into it; where they are not as at first
    elastic = False  # whether numbers that depend on the parameters decide the shape of the results
    shares = False  # whether it takes memory of constants, which its results may then be views of
    state: Tensor | None = None  # of the generator, where it draws
    count = 0  # of the tensors that it returned
    first = 0  # the slot of the first of them
    expects: Any = None
    moved = 0  # the call that then changed the statistics that this one evaluates with
    refusal: str | None = None
    inside: Inside | None = None  # the module that made it
    spot: Spot | None = None  # where in the script

    def __init__(self, index: int, function: Any, name: str, part: int) -> None:
        self.index = index
        self.function = function
        self.name = name
        self.part = part  # how many backward() calls came before
        self.autocast = autocast()
        self.needs: list[Call] = []
        if not torch.is_grad_enabled():
            self.grad = False


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
        if version >= 0 and compact_bytes(tensor) > COPY_LIMIT:
            return tensor.detach(), version
        known = self._copies.get(id(tensor))
        if known is not None and known[0] == version:
            return known[1], None
        return self._keep(tensor, version, copied(tensor)), None

    def same(self, tensor: Tensor, contents: Tensor) -> Tensor:
        """A copy with these contents that was made of the tensor before, or the contents themselves."""
        known = self._copies.get(id(tensor))
        if known is not None and known[1].shape == contents.shape and torch.equal(known[1], contents):
            return known[1]
        return self._keep(tensor, version_of(tensor), contents)

    def _keep(self, tensor: Tensor, version: int, kept: Tensor) -> Tensor:
        key = id(tensor)
        if key not in self._copies:  # a dead tensor takes its copy along, before its id can be given to another
            self._sources[key] = weakref.ref(tensor, functools.partial(_forget, weakref.ref(self), key))
        self._copies[key] = (version, kept)
        return kept

    def forget(self, key: int) -> None:
        del self._copies[key], self._sources[key]


def _forget(vault: weakref.ref[Vault], key: int, _: object) -> None:
    known = vault()  # a vault that its own references held would wait for the garbage collector
    if known is not None:
        known.forget(key)


def memory_of(tensor: Tensor) -> int:
    """Where the memory that a tensor lies in begins, the same for tensors that share it through numpy; 0 for none."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0


def shared(tensor: Tensor) -> bool:
    """Whether NumPy may see the memory of a tensor: torch then no longer lets it be resized."""
    return tensor.layout is torch.strided and not tensor.untyped_storage().resizable()


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
    return (
        _compact(tensor.detach()).nbytes if tensor.layout is torch.strided else tensor.numel() * tensor.element_size()
    )


def copied(tensor: Tensor) -> Tensor:
    """A copy of the same shape and strides, expanded where the original is."""
    if not torch.is_inference_mode_enabled():
        return _copied(tensor)
    with torch.inference_mode(mode=False):
        return _copied(tensor)


def _copied(tensor: Tensor) -> Tensor:
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
