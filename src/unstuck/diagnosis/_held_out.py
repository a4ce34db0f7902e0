"""What a script evaluates without gradients: rows that it does not train on, and how the network answers for them."""

import contextlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from unstuck.diagnosis._case import HELD_OUT, Case, comparison, distinct
from unstuck.diagnosis._remedies import without_dropout
from unstuck.diagnosis._steering import batches
from unstuck.diagnosis._structure import mean_loss
from unstuck.diagnosis._wires import exchanged, observed, wires
from unstuck.objective import Constant, Tape
from unstuck.record import Evaluation, Hashes

ALL = 0.95  # of the rows: such as are trained on make a set that is no validation
FEW = 8  # rows
HALF = 0.5  # of the rows trained on, that have to be hashed for their share to tell
MOST = 0.5  # of the rows trained on, of which in a leak few are held out as well
ALIKE = 1.5  # times the loss of the rows trained on: held-out rows up to there are answered as those are
ANSWERED = 0.5  # times what guessing earns: or up to there
TOGETHER = 64  # rows to a step that a trial is judged by
BATCHES = 8  # different ones, at the most, that are few
CERTAIN = 3.0  # standard errors
_OF_CLASSES = ("cross_entropy", "nll_loss", "equal", "binary_cross_entropy", "binary_cross_entropy_with_logits")
SURE = 1e-7  # how far from 0 and 1 a probability is taken to be at the least


@dataclass(frozen=True, eq=False)
class Answers:
    """Outputs beside what they should be, rows first: of classes (rows, …, classes) and (rows, …)."""

    kind: str  # "classes", "odds" (logits of yes and no) or "values"
    outputs: Tensor
    targets: Tensor

    @cached_property
    def losses(self) -> Tensor:
        """Row by row, in float64: cross-entropy, or the squared error."""
        o, y = self.outputs.double(), self.targets
        if self.kind == "classes":
            each = F.cross_entropy(o.flatten(0, -2), y.flatten().long(), reduction="none", ignore_index=-100)
        elif self.kind == "odds":
            each = F.binary_cross_entropy_with_logits(o.flatten(), y.double().flatten(), reduction="none")
        else:
            each = (o.flatten() - y.double().flatten()).square()
        return each.view(len(o), -1).mean(1)

    def of(self, rows: Tensor) -> "Answers":
        """Those of some rows."""
        return Answers(self.kind, self.outputs[rows], self.targets[rows])

    @cached_property
    def loss(self) -> float:
        return float(self.losses.mean())

    @cached_property
    def right(self) -> Tensor:
        """Row by row, the share of its places whose class is named rightly."""
        if self.kind == "classes":
            named = self.outputs.argmax(-1) == self.targets
        else:
            named = (self.outputs.flatten() > 0) == (self.targets.flatten() > 0.5)
        return named.double().view(len(self.outputs), -1).mean(1)

    @cached_property
    def confusion(self) -> Tensor:
        """How often each class (rows) was called by each name (columns)."""
        if self.kind == "classes":
            named, meant, count = self.outputs.argmax(-1).flatten(), self.targets.flatten(), self.outputs.shape[-1]
        else:
            named, meant, count = self.outputs.flatten() > 0, self.targets.flatten() > 0.5, 2
        return torch.bincount(meant.long() * count + named.long(), minlength=count * count).view(count, count).double()

    def by_rows(self, rows: int) -> Tensor:
        """The losses of so many rows, of which each may hold several places."""
        return self.losses.view(rows, -1).mean(1)


@dataclass(frozen=True, eq=False)
class HeldOut:
    """One set of rows that the script evaluates now and then."""

    series: tuple[tuple[Evaluation, Answers], ...]  # by step
    inputs: Tensor | None  # of the latest; None where it is not known which of its tensors they are
    known: Tensor | None  # whether the row is trained on as well, as far as is known
    parts: Tensor  # which comparison the row comes from
    fixed: bool  # whether the same targets come each time

    @property
    def latest(self) -> Evaluation:
        return self.series[-1][0]

    @property
    def answers(self) -> Answers:
        return self.series[-1][1]

    @property
    def place(self) -> str:
        return self.latest.place.split(" ")[0]

    @cached_property
    def losses(self) -> Tensor:
        """Of the latest evaluation, one for each row of the inputs."""
        return self.answers.losses if self.inputs is None else self.answers.by_rows(len(self.inputs))


