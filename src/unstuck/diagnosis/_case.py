"""A run laid open for questions: the weights as they stand, the recorded batches, and what was measured of them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from unstuck.diagnosis._findings import Evidence
from unstuck.objective import Constant, Instruction, Objective, Program, Slot, Tape
from unstuck.record import Memory, Run, State, of_tapes

HELD_OUT = 30  # tapes that no arm of a trial trains on
EXAMPLES = 100  # that these hold, where batches are small
FIXED = 6  # tapes that stand for the data where a quantity needs a fixed batch
LOSSES = {  # the calls that compare outputs (first argument) with targets (second), and how the targets are counted
    "cross_entropy": "classes",
    "nll_loss": "classes",
    "binary_cross_entropy": "values",
    "binary_cross_entropy_with_logits": "values",
    "mse_loss": "values",
    "l1_loss": "values",
    "smooth_l1_loss": "values",
    "huber_loss": "values",
    "kl_div": "values",
}
BINARY = {"binary_cross_entropy", "binary_cross_entropy_with_logits"}
T = TypeVar("T")
Measure = Callable[["Case"], Evidence | None]


@dataclass(frozen=True)
class Comparison:
    """The call of a program that compares the network's outputs with the targets."""

    call: Instruction
    kind: str  # "classes", "values", or "" where it is no known loss
    outputs: int  # which argument holds the outputs
    targets: int | None  # which argument holds the targets


