"""Records one training step of somebody else's loop as a tape.

A `Recorder` is a torch function mode that is on between two optimiser steps. It notes every call that takes part in
carrying the parameters to the loss. What the parameters do not touch is kept as a constant; activations are not kept at
all. `Recorder.finish` compiles the tape: calls that do not lead to the loss are dropped and constants are copied.

Whatever autograd sees and the recorder did not (a custom autograd function, a compiled region) shows as a tensor with a
`grad_fn` that no instruction made. Such a tape is refused with a reason.
"""

import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from unstuck.objective._program import (
    Constant,
    Instruction,
    Program,
    Slice,
    Slot,
    Tape,
    TapeError,
    generator_state,
    map_leaves,
    tensors,
)

COPY_LIMIT = 32 << 20  # bytes; a larger constant is kept by reference and its version watched
_ACTIVATION = 1 << 40  # the first slot of a value that is no parameter, until `finish` renumbers them

_PROPERTIES = frozenset(  # read all the time, and never part of the path to the loss
    "shape dtype device grad requires_grad is_leaf grad_fn ndim _version layout is_cuda is_sparse is_quantized is_meta "
    "names is_nested itemsize nbytes output_nr is_mps is_xla _backward_hooks _base is_mkldnn retains_grad".split()
)
_RANDOM = frozenset(  # draw from the global generator
    "dropout dropout1d dropout2d dropout3d dropout_ alpha_dropout alpha_dropout_ feature_alpha_dropout feature_dropout "
    "feature_dropout_ native_dropout rrelu rrelu_ scaled_dot_product_attention multi_head_attention_forward gru lstm "
    "rnn_tanh rnn_relu gumbel_softmax bernoulli bernoulli_ multinomial normal normal_ uniform_ random_ exponential_ "
    "rand_like randn_like randint_like poisson fractional_max_pool2d fractional_max_pool3d log_normal_ cauchy_ "
    "geometric_".split()
)
_READS = frozenset(
    "item tolist numpy __array__ __bool__ __float__ __int__ __index__ __complex__ equal allclose".split()
)
_CUTS = frozenset("detach detach_ data numpy __array__ tolist item".split())
_STATISTICS = frozenset(("batch_norm", "instance_norm"))  # write into two of their arguments, unseen by versions
_OPERATORS = frozenset(f"__i{name}__" for name in "add sub mul truediv div mod pow and or xor floordiv".split())


