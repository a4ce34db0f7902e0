"""What is read of the steps of a run: cheap numbers, as often as the time allows."""

import math
from collections.abc import Iterable, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from unstuck.record._governor import PART, Clock
from unstuck.record._ranks import sharded
from unstuck.record._state import moved

UPDATE_EVERY = 10  # steps between two measurements of the update, at the least
CENSUS_EVERY = 200  # steps between two that are told tensor by tensor
LARGE = 1 << 14  # numbers of a tensor from which on only each 16th takes part in what needs copies
STRIDE = 16
FEW = 32  # numbers that are faster read one by one

COARSE = (torch.bfloat16, torch.float16)  # whose last digit is a large share of a number

Reading = float | Tensor  # a tensor is still on its device, (,) or (k,)


class Pulses:
    """The gradient's norm, and now and then the update, and what two gradients in a row have in common.

    One for each optimiser. `budget` is the share of the time that they may take.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, budget: float) -> None:
        self._optimizer = optimizer
        self._whole = not sharded(optimizer)  # else no rank knows a norm
        self._norms = Clock(PART * budget)
        self._updates = Clock(PART * budget, least=UPDATE_EVERY)
        self._step = 0  # that was last looked at
        self._seconds = 0.0  # of the update being measured
        self._census = False
        self._before: list[Tensor] = []  # the weights before the step, sampled
        self._slopes: list[Tensor] = []  # the gradients of the step before, sampled
        self._gradients: list[Tensor] = []  # their norms, tensor by tensor

    def before_step(self, step: int, pace: float) -> dict[str, Any]:
        """What the coming step begins with; a step takes `pace` seconds without us."""
        norm_due, update_due = self._norms.due(step), step <= 2 or self._updates.due(step)
        if not (norm_due or update_due or self._slopes) or not self._whole:
            return {}
        self._step = step
        with torch.no_grad():  # a gradient may have one itself
            return self._read(pace, norm_due=norm_due, update_due=update_due)

    def _read(self, pace: float, *, norm_due: bool, update_due: bool) -> dict[str, Any]:
        began = perf_counter()
        found: dict[str, Any] = {}
        weights = moved(self._optimizer)
        slopes = [p.grad for p in weights if p.grad is not None and not p.grad.is_sparse]
        if norm_due or update_due:
            self._gradients = norms(slopes)
            found["grad_norm"] = total(self._gradients)
            self._norms.took(self._step, perf_counter() - began, pace)
        if self._slopes:
            found["grad_cosine"] = _cosine(self._slopes, _sampled(slopes))
            self._slopes = []
        if update_due:
            began = perf_counter()
            self._census = self._step <= 2 or self._step % CENSUS_EVERY < self._updates.every
            self._before = [p.clone() for p in _sampled(weights)]
            self._slopes = [s.clone() for s in _sampled(slopes)]
            self._seconds = 2 * (perf_counter() - began)  # with the cosine of the next step
        return found

    @property
    def measures(self) -> bool:
        """Whether what the step does to the weights is being measured."""
        return bool(self._before)

    @property
    def compares(self) -> bool:
        """Whether the gradient waits to be compared with that of the next step."""
        return bool(self._slopes)

    def after_step(self, pace: float) -> dict[str, Any]:
        """What the step has done to the weights, where that is measured."""
        before, self._before = self._before, []
        began = perf_counter()
        weights = moved(self._optimizer)
        after = _sampled(weights)
        found: dict[str, Any] = {}
        if [a.shape for a in after] == [b.shape for b in before]:  # else the step has exchanged some
            shares = [len(b) / max(p.numel(), 1) for p, b in zip(weights, before, strict=True)]
            lengths, updates = norms(before), norms(torch._foreach_sub(after, before))
            found["weight_norm"] = total(lengths, shares)
            found["update_ratio"] = _ratio(total(updates, shares), found["weight_norm"])
            kept = _kept(weights, before, after)
            if kept is not None:
                found["unchanged"] = kept
            if self._census:
                found["tensors"] = {"weight": lengths, "gradient": self._gradients, "update": updates}
        self._updates.took(self._step, self._seconds + perf_counter() - began, pace)
        return found


def norms(parts: Sequence[Tensor]) -> list[Tensor]:
    """The norm of each tensor, 0-d."""
    return list(torch._foreach_norm(list(parts))) if parts else []


def total(parts: Sequence[Tensor], shares: Sequence[float] | None = None) -> Reading:
    """The norm of the whole from those of its parts, of which only shares may have been looked at."""
    if not parts:
        return 0.0
    factors = [1.0] * len(parts) if shares is None else [1 / s if s else 0.0 for s in shares]
    if len(parts) <= FEW and all(n.device.type == "cpu" for n in parts):
        return math.sqrt(sum(f * float(n) ** 2 for f, n in zip(factors, parts, strict=True)))
    squares = together(parts).square()
    if shares is not None:
        squares = squares * torch.tensor(factors, dtype=torch.float64).to(squares.device, non_blocking=True)
    whole = squares.sum().sqrt()
    return float(whole) if whole.device.type == "cpu" else whole


def together(parts: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as one in float64, on a device that is not the CPU if any is there; nobody waits for it."""
    device = next((p.device for p in parts if p.device.type != "cpu"), parts[0].device)
    return torch.stack([p if p.device == device else p.to(device, non_blocking=True) for p in parts]).double()