def held_out(case: Case) -> tuple[HeldOut, ...]:
    """The sets of rows that are evaluated and not trained on, those of most rows first."""
    series: dict[tuple[str, int], list[Evaluation]] = {}
    for e in () if case.memory is None else case.memory.evaluations:
        series.setdefault((e.place, e.part), []).append(e)
    found = []
    for each in series.values():
        with contextlib.suppress(RuntimeError, ValueError, TypeError):  # numbers of a kind that these looks do not know
            found.append(_set_of(case, each))
    return tuple(sorted((s for s in found if s is not None), key=lambda s: -len(s.answers.outputs)))


def _set_of(case: Case, evaluations: Sequence[Evaluation]) -> HeldOut | None:
    pairs = [(e, a) for e in evaluations if (a := answers_of(e)) is not None and bool(a.losses.isfinite().all())]
    if not pairs or pairs[-1][0] is not evaluations[-1] or len({a.kind for _, a in pairs}) > 1:
        return None
    first, last = pairs[0][1].targets, pairs[-1][1].targets
    varied = bool((last != last.flatten()[:1]).any())
    fixed = len({e.step for e, _ in pairs}) > 1 and varied and first.shape == last.shape and torch.equal(first, last)
    if any(e.training for e, _ in pairs) and not fixed:
        return None  # as a policy is asked about the rows that it will be trained on
    latest = pairs[-1][0]
    inputs = _inputs(case, latest, len(pairs[-1][1].outputs))
    hashed = None if inputs is None else _hashed(case, latest, len(inputs))
    known = None if inputs is None else _known(case, inputs, hashed)
    if inputs is None or known is None:
        return HeldOut(tuple(pairs), inputs, known, _parts(latest.sizes), fixed)
    if len(inputs) != sum(latest.sizes):  # of rows with several places each
        whole = torch.zeros(len(inputs), dtype=torch.long)
        return None if _all(case, known, hashed) else HeldOut(tuple(pairs), inputs, known, whole, fixed)
    parts = _parts(latest.sizes)
    each = [parts == k for k in range(len(latest.sizes))]
    trained = [k for k, p in enumerate(each) if _all(case, known[p], None if hashed is None else hashed[p])]
    kept = ~torch.isin(parts, torch.tensor(trained, dtype=torch.long))
    if not bool(kept.any()):
        return None
    if trained:  # one look at both sets, say: the rows trained on are left out
        pairs = [(e, a.of(kept)) for e, a in pairs if e.sizes == latest.sizes]
    return HeldOut(tuple(pairs), inputs[kept], known[kept], parts[kept], fixed)


def _parts(sizes: Sequence[int]) -> Tensor:
    return torch.repeat_interleave(torch.tensor(sizes))


def _all(case: Case, known: Tensor, hashed: Tensor | None) -> bool:
    """Whether these are rows to train on: nearly all, or as many of them as of all that are trained on were hashed."""
    share = case.once(share_hashed)
    likely = hashed is not None and share >= HALF and float(hashed.double().mean()) >= ALL * share
    return likely or float(known.double().mean()) >= ALL


def answers_of(e: Evaluation) -> Answers | None:
    """What an evaluation compared, in the terms of a loss; None where it is neither of classes nor of numbers."""
    o = e.outputs
    if not o.is_floating_point():
        return None
    if e.kind in _OF_CLASSES and e.squashed == "sigmoid":
        o = torch.logit(o.double(), SURE)
    elif e.kind in _OF_CLASSES and e.squashed == "softmax":
        o = o.double().clamp_min(SURE).log()
    return _answers(e.kind, o, e.targets)


