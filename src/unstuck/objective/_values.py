"""What is known of the tensors of a step while it is recorded: parameters, values, constants, and who wrote where."""

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.multiprocessing.reductions import StorageWeakRef

from unstuck.objective._calls import CUTS, Kind, made_before, next_node, passes_on, unseen
from unstuck.objective._graph import (
    COPY_LIMIT,
    LOST,
    Call,
    Made,
    Taken,
    Written,
    compact_bytes,
    copied,
    memory_of,
    shared,
    version_of,
    versions_of,
)
from unstuck.objective._places import Modules, spot
from unstuck.objective._program import Slot, tensors
from unstuck.objective._shared import Shared, saved

NUMPY = "a value of the step was written into through NumPy or .data, unseen by autograd"


class Values:
    """The tensors of one step. `refuse` gives the step up, with the reason."""

    def __init__(self, leaves: list[Tensor], modules: Modules) -> None:
        self.leaves = leaves
        self._met = bool(leaves)  # whether it is known who trains
        self.modules = None if modules.names is None else modules
        self.used: set[int] = set()  # slots of the parameters that some call took
        self.known: dict[int, Slot | Made] = dict(zip(map(id, leaves), map(Slot, range(len(leaves))), strict=True))
        self.written: dict[int, Written] = {}  # memory that calls wrote into
        self.first: dict[int, int] = {}  # the version of each parameter when a call took it first
        self.changes: dict[int, int] = {}  # writes into parameters, by slot
        self.evaluated: dict[int, list[weakref.ref[Call]]] = {}  # calls by the running statistics that they use
        self.apart: dict[int, StorageWeakRef] = {}  # memory that is also seen through .data
        self.behind: dict[int, int] = {}  # such memory that was written into, and the first node of the graph after it
        self.shared: Shared | None = None  # values of the step that NumPy sees
        self.exposed = False  # whether NumPy has got a value of the step
        self.roots: list[Call] = []  # backward() calls
        self.reads: list[Call] = []  # calls that took a number out of the step
        self.refusal: str | None = None
        self._alive: dict[int, weakref.ref[Tensor]] = {}  # these take dead tensors out of `known`
        self._held: dict[int, list[weakref.ref[Taken]]] = {}  # constants by their memory
        self._aside: list[weakref.ref[Taken]] = []  # constants that were copied because something may write into them
        self._owners: dict[int, list[int]] = {}  # slots of parameters by their memory
        self._crowded = 16  # how many written memories are looked through for dead ones
        self._count = 0
        self._began = next_node()

    def refuse(self, reason: str) -> None:
        if self.refusal is None:
            self.refusal = reason
            self.known = {key: leaf for key, leaf in self.known.items() if type(leaf) is Slot}  # for `used`
            for kept in (self._alive, self._held, self.written, self.evaluated, self.roots, self.reads):
                kept.clear()
            self.shared = None

    def open(self, name: str, func: Any) -> Call:
        """A call that is about to be made."""
        self._count += 1
        call = Call(self._count, func, name, len(self.roots))
        if self.modules is not None:
            call.inside, call.spot = self.modules.innermost, spot()
        return call

    def touch(self, given: Sequence[Tensor]) -> bool:
        """Whether a call depends on the parameters; it may show one that was not known yet."""
        found = False
        known = self.known
        for tensor in given:
            leaf = known.get(id(tensor))
            if leaf is None:
                if self._apart(tensor):
                    continue
                if tensor.requires_grad:
                    found = True
                    if tensor.is_leaf and isinstance(tensor, torch.nn.Parameter):
                        leaf = known[id(tensor)] = Slot(len(self.leaves))
                        self.leaves.append(tensor)
                if leaf is None and self._alias(tensor) is None and not tensor.requires_grad:
                    continue
            elif type(leaf) is Made:
                found = True
                continue
            if type(leaf) is Slot:
                self.used.add(leaf.at)
            found = True
        return found

    def _apart(self, tensor: Tensor) -> bool:
        """Whether it is a parameter of a network that does not train here: a teacher, an average of the weights.

        What that computes without gradients is a constant of the step. At a first step nobody is known to train yet.
        """
        apart = self._met and isinstance(tensor, torch.nn.Parameter) and not torch.is_grad_enabled()
        return apart and tensor.requires_grad and self._alias(tensor) is None

    def _alias(self, tensor: Tensor) -> Made | None:
        """A tensor whose memory a call wrote into, as a view of the copy of that memory."""
        written = self._last_write(tensor)
        return None if written is None else self._view(tensor, written.base, [written.by])

    def _last_write(self, tensor: Tensor) -> Written | None:
        written = self.written.get(memory_of(tensor)) if self.written else None
        return None if written is None or written.storage.expired() else written

    def _view(self, tensor: Tensor, base: Taken | None, needs: list[Call]) -> Made:
        call = self.open("as_strided", torch.as_strided)
        call.grad, call.autocast, call.needs, call.count = True, None, needs, 1
        call.args = (base, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
        call.epoch = max((need.epoch for need in needs), default=call.part)
        if base is None or base.before is None or base.before.dtype != tensor.dtype:
            call.refusal = "a value inside the step is seen through another tensor"
        return self.register(tensor, Made(call, 0, version_of(tensor)))

    def preserve(self, kind: Kind, args: Any, given: Sequence[Tensor], *, touched: bool) -> bool:
        """Readies the constants that a call is about to write into; whether the call must be recorded."""
        for tensor in given[1:] if kind.statistics else tensors(args[0]) if args else given:
            key = memory_of(tensor)
            if not key or id(tensor) in self.known or tensor.requires_grad:
                continue
            if not touched:
                self._change(self._parameters_at(key))  # through an alias of before the step
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
                    if not kind.statistics:  # which training saves and does not use; evaluation notes who `moved` them
                        self._aside.append(weakref.ref(taken))
        return touched

    def _share(self, tensor: Tensor, key: int) -> Taken | None:
        """Copies the memory of a constant whose contents come to depend on the parameters."""
        whole = (tensor.untyped_storage().nbytes() // tensor.element_size(),)
        if whole[0] * tensor.element_size() > COPY_LIMIT:
            return None  # it stays a constant, and its version tells
        base = Taken(tensor, LOST, copied(tensor.detach().as_strided(whole, (1,), 0)), overwritten=True)
        made = self._view(tensor, base, [])
        self.written[key] = Written(StorageWeakRef(tensor.untyped_storage()), made.call, base, tracked=False)
        if shared(tensor):
            self._watch(tensor)
        return base

    def expose(self, given: Sequence[Tensor]) -> None:
        """NumPy comes to see a tensor: constants are copied now, values of the step are compared later."""
        for tensor in given:
            for ref in self._held.pop(memory_of(tensor), ()):
                if (taken := ref()) is not None and taken.before is None:
                    _set_aside(taken)
                    self._aside.append(ref)
            if id(tensor) in self.known and tensor.layout is torch.strided:
                self.exposed = True
                self._watch(tensor)

    def spoiled(self, root: Tensor) -> bool:
        """Whether what backward() is about to use was written into unseen by autograd."""
        if self.shared is not None and self.shared.any_changed():
            return True
        self._aside = [ref for ref in self._aside if ref() is not None]
        unseen = {
            memory_of(taken.tensor)
            for taken in (ref() for ref in self._aside)
            if taken is not None
            and taken.before is not None
            and taken.version == version_of(taken.tensor)
            and not torch.equal(taken.before, taken.tensor)
        }
        behind = self.behind
        return bool(unseen or behind) and any(
            (key := memory_of(tensor)) in unseen or (key in behind and made_before(node, behind[key]))
            for node, tensor in saved(root)
        )

    def _watch(self, tensor: Tensor) -> None:
        """Keeps what the memory of a value of the step holds, since NumPy may write into it."""
        if self.shared is None:
            self.shared = Shared()
        if not self.shared.note(tensor):
            self.refuse("NumPy sees a value of the step that is too large to be compared later")

    def leaf(self, tensor: Tensor, call: Call) -> Slot | Made | Taken:
        leaf = self.known.get(id(tensor))
        if leaf is None:
            return self._constant(tensor, call)
        version = version_of(tensor)
        if isinstance(leaf, Slot):
            self.note_parameter(leaf.at, tensor, version, call)
            return leaf
        source = leaf.call
        call.needs.append(source)
        call.epoch = max(call.epoch, source.epoch)
        call.elastic = call.elastic or source.elastic
        call.shares = call.shares or leaf.shares
        last = self._last_write(tensor) if self.written else None
        if last is not None:
            self._follow(last, leaf, tensor, call)
        elif leaf.version != version:
            call.refusal = "a value inside the step was overwritten out of sight"
        elif self.shared is not None and self.shared.changed(tensor):
            call.refusal = NUMPY
        if not source.grad and isinstance(tensor.grad_fn, BackwardCFunction):
            if source.name == "clone" and passes_on(tensor.grad_fn):
                source.grad = True
            else:
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
        if self.shared is not None and self.shared.changed(tensor):
            call.refusal = NUMPY

    def note_parameter(self, slot: int, tensor: Tensor, version: int, call: Call) -> None:
        call.touches = True
        call.epoch = call.part
        first = self.first.get(slot)
        if first is None:
            first = self.first[slot] = version
            if shared(tensor):
                self._watch(tensor)
        if version != first or self.changes:
            call.changes = [*call.changes, (slot, version, self.changes.get(slot, 0))]

    def _constant(self, tensor: Tensor, call: Call) -> Taken:
        node = tensor.grad_fn
        # a state that is carried over from an earlier step, and cut from it here, is a constant
        if node is not None and not (call.name in CUTS and made_before(node, self._began)):
            call.refusal = unseen(tensor)
        version, key, seen = version_of(tensor), memory_of(tensor), shared(tensor)
        call.shares = True
        refs = self._held.get(key)
        if refs is not None:
            refs = [ref for ref in refs if ref() is not None]
            for taken in (ref() for ref in refs):
                if taken is None or taken.tensor is not tensor or taken.version != version:
                    continue
                if taken.before is None or torch.equal(taken.before, tensor):
                    return taken
        taken = Taken(tensor, version)
        if seen:  # NumPy may write into it without a word: what it holds now is what counts
            taken.shared = True
            _set_aside(taken)
            self._aside.append(weakref.ref(taken))
        self._held[key] = [*(refs or ()), weakref.ref(taken)]
        return taken

    def surprise(self, given: Sequence[Tensor], versions: Sequence[int]) -> None:
        """A call with nothing of the step wrote into tensors, and its name did not say so."""
        for tensor, old, new in zip(given, versions, versions_of(given), strict=True):
            if old != new:
                key = memory_of(tensor)
                self._change(self._parameters_at(key))
                for taken in (ref() for ref in self._held.get(key, ())):
                    if taken is not None and taken.before is None:
                        taken.version = LOST

    def note_made(self, tensor: Tensor, made: Made) -> None:
        if made.call.shares:
            for taken in (ref() for ref in self._held.get(memory_of(tensor), ())):
                if taken is not None:
                    taken.viewed = made.shares = True  # a constant's memory is seen through what the call made
                    if taken.shared:
                        self._watch(tensor)
        if type(self.known.get(id(tensor))) is not Slot:
            self.register(tensor, made)

    def register(self, tensor: Tensor, made: Made) -> Made:
        key = id(tensor)
        if key not in self.known:  # a dead tensor leaves at once, before its id can be given to another
            self._alive[key] = weakref.ref(tensor, functools.partial(self.known.pop, key))
        self.known[key] = made
        return made

    def note_write(self, call: Call, tensor: Tensor) -> None:
        key = memory_of(tensor)
        for reader in (ref() for ref in self.evaluated.pop(key, ())):
            if reader is not None and reader is not call:
                reader.moved = call.index
        slots = self._parameters_at(key)
        if call.name == "set_data_" and type(leaf := self.known.get(id(tensor))) is Slot:
            slots = [leaf.at]
        if slots:
            call.refusal = f"{call.name}() writes into a parameter during the step"
            self._change(slots)
            return
        if len(call.args) and isinstance(call.args[0], list):
            call.refusal = f"{call.name}() writes into a list of tensors"
        if call.name == "set_data_":
            call.refusal = "the memory of a tensor was exchanged (.data = ...)"
        if len(self.written) >= self._crowded:
            self.written = {k: known for k, known in self.written.items() if not known.storage.expired()}
            self._crowded = max(16, 2 * len(self.written))
        before = self._last_write(tensor)
        base, tracked = (None, False) if before is None else (before.base, before.tracked)
        if key in self.apart and not self.apart[key].expired():
            self._note_write_behind(call, key, base)
        storage = before.storage if before is not None else StorageWeakRef(tensor.untyped_storage())
        self.written[key] = Written(storage, call, base, tracked=tracked or tensor.requires_grad)
        if self.shared is not None:
            self.shared.renew(tensor)

    def _note_write_behind(self, call: Call, key: int, base: Taken | None) -> None:
        """A call writes into memory that is also seen through .data, where autograd may not see it."""
        if base is None:
            self.refuse(f"{call.name}() writes into a value whose .data was taken: autograd may not see it")
        else:
            self.behind[key] = next_node()

    def _change(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.changes[slot] = self.changes.get(slot, 0) + 1

    def _parameters_at(self, key: int) -> list[int]:
        if sum(map(len, self._owners.values())) != len(self.leaves):
            self._owners = {}
            for slot, parameter in enumerate(self.leaves):
                self._owners.setdefault(memory_of(parameter), []).append(slot)
        return self._owners.get(key, [])


def _set_aside(taken: Taken) -> None:
    """Copies a constant, before something writes into it."""
    if compact_bytes(taken.tensor) > COPY_LIMIT:
        taken.version = LOST
    else:
        taken.before = copied(taken.tensor)
