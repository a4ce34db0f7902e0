"""What the activations and gradients look like at the present weights: one replay of a few tapes answers all of it."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unstuck.diagnosis._case import Case, Comparison, comparison
from unstuck.diagnosis._findings import Evidence
from unstuck.objective import Instruction, Program, Slot, Tape, tensors

FLAT = 0.1  # of the largest slope of a tanh or sigmoid: where a gradient hardly passes
DEPENDS = 0.002  # the least share of the outputs' variance that inputs must account for
RECTIFIERS = frozenset(("relu", "relu_", "relu6", "clamp_min", "threshold"))
SIGMOIDS = {"tanh": 1.0, "tanh_": 1.0, "sigmoid": 0.25, "sigmoid_": 0.25}  # the largest derivative


@dataclass
class Census:
    """Sums over the examples of a few tapes; a unit is the second axis of an activation, or its last."""

    outputs: list[Tensor] = field(default_factory=list)  # (examples, classes)
    targets: list[Tensor] = field(default_factory=list)
    fired: dict[int, Tensor] = field(default_factory=dict)  # by call: whether each unit was ever above 0
    saturated: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    flat: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    scales: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))  # rms before an activation


def take_census(case: Case) -> Census:
    """One replay of the fixed tapes, watched."""
    return Census() if case.state is None else census(case.state.weights, case.fixed)


def census(weights: Sequence[Tensor], tapes: Sequence[Tape]) -> Census:
    """What one replay of some tapes shows at these weights."""
    taken = Census()
    for tape in tapes:
        place = {id(c): k for k, c in enumerate(tape.program.instructions)}
        end = comparison(tape.program)

        def look(
            call: Instruction, args: Any, result: Any, *, place: dict[int, int] = place, end: Comparison | None = end
        ) -> None:
            if end is not None and call is end.call:
                _take_outputs(taken, args[end.outputs], None if end.targets is None else args[end.targets])
            if call.name in RECTIFIERS or call.name in SIGMOIDS:
                _take_activation(taken, place[id(call)], call.name, tensors(args)[0], tensors(result)[0])

        with torch.no_grad():
            tape.replay(weights, observe=look)
    return taken


def _take_outputs(taken: Census, outputs: Any, targets: Any) -> None:
    if isinstance(outputs, Tensor) and outputs.dim() >= 1:
        width = outputs.shape[-1] if outputs.dim() > 1 else 1
        taken.outputs.append(outputs.detach().double().reshape(-1, width))
    if isinstance(targets, Tensor) and targets.is_floating_point():
        taken.targets.append(targets.detach().double().flatten())


def _take_activation(taken: Census, place: int, name: str, before: Tensor, after: Tensor) -> None:
    if name.endswith("_"):
        before = after  # written over: what is left still tells dead from alive
    if after.dim() < 2:
        return
    units = 1 if after.dim() == 4 else after.dim() - 1
    by_unit = after.detach().movedim(units, 0).flatten(1)
    if name in RECTIFIERS:
        fired = (by_unit > 0).any(1)
        taken.fired[place] = taken.fired[place] | fired if place in taken.fired else fired
    else:
        slope = 1 - by_unit**2 if name.startswith("tanh") else by_unit * (1 - by_unit)
        taken.saturated[place].append(float((slope < 0.01 * SIGMOIDS[name]).double().mean()))
        taken.flat[place].append(float((slope < FLAT * SIGMOIDS[name]).double().mean()))
    taken.scales[place].append(float(before.detach().double().square().mean().sqrt()))


def input_dependence(case: Case) -> Evidence | None:
    outputs = case.once(take_census).outputs
    if not outputs or sum(len(o) for o in outputs) < 8:
        return None
    o = torch.cat(outputs)
    if not bool(o.isfinite().all()):
        return None
    across = float(o.var(0, correction=0).mean())
    whole = float((o - o.mean()).square().mean())
    if o.shape[1] == 1:  # one output: its spread against that of the targets
        targets = case.once(take_census).targets
        whole = float(torch.cat(targets).var(correction=0)) if targets else whole
        if whole == 0 and targets:
            return None  # as in one half of a GAN's loss: the targets ask for no dependence
    share = 0.0 if across < 1e-12 or whole == 0 else min(across / whole, 1.0)
    return Evidence.exact(
        "input dependence", share, "share of the outputs' variance that comes from the inputs", n=len(o)
    )


def dead_share(case: Case) -> Evidence | None:
    fired = case.once(take_census).fired
    if not fired:
        return Evidence.exact("dead units", 0.0, "share of a ReLU layer's units that never fire (there is no ReLU)")
    worst = max(float((~f).double().mean()) for f in fired.values())
    return Evidence.exact(
        "dead units", worst, "share of a layer's units that are zero for every input", n=_examples(case)
    )


def dead_signal(case: Case) -> Evidence | None:
    """Units that never fire may be dead, or sit at the origin of a network whose weights are nearly zero."""
    taken = case.once(take_census)
    dead = {k: float((~f).double().mean()) for k, f in taken.fired.items()}
    if not dead or max(dead.values()) < 0.9:
        return None
    scales = [sum(taken.scales[k]) / len(taken.scales[k]) for k, share in dead.items() if share >= 0.9]
    return Evidence.exact("signal into the dead layer", max(scales), "rms of what enters it", n=_examples(case))


def saturation(case: Case) -> Evidence | None:
    shares = [sum(s) / len(s) for s in case.once(take_census).saturated.values()]
    if not shares:
        return Evidence.exact(
            "saturation", 0.0, "share of activations on the flat part of a tanh or sigmoid (none here)"
        )
    return Evidence.exact(
        "saturation", max(shares), "share of activations on the flat part of a tanh or sigmoid", n=_examples(case)
    )


def flatness(case: Case) -> Evidence | None:
    shares = [sum(s) / len(s) for s in case.once(take_census).flat.values()]
    meaning = f"share of activations whose slope is below {FLAT:g} of the largest there is"
    return Evidence.exact("flat activations", max(shares, default=0.0), meaning, n=_examples(case))


def at_rest(case: Case) -> Evidence | None:
    """Dead units, or in a network that is blind saturated ones: elsewhere a saturated output may just be sure."""
    shares = [case["dead units"]]
    dependence = case["input dependence"]
    if dependence is not None and dependence.value < DEPENDS:
        shares.append(case["saturation"])
    worst = max((s.value for s in shares if s is not None), default=0.0)
    return Evidence.exact(
        "units at rest", worst, "share of a layer's units, dead or saturated, that pass no gradient", n=_examples(case)
    )


def smallest_scale(case: Case) -> Evidence | None:
    scales = [sum(s) / len(s) for s in case.once(take_census).scales.values()]
    if not scales:
        return None
    return Evidence.exact(
        "smallest signal", min(scales), "rms of what enters the weakest activation", n=_examples(case)
    )


def _examples(case: Case) -> int:
    return sum(len(o) for o in case.once(take_census).outputs)


def gradients(case: Case) -> tuple[tuple[int, ...], tuple[Tensor, ...], float] | None:
    """The mean gradient of the fixed tapes: which parameters, their gradients, the mean loss."""
    return None if case.state is None or not case.fixed else _slopes(case, case.state.weights)


def gradients_at_start(case: Case) -> tuple[tuple[int, ...], tuple[Tensor, ...], float] | None:
    """The same at the first weights."""
    return None if case.start is None or case.start.step or not case.fixed else _slopes(case, case.start.weights)


def _slopes(case: Case, weights: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[Tensor, ...], float]:
    used = sorted({k for t in case.fixed for k in t.program.reads()})
    values = [w.clone().requires_grad_(w.is_floating_point()) for w in weights]
    total, loss = [torch.zeros_like(values[k]) for k in used], 0.0
    for tape in case.fixed:
        here = tape.replay(values)
        found = torch.autograd.grad(here, [values[k] for k in used], allow_unused=True, materialize_grads=True)
        total = [a + b / len(case.fixed) for a, b in zip(total, found, strict=True)]
        loss += float(here.detach()) / len(case.fixed)
    return tuple(used), tuple(g.detach() for g in total), loss


def relative_gradient(case: Case) -> Evidence | None:
    """‖g‖‖w‖/L over weight matrices: the bias of the output carries mini-batch noise whatever the network does."""
    found = case.once(gradients)
    if found is None or case.state is None:
        return None
    used, gs, loss = found
    matrices = [(case.state.weights[k], g) for k, g in zip(used, gs, strict=True) if g.dim() > 1] or [
        (case.state.weights[k], g) for k, g in zip(used, gs, strict=True)
    ]
    w = math.sqrt(sum(float(x.double().square().sum()) for x, _ in matrices))
    g = math.sqrt(sum(float(x.double().square().sum()) for _, x in matrices))
    if not math.isfinite(g * w) or loss == 0:
        return None
    return Evidence.exact(
        "relative gradient", g * w / abs(loss), "‖g‖‖w‖/L, near 0 at a critical point", n=len(case.fixed)
    )


def zero_gradients(case: Case) -> Evidence | None:
    found = case.once(gradients)
    if found is None:
        return None
    zero = [not bool(g.any()) for g in found[1]]
    return Evidence.exact(
        "zero gradients", sum(zero) / len(zero), "share of parameters whose gradient is exactly 0", n=len(zero)
    )


def zero_at_start(case: Case) -> Evidence | None:
    if case.start is None or case.start.step:
        return None
    matrices = [w for w in case.start.weights if w.dim() > 1]
    if not matrices:
        return None
    zero = sum(not bool(w.any()) for w in matrices) / len(matrices)
    return Evidence.exact(
        "zero weights at the start", zero, "share of weight matrices that were all zero", n=len(matrices)
    )


def growth(case: Case) -> Evidence | None:
    if case.start is None or case.state is None or case.start.step or case.state is case.start:
        return None
    norms = [math.sqrt(sum(float(w.double().square().sum()) for w in s.weights)) for s in (case.start, case.state)]
    ratio = norms[1] / norms[0] if norms[0] else math.inf
    return Evidence.exact("growth of the weights", ratio, "‖w‖ now over ‖w‖ at the start")


def layers_feeding(program: Program, place: int) -> list[int]:
    """The parameters of the nearest calls before an activation that have any: its layer, and a norm in between."""
    producer = {slot: k for k, c in enumerate(program.instructions) for slot in c.made()}
    found: list[int] = []
    frontier = list(program.instructions[place].slots())
    while frontier:
        slot = frontier.pop()
        if slot < program.parameters or slot not in producer:
            continue
        call = program.instructions[producer[slot]]
        own = [s for s in call.slots() if s < program.parameters]
        found += own
        if not own or call.name in ("batch_norm", "layer_norm", "group_norm"):
            frontier += [a.at for a in call.args if type(a) is Slot]
    return list(dict.fromkeys(found))


def dead_layers(case: Case, program: Program) -> list[int]:
    """Parameters of the layers whose units are nearly all dead."""
    fired = case.once(take_census).fired
    places = [k for k, f in fired.items() if float((~f).double().mean()) > 0.9 and k < len(program.instructions)]
    return list(dict.fromkeys(k for place in places for k in layers_feeding(program, place)))


def dead_rows(case: Case) -> dict[int, Tensor]:
    """Which units of a layer never fire, by the parameters that make them."""
    program, taken = case.fixed[-1].program, case.once(take_census)
    found: dict[int, Tensor] = {}
    for place, fired in taken.fired.items():
        for k in layers_feeding(program, place) if place < len(program.instructions) else ():
            if case.state is not None and case.state.weights[k].shape[:1] == fired.shape:
                found[k] = ~fired
    return found


def saturated_layers(case: Case, program: Program) -> list[int]:
    """Parameters of the layers most of whose activations are flat."""
    shares = case.once(take_census).flat
    places = [k for k, s in shares.items() if sum(s) / len(s) > 0.5 and k < len(program.instructions)]
    return list(dict.fromkeys(k for place in places for k in layers_feeding(program, place)))


def first_gradient(case: Case) -> Evidence | None:
    """The root mean square gradient of the first weight matrix over that of the last one, in the order of their use."""
    return _first_over_last(case, "gradient of the first layer", case.once(gradients))


def first_gradient_at_start(case: Case) -> Evidence | None:
    """The same at the first weights."""
    return _first_over_last(case, "gradient of the first layer at the start", case.once(gradients_at_start))


def _first_over_last(
    case: Case, name: str, found: tuple[tuple[int, ...], tuple[Tensor, ...], float] | None
) -> Evidence | None:
    if found is None or not case.fixed:
        return None
    slopes = dict(zip(found[0], found[1], strict=True))
    order = dict.fromkeys(k for call in case.fixed[-1].program.instructions for k in call.slots() if k in slopes)
    sizes = [float(slopes[k].double().square().mean().sqrt()) for k in order if slopes[k].dim() > 1]
    if len(sizes) < 2 or not sizes[-1]:
        return None
    meaning = "rms gradient of the first weight matrix over that of the last"
    return Evidence.exact(name, sizes[0] / sizes[-1], meaning, n=len(case.fixed))


def squashing(program: Program) -> list[int]:
    """The calls of tanh or sigmoid that a later layer follows."""
    layers = [k for k, c in enumerate(program.instructions) if any(s < program.parameters for s in c.slots())]
    last = max(layers, default=0)
    return [k for k, c in enumerate(program.instructions) if c.name in SIGMOIDS and k < last]


def squashing_layers(case: Case) -> Evidence | None:
    if not case.fixed:
        return None
    count = len(squashing(case.fixed[-1].program))
    return Evidence.exact("squashing layers", count, "calls of tanh or sigmoid between the layers")


def mean_loss(weights: Sequence[Tensor], tapes: Sequence[Tape]) -> float:
    with torch.no_grad():
        return sum(float(t.replay(weights)) for t in tapes) / len(tapes)