def _answers(kind: str, o: Tensor, y: Tensor) -> Answers | None:
    if kind in ("cross_entropy", "nll_loss", "equal") and not (y.is_floating_point() or y.dtype == torch.bool):
        if o.dim() == y.dim() + 1 and o.shape[:1] + o.shape[2:] == y.shape and o.dim() > 2:
            o = o.movedim(1, -1)
        if o.dim() == y.dim() + 1 and o.shape[:-1] == y.shape and o.shape[-1] > 1:
            inside = bool(((y >= 0) & (y < o.shape[-1])).all())
            return Answers("classes", o, y) if inside else None
    if o.numel() != y.numel():
        return None
    if kind in ("equal", "binary_cross_entropy", "binary_cross_entropy_with_logits"):
        return Answers("odds", o, y) if bool(((y == 0) | (y == 1)).all()) else None
    return Answers("values", o, y) if kind not in ("cross_entropy", "nll_loss") else None


# The training beside it


def trained_on(case: Case) -> Answers | None:
    """The answers for the latest recorded batches at the last weights, without dropout."""
    return None if case.state is None else trained_at(case, case.state.weights)


def trained_at(case: Case, weights: Sequence[Tensor]) -> Answers | None:
    """The same at other weights."""
    if not case.tapes:
        return None
    w = case.once(wires)[0]
    found = comparison(w.program)
    if found is None or found.targets is None or not found.kind:
        return None
    outputs, targets = [], []
    places = [k for k, c in enumerate(w.program.instructions) if c is found.call]
    for tape in distinct(w.tapes)[-HELD_OUT:]:
        seen = observed(
            without_dropout(tape),
            weights,
            lambda k, args, _: (args[found.outputs], args[found.targets]) if k in places else None,
        )
        for pair in filter(None, seen):
            outputs.append(pair[0])
            targets.append(pair[1])
    if not outputs or len({(o.shape[1:], y.shape[1:]) for o, y in zip(outputs, targets, strict=True)}) > 1:
        return None
    o, y = torch.cat(outputs), torch.cat(targets)
    if found.call.name == "binary_cross_entropy":
        o = torch.logit(o.double(), SURE)
    return _answers(found.call.name, o, y)


def input_place(case: Case) -> int | None:
    """The constant of the usual program that is its only input."""
    if not case.tapes:
        return None
    found = batches(case.once(wires)[0])
    return found[2][0] if found is not None and len(found[2]) == 1 else None


def _inputs(case: Case, e: Evaluation, rows: int) -> Tensor | None:
    place = case.once(input_place)
    if place is None:
        return None
    like = case.once(wires)[0].recent[-1].constants[place]
    alike = [x for x in e.inputs if x.shape[1:] == like.shape[1:] and x.dtype == like.dtype]
    return next((x for x in alike if len(x) and rows % len(x) == 0), None)


def batches_trained_on(case: Case) -> tuple[Tensor, ...]:
    """The inputs of the recorded steps, each different batch once."""
    place = case.once(input_place)
    if place is None:
        return ()
    found = [c[place] for t in case.once(wires)[0].tapes for c in t.of_shares(t.constants)]
    alike = [x for x in found if x.shape[1:] == found[-1].shape[1:]]
    return tuple({tuple(_keys(x.flatten()[None])): x for x in alike}.values())


def one_target_a_row(case: Case) -> bool:
    """Whether the training compares one number with each row of its inputs."""
    place = case.once(input_place)
    found = None if place is None else comparison(case.once(wires)[0].program)
    if found is None or found.targets is None or type(at := found.call.args[found.targets]) is not Constant:
        return False
    constants = case.once(wires)[0].recent[-1].constants
    return place is not None and constants[at.at].numel() == len(constants[place])


def rows_trained_on(case: Case) -> Tensor | None:
    """The inputs of the recorded steps, each batch once."""
    found = case.once(batches_trained_on)
    return torch.cat(found) if found else None


def _known(case: Case, inputs: Tensor, hashed: Tensor | None) -> Tensor | None:
    """Whether each row is among those of the recorded steps, or among the many more that were hashed."""
    seen = case.once(_seen)
    if seen is None:
        return None
    known = torch.tensor([key in seen for key in _keys(inputs)])
    return known if hashed is None else known | hashed


