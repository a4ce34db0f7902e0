"""How the run moves: the trend of its loss, and what its own update does to the loss of recorded batches."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from unstuck.critical import Escape, escape
from unstuck.curvature import eigenpairs, hessian
from unstuck.diagnosis._case import Case, clipped, distinct, examples_in, rebuilt
from unstuck.diagnosis._findings import Evidence
from unstuck.diagnosis._structure import mean_loss
from unstuck.diagnosis._trial import STEPS
from unstuck.objective import Tape
from unstuck.record import State

CAP = 4.0**15  # the largest multiple of an update that is tried
WINDOW = 1 / 3  # of the run, at its end: the stretch over which the loss must have stopped falling
FURTHER = 20  # doublings of the way
ELSEWHERE = 32  # rows to look at elsewhere, where batches are smaller
BLOCKS = 12
BLOCKS_OF_ALL = 50  # stretches of a run by which a rise is told from a single bad batch
AT_CHANCE = 0.9  # of what guessing earns: a loss that has not left it
MOMENTS, APART = 5, 5  # at which the curvature is measured, and the steps between two of them


def trend(case: Case) -> Evidence | None:
    """The change of ln(loss) over the last third of the run: Theil–Sen over block means, with its middle 80 %.

    Of a short run the window is its last 60 steps: standing still for less than a trial takes tells nothing, for early
    on any loss is noisy and falls in bursts. ValueError where there are fewer steps, or a loss has no logarithm.
    """
    finite = [x for x in case.losses if math.isfinite(x)]
    window = finite[-max(int(len(finite) * WINDOW), STEPS) :]
    if len(window) < STEPS:
        raise ValueError(f"whether a loss stands still shows over {STEPS} steps, and this run has {len(window)}")
    if min(window) <= 0:
        raise ValueError("whether a loss stands still shows only where it is above 0")
    size = len(window) / BLOCKS
    blocks = [math.log(statistics.fmean(window[int(k * size) : int((k + 1) * size)])) for k in range(BLOCKS)]
    slopes = sorted((blocks[j] - blocks[i]) / (j - i) for i in range(BLOCKS) for j in range(i + 1, BLOCKS))
    low, middle, high = (slopes[int(q * (len(slopes) - 1))] * BLOCKS for q in (0.1, 0.5, 0.9))
    return Evidence("trend", middle, low, high, len(window), "change of ln(loss) over the last third of the run")


def waited(case: Case) -> Evidence | None:
    """For how many steps the loss stood at what guessing earns before it first fell; 0 where that is not known."""
    losses = [x for x in case.losses if math.isfinite(x)]
    if case.guess is None or not losses:
        return None
    width = max(len(losses) // BLOCKS_OF_ALL, 5)
    means = [statistics.fmean(losses[k : k + width]) for k in range(0, len(losses) - width + 1, width)]
    there = next((k for k, m in enumerate(means) if m < AT_CHANCE * case.guess), len(means))
    return Evidence.exact("steps at chance", there * width, "before the loss first fell", n=len(losses))


def level(case: Case) -> Evidence | None:
    """The recent loss against the loss of knowing nothing."""
    recent = [x for x in case.losses if math.isfinite(x)][-50:]
    if not recent or not case.chance > 0:
        return None
    shares = sorted(x / case.chance for x in recent)
    return Evidence(
        "loss over chance",
        statistics.fmean(shares),  # of batches of a few rows most may be answered rightly, and the rest badly
        shares[len(shares) // 10],
        shares[-1 - len(shares) // 10],
        len(recent),
        "1 is what guessing earns",
    )


def rise(case: Case) -> Evidence | None:
    """The worst loss against the one the run began with; infinite where it stopped being finite."""
    if case.losses and not math.isfinite(case.losses[0]):
        return Evidence.exact("rise of the loss", math.inf, "the loss was never a number", n=len(case.losses))
    if len(case.losses) < 2 or case.losses[0] <= 0:
        return None
    if not all(math.isfinite(x) for x in case.losses):
        return Evidence.exact("rise of the loss", math.inf, "the loss ceased to be a number", n=len(case.losses))
    width = max(len(case.losses) // BLOCKS_OF_ALL, 1)
    means = [statistics.fmean(case.losses[k : k + width]) for k in range(0, len(case.losses) - width + 1, width)]
    meaning = f"the worst mean of {width} losses over the first loss" if width > 1 else "the worst loss over the first"
    return Evidence.exact("rise of the loss", max(means) / case.losses[0], meaning, n=len(case.losses))


def risen(case: Case) -> Evidence | None:
    """The mean loss of the last quarter of the run over the lowest that it had been before, of twelfths."""
    finite = [x for x in case.losses if math.isfinite(x)]
    if len(finite) < STEPS:
        return None
    size = len(finite) / BLOCKS
    blocks = [statistics.fmean(finite[int(k * size) : int((k + 1) * size)]) for k in range(BLOCKS)]
    low = min(blocks[: -BLOCKS // 4])
    if low <= 0:
        return None
    meaning = "mean of the last quarter of the run over that of its best twelfth before"
    return Evidence.exact(
        "loss over its lowest", statistics.fmean(blocks[-BLOCKS // 4 :]) / low, meaning, n=len(finite)
    )


def update(
    state: State,
    tape: Tape,
    clip: float = math.inf,
    change: Callable[[torch.optim.Optimizer], object] = lambda optimizer: None,
) -> list[Tensor]:
    """What the run's optimiser, with its state and a change, would do to the weights, gradients clipped."""
    leaves = _leaves(state)
    optimizer = rebuilt(state, leaves)
    change(optimizer)
    tape.replay(leaves).backward()
    clipped(leaves, clip)
    optimizer.step()
    return [(a.detach() - b) for a, b in zip(leaves, state.weights, strict=True)]


