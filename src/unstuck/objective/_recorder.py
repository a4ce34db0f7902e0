"""Records one training step of somebody else's loop as a tape.

A `Recorder` is a torch function mode that is on between two optimiser steps. It notes every call that takes part in
carrying the parameters to the loss, with or without gradients. What the parameters do not touch is kept as a constant;
activations are not kept at all. `Recorder.finish` compiles the tape: calls that do not lead to the loss are dropped and
constants are copied.

Whatever autograd sees and the recorder did not (a custom autograd function, a compiled region) shows as a tensor with a
`grad_fn` that no call made. Such a tape is refused with a reason. Nothing is ever raised into the script.
"""

import weakref
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from unstuck.objective._calls import SHAPES, Kind, caller, elastic, is_flag, kind_of, may_draw, unrepeatable, updates
from unstuck.objective._compile import compiled, constants, put_places
from unstuck.objective._graph import Call, Made, Taken, Vault, ancestors, memory_of, version_of, versions_of
from unstuck.objective._places import Inside, Modules, Names
from unstuck.objective._program import Program, Slice, Slot, Tape, TapeError, generator_state, leaves, tensors
from unstuck.objective._reads import Read, floats_in, steering
from unstuck.objective._values import NUMPY, Values

_PLAIN = (bool, int, float, complex, str, range, type(None), type(...), torch.dtype, torch.device, torch.layout)
_LITERALS = frozenset((*_PLAIN, torch.memory_format))
_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_is_compiling = torch.compiler.is_compiling
_Plain = tuple[Call, list[Tensor], list[int]]  # with the tensors that it takes, and their versions


