"""Whether rows of two kinds that a squared error leaves mixed are told apart by the same network under another loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from unstuck.diagnosis._case import Case, comparison, distinct
from unstuck.diagnosis._findings import Evidence
from unstuck.diagnosis._held_out import trained_on
from unstuck.diagnosis._remedies import without_dropout
from unstuck.diagnosis._wires import losses, wires
from unstuck.objective import Constant, Tape

STEPS, RATES = 150, (0.1, 0.01)  # of Adam, for each of the two losses

Loss = Callable[[Tensor, Tensor], Tensor]  # of outputs and of 1 or -1 for the kind of each row


@dataclass(frozen=True)
class Kinds:
    """The two targets, as their middle and half of their distance."""

    middle: float
    half: float

    def of(self, y: Tensor) -> Tensor:
        """1 or -1."""
        return (y.detach().flatten().double() - self.middle).sign()

    def beside(self, outputs: Tensor) -> Tensor:
        """Outputs on the scale of the kinds."""
        return (outputs.flatten().double() - self.middle) / self.half


def kinds(case: Case) -> Kinds | None:
    """The two targets of a squared error, the only loss; None where there are more, or one in a batch."""
    w = case.once(wires)[0] if case.tapes else None
    found = None if w is None else comparison(w.program)
    if w is None or found is None or found.call.name != "mse_loss" or len(list(losses(w))) != 1:
        return None
    known = case.once(trained_on)
    if known is None or known.outputs.numel() != len(known.outputs):
        return None
    values = known.targets.double().unique()
    if len(values) != 2 or any(len(_targets(t).unique()) < 2 for t in w.recent):
        return None  # a batch of one kind is a game's: what is right for it changes from call to call
    low, high = values.tolist()
    return Kinds((low + high) / 2, (high - low) / 2)


def _targets(tape: Tape) -> Tensor:
    end = comparison(tape.program)
    at = None if end is None or end.targets is None else end.call.args[end.targets]
    return tape.constants[at.at] if type(at) is Constant else torch.zeros(1)


def wrong_side(case: Case) -> Evidence:
    two = case.once(kinds)
    known = None if two is None else case.once(trained_on)
    if known is None or two is None:
        return Evidence.exact("rows on the wrong side", 0.0, "of two targets of a squared error (there are none)")
    share = float((two.beside(known.outputs).sign() != two.of(known.targets)).double().mean())
    return Evidence.exact(
        "rows on the wrong side", share, "of the middle between their two targets", n=len(known.targets)
    )


def under_logistic(case: Case) -> Evidence | None:
    return _after(case, "on the wrong side under a logistic loss", lambda o, kind: F.softplus(-o * kind).mean())


def under_squared(case: Case) -> Evidence | None:
    return _after(case, "on the wrong side under its own loss", lambda o, kind: (o - kind).square().mean())


def _after(case: Case, name: str, loss: Loss) -> Evidence | None:
    """The least share on the wrong side after some steps of Adam with a loss, from where the run stands."""
    two = case.once(kinds)
    if two is None or case.state is None:
        return None
    program = case.once(wires)[0].program
    tapes = [without_dropout(t) for t in distinct(case.tapes) if t.program is program]
    share = min(_trained(case.state.weights, tapes, two, loss, rate) for rate in RATES)
    return Evidence.exact(name, share, f"share of the rows, trained on for {STEPS} steps", n=len(tapes))


def _trained(start: Sequence[Tensor], tapes: Sequence[Tape], two: Kinds, loss: Loss, rate: float) -> float:
    weights = [w.detach().clone().requires_grad_(w.is_floating_point()) for w in start]
    optimizer = torch.optim.Adam([weights[k] for k in sorted(tapes[0].program.reads())], lr=rate)
    for k in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, 3 * (STEPS - k) / STEPS)
        optimizer.zero_grad()
        loss(*_answered(tapes[k % len(tapes)], weights, two)).backward()
        optimizer.step()
    with torch.no_grad():
        pairs = [_answered(t, weights, two) for t in tapes[-30:]]
    return float(torch.cat([o.sign() != kind for o, kind in pairs]).double().mean())


def _answered(tape: Tape, weights: Sequence[Tensor], two: Kinds) -> tuple[Tensor, Tensor]:
    """The outputs of a step, on the scale of the kinds, and the kinds."""
    end = comparison(tape.program)
    seen: list[tuple[Tensor, Tensor]] = []
    if end is None or end.targets is None:
        raise ValueError("where the outputs are compared with the targets is not known")

    def look(call: object, args: Sequence[Tensor], _: object) -> None:
        if call is end.call and end.targets is not None:
            seen.append((two.beside(args[end.outputs]), two.of(args[end.targets])))

    tape.replay(weights, observe=look)
    return seen[0]