class Case:
    """What the diagnosis knows of a run. Quantities are measured when first asked for, and once."""

    def __init__(self, run: Run, measures: Mapping[str, Measure]) -> None:
        self.run = run
        self._measures = measures
        self._known: dict[str, Evidence | None] = {}
        self.reasons: dict[str, str] = {}  # why a quantity is unknown, where that was said
        self._once: dict[Callable[[Case], Any], Any] = {}

    @property
    def steps(self) -> list[int]:
        """The steps that `losses` belong to."""
        return self._course[0]

    @property
    def losses(self) -> list[float]:
        return self._course[1]

    @cached_property
    def _course(self) -> tuple[list[int], list[float]]:
        return _losses(self.run)

    def __getitem__(self, name: str) -> Evidence | None:
        """The quantity, or None where this run cannot tell it."""
        if name not in self._known:
            try:
                self._known[name] = self._measures[name](self)
            except (RuntimeError, ValueError) as error:  # the others may still tell
                self._known[name] = None
                self.reasons[name] = str(error)
        return self._known[name]

    def once(self, function: Callable[["Case"], T]) -> T:
        """`function` of this case, computed when first asked for."""
        if function not in self._once:
            self._once[function] = function(self)
        return self._once[function]

    @cached_property
    def _kept(self) -> Memory | None:
        return self.run.memory()

    @cached_property
    def memory(self) -> Memory | None:
        return self._kept if self._kept is not None and self._kept.tapes else None

    @property
    def left_out(self) -> str:
        """Why steps that were recorded cannot be replayed here."""
        return "" if self._kept is None else self._kept.left_out

    @cached_property
    def tapes(self) -> tuple[Tape, ...]:
        return () if self.memory is None else self.memory.tapes

    @cached_property
    def state(self) -> State | None:
        """The latest weights that are still finite, with their optimiser."""
        states = () if self.memory is None else self.memory.states
        return next((s for s in sorted(states, key=lambda s: -s.step) if s.finite), None)

    @cached_property
    def start(self) -> State | None:
        """The weights before the first step."""
        return None if self.memory is None else min(self.memory.states, key=lambda s: s.step)

    @cached_property
    def fixed(self) -> tuple[Tape, ...]:
        """The tapes that stand for the data: the latest ones of the usual program, each batch once."""
        tapes = distinct(self.tapes)
        programs = [id(t.program) for t in tapes]
        usual = max(programs, key=programs.count, default=None)
        alike = [t for t in tapes if id(t.program) == usual]
        rows = examples_in(alike[-1]) if alike else 1
        return tuple(alike[-max(FIXED, min(math.ceil(EXAMPLES / rows), HELD_OUT)) :])

    @cached_property
    def split(self) -> tuple[tuple[Tape, ...], tuple[Tape, ...]]:
        """Tapes to train on and tapes to judge by, disjoint where there are enough different batches."""
        tapes = self.tapes
        if len(distinct(tapes)) < 4:
            return tapes, distinct(tapes)
        held = {id(t) for t in tapes[:: max(len(tapes) // HELD_OUT, 3)][:HELD_OUT]}
        return tuple(t for t in tapes if id(t) not in held), tuple(t for t in tapes if id(t) in held)

    @property
    def names(self) -> tuple[str, ...]:
        return () if self.memory is None else self.memory.names

    @cached_property
    def clip(self) -> float:
        """The norm that the script clips its gradients to, as far as it shows: none that a step used was longer.

        Infinite where it does not clip. A tape ends at the loss: steps that go on from it have to clip as well.
        """
        clips = {step for step, n in zip(*self.run.series("clips"), strict=True) if n}
        norms = [x for step, x in zip(*self.run.series("grad_norm"), strict=True) if step in clips and math.isfinite(x)]
        return max(norms, default=0.0) or math.inf

    def objective(self, tapes: Sequence[Tape], weights: Sequence[Tensor]) -> Objective:
        """The mean loss of tapes as a function of the parameters that take part in them."""
        return of_tapes(tapes, weights)

    @cached_property
    def chance(self) -> float:
        """The loss of knowing nothing of the inputs, or the loss at the start where that is not known."""
        if self.guess is not None:
            return self.guess
        return max((x for x in self.losses[:10] if math.isfinite(x)), default=math.nan)

    @property
    def classes(self) -> bool:
        """Whether the usual program names classes."""
        found = comparison(self.fixed[-1].program) if self.fixed else None
        return found is not None and found.kind == "classes"

    @cached_property
    def guess(self) -> float | None:
        """What guessing earns: the entropy of the labels, or the spread of the targets; None of any other loss."""
        known = [found for t in distinct(self.tapes)[-HELD_OUT:] if (found := _targets(t)) is not None]
        kinds = {kind for kind, _ in known}
        if kinds == {"cross_entropy"} or kinds == {"nll_loss"}:
            labels = torch.cat([y.flatten() for _, y in known])
            counts = torch.bincount(labels[labels >= 0]).double()
            p = counts[counts > 0] / counts.sum()
            return float(-(p * p.log()).sum())
        if kinds and kinds <= BINARY:
            return _of_odds([y.double() for _, y in known])
        if kinds == {"mse_loss"}:
            rows = [y.double().reshape(len(y) if y.dim() else 1, -1) for _, y in known]
            if len({y.shape[1] for y in rows}) > 1:
                rows = [y.reshape(-1, 1) for y in rows]
            return float(torch.cat(rows).var(0, correction=0).mean())
        return None


def _of_odds(targets: Sequence[Tensor]) -> float | None:
    """The entropy of yes and no, column by column; None where they do not vary, as in one half of a GAN's loss."""
    columns = {y.shape[-1] if y.dim() > 1 else 1 for y in targets}
    if len(columns) > 1 or any(bool((y == y.flatten()[:1]).all()) for y in targets):
        return None
    p = torch.cat([y.reshape(-1, *columns) for y in targets]).mean(0)
    if bool(((p < 0) | (p > 1)).any()):
        return None
    return float(-(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)).mean())


def clipped(weights: Sequence[Tensor], norm: float) -> None:
    """Shortens the gradient of all weights to a norm."""
    if norm < math.inf:
        torch.nn.utils.clip_grad_norm_(weights, norm)


def _losses(run: Run) -> tuple[list[int], list[float]]:
    """Steps and losses of the optimiser that has most of them: those of another (in a GAN) are of another function."""
    steps, losses = run.series("loss")
    optimizers = dict(zip(*run.series("optimizer"), strict=True))
    owners = [optimizers.get(step, 0) for step in steps]
    owner = max(dict.fromkeys(owners), key=owners.count, default=0)
    mine = [k for k, o in enumerate(owners) if o == owner]
    return [steps[k] for k in mine], [losses[k] for k in mine]


def rebuilt(state: State, weights: Sequence[Tensor]) -> torch.optim.Optimizer:
    """The run's optimiser, with its state, over `weights` (leaves); ValueError where there is none."""
    if state.optimizer is None:
        raise ValueError("the run's optimiser is needed; it had none, or several")
    return state.optimizer.build(weights)


def distinct(tapes: Sequence[Tape]) -> tuple[Tape, ...]:
    """Tapes with different batches: full-batch training repeats one."""
    seen = {tuple(_fingerprint(c) for c in tape.constants): tape for tape in tapes}
    return tuple(sorted(seen.values(), key=lambda t: t.step))


def _fingerprint(constant: Tensor) -> tuple[Any, ...]:
    x = constant.detach()
    if x.layout is not torch.strided:  # a sparse matrix, the graph of a graph network say
        x = x.to_sparse_coo().coalesce()
        return tuple(x.shape), *_fingerprint(x.indices()), *_fingerprint(x.values())
    x = (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).double().flatten()
    weights = torch.arange(1, len(x) + 1, dtype=torch.float64, device=x.device).remainder_(97.0)
    return tuple(constant.shape), float(x.sum()), float(x @ weights)


def examples_in(tape: Tape) -> int:
    """How many examples a tape holds, at the most: the longest first axis of its constants."""
    return max((c.shape[0] for c in tape.constants if c.dim()), default=1) or 1


def comparison(program: Program) -> Comparison | None:
    """Where a program compares outputs with targets: its last known loss, else its last call with a constant."""
    for call in reversed(program.instructions):
        if call.name in LOSSES:
            return Comparison(call, LOSSES[call.name], 0, 1)
    for call in reversed(program.instructions):
        tensors = [k for k, a in enumerate(call.args) if type(a) is Slot and a.at >= program.parameters]
        others = [k for k, a in enumerate(call.args) if k not in tensors and any(_constants(a))]
        if tensors and others:
            return Comparison(call, "", tensors[0], others[0])
    return None


def _constants(x: Any) -> Iterator[bool]:
    if type(x) is Constant:
        yield True
    elif isinstance(x, (tuple, list)) and type(x) is not Slot:
        for y in x:
            yield from _constants(y)


def _targets(tape: Tape) -> tuple[str, Tensor] | None:
    found = comparison(tape.program)
    if found is None or found.targets is None or not found.kind or len(found.call.args) < 2:
        return None
    targets = found.call.args[found.targets]
    if type(targets) is not Constant:
        return None
    each = [constants[targets.at] for constants in tape.of_shares(tape.constants)]
    if found.kind == "classes" and each[0].is_floating_point():
        return None
    alike = all(y.dim() and y.shape[1:] == each[0].shape[1:] for y in each)
    return found.call.name, torch.cat(each) if alike else each[0]
