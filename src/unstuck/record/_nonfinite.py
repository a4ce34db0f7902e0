"""Where the first number that is not finite arose: in a parameter, in the batch, in a call forward or in one backward.

The step is run again from its tape, and every call watched: a number arises where what goes into a call is finite and
what comes out is not. Of several such calls the first counts from which it went on to the loss. −infinity is what masks
are made of: by itself it is no fault of a call that was given one.
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unstuck.objective import Constant, Instruction, Number, Slot, Tape, TapeError, memory_of, tensors
from unstuck.record._state import State

MASKED = frozenset(  # calls that are given −infinity on purpose
    "softmax log_softmax logsumexp scaled_dot_product_attention multi_head_attention_forward where masked_fill".split()
)
SINGULAR = frozenset(  # calls whose slope has no bound where an argument is 0
    "sqrt rsqrt reciprocal log log2 log10 pow __pow__ float_power div true_divide __truediv__ __rtruediv__ "
    "xlogy".split()
)
Names = Callable[[Tensor], str]


def nonfinite_batch(tape: Tape, but: Collection[torch.Size] = ()) -> dict[str, Any] | None:
    """The input of the step that holds NaN or infinity, and in which rows; −infinity is what masks are made of.

    An input of a shape in `but` is left out.
    """
    for k, constant in enumerate(tape.constants):
        if constant.shape not in but and _count(constant).spoilt:
            return _rows(tape, k)
    return None


def first_nonfinite(
    tape: Tape | None,
    leaves: Sequence[Tensor],
    name: Names,
    *,
    step: int,
    tapes: Iterable[Tape],
    states: Iterable[State],
) -> dict[str, Any]:
    """Where the first number that is not finite arose in a step whose loss is not.

    Where a parameter was spoilt before, the update of step `since` did it, the last one whose loss was finite. What of
    that step is kept, its tape and a state of before, may tell the `cause`.
    """
    seen = None if tape is None else origin(tape, leaves)
    broken = next((p for p in leaves if _count(p).any), None)
    found: dict[str, Any] = seen if seen is not None and seen["origin"] != "backward" else {}
    if found.get("origin", "unknown") == "unknown":
        found = {"origin": "unknown" if broken is None else "parameter", "where": ""}
    if found["origin"] != "parameter":
        return found
    found["where"] = name(leaves[found.pop("slot")] if "slot" in found or broken is None else broken)
    found["since"] = step - 1
    last = next((t for t in tapes if t.step == step - 1), None)
    cause = None if last is None else seen_again(last, states, leaves)
    return found if cause is None else {**found, "cause": cause}


def first_nonfinite_gradient(tape: Tape | None, leaves: Sequence[Tensor], name: Names) -> dict[str, Any] | None:
    """Where the first gradient that is not finite arose in a step whose loss is; None where all gradients are."""
    broken = next((p for p in leaves if p.grad is not None and _count(p.grad).any), None)
    if broken is None:
        return None
    found = None if tape is None else origin(tape, leaves)
    if found is None or found["origin"] != "backward":
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return None  # it came from another rank, which tells more
        found = {"origin": "backward", "where": "", "replayed": tape is not None}
    return {**found, "parameter": name(broken)}


def seen_again(tape: Tape, states: Iterable[State], leaves: Sequence[Tensor]) -> dict[str, Any] | None:
    """The call of a recorded step in which a number that is not finite arises at the latest finite weights, too."""
    state = max((s for s in states if s.finite and len(s.weights) == len(leaves)), key=lambda s: s.step, default=None)
    if state is None:
        return None
    weights = [w.detach().requires_grad_(p.requires_grad) for w, p in zip(state.weights, leaves, strict=True)]
    found = origin(tape, weights)
    if found is None or found["origin"] not in ("forward", "backward"):
        return None
    return {**found, "step": tape.step, "weights": state.step}


def met_again(
    tape: Tape, models: Iterable[nn.Module], states: Iterable[State], leaves: Sequence[Tensor]
) -> tuple[str, dict[str, Any]] | None:
    """What of a later step explains a loss that was not finite, as a fact: its batch, or one of its calls."""
    buffers = [b for m in models for b in m.buffers()]
    # statistics that the blow-up has spoilt are inputs of a step, too
    batch = nonfinite_batch(tape, {b.shape for b in buffers if _count(b).any})
    if batch is not None:
        return "non-finite-batch", batch
    call = seen_again(tape, states, leaves)
    return None if call is None else ("non-finite-call", call)


def origin(tape: Tape, weights: Sequence[Tensor]) -> dict[str, Any] | None:
    """Where the first number that is not finite arises in a step at `weights`, if it does: forward, else backward."""
    values = [w.detach().requires_grad_(w.requires_grad) for w in weights]
    forward, backward = _Forward(tape), _Backward()

    def look(call: Instruction, args: Any, result: Any) -> None:
        forward.observe(call, args, result)
        backward.observe(forward.at, args, result)

    try:
        with torch.enable_grad():
            loss = tape.replay(values, observe=look, foresee=forward.foresee)
        if not bool(loss.isfinite()):
            return forward.origin()
        if loss.requires_grad:
            torch.autograd.grad(loss, [v for v in values if v.requires_grad], allow_unused=True)
    except (TapeError, RuntimeError):  # what was seen until then
        return forward.origin() if forward.arose else None
    finally:
        backward.close()
    return backward.origin(forward)


class Counts(NamedTuple):
    """How many of the numbers of a tensor are not finite."""

    nan: int = 0
    high: int = 0  # +infinity
    low: int = 0  # −infinity
    of: int = 0

    @property
    def any(self) -> bool:
        return bool(self.nan or self.high or self.low)

    @property
    def spoilt(self) -> bool:
        """Whether that is more than a mask may hold."""
        return bool(self.nan or self.high)


NONE = Counts()


def _count(x: Tensor) -> Counts:
    x = x.detach()
    if not (x.is_floating_point() or x.is_complex()):
        return Counts()
    if x.layout is not torch.strided:
        x = x._values() if x.is_sparse else x.to_dense()  # noqa: SLF001
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    if bool(x.isfinite().all()):
        return Counts(of=x.numel())
    return Counts(int(x.isnan().sum()), int(x.isposinf().sum()), int(x.isneginf().sum()), x.numel())


def _told(tape: Tape, k: int, shape: Sequence[int], counts: Counts) -> dict[str, Any]:
    """The fact about instruction `k`."""
    module, line = tape.program.where(k)
    return {
        "where": tape.program.place(k),
        "call": tape.program.instructions[k].name,
        "module": module,
        "line": line,
        "shape": list(shape),
        "nan": counts.nan,
        "inf": counts.high + counts.low,
        "numbers": counts.of,
    }


def _rows(tape: Tape, k: int) -> dict[str, Any]:
    x = tape.constants[k]
    flat = x.flatten(1) if x.dim() > 1 else x.unsqueeze(-1)
    rows = (~flat.isfinite()).any(-1).nonzero().flatten().tolist()
    return {"origin": "batch", "where": f"input {k} of the step, shape {tuple(x.shape)}", "rows": rows[:20]}


@dataclass
class _Call:
    """What went into a call and came out of it."""

    sources: list[int | Slot | Constant] = field(default_factory=list)  # of what was not finite in it
    given: Counts = NONE  # taken together
    unbounded: bool = False  # whether the script itself gave it an infinite number
    zeros: int = 0  # among its arguments
    made: Counts = NONE  # the first of its results that is not finite
    shape: tuple[int, ...] = ()
    arose: bool = False
    wide: bool = False  # whether it is finite when it is computed in float64


class _Forward:
    """Watches a replay for the calls in which numbers that are not finite arise, and where they go."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self._calls: list[_Call] = []
        self._makers: dict[int, int] = {}  # by slot
        self._writers: dict[int, int] = {}  # by memory: who made it hold such numbers
        self._given: list[tuple[Tensor, Counts]] = []
        self._keywords: dict[str, Any] = {}

    @property
    def at(self) -> int:
        """The number of the present call."""
        return len(self._calls) - 1

    def __getitem__(self, k: int) -> _Call:
        return self._calls[k]

    @property
    def arose(self) -> list[int]:
        return [k for k, call in enumerate(self._calls) if call.arose]

    def foresee(self, call: Instruction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(call.leaves())
        places = [x for x in names if type(x) in (Slot, Constant)]
        numbers = [self.tape.numbers[x.at] if type(x) is Number else x for x in names]
        self._keywords = kwargs
        self._given = [(t, _count(t)) for t in tensors((args, kwargs))]
        seen = _Call(unbounded=any(type(x) is float and x - x != 0 for x in numbers))
        for place, (tensor, counts) in zip(places, self._given, strict=True):
            if counts.any:
                seen.sources.append(self._source(place, tensor))
            if call.name in SINGULAR and counts.of:
                seen.zeros += int((tensor == 0).sum())
        every = [counts for _, counts in self._given]
        seen.given = Counts(*(sum(column) for column in zip(*every, strict=True))) if every else Counts()
        self._calls.append(seen)

    def _source(self, place: Slot | Constant, tensor: Tensor) -> int | Slot | Constant:
        writer = self._writers.get(memory_of(tensor))
        if writer is None and type(place) is Slot:
            writer = self._makers.get(place.at)
        return place if writer is None else writer

    def observe(self, call: Instruction, args: tuple[Any, ...], result: Any) -> None:
        k, seen = self.at, self._calls[-1]
        self._makers.update(dict.fromkeys(call.outputs, k))
        before = {memory_of(t) for t, _ in self._given}
        spoilt = {memory_of(t) for t, counts in self._given if counts.any}
        for tensor in (*tensors(result), *(t for t, _ in self._given)):
            counts, memory = _count(tensor), memory_of(tensor)
            if counts.any and memory not in spoilt:
                self._writers[memory] = k
                if not seen.made.any:
                    seen.made, seen.shape = counts, tuple(tensor.shape)
            elif not counts.any and memory not in before:
                self._writers.pop(memory, None)
        self._writers.pop(0, None)  # what has no memory of its own
        clean = not (seen.given.any or seen.unbounded)
        seen.arose = seen.made.any if clean else seen.made.spoilt and not seen.given.spoilt
        if seen.arose:
            seen.wide = _finite_in_float64(call, args, self._keywords)

    def origin(self) -> dict[str, Any]:
        """Where what has spoilt the loss comes from."""
        tape = self.tape
        reached, outside = self._reached(self._ends())
        for place in outside:
            if type(place) is Slot:
                return {"origin": "parameter", "slot": place.at}
        for place in outside:
            if type(place) is Constant and _count(tape.constants[place.at]).spoilt:
                return _rows(tape, place.at)
        first = self._first(reached)
        if first is None:
            return {"origin": "unknown", "where": ""}
        call, seen = tape.program.instructions[first], self._calls[first]
        given = next((x for x in seen.sources if type(x) is Constant), None)
        if given is not None and call.name not in MASKED:
            return _rows(tape, given.at)
        more = {"masked": seen.given.any or seen.unbounded, "overflow": seen.wide}
        told = _told(tape, first, seen.shape, seen.made)
        return {"origin": "forward", **told, **{name: x for name, x in more.items() if x}}

    def hidden(self, k: int) -> str:
        """Where numbers arose that call `k` got or made and that the loss left out later; "" where there are none."""
        first = self._first(self._reached([k])[0])
        return "" if first is None else self.tape.program.place(first)

    def _first(self, reached: Iterable[int]) -> int | None:
        return min((k for k in reached if self._calls[k].arose), default=None)

    def _ends(self) -> list[int]:
        roots = [self._makers[slot] for slot in self.tape.program.roots if slot in self._makers]
        return [k for k in roots if self._calls[k].made.any or self._calls[k].sources] or self.arose

    def _reached(self, ends: Iterable[int]) -> tuple[set[int], list[Slot | Constant]]:
        """The calls through which numbers that are not finite came there, and from what outside of the step."""
        todo = list(ends)
        reached: set[int] = set()
        outside: list[Slot | Constant] = []
        while todo:
            k = todo.pop()
            if k not in reached:
                reached.add(k)
                todo += [x for x in self._calls[k].sources if isinstance(x, int)]
                outside += [x for x in self._calls[k].sources if not isinstance(x, int)]
        return reached, outside


def _finite_in_float64(call: Instruction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is finite in float64: then its numbers were too large, or too small, for their own type."""
    if call.name.endswith("_"):
        return False  # it has written over what it was given
    with contextlib.suppress(Exception), torch.no_grad(), _no_casts():
        given = _doubled(args)
        result = call.function(*given, **_doubled(kwargs))
        return all(not _count(t).any for t in tensors(result)) and any(
            t.dtype == torch.float64 for t in tensors(result)
        )
    return False


@contextlib.contextmanager
def _no_casts() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def _doubled(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.detach().double() if x.is_floating_point() and x.dtype != torch.float64 else x.detach().clone()
    if isinstance(x, dict):
        return {name: _doubled(value) for name, value in x.items()}
    return type(x)([_doubled(y) for y in x]) if type(x) in (tuple, list) else x


class _Backward:
    """Watches a backward pass for the node that makes the first gradient that is not finite of finite ones."""

    def __init__(self) -> None:
        self._owners: dict[Any, int] = {}  # which call made a node of the graph
        self._handles: list[Any] = []
        self._first: tuple[int, tuple[int, ...], Counts, bool] | None = None

    def observe(self, k: int, args: tuple[Any, ...], result: Any) -> None:
        todo = [t.grad_fn for t in (*tensors(result), *tensors(args)) if t.grad_fn is not None]
        while todo:
            node = todo.pop()
            if node in self._owners or hasattr(node, "variable"):  # which gathers the gradient of a parameter
                continue
            self._owners[node] = k
            self._handles.append(node.register_hook(functools.partial(self._look, k)))
            todo += [following for following, _ in node.next_functions if following is not None]

    def _look(self, k: int, made: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> None:
        if self._first is not None:
            return
        spoilt = [(g, counts) for g in given if g is not None and (counts := _count(g)).any]
        if spoilt:  # finite gradients met here, and their sum is not
            gradient, counts = spoilt[0]
            self._first = k, tuple(gradient.shape), counts, True
            return
        for gradient in made:
            if gradient is not None and (counts := _count(gradient)).any:
                self._first = k, tuple(gradient.shape), counts, False
                return

    def origin(self, forward: _Forward) -> dict[str, Any] | None:
        """The call whose backward pass that was, if there was one."""
        if self._first is None:
            return None
        k, shape, counts, met = self._first
        more = {"met": met, "zeros": forward[k].zeros, "hidden": forward.hidden(k)}
        return {"origin": "backward", **_told(forward.tape, k, shape, counts), **{n: x for n, x in more.items() if x}}

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._owners.clear()