def head_room(case: Case) -> Evidence | None:
    """The smallest multiple of the run's own update at which the loss of the same batch is no lower than before."""
    meaning = "multiple of the update at which its own batch's loss is back where it was"
    return _head_room(case, "head-room", meaning, lambda tapes, k: [tapes[k]])


def head_room_elsewhere(case: Case) -> Evidence | None:
    """The same on a batch that the update has not seen."""

    def others(tapes: Sequence[Tape], k: int) -> Sequence[Tape]:
        count = min(math.ceil(ELSEWHERE / examples_in(tapes[0])), len(tapes) - 1)
        return [tapes[(k + 2 + j) % len(tapes)] for j in range(max(count, 1))]

    return _head_room(case, "head-room elsewhere", "the same on another batch", others)


def _head_room(
    case: Case, name: str, meaning: str, judges: Callable[[Sequence[Tape], int], Sequence[Tape]]
) -> Evidence | None:
    state = case.state
    tapes = case.fixed
    if state is None or not tapes:
        return None
    found: list[float] = []
    for k, tape in enumerate(tapes[:5]):
        found.append(_crossing(state.weights, update(state, tape, case.clip), judges(tapes, k)))
    return Evidence(name, statistics.median(found), min(found), max(found), len(found), meaning)


def _crossing(weights: Sequence[Tensor], step: Sequence[Tensor], tapes: Sequence[Tape]) -> float:
    """By doubling, then bisection on the logarithm to 10 %; 0 where the smallest multiple already raises the loss."""

    def raised(multiple: float) -> bool:
        here = mean_loss([w + multiple * d for w, d in zip(weights, step, strict=True)], tapes)
        return not here <= base + rounding

    base = mean_loss(weights, tapes)
    rounding = 8 * abs(base) * torch.finfo(step[0].dtype).eps  # a tiny update's gain can be smaller than that
    low, high = 1 / 16, 1 / 16
    if raised(low):
        return 0.0
    while not raised(high):
        low, high = high, 4 * high
        if low >= CAP:
            return CAP
    while high / low > 1.1:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if raised(middle) else (middle, high)
    return math.sqrt(low * high)


