"""How a run began: the loss, the signals, the symmetry and the inputs before the first step."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from unstuck.diagnosis._case import Case
from unstuck.diagnosis._findings import Evidence
from unstuck.diagnosis._steering import batches
from unstuck.diagnosis._structure import Census, census, mean_loss
from unstuck.diagnosis._wires import exchanged, wires
from unstuck.objective import Tape

LARGE, FAR = 10.0, 3.0  # rms of the inputs, and their mean in spreads of a column, from which on they are not scaled


def census_at_start(case: Case) -> Census:
    """What the recorded batches show at the first weights."""
    return Census() if case.start is None or case.start.step else census(case.start.weights, case.fixed)


def level_at_start(case: Case) -> Evidence | None:
    """The loss of the first weights over that of guessing."""
    if case.start is None or case.start.step or not case.fixed:
        return None
    if case.guess is None or not case.guess > 0:
        raise ValueError("what guessing earns is not known of its loss")
    loss = mean_loss(case.start.weights, case.fixed)
    return Evidence.exact("loss at the start", loss / case.guess, "over what guessing earns", n=len(case.fixed))


def signal_at_start(case: Case) -> Evidence | None:
    """The largest root mean square of what enters an activation, or leaves the network, at the first weights."""
    taken = case.once(census_at_start)
    scales = [sum(s) / len(s) for s in taken.scales.values()]
    scales += [math.sqrt(float(torch.cat(taken.outputs).square().mean()))] if taken.outputs else []
    if not scales:
        return None
    return Evidence.exact("signal at the start", max(scales), "largest rms of what enters an activation or the loss")


def saturation_at_start(case: Case) -> Evidence | None:
    shares = [sum(s) / len(s) for s in case.once(census_at_start).saturated.values()]
    return Evidence.exact(
        "saturation at the start",
        max(shares, default=0.0),
        "share of activations on the flat part of a tanh or sigmoid",
    )


def offset_at_start(case: Case) -> Evidence | None:
    """The share of the outputs' size that no input changes."""
    outputs = case.once(census_at_start).outputs
    if not outputs:
        return None
    o = torch.cat(outputs)
    if o.shape[1] > 1:
        o = o - o.mean(1, keepdim=True)
    whole = float(o.square().mean())
    return Evidence.exact(
        "constant part of the outputs",
        float(o.mean(0).square().mean()) / whole if whole else 0.0,
        "share of their size that no input changes",
        n=len(o),
    )


def equal_rows(w: Tensor) -> float:
    """The share of the units of a layer whose weights equal another's; such as are all zero do not count."""
    rows = w.detach().flatten(1)
    alive = rows[rows.any(1)]
    if len(alive) < 2:
        return 0.0
    _, counts = alive.unique(dim=0, return_counts=True)
    return float(counts[counts > 1].sum()) / len(rows)


def smallest_at_start(case: Case) -> Evidence | None:
    scales = [sum(s) / len(s) for s in case.once(census_at_start).scales.values()]
    if not scales:
        return None
    return Evidence.exact("smallest signal at the start", min(scales), "rms of what enters the weakest activation")


def first_gain(case: Case) -> Evidence | None:
    """How many times its inputs the first layer makes them at the first weights."""
    scales, size = case.once(census_at_start).scales, case["size of the inputs"]
    if not scales or size is None or not size.value:
        return None
    first = scales[min(scales)]
    return Evidence.exact(
        "gain of the first layer", sum(first) / len(first) / size.value, "rms that leaves it over rms of the inputs"
    )


def outputs_at_start(case: Case) -> Evidence | None:
    """The size of the outputs, over that of the targets where these are numbers, at the first weights."""
    taken = case.once(census_at_start)
    if not taken.outputs:
        return None
    size = math.sqrt(float(torch.cat(taken.outputs).square().mean()))
    aims = math.sqrt(float(torch.cat(taken.targets).square().mean())) if taken.targets else 1.0
    return Evidence.exact(
        "size of the outputs at the start", size / aims if aims else math.inf, "over that of the targets"
    )


def input_numbers(case: Case) -> dict[int, Tensor]:
    """The inputs that are numbers with a point, by constant, each as (examples, columns); images by their channels."""
    if not case.tapes:
        return {}
    found = batches(case.once(wires)[0])
    if found is None:
        return {}
    _, shares, places, _ = found
    return {k: _columns(torch.cat([c[k] for c in shares])) for k in places if shares[0][k].is_floating_point()}


def _columns(x: Tensor) -> Tensor:
    x = x.double()
    if x.dim() == 1:
        return x[:, None]
    return (x.movedim(1, -1) if x.dim() == 4 else x).flatten(0, -2)


def standardised(case: Case) -> Callable[[Tape], Tape]:
    """Changes a recorded step of the usual program to one whose inputs have mean 0 and spread 1, column by column."""
    program = case.once(wires)[0].program
    known = {k: (x.mean(0), x.std(0)) for k, x in case.once(input_numbers).items()}

    def scaled(x: Tensor, k: int) -> Tensor:
        mean, std = known[k]
        shape = (1, -1, 1, 1) if x.dim() == 4 else (-1,)
        mean, std = (v.to(x).view(shape) if x.dim() > 1 else v.to(x) for v in (mean, std.clamp_min(1e-12)))
        return torch.where(std > 1e-9, (x - mean) / std, 0.0).to(x.dtype)

    return exchanged(program, known, scaled)


def input_scale(case: Case) -> Evidence | None:
    parts = _parts(case)
    size = max((float(x.square().mean(1).sqrt().median()) for x in parts), default=0.0)
    return Evidence.exact("size of the inputs", size, "rms of the median row", n=len(parts[0]) if parts else 0)


def input_offset(case: Case) -> Evidence | None:
    far = 0.0
    for x in _parts(case):
        std, mean = x.std(0), x.mean(0).abs()
        live = std > 1e-6 * mean.clamp_min(1e-30)
        if bool(live.any()):
            far = max(far, float((mean[live] / std[live]).median()))
    return Evidence.exact("offset of the inputs", far, "mean over spread of a column, the median one")


def input_spread(case: Case) -> Evidence | None:
    wide = 1.0
    for x in _parts(case):
        live = x.std(0)[x.std(0) > 0]
        if len(live) > 1:
            wide = max(wide, float(live.quantile(0.9) / live.quantile(0.1)))
    return Evidence.exact("spread of the inputs", wide, "spread of a wide column over that of a narrow one")


def _parts(case: Case) -> list[Tensor]:
    """The inputs that are numbers, none where they are classes or tokens; ValueError where inputs cannot be told."""
    if not case.tapes or batches(case.once(wires)[0]) is None:
        raise ValueError("what its inputs are cannot be told from its recorded steps")
    return list(case.once(input_numbers).values())


def unscaled(case: Case) -> Evidence | None:
    """1 and more where the inputs are larger, or further from 0, than a usual initialisation allows for."""
    size, offset = case["size of the inputs"], case["offset of the inputs"]
    if size is None:
        return None
    far = max(size.value / LARGE, 0.0 if offset is None else offset.value / FAR)
    return Evidence.exact("scale of the inputs", far, f"rms over {LARGE:g}, or mean over {FAR:g} spreads")