def summed(losses: Sequence[Reading]) -> Reading:
    """The sum of what backward() was called on; on a device that is not the CPU if any is there, to be read later."""
    if len(losses) == 1 and type(losses[0]) is float:
        return losses[0]
    if any(isinstance(x, Tensor) and not x.is_cpu for x in losses):
        parts = [torch.as_tensor(x) for x in losses]
        return parts[0] if len(parts) == 1 else together(parts).sum()
    return sum(map(float, losses))


def number(rate: Any) -> Any:
    """A rate as it stands now, for schedules write into a tensor: as a number, unless it lies on a device."""
    if isinstance(rate, Tensor):
        return float(rate) if rate.is_cpu else rate.detach().clone()
    return rate if rate is None else float(rate)


def on_devices(records: Sequence[dict[str, Any]]) -> set[torch.device]:
    """The devices, other than the CPU, that readings still lie on."""
    return {t.device for t in _tensors(records) if t.device.type != "cpu"}


def settled(records: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """The records with all their readings as numbers, read from each device at once."""
    found: dict[int, float] = {}
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in _tensors(records):
        by_device.setdefault(tensor.device, []).append(tensor)
    if not by_device:
        return records
    for tensors in by_device.values():
        flat = torch.stack([t.detach().reshape(()) for t in tensors]).double().tolist()
        found.update(zip(map(id, tensors), flat, strict=True))
    return [{name: _number(value, found) for name, value in record.items()} for record in records]


def _tensors(records: Iterable[Mapping[str, Any]]) -> Iterable[Tensor]:
    for record in records:
        for value in record.values():
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, dict):  # tensor by tensor
                for parts in value.values():
                    yield from parts


def _number(x: Any, found: Mapping[int, float]) -> Any:
    if isinstance(x, Tensor):
        return found[id(x)]
    if isinstance(x, dict):
        return {name: [found[id(part)] for part in parts] for name, parts in x.items()}
    return x


def _sampled(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor flat, of a large one each 16th number."""
    flat = [t.detach().reshape(-1) for t in tensors]
    return [f[::STRIDE] if len(f) > LARGE else f for f in flat]


def _kept(weights: Sequence[Tensor], before: Sequence[Tensor], after: Sequence[Tensor]) -> Reading | None:
    """The share of the numbers of coarse weights that have a gradient and that the step has left as they were."""
    stay: list[Tensor] = []
    count: list[Tensor] = []
    for p, was, now in zip(weights, before, after, strict=True):
        if p.dtype in COARSE and p.grad is not None and not p.grad.is_sparse:
            (slope,) = _sampled([p.grad])
            pulled = slope != 0
            stay.append(((was == now) & pulled).sum())
            count.append(pulled.sum())
    if not count:
        return None
    share = together(stay).sum() / together(count).sum().clamp_min(1)
    return float(share) if share.device.type == "cpu" else share


def _cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> Reading | None:
    if not a or [x.shape for x in a] != [x.shape for x in b]:
        return None
    products = [torch.vdot(x, y).real if x.is_complex() else torch.dot(x, y) for x, y in zip(a, b, strict=True)]
    both = together(products).sum()
    lengths = total(norms(a)) * total(norms(b))
    return _ratio(float(both) if both.device.type == "cpu" else both, lengths)


def _ratio(a: Reading, b: Reading) -> Reading:
    return a / b if isinstance(b, Tensor) or b else math.inf