def drift_gain(case: Case) -> Evidence | None:
    """The best relative decrease of the loss further along the way that the weights have come lately."""
    if case.memory is None or case.state is None:
        return None
    now = case.state
    earlier = [s for s in case.memory.states if s.step <= now.step - 20 and len(s.weights) == len(now.weights)]
    if not earlier:
        return None
    before = max(earlier, key=lambda s: s.step)
    way = [a - b for a, b in zip(now.weights, before.weights, strict=True)]
    base = mean_loss(now.weights, case.fixed)
    best = 0.0
    for k in range(FURTHER):
        loss = mean_loss([w + 2.0**k / 4 * d for w, d in zip(now.weights, way, strict=True)], case.fixed)
        if not math.isfinite(loss):
            break
        best = max(best, 1 - loss / base if base > 0 else 0.0)
    return Evidence.exact(
        "drift gain",
        best,
        "share of the loss that lies ahead on the way the weights have come",
        n=now.step - before.step,
    )


def curvature_times_rate(case: Case) -> Evidence | None:
    """λ₁ of the Hessian, preconditioned as the optimiser does, times the effective rate: 2 is the edge of stability.

    The median over a few moments: the run's own, and those of its next steps, for where the weights are thrown about
    the curvature of one moment can be a tenth of that of the next.
    """
    if case.state is None or case.state.optimizer is None or not case.fixed:
        return None
    moments = _onward(case, case.state)
    return _steepness("curvature × rate", [_curvature_times_rate(case, *moment) for moment in moments])


def curvature_at_the_start(case: Case) -> Evidence | None:
    """The same before the first step, where an adaptive optimiser has no preconditioner yet."""
    state = case.start
    if state is None or state.optimizer is None or not case.fixed:
        return None
    weights = _leaves(state)
    return _steepness("curvature × rate at the start", [_curvature_times_rate(case, weights, rebuilt(state, weights))])


def _steepness(name: str, found: Sequence[tuple[float, float] | None]) -> Evidence | None:
    known = [f for f in found if f is not None]
    if not known:
        return None
    low, high = min(value - error for value, error in known), max(value + error for value, error in known)
    middle = statistics.median(value for value, _ in known)
    return Evidence(name, middle, low, high, len(known), "λ₁η: above 2 a step overshoots and climbs")


def _onward(case: Case, state: State) -> Iterator[tuple[list[Tensor], torch.optim.Optimizer]]:
    """A copy of the run now, and after some of its next steps, which repeat recorded batches; while it stays finite."""
    weights = _leaves(state)
    optimizer = rebuilt(state, weights)
    for k in range(APART * (MOMENTS - 1) + 1):
        if k % APART == 0:
            yield weights, optimizer
        optimizer.zero_grad()
        loss = case.tapes[k % len(case.tapes)].replay(weights)
        if not bool(loss.isfinite()):
            return
        loss.backward()
        clipped(weights, case.clip)
        optimizer.step()


def _leaves(state: State) -> list[Tensor]:
    return [w.detach().clone().requires_grad_(w.is_floating_point()) for w in state.weights]


