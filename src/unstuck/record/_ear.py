"""Hears what a script computes without gradients: what enters its network, and what the outputs are compared with."""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from unstuck.objective import tensors
from unstuck.record._rows import Rows, beside, learns

ROWS = 1024  # of an evaluation that are kept
BYTES = 8 << 20  # of its inputs, and of its outputs
CALLS = 20_000  # that are heard
ENTRANCES = 2  # tensors that meet a parameter in one call of the network, of which the first few may be its inputs

LOSSES = frozenset(
    "cross_entropy nll_loss binary_cross_entropy binary_cross_entropy_with_logits mse_loss l1_loss smooth_l1_loss "
    "huber_loss".split()
)
_EQUAL = frozenset("eq ne __eq__ __ne__".split())
_DIFFERENCE = frozenset("sub __sub__ __rsub__ rsub".split())
_SQUASHES = {"sigmoid": "sigmoid", "sigmoid_": "sigmoid", "softmax": "softmax"}
_KEEPS = frozenset(  # calls that keep what their numbers mean
    "cpu to float double detach squeeze unsqueeze view reshape flatten clone contiguous __getitem__ cat half cuda "
    "unflatten t permute transpose".split()
)
_RESULTS = (Tensor, tuple, list)
Pair = tuple[Tensor, Tensor]


class _Made:
    """What is known of a tensor that the network made: the numbers that it was chosen by, and what squashed them."""

    __slots__ = ("chosen_by", "ref", "squashed")

    def __init__(self, ref: "weakref.ref[Tensor]", chosen_by: "tuple[Tensor, str] | None", squashed: str) -> None:
        self.ref = ref
        self.chosen_by = chosen_by
        self.squashed = squashed