def _hashed(case: Case, e: Evaluation, rows: int) -> Tensor | None:
    """Whether each row that was evaluated is among those that were hashed as they were trained on."""
    if e.hashes is None or case.memory is None or case.memory.rows is None or len(e.hashes) != rows:
        return None
    return torch.isin(e.hashes.cpu(), case.memory.rows)


def share_hashed(case: Case) -> float:
    """The share of the rows trained on that were hashed, of which those of the recorded steps are a sample."""
    seen = case.once(rows_trained_on)
    if seen is None or case.memory is None or case.memory.rows is None:
        return 0.0
    hashes = Hashes().of([seen])
    return 0.0 if hashes is None else float(torch.isin(hashes.cpu(), case.memory.rows).double().mean())


def _seen(case: Case) -> frozenset[bytes] | None:
    rows = case.once(rows_trained_on)
    return None if rows is None else distinct_rows(rows)


def distinct_rows(rows: Tensor) -> frozenset[bytes]:
    """Each different row once, by its bytes."""
    return frozenset(_keys(rows))


def each_once(rows: Tensor) -> Tensor:
    """Each different row once."""
    return rows[list({key: k for k, key in enumerate(_keys(rows))}.values())]


def _keys(rows: Tensor) -> list[bytes]:
    """Each row's bytes."""
    flat = rows.detach().cpu().flatten(1) if rows.dim() > 1 else rows.detach().cpu()[:, None]
    flat = flat.double() if flat.dtype in (torch.bfloat16, torch.float16) else flat
    return [row.tobytes() for row in flat.contiguous().numpy()]


def asked(case: Case, inputs: Tensor, weights: Sequence[Tensor] | None = None) -> Tensor | None:
    """The outputs for other rows, without dropout, at some weights or the last; None where it cannot take them."""
    place, w = case.once(input_place), case.once(wires)[0]
    found = comparison(w.program)
    if place is None or found is None or case.state is None:
        return None
    weights = case.state.weights if weights is None else weights
    tape = without_dropout(w.recent[-1])
    if tape.shares > 1:
        return None
    size = len(tape.constants[place])
    made: list[Tensor] = []
    calls = [k for k, c in enumerate(w.program.instructions) if c is found.call]
    for begin in range(0, len(inputs), size):
        rows = torch.arange(begin, begin + size) % len(inputs)  # the last batch is filled with rows from the front
        other = exchanged(tape.program, (place,), lambda c, _, rows=rows: inputs[rows].to(c))(tape)
        seen = observed(other, weights, lambda k, args, _: args[found.outputs] if k in calls else None)
        made += [o for o in seen if o is not None]
    outputs = torch.cat(made)
    each = len(outputs) // math.ceil(len(inputs) / size) // size
    return outputs[: each * len(inputs)]


def unseen(case: Case) -> tuple[Tape, ...]:
    """The held-out rows as steps that a trial can be judged by; none where they are answered in quite another way."""
    found = comparison(case.once(wires)[0].program) if case.tapes else None
    place = case.once(input_place)
    if place is None or found is None or found.targets is None or case.state is None:
        return ()
    aim = found.call.args[found.targets]
    sets = [s for s in case.once(held_out) if s.inputs is not None]
    if type(aim) is not Constant or not sets or case.once(wires)[0].recent[-1].shares > 1:
        return ()
    size = len(case.once(wires)[0].recent[-1].constants[place])
    sizes = (max(size, TOGETHER), size) if case.once(wires)[0].of_any_size else (size,)
    for rows in sizes:  # some programs take batches of their own size alone
        with contextlib.suppress(RuntimeError, ValueError):  # rows that the program does not take
            steps = _as_steps(case, sets[0], place, aim.at, rows)
            loss, trained = mean_loss(case.state.weights, steps), mean_loss(case.state.weights, case.fixed)
            return steps if loss < max(ALIKE * trained, ANSWERED * case.chance) else ()
    return ()