def _curvature_times_rate(
    case: Case, weights: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> tuple[float, float] | None:
    """λ₁η with its error bar at one moment; None where the optimiser's rates cannot be read."""
    objective = case.objective(case.fixed, [w.detach() for w in weights])
    used = sorted({k for t in case.fixed for k in t.program.reads()})
    rates = [_rates(optimizer, weights[k]) for k in used]
    known = [r for r in rates if r is not None]
    if len(known) < len(rates):
        return None
    each = (r.flatten().expand(weights[k].numel()) for r, k in zip(known, used, strict=True))
    root = torch.cat([r.to(objective.device) for r in each]).sqrt().to(objective.dtype)
    H = hessian(objective)
    A = replace(H, matvec=lambda v: root * (H @ (root * v)))
    pairs = eigenpairs(A, largest=1, smallest=1, tol=0.05, max_products=40, generator=torch.Generator().manual_seed(0))
    return float(pairs.values.max()), float(pairs.errors[pairs.values.argmax()])


def _rates(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor | None:
    """The effective rate of a parameter's entries: η, over 1 − β with momentum, over √v̂ + ε with Adam and its kin.

    None where the optimiser keeps what we cannot read a rate from.
    """
    group = next((g for g in optimizer.param_groups if any(p is parameter for p in g["params"])), None)
    if group is None:
        return torch.zeros(1)
    rate = float(group.get("lr", 0.0))
    rate /= 1 - float(group.get("momentum", 0.0) or 0.0)
    kept = optimizer.state.get(parameter, {})
    if "exp_avg_sq" in kept and "betas" in group:  # Adam, AdamW, NAdam, RAdam
        moment = kept.get("max_exp_avg_sq", kept["exp_avg_sq"])
        return rate / ((moment / (1 - group["betas"][1] ** float(kept.get("step", 1)))).sqrt() + group["eps"])
    if set(kept) <= {"step", "square_avg", "momentum_buffer", "grad_avg"} and "square_avg" in kept:  # RMSprop
        moment = kept["square_avg"] - kept["grad_avg"] ** 2 if "grad_avg" in kept else kept["square_avg"]
        return rate / (moment.sqrt() + group["eps"])
    if set(kept) <= {"step", "sum"} and "sum" in kept:  # Adagrad
        return rate / (1 + (float(kept["step"]) - 1) * group["lr_decay"]) / (kept["sum"].sqrt() + group["eps"])
    return torch.full((1,), rate, dtype=torch.float64) if set(kept) <= {"step", "momentum_buffer"} else None


def under_epsilon(case: Case) -> Evidence | None:
    """The share of numbers whose root mean square gradient, as Adam and its kin keep it, is below their ε."""
    if case.state is None or case.state.optimizer is None:
        return None
    optimizer, below, count = case.state.optimizer, 0, 0
    for group, members in zip(optimizer.groups, optimizer.members, strict=True):
        for k in members:
            kept = optimizer.state.get(k, {})
            moment = kept.get("max_exp_avg_sq", kept.get("exp_avg_sq", kept.get("square_avg")))
            if moment is not None and "eps" in group:
                correction = 1 - group["betas"][1] ** float(kept.get("step", 1)) if "betas" in group else 1.0
                below += int(((moment / correction).sqrt() < group["eps"]).sum())
                count += moment.numel()
    if not count:
        return Evidence.exact("under ε", 0.0, "share of the numbers whose rms gradient is below ε (there is none)")
    meaning = "share of the numbers whose rms gradient is below ε, so that the step is no longer scaled by it"
    return Evidence.exact("under ε", below / count, meaning, n=count)


def repeats_one_batch(case: Case) -> bool:
    return len(case.tapes) > 1 and len(distinct(case.tapes)) == 1


def different_batches(case: Case) -> Evidence | None:
    if len(case.tapes) < 2:
        return None
    return Evidence.exact("different batches", len(distinct(case.tapes)), "among the recorded steps", n=len(case.tapes))


def way_out(case: Case) -> tuple[Escape, Tensor] | None:
    """The line search along the most negative curvature, and the step that it found best."""
    if case.state is None or not case.fixed:
        return None
    objective = case.objective(case.fixed, case.state.weights)
    try:
        found = escape(objective, tol=0.05, max_products=60, generator=torch.Generator().manual_seed(0))
    except ValueError:
        return None
    return found, found.point - objective.point


def escape_gain(case: Case) -> Evidence | None:
    """By how much the loss falls along the most negative curvature: the smaller of the two sides."""
    found = case.once(way_out)
    if found is None or found[0].loss <= 0:
        return None
    gains = sorted(1 - loss / found[0].loss for loss in found[0].losses)
    meaning = "share of the loss gained along ± the most negative curvature, the smaller side"
    return Evidence("escape gain", gains[0], gains[0], gains[1], len(case.fixed), meaning)