class Recorder(TorchFunctionMode):
    """Enter it after an optimiser step, leave it before the next, tell it the `root` of backward, then `finish`.

    `leaves` are the parameters in the order of their slots. Parameters that no optimiser owns are appended when a call
    uses them. `used` are the slots of those that some call took. `cuts` lists the calls that took a value out of the
    graph, the first of them with their source lines. `seconds` were spent in here beside the calls themselves.

    Where `names` is given, which names modules, they are followed (entering does it, else `modules.follow()`), and the
    program tells the places of its calls. A recording then takes a fifth longer: one of a program is enough.
    """

    def __init__(self, leaves: list[Tensor], *, names: Names | None = None) -> None:
        super().__init__()
        self.leaves = leaves
        self.cuts: list[tuple[str, str]] = []
        self._cut_in: Inside | None = None
        self.calls = 0
        self.seconds = 0.0
        self.modules = Modules(names)
        self._values = Values(leaves, self.modules)
        self.used = self._values.used
        self._numbers: list[Read] = []
        self._losses: list[Tensor] = []
        self._elastic = False  # whether there are shapes that depend on the parameters
        self.looked = False  # whether a gradient was looked at or set after a backward()
        self._cleared = False  # whether gradients were cleared between two backward() calls
        self._off = False

    def __enter__(self) -> Any:
        self.modules.follow()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.modules.leave()
        super().__exit__(*error)

    @property
    def cut_in(self) -> str:
        """The module in which a value was taken out of the graph first, where modules are followed; else ""."""
        return "" if self._cut_in is None else self.modules.name_of(self._cut_in)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._off or _is_compiling():  # the compiler looks into function modes
            return func(*args, **(kwargs or {}))
        self.calls += 1
        try:
            kind = kind_of(func)
        except TypeError:  # cannot be hashed
            kind = Kind(func)
        if kind.looks and not (kind.shape and self._elastic):
            if kind.gradient and self._values.roots:
                self.looked = self.looked or self._has_gradient(args)
            return func(*args, **kwargs) if kwargs else func(*args)
        if kind.plain and self._values.refusal is None:
            began = perf_counter()
            try:
                plain = self._plain(func, kind, args, kwargs)
            except Exception as error:
                plain = None
                self._failed(kind.name, error)
            if plain is not None:
                called = perf_counter()
                result = func(*args, **kwargs) if kwargs else func(*args)
                returned = perf_counter()
                try:
                    self._made(plain, kind, args, result)
                except Exception as error:
                    self._failed(kind.name, error)
                self.seconds += perf_counter() - returned + called - began
                return result
        return self._see(func, kind, args, kwargs or {})

    def _plain(self, func: Any, kind: Kind, args: Any, kwargs: Any) -> _Plain | None:  # noqa: C901
        """A call of the usual shape, that only computes something from tensors and numbers; None for any other.

        Most calls are of it, and in a training step each finds the processor's caches cold: so it takes one short way.
        """
        values = self._values
        known = values.known
        items = args if not kwargs else (*args, *kwargs.values())
        touched = False
        for x in items:
            what = type(x)
            if what in _TENSORS:
                if id(x) in known:
                    touched = True
                elif x.requires_grad or values.written:  # it may have to become known before the call
                    return None
            elif what is tuple:
                for y in x:
                    if type(y) not in _LITERALS:
                        return None
            elif what not in _LITERALS or (x is True and kind.inplace):
                return None
        if not touched or (kwargs and "out" in kwargs):
            return None
        call = values.open(kind.name, func)
        encoded: list[Any] = []
        given: list[Tensor] = []
        versions: list[int] = []
        for x in items:
            if type(x) not in _TENSORS:
                encoded.append(x)
                continue
            leaf = known.get(id(x))
            try:
                version = x._version
            except RuntimeError:  # of inference mode
                return None
            given.append(x)
            versions.append(version)
            if type(leaf) is Slot:
                at = leaf.at
                values.used.add(at)
                if values.changes or values.first.get(at) != version:
                    values.note_parameter(at, x, version, call)
                call.touches = True
                call.epoch = call.part
            elif type(leaf) is not Made or leaf.version != version or values.written or values.shared is not None:
                leaf = values.leaf(x, call)
            else:
                source = leaf.call
                call.needs.append(source)
                if source.epoch > call.epoch:
                    call.epoch = source.epoch
                if source.elastic:
                    call.elastic = True
                if leaf.shares:
                    call.shares = True
                if not source.grad:
                    values.leaf(x, call)
            encoded.append(leaf)
        if kwargs:
            count = len(args)
            call.args = tuple(encoded[:count])
            call.kwargs = tuple(zip(kwargs, encoded[count:], strict=True))
        else:
            call.args = tuple(encoded)
        return call, given, versions

    def _made(self, plain: _Plain, kind: Kind, args: Any, result: Any) -> None:
        """Notes what a plain call made."""
        call, given, versions = plain
        for x, version in zip(given, versions, strict=True):
            if x._version != version:  # its name did not say so
                self._close(call, kind, args, given, versions, result)
                return
        if type(result) is not Tensor:
            self._close(call, kind, args, given, versions, result)
            return
        call.count = 1
        self._values.note_made(result, Made(call, 0, version_of(result)))

    def _see(self, func: Any, kind: Kind, args: Any, kwargs: Any) -> Any:  # noqa: C901
        """Runs a call and notes what it was given, made and wrote."""
        values = self._values
        began = perf_counter()
        call: Call | None = None
        state: Tensor | None = None
        given: list[Tensor] = []
        versions: list[int] = []
        if values.refusal is None:
            try:
                if kind.backward:
                    self._check_backward(args, kwargs)
                elif given := _given(args, kwargs):
                    touched = values.touch(given)
                    if kind.looks:
                        touched = self._shaped(args[0])
                    elif kind.exposes:
                        values.expose(given)
                    elif kind.writes_now(args, kwargs):
                        touched = values.preserve(kind, args, given, touched=touched)
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
        if given and values.refusal is None:
            try:
                if call is not None:
                    if state is not None and not torch.equal(state, generator_state(given[0].device)):
                        call.state = state
                    self._close(call, kind, args, given, versions, result)
                elif not kind.writes and versions != versions_of(given):
                    values.surprise(given, versions)
            except Exception as error:
                self._failed(kind.name, error)
        self.seconds += perf_counter() - returned + called - began
        return result

    def root(self, roots: Sequence[Tensor], *, cleared: bool = False) -> None:
        """Notes what backward() is called on, and whether the gradients of the one before were cleared meanwhile."""
        self._cleared = self._cleared or (cleared and bool(self._values.roots))
        self._off = True  # what we ask of the roots is no part of the step
        try:
            for tensor in roots:
                if self._values.refusal is None:
                    self._note_root(tensor)
        except Exception as error:
            self._failed("backward", error)
        finally:
            self._off = False

    def _note_root(self, tensor: Tensor) -> None:
        call = self._values.open("backward", None)
        call.args = (self._values.leaf(tensor, call),)
        if type(call.args[0]) is Taken:
            self._values.refuse(call.refusal or "backward() was called on a tensor that no recorded call made")
        elif tensor.numel() != 1:
            self._values.refuse("backward() was called on a tensor that is not a scalar")
        elif self.looked or self._cleared:
            self._values.refuse("a gradient was read or changed between two backward() calls of the step")
        elif self._values.spoiled(tensor):
            self._values.refuse(NUMPY)
        else:
            self._values.roots.append(call)
            loss = tensor.detach().clone()
            self._losses.append(loss.reshape(()) if loss.ndim else loss)

    def finish(self, vault: Vault, *, step: int = 0, like: Sequence[Program] = ()) -> Tape:
        """The compiled tape; TapeError says why there is none. `like` are programs to share where one is the same."""
        values, roots = self._values, self._values.roots
        if values.refusal is not None:
            raise TapeError(values.refusal)
        if not roots:
            raise TapeError("no backward() was seen in the step")
        kept = ancestors(roots)
        if values.reads:
            kept = steering(values.reads, roots, kept)
        kept.difference_update(roots)
        calls = sorted(kept, key=_index)
        self._check((*calls, *roots))
        program, taken, numbers = compiled(calls, roots, len(self.leaves), like=like, reads=self._numbers)
        copies = constants(taken, self.leaves, vault)
        if self.modules.names is not None:
            put_places(program, calls, self.modules.names)
        return Tape(
            program=program,
            constants=tuple([tensor for tensor, _ in copies]),
            versions=tuple([version for _, version in copies]),
            states=tuple([call.state for call in calls if call.state is not None]),
            loss=float(sum(self._losses)),
            step=step,
            numbers=tuple(numbers),
        )

    def _check(self, calls: Sequence[Call]) -> None:
        values = self._values
        bases = {slot: (version, 0) for slot, version in values.first.items()}
        ends = {slot: (version_of(self.leaves[slot]), values.changes.get(slot, 0)) for slot in bases}
        moved = bases != ends
        for call in calls:
            if call.refusal is not None:
                raise TapeError(call.refusal)
            if call.name == "grad":
                raise TapeError("the loss contains a derivative (torch.autograd.grad)")
            if call.moved and any(root.index > call.moved and call in ancestors([root]) for root in values.roots):
                raise TapeError("batch norm evaluates with statistics that a later call changes before backward()")
            if not call.touches or not (moved or call.changes):
                continue
            then = bases | {slot: (version, changes) for slot, version, changes in call.changes}
            taken = {x.at for x in leaves((call.args, call.kwargs)) if type(x) is Slot}
            if any(then[slot] != ends[slot] for slot in taken):
                raise TapeError("a parameter was changed in place during the step, outside the optimiser")
        if values.shared is not None and any(values.shared.changed(self.leaves[slot]) for slot in bases):
            raise TapeError("a parameter was changed through NumPy during the step, outside the optimiser")

    def _failed(self, name: str, error: Exception) -> None:
        """An error of ours costs the tape, never the script's step."""
        self._values.refuse(f"{name}() could not be recorded: {type(error).__name__}: {error}")

    def _check_backward(self, args: Any, kwargs: Any) -> None:
        weights = tensors([*args[1:2], kwargs.get("gradient"), kwargs.get("grad_tensors")])
        if not all(bool((w == 1).all()) for w in weights) or kwargs.get("inputs") or any(args[4:]):
            self._values.refuse("backward() was given weights or chosen inputs")

    def _has_gradient(self, args: Any) -> bool:
        """Whether the gradient that a call gets or sets is a parameter's, and there."""
        return type(self._values.known.get(id(args[0]))) is Slot and (
            args[0].grad is not None or any(x is not None for x in args[1:])
        )

    # What a call is given

    def _note_used(self, args: Any, kwargs: Any) -> None:
        """What is still of use where there is no tape: which parameters calls take."""
        for tensor in _given(args, kwargs):
            leaf = self._values.known.get(id(tensor))
            if type(leaf) is Slot:
                self.used.add(leaf.at)

    def _shaped(self, tensor: Tensor) -> bool:
        """Whether a shape that is read depends on the parameters."""
        leaf = self._values.known.get(id(tensor))
        return type(leaf) is Made and leaf.call.elastic

    def _encode(self, x: Any, call: Call) -> Any:
        kind = type(x)
        if kind in _LITERALS:
            return x
        if kind in _TENSORS or isinstance(x, Tensor):
            return self._values.leaf(x, call)
        if isinstance(x, (tuple, list)):
            encoded = [self._encode(y, call) for y in x]
            return encoded if isinstance(x, list) else tuple(encoded)
        if isinstance(x, slice):
            return Slice(*(self._encode(y, call) for y in (x.start, x.stop, x.step)))
        if isinstance(x, np.generic):
            if self._values.exposed:
                call.refusal = "a number that NumPy may have computed from the step goes into a later call"
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

    def _opened(
        self, func: Any, kind: Kind, args: Any, kwargs: Any, given: Sequence[Tensor]
    ) -> tuple[Call, Tensor | None]:
        """The call with its arguments, and the state of the generator that it may draw from."""
        name = kind.name
        call = self._values.open(
            name, torch.Tensor.detach if name == "data" else func
        )  # autograd sees what is written then
        encode = self._encode
        call.args = tuple([encode(x, call) for x in args])
        if kwargs:
            call.kwargs = tuple([(k, encode(v, call)) for k, v in kwargs.items()])
            if call.refusal is None and "out" in kwargs:
                call.refusal = f"{name}() writes through out="
        if kind.draws and unrepeatable(name, args):
            call.refusal = f"{name}() drops by masks of cuDNN's, which cannot be drawn again"
        if kind.cuts and (call.needs or call.touches):
            self.cuts.append((name, caller() if len(self.cuts) < 8 else ""))
            self._cut_in = self._cut_in or call.inside
        if kind.elastic and elastic(name, args):
            call.elastic = self._elastic = True
        if kind.statistics and not updates(name, args, kwargs):
            for tensor in given[1:]:
                if not tensor.requires_grad:
                    self._values.evaluated.setdefault(memory_of(tensor), []).append(weakref.ref(call))
        return call, generator_state(given[0].device) if kind.draws and may_draw(name, args, kwargs) else None

    def _close(self, call: Call, kind: Kind, args: Any, given: list[Tensor], versions: list[int], result: Any) -> None:
        """Notes what a call made and wrote."""
        made = [result] if type(result) is Tensor else tensors(result)
        call.count = len(made)
        for k, tensor in enumerate(made):
            self._values.note_made(tensor, Made(call, k, version_of(tensor)))
        if kind.name == "data":
            self._values.apart[memory_of(given[0])] = StorageWeakRef(given[0].untyped_storage())
        now = versions_of(given)
        written = [t for t, old, new in zip(given, versions, now, strict=True) if old != new] if now != versions else []
        if kind.statistics and kind.writes_now(args, dict(call.kwargs)):
            written += [t for t in given[1:] if not t.requires_grad]
        if kind.name == "set_data_":
            written.append(args[0])
        for tensor in written:
            self._values.note_write(call, tensor)
        if kind.name == "register_hook" and type(self._values.known.get(id(args[0]))) is Made:
            self._values.refuse("a hook on a value inside the step may change its gradient")
        elif not made and not written and result is not None:
            self._note_read(call, result)

    def _note_read(self, call: Call, result: Any) -> None:
        """Notes a number that the script took out of the step."""
        if not call.needs and not call.touches:
            return  # of an earlier step: no weight of this one changes it
        if is_flag(result):
            call.expects = tuple(result) if isinstance(result, torch.Size) else result
        elif isinstance(result, (float, list, complex, np.ndarray)):
            self._numbers += [(call.index, x) for x in floats_in(result)]
        else:
            return
        number = not isinstance(result, bool) and call.name not in SHAPES
        if number and not call.grad and not any(type(x) is Made and x.call.grad for x in self._values.known.values()):
            return  # an evaluation before the forward pass begins
        if call.expects is None:
            call.args, call.needs = (), []
        self._values.reads.append(call)


def _index(call: Call) -> int:
    return call.index


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
