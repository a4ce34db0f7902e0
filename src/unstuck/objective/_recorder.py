"""Records one training step of somebody else's loop as a tape.

A `Recorder` is a torch function mode that is on between two optimiser steps. It notes every call that takes part in
carrying the parameters to the loss, with or without gradients. What the parameters do not touch is kept as a constant;
activations are not kept at all. `Recorder.finish` compiles the tape: calls that do not lead to the loss are dropped and
constants are copied.

Whatever autograd sees and the recorder did not (a custom autograd function, a compiled region) shows as a tensor with a
`grad_fn` that no call made. Such a tape is refused with a reason. Nothing is ever raised into the script.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from unstuck.objective._calls import SHAPES, Kind, caller, elastic, is_flag, kind_of, unseen, updates
from unstuck.objective._compile import compile_tape
from unstuck.objective._graph import (
    COPY_LIMIT,
    LOST,
    Call,
    Made,
    Taken,
    Vault,
    Written,
    ancestors,
    compact_bytes,
    copied,
    memory_of,
    shared,
    steering,
    version_of,
    versions_of,
)
from unstuck.objective._program import Program, Slice, Slot, Tape, TapeError, generator_state, leaves, tensors
from unstuck.objective._shared import Shared

_PLAIN = (bool, int, float, complex, str, range, type(None), type(...), torch.dtype, torch.device, torch.layout)
_LITERALS = frozenset((*_PLAIN, torch.memory_format))
_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_NUMPY = "a value of the step was written into through NumPy"
_is_compiling = torch.compiler.is_compiling


class Recorder(TorchFunctionMode):
    """Enter it after an optimiser step, leave it before the next, tell it the `root` of backward, then `finish`.

    `leaves` are the parameters in the order of their slots. Parameters that no optimiser owns are appended when a call
    uses them. `cuts` lists the first calls that took a value out of the graph, with their source lines.
    """

    def __init__(self, leaves: list[Tensor]) -> None:
        super().__init__()
        self.leaves = leaves
        self.cuts: list[tuple[str, str]] = []
        self.used: set[int] = set()  # slots of the parameters that some call took
        self.calls = 0
        self.seconds = 0.0  # spent in here beside the calls themselves
        self._known: dict[int, Slot | Made] = dict(zip(map(id, leaves), map(Slot, range(len(leaves))), strict=True))
        self._alive: dict[int, weakref.ref[Tensor]] = {}  # these take dead tensors out of `_known`
        self._held: dict[int, list[weakref.ref[Taken]]] = {}  # constants by their memory
        self._written: dict[int, Written] = {}  # memory that calls wrote into
        self._crowded = 16  # how many written memories are looked through for dead ones
        self._first: dict[int, int] = {}  # the version of each parameter when a call took it first
        self._changes: Counter[int] = Counter()  # writes into parameters, by slot
        self._owners: dict[int, list[int]] = {}  # slots of parameters by their memory
        self._evaluated: dict[int, list[weakref.ref[Call]]] = {}  # calls by the running statistics that they use
        self._shared = Shared()  # values of the step that NumPy sees
        self._reads: list[Call] = []
        self._numbers: list[tuple[int, float]] = []  # what was read back, after how many calls
        self._roots: list[Call] = []
        self._losses: list[Tensor] = []
        self._count = 0
        self._elastic = False  # whether there are shapes that depend on the parameters
        self._looked = False  # whether a gradient was looked at or set after a backward()
        self._apart: dict[int, StorageWeakRef] = {}  # memory that is also seen through .data
        self._refusal: str | None = None
        self._off = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._off or _is_compiling():  # the compiler looks into function modes
            return func(*args, **(kwargs or {}))
        self.calls += 1
        try:
            kind = kind_of(func)
        except TypeError:  # cannot be hashed
            kind = Kind(func)
        if kind.looks and not (kind.shape and self._elastic):
            if kind.gradient and self._roots:
                self._looked = self._looked or self._has_gradient(args)
            return func(*args, **kwargs) if kwargs else func(*args)
        return self._see(func, kind, args, kwargs or {})

    def _see(self, func: Any, kind: Kind, args: Any, kwargs: Any) -> Any:
        """Runs a call and notes what it was given, made and wrote."""
        began = perf_counter()
        call: Call | None = None
        state: Tensor | None = None
        given: list[Tensor] = []
        versions: list[int] = []
        if self._refusal is None:
            try:
                if kind.backward:
                    self._check_backward(args, kwargs)
                elif given := _given(args, kwargs):
                    touched = self._touched(given)
                    if kind.looks:
                        touched = self._shaped(args[0])
                    elif kind.exposes:
                        self._expose(given)
                    elif kind.writes_now(args, kwargs):
                        touched = self._preserve(kind, args, given, touched=touched)
                    if touched:
                        call, state = self._opened(func, kind, args, kwargs, given)
                    versions = versions_of(given)
            except Exception as error:
                self._failed(kind.name, error)
        elif not kind.backward:
            self._note_used(args, kwargs)
        self._off = kind.backward  # hooks and recomputation inside backward are not part of the forward
        called = perf_counter()
        try:
            result = func(*args, **kwargs)
        finally:
            self._off = False
            returned = perf_counter()
        if given and self._refusal is None:
            try:
                if call is not None:
                    if state is not None and not torch.equal(state, generator_state(given[0].device)):
                        call.state = state
                    self._close(call, kind, args, given, versions, result)
                elif not kind.writes and versions != versions_of(given):
                    self._surprise(given, versions)
            except Exception as error:
                self._failed(kind.name, error)
        self.seconds += perf_counter() - returned + called - began
        return result

    def root(self, roots: Sequence[Tensor]) -> None:
        """Notes what backward() is called on."""
        self._off = True  # what we ask of the roots is no part of the step
        try:
            for tensor in roots:
                if self._refusal is None:
                    self._note_root(tensor)
        except Exception as error:
            self._failed("backward", error)
        finally:
            self._off = False

    def _note_root(self, tensor: Tensor) -> None:
        call = self._open("backward", None)
        call.args = (self._leaf(tensor, call),)
        if type(call.args[0]) is Taken:
            self._refuse(call.refusal or "backward() was called on a tensor that no recorded call made")
        elif tensor.numel() != 1:
            self._refuse("backward() was called on a tensor that is not a scalar")
        elif self._looked:
            self._refuse("a gradient was read or changed between two backward() calls of the step")
        elif self._shared and self._shared.any_changed():
            self._refuse(_NUMPY)
        else:
            self._roots.append(call)
            loss = tensor.detach().clone()
            self._losses.append(loss.reshape(()) if loss.ndim else loss)

    def finish(self, vault: Vault, *, step: int = 0, like: Program | None = None) -> Tape:
        """The compiled tape; TapeError says why there is none. `like` is a program to share where it is the same."""
        if self._refusal is not None:
            raise TapeError(self._refusal)
        if not self._roots:
            raise TapeError("no backward() was seen in the step")
        kept = ancestors(self._roots)
        if self._reads:
            kept = steering(self._reads, self._roots, kept)
        kept.difference_update(self._roots)
        calls = sorted(kept, key=_index)
        self._check((*calls, *self._roots))
        tape = compile_tape(
            calls, self._roots, self._losses, self.leaves, vault, like=like, numbers=self._numbers
        )
        return replace(tape, step=step)

    def _check(self, calls: Sequence[Call]) -> None:
        bases = {slot: (version, 0) for slot, version in self._first.items()}
        ends = {slot: (version_of(self.leaves[slot]), self._changes[slot]) for slot in bases}
        moved = {slot for slot, base in bases.items() if base != ends[slot]}
        for call in calls:
            if call.refusal is not None:
                raise TapeError(call.refusal)
            if call.name == "grad":
                raise TapeError("the loss contains a derivative (torch.autograd.grad)")
            if call.moved and any(root.index > call.moved and call in ancestors([root]) for root in self._roots):
                raise TapeError("batch norm evaluates with statistics that a later call changes before backward()")
            if not call.touches or not (moved or call.changes):
                continue
            then = {slot: (version, changes) for slot, version, changes in call.changes}
            taken = {x.at for x in leaves((call.args, call.kwargs)) if type(x) is Slot}
            if any(then.get(slot, bases[slot]) != ends[slot] for slot in taken):
                raise TapeError("a parameter was changed in place during the step, outside the optimiser")
        if self._shared and any(self._shared.changed(self.leaves[slot]) for slot in bases):
            raise TapeError("a parameter was changed through NumPy during the step, outside the optimiser")

    def _refuse(self, reason: str) -> None:
        if self._refusal is None:
            self._refusal = reason
            self._known = {key: leaf for key, leaf in self._known.items() if type(leaf) is Slot}  # for `used`
            for kept in (self._alive, self._held, self._written, self._reads, self._roots, self._losses):
                kept.clear()
            self._shared = Shared()

    def _failed(self, name: str, error: Exception) -> None:
        """An error of ours costs the tape, never the script's step."""
        self._refuse(f"{name}() could not be recorded: {type(error).__name__}: {error}")

    def _check_backward(self, args: Any, kwargs: Any) -> None:
        weights = tensors([*args[1:2], kwargs.get("gradient"), kwargs.get("grad_tensors")])
        if not all(bool((w == 1).all()) for w in weights) or kwargs.get("inputs") or any(args[4:]):
            self._refuse("backward() was given weights or chosen inputs")

    def _has_gradient(self, args: Any) -> bool:
        """Whether the gradient that a call gets or sets is a parameter's, and there."""
        return type(self._known.get(id(args[0]))) is Slot and (
            args[0].grad is not None or any(x is not None for x in args[1:])
        )

    # What a call is given

    def _touched(self, given: Sequence[Tensor]) -> bool:
        """Whether a call depends on the parameters; it may show one that was not known yet."""
        found = False
        known = self._known
        for tensor in given:
            leaf = known.get(id(tensor))
            if leaf is None:
                if tensor.requires_grad:
                    found = True
                    if tensor.is_leaf and isinstance(tensor, torch.nn.Parameter):
                        leaf = known[id(tensor)] = Slot(len(self.leaves))
                        self.leaves.append(tensor)
                if leaf is None:
                    if not self._written or self._alias(tensor) is None:
                        continue
            elif type(leaf) is Made:
                found = True
                continue
            if type(leaf) is Slot:
                self.used.add(leaf.at)
            found = True
        return found

    def _note_used(self, args: Any, kwargs: Any) -> None:
        """What is still of use where there is no tape: which parameters calls take."""
        for tensor in _given(args, kwargs):
            leaf = self._known.get(id(tensor))
            if type(leaf) is Slot:
                self.used.add(leaf.at)

    def _shaped(self, tensor: Tensor) -> bool:
        """Whether a shape that is read depends on the parameters."""
        leaf = self._known.get(id(tensor))
        return type(leaf) is Made and leaf.call.elastic

    def _alias(self, tensor: Tensor) -> Made | None:
        """A tensor whose memory a call wrote into, as a view of the copy of that memory."""
        written = self._last_write(tensor)
        return None if written is None else self._view(tensor, written.base, [written.by])

    def _last_write(self, tensor: Tensor) -> Written | None:
        written = self._written.get(memory_of(tensor)) if self._written else None
        return None if written is None or written.storage.expired() else written

    def _view(self, tensor: Tensor, base: Taken | None, needs: list[Call]) -> Made:
        call = self._open("as_strided", torch.as_strided)
        call.grad, call.autocast, call.needs, call.count = True, None, needs, 1
        call.args = (base, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
        call.epoch = max((need.epoch for need in needs), default=call.part)
        if base is None or base.before is None or base.before.dtype != tensor.dtype:
            call.refusal = "a value inside the step is seen through another tensor"
        return self._register(tensor, Made(call, 0, version_of(tensor)))

    def _preserve(self, kind: Kind, args: Any, given: Sequence[Tensor], *, touched: bool) -> bool:
        """Readies the constants that a call is about to write into; whether the call must be recorded."""
        for tensor in given[1:] if kind.statistics else tensors(args[0]) if args else given:
            key = memory_of(tensor)
            if not key or id(tensor) in self._known or tensor.requires_grad:
                continue
            if not touched:
                self._changes.update(self._parameters_at(key))  # through an alias of before the step
            held = [taken for ref in self._held.pop(key, ()) if (taken := ref()) is not None and taken.before is None]
            touched = touched or any(taken.viewed for taken in held)
            base = self._share(tensor, key) if touched else None
            for taken in held:
                if taken.viewed and base is not None and base.tensor.dtype == taken.tensor.dtype:
                    taken.base = base
                elif taken.viewed:
                    taken.version = LOST
                else:
                    _set_aside(taken)
        return touched

    def _share(self, tensor: Tensor, key: int) -> Taken | None:
        """Copies the memory of a constant whose contents come to depend on the parameters."""
        whole = (tensor.untyped_storage().nbytes() // tensor.element_size(),)
        if whole[0] * tensor.element_size() > COPY_LIMIT:
            return None  # it stays a constant, and its version tells
        base = Taken(tensor, LOST, copied(tensor.detach().as_strided(whole, (1,), 0)), overwritten=True)
        made = self._view(tensor, base, [])
        self._written[key] = Written(StorageWeakRef(tensor.untyped_storage()), made.call, base, tracked=False)
        if shared(tensor):
            self._shared.note(tensor)
        return base

    def _expose(self, given: Sequence[Tensor]) -> None:
        """NumPy comes to see a tensor: constants are copied now, values of the step are compared later."""
        for tensor in given:
            for ref in self._held.pop(memory_of(tensor), ()):
                if (taken := ref()) is not None and taken.before is None:
                    _set_aside(taken)
            if id(tensor) in self._known and tensor.layout is torch.strided and not self._shared.note(tensor):
                self._refuse("NumPy sees a value of the step that is too large to be compared later")

    def _leaf(self, tensor: Tensor, call: Call) -> Slot | Made | Taken:
        leaf = self._known.get(id(tensor))
        if leaf is None:
            return self._constant(tensor, call)
        try:
            version = tensor._version
        except RuntimeError:
            version = -1
        if type(leaf) is Slot:
            self._note_parameter(leaf.at, tensor, version, call)
            return leaf
        source = leaf.call
        call.needs.append(source)
        if source.epoch > call.epoch:
            call.epoch = source.epoch
        if source.elastic:
            call.elastic = True
        if leaf.shares:
            call.shares = True
        last = self._last_write(tensor) if self._written else None
        if last is not None:
            self._follow(last, leaf, tensor, call)
        elif leaf.version != version:
            call.refusal = "a value inside the step was overwritten out of sight"
        elif self._shared and self._shared.changed(tensor):
            call.refusal = _NUMPY
        if not source.grad and isinstance(tensor.grad_fn, BackwardCFunction):
            call.refusal = unseen(tensor)
        return leaf

    def _follow(self, last: Written, leaf: Made, tensor: Tensor, call: Call) -> None:
        """A value is read whose memory a call wrote into."""
        call.needs.append(last.by)
        call.epoch = max(call.epoch, last.by.epoch)
        if last.tracked and leaf.call.name == "as_strided" and not tensor.requires_grad:
            call.refusal = "a value with a gradient is read through a tensor that has none"
        if not last.by.grad and isinstance(tensor.grad_fn, BackwardCFunction):
            call.refusal = unseen(tensor)
        if self._shared and self._shared.changed(tensor):
            call.refusal = _NUMPY

    def _note_parameter(self, slot: int, tensor: Tensor, version: int, call: Call) -> None:
        call.touches = True
        call.epoch = call.part
        first = self._first.get(slot)
        if first is None:
            first = self._first[slot] = version
            if shared(tensor) and not self._shared.note(tensor):
                self._refuse("a large parameter shares its memory with NumPy, which may write into it unseen")
        if version != first or self._changes:
            call.changes.append((slot, version, self._changes[slot]))

    def _constant(self, tensor: Tensor, call: Call) -> Taken:
        if tensor.grad_fn is not None:
            call.refusal = unseen(tensor)
        version, key, seen = version_of(tensor), memory_of(tensor), shared(tensor)
        call.shares = True
        refs = self._held.get(key)
        if refs is not None:
            refs = [ref for ref in refs if ref() is not None]
            for taken in (ref() for ref in refs):
                if taken is not None and taken.tensor is tensor and taken.version == version:
                    if taken.before is None or torch.equal(taken.before, tensor):
                        return taken
        taken = Taken(tensor, version)
        if seen:  # NumPy may write into it without a word: what it holds now is what counts
            taken.shared = True
            _set_aside(taken)
        self._held[key] = [*(refs or ()), weakref.ref(taken)]
        return taken

    def _encode(self, x: Any, call: Call) -> Any:
        kind = type(x)
        if kind in _LITERALS:
            return x
        if kind in _TENSORS or isinstance(x, Tensor):
            return self._leaf(x, call)
        if isinstance(x, (tuple, list)):
            encoded = [self._encode(y, call) for y in x]
            return encoded if isinstance(x, list) else tuple(encoded)
        if isinstance(x, slice):
            return Slice(*(self._encode(y, call) for y in (x.start, x.stop, x.step)))
        if isinstance(x, np.generic):
            return x.item()
        if isinstance(x, np.ndarray) and call.name in ("__getitem__", "__setitem__"):
            copy = torch.from_numpy(x.copy()).clone()
            return Taken(copy, version_of(copy))
        if isinstance(x, torch.Generator):
            call.refusal = "the step draws from a generator of the script's own"
        else:
            call.refusal = f"{call.name}() takes an argument that a tape cannot keep, of type {kind.__name__}"
        return None

    # What a call does

    def _open(self, name: str, func: Any) -> Call:
        self._count += 1
        return Call(self._count, func, name, len(self._roots))

    def _opened(
        self, func: Any, kind: Kind, args: Any, kwargs: Any, given: Sequence[Tensor]
    ) -> tuple[Call, Tensor | None]:
        """The call with its arguments, and the state of the generator that it may draw from."""
        name = kind.name
        call = self._open(name, torch.Tensor.detach if name == "data" else func)  # autograd sees what is written then
        encode = self._encode
        call.args = tuple([encode(x, call) for x in args])
        if kwargs:
            call.kwargs = tuple([(k, encode(v, call)) for k, v in kwargs.items()])
            if call.refusal is None and "out" in kwargs:
                call.refusal = f"{name}() writes through out="
        if kind.cuts and (call.needs or call.touches):
            self.cuts.append((name, caller() if len(self.cuts) < 8 else ""))
        if kind.elastic and elastic(name, args):
            call.elastic = self._elastic = True
        if kind.statistics and not updates(name, args, kwargs):
            for tensor in given[1:]:
                if not tensor.requires_grad:
                    self._evaluated.setdefault(memory_of(tensor), []).append(weakref.ref(call))
        return call, generator_state(given[0].device) if kind.draws else None

    def _close(
        self, call: Call, kind: Kind, args: Any, given: list[Tensor], versions: list[int], result: Any
    ) -> None:
        """Notes what a call made and wrote."""
        made = [result] if type(result) is Tensor else tensors(result)
        call.count = len(made)
        for k, tensor in enumerate(made):
            self._note_made(tensor, Made(call, k, version_of(tensor)))
        if kind.name == "data":
            self._apart[memory_of(given[0])] = StorageWeakRef(given[0].untyped_storage())
        now = versions_of(given)
        written = [t for t, old, new in zip(given, versions, now, strict=True) if old != new] if now != versions else []
        if kind.statistics and kind.writes_now(args, dict(call.kwargs)):
            written += [t for t in given[1:] if not t.requires_grad]
        if kind.name == "set_data_":
            written.append(args[0])
        for tensor in written:
            self._note_write(call, tensor)
        if kind.name == "register_hook" and type(self._known.get(id(args[0]))) is Made:
            self._refuse("a hook on a value inside the step may change its gradient")
        elif not made and not written and result is not None:
            self._note_read(call, result)

    def _surprise(self, given: Sequence[Tensor], versions: Sequence[int]) -> None:
        """A call with nothing of the step wrote into tensors, and its name did not say so."""
        for tensor, old, new in zip(given, versions, versions_of(given), strict=True):
            if old != new:
                key = memory_of(tensor)
                self._changes.update(self._parameters_at(key))
                for taken in (ref() for ref in self._held.get(key, ())):
                    if taken is not None and taken.before is None:
                        taken.version = LOST

    def _note_made(self, tensor: Tensor, made: Made) -> None:
        if made.call.shares:
            for taken in (ref() for ref in self._held.get(memory_of(tensor), ())):
                if taken is not None:
                    taken.viewed = made.shares = True  # a constant's memory is seen through what the call made
                    if taken.shared and not self._shared.note(tensor):
                        self._refuse("NumPy sees a value of the step that is too large to be compared later")
        if type(self._known.get(id(tensor))) is not Slot:
            self._register(tensor, made)

    def _register(self, tensor: Tensor, made: Made) -> Made:
        key = id(tensor)
        if key not in self._known:  # a dead tensor leaves at once, before its id can be given to another
            self._alive[key] = weakref.ref(tensor, functools.partial(self._known.pop, key))
        self._known[key] = made
        return made

    def _note_write(self, call: Call, tensor: Tensor) -> None:
        key = memory_of(tensor)
        for reader in (ref() for ref in self._evaluated.pop(key, ())):
            if reader is not None and reader is not call:
                reader.moved = call.index
        slots = self._parameters_at(key)
        if call.name == "set_data_" and type(leaf := self._known.get(id(tensor))) is Slot:
            slots = [leaf.at]
        if slots:
            call.refusal = f"{call.name}() writes into a parameter during the step"
            self._changes.update(slots)
            return
        if len(call.args) and isinstance(call.args[0], list):
            call.refusal = f"{call.name}() writes into a list of tensors"
        if call.name == "set_data_":
            call.refusal = "the memory of a tensor was exchanged (.data = ...)"
        if len(self._written) >= self._crowded:
            self._written = {k: known for k, known in self._written.items() if not known.storage.expired()}
            self._crowded = max(16, 2 * len(self._written))
        before = self._last_write(tensor)
        base, tracked = (None, False) if before is None else (before.base, before.tracked)
        if base is None and key in self._apart and not self._apart[key].expired():
            self._refuse(f"{call.name}() writes into a value whose .data was taken: autograd may not see it")
            return
        storage = before.storage if before is not None else StorageWeakRef(tensor.untyped_storage())
        self._written[key] = Written(storage, call, base, tracked=tracked or tensor.requires_grad)
        if self._shared:
            self._shared.renew(tensor)

    def _parameters_at(self, key: int) -> list[int]:
        if sum(map(len, self._owners.values())) != len(self.leaves):
            self._owners = {}
            for slot, parameter in enumerate(self.leaves):
                self._owners.setdefault(memory_of(parameter), []).append(slot)
        return self._owners.get(key, [])

    def _note_read(self, call: Call, result: Any) -> None:
        """Notes a number that the script took out of the step."""
        if not call.needs and not call.touches:
            return  # of an earlier step: no weight of this one changes it
        if is_flag(result):
            call.expects = tuple(result) if isinstance(result, torch.Size) else result
        elif isinstance(result, float):
            self._numbers.append((call.index, result))
        elif not isinstance(result, (list, complex, np.ndarray)):
            return
        number = not isinstance(result, bool) and call.name not in SHAPES
        if number and not call.grad and not any(type(x) is Made and x.call.grad for x in self._known.values()):
            return  # an evaluation before the forward pass begins
        if call.expects is None:
            call.args, call.needs = (), []
        self._reads.append(call)


def _index(call: Call) -> int:
    return call.index


def _set_aside(taken: Taken) -> None:
    """Copies a constant, before something writes into it."""
    if compact_bytes(taken.tensor) > COPY_LIMIT:
        taken.version = LOST
    else:
        taken.before = copied(taken.tensor)


def _given(args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors among the arguments, in their order."""
    found: list[Tensor] = []
    for x in (*args, *kwargs.values()) if kwargs else args:
        kind = type(x)
        if kind in _TENSORS:
            found.append(x)
        elif kind not in _LITERALS:
            found += tensors(x)
    return found