class Ear(TorchFunctionMode):
    """Follows the outputs of a network from its parameters to a comparison with something that it did not make.

    `entered` has the inputs: by their order among the tensors that meet a parameter, and call by call of the network.
    `compared` has the outputs and the targets by the name of the comparison. Nothing is changed, and an error of ours
    ends the hearing alone.
    """

    def __init__(
        self, leaves: Sequence[Tensor], rows: Rows | None = None, recorder: TorchFunctionMode | None = None
    ) -> None:
        self._leaves = {id(p) for p in leaves}
        self._rows = rows  # which hash them, in a time of their own
        self._awaiting: Rows | None = None  # until this call of the network has been given its rows
        self._hashed: list[Tensor] = []  # call by call of the network
        self._came = 0  # rows, hashed or not
        self._recorder = recorder  # that sees every call as well: two modes would see each other's
        self._made: dict[int, _Made] = {}
        self._entrance = 0  # tensors that have entered in this call of the network
        self._depth = 0  # of modules
        self._handles: list[Any] = []
        self.calls = 0
        self.seconds = 0.0
        self.deaf = False
        self.training = False  # whether the network was in training mode
        self.drawn: set[str] = set()  # calls that behaved as they do in training
        self.entered: list[list[Tensor]] = [[] for _ in range(ENTRANCES)]
        self.met: dict[int | str, int] = {}  # rows that came, kept or not, by entrance and by comparison
        self.compared: dict[str, list[Pair]] = {}
        self.squashed = ""  # by what the outputs of the comparison were

    def follow(self) -> None:
        """Begins to follow the modules that are called."""

        def enter(module: nn.Module, given: Any) -> None:
            if self._depth == 0:
                self._entrance, self._awaiting = 0, self._rows
                self.training = self.training or (module.training and next(module.parameters(), None) is not None)
            self._depth += 1
            if self._awaiting is not None and not self.deaf:
                self.deaf = not self._awaiting.timed(self._note_rows, self._awaiting, module, given)

        def end(*_: Any) -> None:
            self._depth = max(self._depth - 1, 0)

        self._handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(end, always_call=True)]

    def leave(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._recorder is None:
            result = func(*args, **(kwargs or {}))
        else:
            result = self._recorder.__torch_function__(func, types, args, kwargs)
        if not (self.deaf or torch.is_grad_enabled()):
            began = perf_counter()
            try:
                self._hear(getattr(func, "__name__", ""), args, kwargs or {}, result)
            except Exception:  # ours: the script goes on
                self.deaf = True
            self.seconds += perf_counter() - began
        return result

    def _note_rows(self, rows: Rows, module: nn.Module, given: Any) -> None:
        """The rows that the network is called with, as those of a step are found."""
        inputs = beside(given)
        if any(self._known(x) is not None for x in inputs):
            self._awaiting = None  # it goes on from what it has made
        elif inputs and learns(module):
            self._awaiting = None
            self._came += inputs[0].shape[0]
            room = ROWS - sum(map(len, self._hashed))
            found = rows.hashes.of([x[:room] for x in inputs]) if room > 0 else None
            self._hashed += [] if found is None else [found]

    def _hear(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        self.calls += 1
        if self.calls > CALLS:
            self.deaf = True
        if not (isinstance(result, _RESULTS) or name == "__setitem__") or type(result) is torch.Size:
            return  # what is read of a tensor
        leaf, made, others = False, [], []
        for x in tensors([*args, *kwargs.values()]):
            if id(x) in self._leaves:
                leaf = True
            elif (known := self._known(x)) is not None:
                made.append((x, known))
            elif x.dim():
                others.append(x)
        if not (leaf or made):
            return
        if leaf and others and not made:
            self._enters(others[0])
        elif made and others:
            self._compares(name, args, kwargs)
        self._note_mode(name, args, kwargs)
        self._note_made(name, args, made, result)

    def _known(self, x: Any) -> _Made | None:
        known = self._made.get(id(x))
        return known if known is not None and known.ref() is x else None

    def _note_made(self, name: str, args: Sequence[Any], made: Sequence[tuple[Tensor, _Made]], result: Any) -> None:
        chosen = next((m.chosen_by for _, m in made if m.chosen_by is not None), None)
        squashed = _SQUASHES.get(name, "")
        if name in _KEEPS:
            squashed = next((m.squashed for _, m in made if m.squashed), "")
        found = tensors(result)
        if name == "__setitem__" and isinstance(args[0], Tensor):  # outputs gathered in a buffer
            found = [args[0]]
            squashed = next((m.squashed for _, m in made if m.squashed), "")
        for x in found:
            by = chosen
            if by is None and not x.is_floating_point():
                by = next(((y, m.squashed) for y, m in made if y.is_floating_point()), None)
            self._made[id(x)] = _Made(weakref.ref(x, self._forget(id(x))), by, squashed)

    def _forget(self, key: int) -> Any:
        return lambda _: self._made.pop(key, None)

    def _note_mode(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if name == "dropout" and _argument(args, kwargs, 2, "training", True) and _argument(args, kwargs, 1, "p", 0.5):
            self.drawn.add("dropout")
        elif name == "batch_norm" and _argument(args, kwargs, 5, "training", False):
            self.drawn.add("batch norm")

    def _enters(self, x: Tensor) -> None:
        if self._entrance < ENTRANCES:
            self.met[self._entrance] = self.met.get(self._entrance, 0) + len(x)
            _keep(x, self.entered[self._entrance])
        self._entrance += 1

    def _compares(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if name in LOSSES:
            outputs, targets = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "target")
            known = self._known(outputs)
            if known is not None and isinstance(targets, Tensor) and self._known(targets) is None:
                self._pair(name, outputs, targets, known.squashed)
        elif name in _EQUAL or name in _DIFFERENCE:
            pair = [x for x in args[:2] if isinstance(x, Tensor)]
            mine = [x for x in pair if self._known(x) is not None]
            other = [x for x in pair if self._known(x) is None]
            if len(mine) != 1 or len(other) != 1:
                return
            known = self._made[id(mine[0])]
            if name in _DIFFERENCE and mine[0].is_floating_point() and mine[0].shape == other[0].shape:
                self._pair("difference", mine[0], other[0], known.squashed)
            elif name in _EQUAL and known.chosen_by is not None:
                outputs, squashed = known.chosen_by
                self._pair("equal", outputs, other[0], squashed)

    def _pair(self, name: str, outputs: Tensor, targets: Tensor, squashed: str) -> None:
        pairs = self.compared.setdefault(name, [])
        if not (outputs.dim() and targets.dim()) or len(outputs) != len(targets):
            return
        self.met[name] = self.met.get(name, 0) + len(outputs)
        if sum(len(o) for o, _ in pairs) >= ROWS:
            return
        kept: list[Tensor] = [o for o, _ in pairs]
        before = len(kept)
        _keep(outputs, kept)
        if len(kept) > before:
            self.squashed = squashed
            pairs.append((kept[-1], targets[: len(kept[-1])].detach().clone()))

    def inputs_of(self, kind: str) -> list[Tensor]:
        """The inputs of what was compared: those of which a row gave one row of the outputs, or several, each the same.

        Where fewer rows of them were kept than of the outputs, they are left out: they would not lie beside them.
        """
        found = (self._beside(joined(parts), self.met.get(k, 0), kind) for k, parts in enumerate(self.entered))
        return [x for x in found if x is not None]

    def hashes_of(self, kind: str) -> Tensor | None:
        """Those of the rows that the network was called with, as `inputs_of` has the inputs."""
        return self._beside(joined(self._hashed), self._came, kind)

    def _beside(self, x: Tensor | None, came: int, kind: str) -> Tensor | None:
        """As many rows, of so many that came, as lie beside the kept rows of the outputs."""
        compared = self.met[kind]
        if x is None or not came or compared % came:
            return None
        each, rows = compared // came, sum(len(o) for o, _ in self.compared[kind])
        return x[: rows // each] if rows % each == 0 and len(x) >= rows // each else None


def joined(parts: Iterable[Tensor]) -> Tensor | None:
    """Rows that came part by part; None where they do not fit together."""
    found = [x.clone() if x.is_inference() else x for x in parts]
    if not found or len({(x.shape[1:], x.dtype) for x in found}) > 1:
        return None
    return torch.cat(found) if len(found) > 1 else found[0]


def _keep(x: Tensor, kept: list[Tensor]) -> None:
    """Adds a copy of the first rows of a tensor, as many as there is room for."""
    if not x.dim() or not len(x) or x.layout is not torch.strided:
        return
    room = BYTES - sum(y.nbytes for y in kept)
    rows = min(ROWS - sum(map(len, kept)), room // max(x.nbytes // len(x), 1), len(x))
    if rows > 0:
        kept.append(x[:rows].detach().clone())


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], k: int, name: str, default: Any = None) -> Any:
    return args[k] if k < len(args) else kwargs.get(name, default)
