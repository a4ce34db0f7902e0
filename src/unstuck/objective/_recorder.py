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

from unstuck.objective._calls import (
    CUTS,
    METADATA,
    PROPERTIES,
    SHAPES,
    STATISTICS,
    autocast,
    caller,
    elastic,
    is_flag,
    label,
    may_draw,
    unseen,
    writes,
)
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
    compile_tape,
    copied,
    memory_of,
    quoted,
    steering,
    version_of,
    versions_of,
)
from unstuck.objective._program import Program, Slice, Slot, Tape, TapeError, generator_state, tensors

_PLAIN = (bool, int, float, complex, str, range, type(None), type(...), torch.dtype, torch.device, torch.layout)
_LITERALS = frozenset((*_PLAIN, torch.memory_format))


class Recorder(TorchFunctionMode):
    """Enter it after an optimiser step, leave it before the next, tell it the `root` of backward, then `finish`.

    `leaves` are the parameters in the order of their slots. Parameters that no optimiser owns are appended when a call
    uses them. `cuts` lists the calls that took a value out of the graph, with their source lines.
    """

    def __init__(self, leaves: list[Tensor]) -> None:
        super().__init__()
        self.leaves = leaves
        self.cuts: list[tuple[str, str]] = []
        self.used: set[int] = set()  # slots of the parameters that some call took
        self.calls = 0
        self.seconds = 0.0  # spent in here beside the calls themselves
        self._outside = 0.0  # what the calls themselves took
        self._known: dict[int, Slot | Made] = {id(p): Slot(k) for k, p in enumerate(leaves)}  # live tensors by id
        self._alive: dict[int, weakref.ref[Tensor]] = {}  # these take dead tensors out of `_known`
        self._held: dict[int, list[weakref.ref[Taken]]] = {}  # constants by their memory
        self._written: dict[int, Written] = {}  # memory that calls wrote into
        self._crowded = 16  # how many written memories are looked through for dead ones
        self._changes: Counter[int] = Counter()  # writes into parameters, by slot
        self._owners: dict[int, list[int]] = {}  # slots of parameters by their memory
        self._reads: list[Call] = []
        self._numbers: list[float] = []  # what was read back
        self._roots: list[Call] = []
        self._losses: list[Tensor] = []
        self._count = 0
        self._elastic = False  # whether there are shapes that depend on the parameters
        self._apart: dict[int, StorageWeakRef] = {}  # memory that is also seen through .data
        self._refusal: str | None = None
        self._off = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._off or torch.compiler.is_compiling():  # the compiler looks into function modes
            return func(*args, **(kwargs or {}))
        began, self._outside, self.calls = perf_counter(), 0.0, self.calls + 1
        result = self._see(func, args, kwargs or {})
        self.seconds += perf_counter() - began - self._outside
        return result

    def _see(self, func: Any, args: Any, kwargs: Any) -> Any:
        name, attribute = label(func)
        if attribute in PROPERTIES or name in METADATA:
            if self._elastic and (attribute or name) in SHAPES:
                return self._look(func, attribute or name, args, kwargs)
            return self._call(func, args, kwargs)
        if name == "backward":
            return self._backward(func, args, kwargs)
        given = tensors((*args, kwargs) if kwargs else args)
        if not given:
            return self._call(func, args, kwargs)
        try:
            touched = self._touched(given)
            if attribute:
                name = f"set_{attribute}_" if name == "__set__" else attribute
            if writes(name, kwargs):
                touched = self._preserve(name, args, given, touched=touched)
        except Exception as error:
            touched = self._failed(name, error)
        if not touched or self._refusal is not None:
            return self._call(func, args, kwargs)
        return self._record(func, name, args, kwargs, given)

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        began = perf_counter()
        result = func(*args, **kwargs)
        self._outside += perf_counter() - began  # not our time
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
        else:
            self._roots.append(call)
            self._losses.append(tensor.detach().clone().reshape(()))

    def finish(self, vault: Vault, *, step: int = 0, like: Program | None = None) -> Tape:
        """The compiled tape; TapeError says why there is none. `like` is a program to share where it is the same."""
        if self._refusal is not None:
            raise TapeError(self._refusal)
        if not self._roots:
            raise TapeError("no backward() was seen in the step")
        kept = steering(self._reads, self._roots, ancestors(self._roots))
        calls = sorted(kept - set(self._roots), key=lambda call: call.index)
        for call in (*calls, *self._roots):
            self._check(call)
        number = quoted(self._numbers, calls)
        if number is not None:
            raise TapeError(f"a number that was read back ({number:.6g}) goes into a later call")
        tape = compile_tape(calls, self._roots, self._losses, self.leaves, vault)
        return replace(tape, step=step, program=like if like is not None and like == tape.program else tape.program)

    def _check(self, call: Call) -> None:
        if call.refusal is not None:
            raise TapeError(call.refusal)
        if call.name == "grad":
            raise TapeError("the loss contains a derivative (torch.autograd.grad)")
        for slot, version, changes in call.parameters:
            if (version, changes) != (version_of(self.leaves[slot]), self._changes[slot]):
                raise TapeError("a parameter was changed in place during the step, outside the optimiser")

    def _refuse(self, reason: str) -> None:
        if self._refusal is None:
            self._refusal = reason
            self._known = {key: leaf for key, leaf in self._known.items() if type(leaf) is Slot}  # for `used`
            for kept in (self._alive, self._held, self._written, self._reads, self._roots, self._losses):
                kept.clear()

    def _failed(self, name: str, error: Exception) -> bool:
        """An error of ours costs the tape, never the script's step."""
        self._refuse(f"{name}() could not be recorded: {type(error).__name__}: {error}")
        return False

    def _backward(self, func: Any, args: Any, kwargs: Any) -> Any:
        weights = tensors([*args[1:2], kwargs.get("gradient"), kwargs.get("grad_tensors")])
        if not all(bool((w == 1).all()) for w in weights) or kwargs.get("inputs") or any(args[4:]):
            self._refuse("backward() was given weights or chosen inputs")
        self._off = True  # hooks and recomputation inside backward are not part of the forward
        try:
            return self._call(func, args, kwargs)
        finally:
            self._off = False

    # What a call is given

    def _touched(self, given: Sequence[Tensor]) -> bool:
        """Whether a call depends on the parameters; it may show one that was not known yet."""
        found = False
        for tensor in given:
            leaf = self._known.get(id(tensor))
            if leaf is None and tensor.requires_grad:
                found = True
                if tensor.is_leaf and isinstance(tensor, torch.nn.Parameter):
                    leaf = self._known[id(tensor)] = Slot(len(self.leaves))
                    self.leaves.append(tensor)
            if leaf is None and self._written:
                leaf = self._alias(tensor)
            if type(leaf) is Slot:
                self.used.add(leaf.at)
            found = found or leaf is not None
        return found

    def _alias(self, tensor: Tensor) -> Made | None:
        """A tensor whose memory a call wrote into, as a view of the copy of that memory."""
        written = self._last_write(tensor)
        return None if written is None else self._view(tensor, written.base, [written.by])

    def _last_write(self, tensor: Tensor) -> Written | None:
        written = self._written.get(memory_of(tensor)) if self._written else None
        return None if written is None or written.storage.expired() else written

    def _view(self, tensor: Tensor, base: Taken | None, needs: list[Call]) -> Made:
        call = self._open("as_strided", torch.as_strided)
        call.grad, call.autocast, call.needs, call.versions = True, None, needs, (version_of(tensor),)
        call.args = (base, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
        call.epoch = max((need.epoch for need in needs), default=call.part)
        if base is None or base.before is None or base.before.dtype != tensor.dtype:
            call.refusal = "a value inside the step is seen through another tensor"
        return self._register(tensor, Made(call, 0))

    def _preserve(self, name: str, args: Any, given: Sequence[Tensor], *, touched: bool) -> bool:
        """Readies the constants that a call is about to write into; whether the call must be recorded."""
        for tensor in tensors(args[0]) if args and name not in STATISTICS else given:
            key = memory_of(tensor)
            if not key or id(tensor) in self._known or tensor.requires_grad:
                continue
            held = [taken for ref in self._held.pop(key, ()) if (taken := ref()) is not None and taken.before is None]
            touched = touched or any(taken.viewed for taken in held)
            base = self._share(tensor, key) if touched else None
            for taken in held:
                if taken.viewed and base is not None and base.tensor.dtype == taken.tensor.dtype:
                    taken.base = base
                elif taken.viewed or compact_bytes(taken.tensor) > COPY_LIMIT:
                    taken.version = LOST
                else:
                    taken.before = copied(taken.tensor)
        return touched

    def _share(self, tensor: Tensor, key: int) -> Taken | None:
        """Copies the memory of a constant whose contents come to depend on the parameters."""
        whole = (tensor.untyped_storage().nbytes() // tensor.element_size(),)
        if whole[0] * tensor.element_size() > COPY_LIMIT:
            return None  # it stays a constant, and its version tells
        base = Taken(tensor, LOST, copied(tensor.detach().as_strided(whole, (1,), 0)), overwritten=True)
        made = self._view(tensor, base, [])
        self._written[key] = Written(StorageWeakRef(tensor.untyped_storage()), made.call, base, tracked=False)
        return base

    def _leaf(self, tensor: Tensor, call: Call) -> Slot | Made | Taken:
        leaf = self._known.get(id(tensor))
        if leaf is None:
            return self._constant(tensor, call)
        if isinstance(leaf, Slot):
            call.parameters.append((leaf.at, version_of(tensor), self._changes[leaf.at]))
            call.epoch = call.part
            return leaf
        last = self._last_write(tensor)
        sources = [leaf.call] if last is None else [leaf.call, last.by]
        call.needs += sources
        call.epoch = max(call.epoch, *(source.epoch for source in sources))
        call.elastic = call.elastic or leaf.call.elastic
        if last is None and leaf.call.versions[leaf.at] != version_of(tensor):
            call.refusal = "a value inside the step was overwritten out of sight"
        if last is not None and last.tracked and leaf.call.name == "as_strided" and not tensor.requires_grad:
            call.refusal = "a value with a gradient is read through a tensor that has none"
        if not all(source.grad for source in sources) and isinstance(tensor.grad_fn, BackwardCFunction):
            call.refusal = unseen(tensor)
        return leaf

    def _constant(self, tensor: Tensor, call: Call) -> Taken:
        if tensor.grad_fn is not None:
            call.refusal = unseen(tensor)
        version, key = version_of(tensor), memory_of(tensor)
        held = [ref for ref in self._held.get(key, ()) if ref() is not None]
        for taken in (ref() for ref in held):
            if taken is not None and taken.tensor is tensor and taken.version == version:
                return taken
        taken = Taken(tensor, version)
        self._held[key] = [*held, weakref.ref(taken)]
        return taken

    def _encode(self, x: Any, call: Call) -> Any:
        kind = type(x)
        if kind in _LITERALS:
            return x
        if isinstance(x, Tensor):
            return self._leaf(x, call)
        if isinstance(x, (tuple, list)):
            encoded = [self._encode(y, call) for y in x]
            return encoded if isinstance(x, list) else tuple(encoded)
        if isinstance(x, slice):
            return Slice(*(self._encode(y, call) for y in (x.start, x.stop, x.step)))
        if isinstance(x, np.generic):
            return x.item()
        if isinstance(x, np.ndarray) and call.name in ("__getitem__", "__setitem__"):
            copy = torch.from_numpy(x.copy())
            return Taken(copy, version_of(copy))
        if isinstance(x, torch.Generator):
            call.refusal = "the step draws from a generator of the script's own"
        else:
            call.refusal = f"{call.name}() takes an argument that a tape cannot keep, of type {kind.__name__}"
        return None

    # What a call does

    def _open(self, name: str, func: Any) -> Call:
        self._count += 1
        part = len(self._roots)
        return Call(self._count, func, name, torch.is_grad_enabled(), autocast(), part)

    def _record(self, func: Any, name: str, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        call = self._open(
            name, torch.Tensor.detach if name == "data" else func
        )  # so that autograd sees what is written
        versions, state = [], None
        try:
            call.args = tuple([self._encode(x, call) for x in args])
            call.kwargs = tuple([(k, self._encode(v, call)) for k, v in kwargs.items()])
            if name in CUTS and (call.needs or call.parameters):
                self.cuts.append((name, caller()))
            if call.refusal is None and "out" in kwargs:
                call.refusal = f"{name}() writes through out="
            if elastic(name, args):
                call.elastic = self._elastic = True
            versions = versions_of(given)
            state = generator_state(given[0].device) if may_draw(func, name) else None
        except Exception as error:
            self._failed(name, error)
        result = self._call(func, args, kwargs)
        if self._refusal is None:
            try:
                if state is not None and not torch.equal(state, generator_state(given[0].device)):
                    call.state = state
                self._close(call, args, given, versions, result)
            except Exception as error:
                self._failed(name, error)
        return result

    def _close(self, call: Call, args: Any, given: list[Tensor], versions: list[int], result: Any) -> None:
        """Notes what a call made and wrote."""
        made = tensors(result)
        call.versions = tuple(versions_of(made))
        if call.name == "data":
            self._apart[memory_of(given[0])] = StorageWeakRef(given[0].untyped_storage())
        for k, tensor in enumerate(made):
            self._note_made(tensor, Made(call, k))
        now = versions_of(given)
        written = [t for t, old, new in zip(given, versions, now, strict=True) if old != new] if now != versions else []
        if call.name in STATISTICS:
            written += [t for t in given[1:] if not t.requires_grad]
        if call.name == "set_data_":
            written.append(args[0])
        for tensor in written:
            self._note_write(call, tensor)
        if call.name == "register_hook" and type(self._known.get(id(args[0]))) is Made:
            self._refuse("a hook on a value inside the step may change its gradient")
        elif not made and not written and result is not None:
            self._note_read(call, result)

    def _note_made(self, tensor: Tensor, made: Made) -> None:
        if type(self._known.get(id(tensor))) is not Slot:
            self._register(tensor, made)
        for ref in self._held.get(memory_of(tensor), ()) if self._held else ():
            if (taken := ref()) is not None:
                taken.viewed = True  # a constant's memory is seen through what the call made

    def _register(self, tensor: Tensor, made: Made) -> Made:
        key = id(tensor)
        if key not in self._known:  # a dead tensor leaves at once, before its id can be given to another
            self._alive[key] = weakref.ref(tensor, functools.partial(self._known.pop, key))
        self._known[key] = made
        return made

    def _note_write(self, call: Call, tensor: Tensor) -> None:
        key = memory_of(tensor)
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
        storage = StorageWeakRef(tensor.untyped_storage())
        self._written[key] = Written(storage, call, base, tracked=tracked or tensor.requires_grad)

    def _parameters_at(self, key: int) -> list[int]:
        if sum(map(len, self._owners.values())) != len(self.leaves):
            self._owners = {}
            for slot, parameter in enumerate(self.leaves):
                self._owners.setdefault(memory_of(parameter), []).append(slot)
        return self._owners.get(key, [])

    def _note_read(self, call: Call, result: Any) -> None:
        """Notes a number that the script took out of the step."""
        if not call.needs and not call.parameters:
            return  # of an earlier step: no weight of this one changes it
        if is_flag(result):
            call.expects = tuple(result) if isinstance(result, torch.Size) else result
        elif isinstance(result, float):
            self._numbers.append(result)
        elif not isinstance(result, (list, complex, np.ndarray)):
            return
        number = not isinstance(result, bool) and call.name not in SHAPES
        if number and not call.grad and not any(type(x) is Made and x.call.grad for x in self._known.values()):
            return  # an evaluation before the forward pass begins
        if call.expects is None:
            call.args, call.needs = (), []
        self._reads.append(call)

    def _look(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """A shape that is read."""
        leaf = self._known.get(id(args[0]))
        if type(leaf) is not Made or not leaf.call.elastic:
            return self._call(func, args, kwargs)
        return self._record(func, name, args, kwargs, [args[0]])
