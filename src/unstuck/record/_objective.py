"""The loss of recorded steps as a function of the weights."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unstuck.objective import Objective, Tape, Term, second_order

if TYPE_CHECKING:
    from unstuck.record._run import Run


def of_run(run: "Run") -> Objective:
    """The objective that `Run.objective` promises."""
    memory = run.memory()
    if memory is not None and memory.left_out and not memory.tapes:
        raise ValueError(f"recorded steps that can be replayed here were needed, got none: {memory.left_out}")
    if memory is None or not memory.tapes:
        raise ValueError(f"recorded steps were needed, but {run.folder} has none{_reason(run)}")
    state = next((s for s in sorted(memory.states, key=lambda s: -s.step) if s.finite), None)
    if state is None:
        raise ValueError(
            f"finite weights were needed, but {run.folder} kept none: they were lost before it was written"
        )
    names = memory.names if len(set(memory.names)) == len(memory.names) else None
    return of_tapes(memory.tapes, state.weights, names=names)


def of_tapes(tapes: Sequence[Tape], weights: Sequence[Tensor], *, names: Sequence[str] | None = None) -> Objective:
    """The mean loss of tapes as a function of the parameters that take part in them, named by index without `names`."""
    used = sorted({k for t in tapes for k in t.program.reads()})

    def term(tape: Tape, count: int) -> Term:
        def loss(values: Sequence[Tensor]) -> Tensor:
            full = list(weights)
            for k, value in zip(used, values, strict=True):
                full[k] = value
            with second_order(tape):
                return tape.replay(full)

        return Term(loss, float(count))

    return Objective.of_terms(
        [term(tape, count) for tape, count in _counted(tapes)],
        {str(k) if names is None else names[k]: weights[k] for k in used},
    )


def _counted(tapes: Sequence[Tape]) -> list[tuple[Tape, int]]:
    """Each different step, and how often it comes: full-batch training repeats one."""
    alike: dict[tuple[Any, ...], list[list[Tape]]] = {}
    for tape in tapes:
        data = _data(tape)
        sums = [(x.shape, x.dtype, float((x.real if x.is_complex() else x).double().sum())) for x in data]
        groups = alike.setdefault((id(tape.program), tape.numbers, *sums), [])
        same = (g for g in groups if all(torch.equal(x, y) for x, y in zip(data, _data(g[0]), strict=True)))
        group = next(same, None)
        if group is None:
            groups.append(group := [])
        group.append(tape)
    return [(group[0], len(group)) for groups in alike.values() for group in groups]


def _data(tape: Tape) -> tuple[Tensor, ...]:
    """What tells a step from others of its program: the batch, and where its random numbers begin."""
    return (*tape.constants, *tape.states)


def _reason(run: "Run") -> str:
    """Why, as far as the log tells it."""
    reasons = next((e["refusals"] for e in reversed(run.events) if e.get("refusals")), {})
    because = max(reasons, key=reasons.__getitem__) if reasons else "it was cut off, or took no step"
    return f" ({because})"