def _as_steps(case: Case, rows: HeldOut, place: int, aim: int, size: int) -> tuple[Tape, ...]:
    tape, inputs, targets = case.once(wires)[0].recent[-1], rows.inputs, rows.answers.targets
    assert inputs is not None
    each = len(targets) // len(inputs)
    steps = []
    for begin in range(0, min(len(inputs), HELD_OUT * size), size):
        chosen = torch.arange(begin, begin + size) % len(inputs)  # the last one is filled with rows from the front
        aims = targets.view(len(inputs), each, *targets.shape[1:])[chosen].flatten(0, 1)
        of = {place: inputs[chosen], aim: aims}
        change = exchanged(tape.program, of, lambda c, k, of=of: of[k].reshape(-1, *c.shape[1:]).to(c))
        steps.append(change(tape))
    return tuple(steps)


def answers_for(case: Case, inputs: Tensor, targets: Tensor) -> Answers | None:
    """The answers for recorded rows at the last weights, beside what the training compares them with."""
    found, outputs = comparison(case.once(wires)[0].program), asked(case, inputs)
    if found is None or outputs is None:
        return None
    o = torch.logit(outputs.double(), SURE) if found.call.name == "binary_cross_entropy" else outputs
    return _answers(found.call.name, o, targets)


def normalises(case: Case) -> bool:
    """Whether the training normalises by the rows at hand, as a replay of its steps then does with any rows."""
    return any(True for w in case.once(wires) for _ in w.calls(("batch_norm",)))


def answered(case: Case, rows: HeldOut, inputs: Tensor, weights: Sequence[Tensor] | None = None) -> Answers | None:
    """The answers for other inputs in the place of those that were evaluated."""
    outputs = asked(case, inputs, weights)
    if outputs is None or outputs.numel() != rows.answers.outputs.numel():
        return None
    return Answers(rows.answers.kind, outputs.reshape(rows.answers.outputs.shape), rows.answers.targets)


def certain(difference: Tensor) -> float:
    """How many standard errors the mean of paired differences lies from 0."""
    spread = float(difference.std()) / math.sqrt(max(len(difference), 1)) if len(difference) > 1 else math.inf
    mean = float(difference.mean())
    return mean / spread if spread > 0 else math.copysign(math.inf, mean) if mean else 0.0


def apart(a: Tensor, b: Tensor, *, most: int = sys.maxsize) -> float:
    """How many standard errors the means of two samples lie apart, a above b; `most` are different, of each."""
    if min(len(a), len(b)) < 2:
        return 0.0
    spread = math.sqrt(float(a.var()) / min(len(a), most) + float(b.var()) / min(len(b), most))
    return float(a.mean() - b.mean()) / spread if spread else 0.0


def above(a: Tensor, b: Tensor) -> float:
    """How many standard errors the ranks of one sample lie above those of another (Mann and Whitney)."""
    m, n = len(a), len(b)
    _, at, count = torch.cat([a, b]).unique(return_inverse=True, return_counts=True)
    ranks = (count.cumsum(0) - (count - 1) / 2)[at].double()  # of equal ones their mean
    surplus = float(ranks[:m].sum()) - m * (m + n + 1) / 2
    return surplus / math.sqrt(m * n * (m + n + 1) / 12)


def few_batches(case: Case) -> int:
    """How many different batches the recorded steps used, where these are few and come again; else 0."""
    tapes = case.once(wires)[0].tapes if case.tapes else ()
    count = len(case.once(batches_trained_on))
    return count if 0 < count <= BATCHES and len(tapes) >= max(4 * count, 16) else 0


def within(case: Case, rows: HeldOut) -> bool:
    """Whether most rows that are trained on are among the evaluated ones, and others as well."""
    seen = case.once(rows_trained_on)
    if seen is None or rows.inputs is None:
        return False
    trained, here = distinct_rows(seen), distinct_rows(rows.inputs)
    return len(trained & here) >= MOST * len(trained) and len(here) * ALL > len(trained)