class Vault:
    """Copies of constants, one for each tensor and version: a data set that every step uses is copied once."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}

    def copy(self, tensor: Tensor) -> tuple[Tensor, int | None]:
        """A copy that nobody writes into; a large tensor itself, with the version to watch."""
        version = tensor._version  # noqa: SLF001
        if tensor.numel() * tensor.element_size() > COPY_LIMIT:
            return tensor.detach(), version
        key = id(tensor)
        known = self._kept.get(key)
        if known is not None and known[0]() is tensor and known[1] == version:
            return known[2], None
        kept = tensor.detach().clone()
        self._kept[key] = (weakref.ref(tensor, lambda _: self._kept.pop(key, None)), version, kept)
        return kept, None


@dataclass(eq=False)
class _Taken:
    """A constant as it was when a call took it."""

    tensor: Tensor
    version: int
    before: Tensor | None = None  # its contents before a call that writes into it


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
        self._slots: dict[int, int] = {id(p): k for k, p in enumerate(leaves)}
        self._alive: dict[int, weakref.ref[Tensor]] = {}
        self._next = _ACTIVATION
        self._epoch: dict[int, int] = {}  # how many backward() calls had been seen when a value was made
        self._taken: list[_Taken] = []
        self._constants: dict[int, int] = {}
        self._calls: list[Instruction] = []
        self._states: dict[int, Tensor] = {}  # by the index of the call
        self._reads: list[tuple[int, str]] = []
        self._versions: dict[int, int] = {}  # of the parameters, when they were first used
        self._roots: list[tuple[int, Tensor]] = []
        self._refusal: str | None = None
        self._off = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", name)
            if name in _PROPERTIES:
                return func(*args, **kwargs)
        if self._off or self._refusal is not None:
            return func(*args, **kwargs)
        if name == "backward":
            return self._backward(func, args, kwargs)
        given = tensors(args) + (tensors(kwargs) if kwargs else [])
        if True not in [self._depends(t) for t in given]:  # every one is asked: it may be a parameter not known yet
            return func(*args, **kwargs)
        if name in _CUTS:
            self.cuts.append((name, caller()))
        writes = _writes(name, kwargs)
        if not torch.is_grad_enabled() and not (writes and self._is_activation(args[0])):
            return func(*args, **kwargs)  # made without gradients: a constant, should the loss use it
        if name in _READS:
            return self._read(func, name, args, kwargs)
        return self._record(func, name, args, kwargs)

    def root(self, roots: Sequence[Tensor]) -> None:
        """Notes what backward() is called on."""
        for tensor in roots:
            slot = self._slots.get(id(tensor))
            if slot is None:
                self._refuse(_unseen(tensor))
            elif tensor.numel() != 1:
                self._refuse("backward() was called on a tensor that is not a scalar")
            else:
                self._roots.append((slot, tensor.detach()))

    def finish(self, vault: Vault, *, step: int = 0, like: Program | None = None) -> Tape:
        """The compiled tape; TapeError says why there is none. `like` is a program to share where it is the same."""
        if self._refusal is not None:
            raise TapeError(self._refusal)
        if not self._roots:
            raise TapeError("no backward() was seen in the step")
        for index, version in self._versions.items():
            if self.leaves[index]._version != version:  # noqa: SLF001
                raise TapeError("a parameter was changed in place during the step, outside the optimiser")
        kept = self._needed()
        if any(self._calls[k].name == "grad" for k in kept):
            raise TapeError("the loss contains a derivative (torch.autograd.grad)")
        for count, name in self._reads:
            if kept and count <= kept[-1]:
                raise TapeError(f"the forward pass reads a number back ({name}()), which may steer what follows")
        return self._compile(kept, vault, step, like)

    def _refuse(self, reason: str) -> None:
        self._refusal = self._refusal or reason

    def _backward(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._off = True  # hooks and recomputation inside backward are not part of the forward
        try:
            return func(*args, **kwargs)
        finally:
            self._off = False

    def _depends(self, tensor: Tensor) -> bool:
        slot = self._slots.get(id(tensor))
        if slot is None and tensor.requires_grad and tensor.is_leaf and isinstance(tensor, torch.nn.Parameter):
            slot = self._slots[id(tensor)] = len(self.leaves)
            self.leaves.append(tensor)
        if slot is not None and slot < _ACTIVATION:
            self.used.add(slot)
        return slot is not None

    def _is_activation(self, x: Any) -> bool:
        return self._slots.get(id(x), -1) >= _ACTIVATION

    def _read(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        newest = max((self._epoch.get(self._slots.get(id(t), -1), len(self._roots)) for t in tensors(args)), default=0)
        if newest < len(self._roots):
            return result  # looks back at a step whose backward() has run: a number for the log
        if isinstance(result, (bool, int)):
            args, kwargs = self._encode(args), self._encode_named(kwargs)
            self._calls.append(Instruction(func, name, args, kwargs, expects=result))
        else:
            self._reads.append((len(self._calls), name))
        return result

    def _record(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        call = Instruction(
            func,
            name,
            self._encode(args),
            self._encode_named(kwargs),
            random=name in _RANDOM,
            grad=torch.is_grad_enabled(),
            autocast=_autocast(),
        )
        if "out" in kwargs:
            self._refuse(f"{name} writes through out=")
        if self._refusal is not None:
            return func(*args, **kwargs)
        if _writes(name, kwargs) or name in _STATISTICS:
            self._keep_before(name, args, kwargs)
        state = generator_state(tensors((args, kwargs))[0].device) if call.random else None
        result = func(*args, **kwargs)
        made = tensors(result)
        if made and made[0] is not (args[0] if args else None):
            epoch = self._epoch_of(args, kwargs)
            call = replace(call, outputs=tuple(self._new_slot(t, epoch) for t in made))
        elif made or name == "__setitem__":
            if self._slots.get(id(args[0]), _ACTIVATION) < _ACTIVATION and _writes(name, kwargs):
                self._refuse(f"{name} writes into a parameter during the step")
            call = replace(call, written=self._new_slot(args[0], len(self._roots)))
        else:
            return result
        if state is not None:
            self._states[len(self._calls)] = state
        self._calls.append(call)
        return result

    def _epoch_of(self, args: Any, kwargs: Any) -> int:
        known = [self._epoch.get(self._slots.get(id(t), -1)) for t in tensors(args) + tensors(kwargs)]
        return max((e for e in known if e is not None), default=len(self._roots))

    def _new_slot(self, tensor: Tensor, epoch: int) -> int:
        key, slot = id(tensor), self._next
        self._next += 1
        self._slots[key] = slot
        self._epoch[slot] = epoch
        if key not in self._alive:  # an id is free again once its tensor is gone: the weak reference forgets it in time
            self._alive[key] = weakref.ref(tensor, lambda _: self._forget(key))
        return slot

    def _forget(self, key: int) -> None:
        self._slots.pop(key, None)
        self._alive.pop(key, None)

    def _encode_named(self, kwargs: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
        return tuple((k, self._encode(v)) for k, v in kwargs.items())

    def _encode(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            slot = self._slots.get(id(x))
            if slot is None:
                return self._constant(x)
            if slot < _ACTIVATION:
                self._versions.setdefault(slot, x._version)  # noqa: SLF001
            return Slot(slot)
        if isinstance(x, (tuple, list)):
            encoded = [self._encode(y) for y in x]
            return encoded if type(x) is list else tuple(encoded)
        if isinstance(x, slice):
            return Slice(self._encode(x.start), self._encode(x.stop), self._encode(x.step))
        if isinstance(x, torch.Generator):
            self._refuse("the step draws from a generator of the script's own")
        if isinstance(x, dict) and tensors(x):
            self._refuse("a call takes a dictionary of tensors")
        return x

    def _constant(self, x: Tensor) -> Constant:
        if x.grad_fn is not None:
            self._refuse(_unseen(x))
        index, version = self._constants.get(id(x)), x._version  # noqa: SLF001
        if index is None or self._taken[index].version != version:
            index = self._constants[id(x)] = len(self._taken)
            self._taken.append(_Taken(x, version))
        return Constant(index)

    def _keep_before(self, name: str, args: Any, kwargs: Any) -> None:
        """Copies the constants that a call is about to write into."""
        into = (*args[1:3], *kwargs.values()) if name in _STATISTICS else args[:1]
        for t in tensors(into):
            index = self._constants.get(id(t))
            if index is not None and self._taken[index].before is None:
                self._taken[index].before = t.detach().clone()

    def _needed(self) -> list[int]:
        """The calls that lead to a root, that write into a value on the way, or that read a flag before the end."""
        wanted = {slot for slot, _ in self._roots}
        kept: list[int] = []
        for k in range(len(self._calls) - 1, -1, -1):
            call = self._calls[k]
            writes = call.written is not None and any(
                s >= _ACTIVATION for s in replace(call, args=call.args[:1]).slots()
            )
            if writes or not wanted.isdisjoint(call.made()) or (kept and call.expects is not None):
                kept.append(k)
                wanted.update(call.slots())
        return kept[::-1]

    def _compile(self, kept: Sequence[int], vault: Vault, step: int, like: Program | None) -> Tape:
        slots = {k: k for k in range(len(self.leaves))}
        constants: dict[int, int] = {}

        def renumber(x: Slot | Constant) -> Slot | Constant:
            if type(x) is Slot:
                return Slot(slots.setdefault(x.at, len(slots)))
            return Constant(constants.setdefault(x.at, len(constants)))

        def renumbered(call: Instruction) -> Instruction:
            args, kwargs = map_leaves(renumber, call.args), map_leaves(renumber, call.kwargs)
            outputs = tuple(renumber(Slot(s)).at for s in call.outputs)
            written = None if call.written is None else renumber(Slot(call.written)).at
            return replace(call, args=args, kwargs=kwargs, outputs=outputs, written=written)

        calls = tuple(renumbered(self._calls[k]) for k in kept)
        roots = tuple(slots[slot] for slot, _ in self._roots)
        overwritten = frozenset(new for old, new in constants.items() if self._taken[old].before is not None)
        program = Program(
            calls, len(self.leaves), len(slots), roots, overwritten, _released(calls, roots, len(self.leaves))
        )
        copies = [self._copy(self._taken[old], vault) for old in constants]
        return Tape(
            program=like if like is not None and like == program else program,
            constants=tuple(tensor for tensor, _ in copies),
            versions=tuple(version for _, version in copies),
            states=tuple(self._states[k] for k in kept if k in self._states),
            loss=float(sum(tensor for _, tensor in self._roots)),
            step=step,
        )

    def _copy(self, taken: _Taken, vault: Vault) -> tuple[Tensor, int | None]:
        if taken.before is not None:
            return taken.before, None
        if taken.tensor._version != taken.version:  # noqa: SLF001
            raise TapeError("an input of the step was overwritten in place before the step ended")
        if any(taken.tensor is p.grad for p in self.leaves):
            raise TapeError("the loss uses the stored gradient of a parameter")
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


def _writes(name: str, kwargs: Mapping[str, Any]) -> bool:
    if name.startswith("__"):
        return name == "__setitem__" or name in _OPERATORS
    return (name.endswith("_") and name != "requires_grad_") or bool(kwargs.get("inplace"))


def _autocast() -> tuple[str, torch.dtype] | None:
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            return device, torch.get_autocast_dtype(device)
    return None


def _unseen(tensor: Tensor) -> str:
    maker = "a call outside the recorded step" if tensor.grad_fn is None else type(tensor.grad_fn).__name__
    return f"part of the loss was made out of sight, by {maker}: a custom autograd function or a compiled region"


def caller() -> str:
    """The source line outside torch and this package that made the current call, as file:line."""
    frame = sys._getframe(1)  # noqa: SLF001
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in ("torch", "unstuck", "contextlib"):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
