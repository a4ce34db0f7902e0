"""The batches of a model as terms: its weights are replaced, its modes, buffers and random masks are fixed."""

import contextlib
import itertools
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from unstuck.objective._kernels import native
from unstuck.objective._term import WRITTEN_BATCH, Term


def examples(batch: Any) -> int:
    """The length of the first tensor in a batch: how many examples it holds."""
    for tensor in _tensors(batch):
        if tensor.ndim > 0:
            return len(tensor)
    raise ValueError(
        f"the number of examples is read off the first tensor of a batch, got {type(batch).__name__} without one: "
        "pass weight=, a function from the batch to that number"
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without what spreads or compiles it: wrappers that have no second derivatives and no other weights."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # of torch.compile
            model = inner
        else:
            return model


def batch_terms(
    model: nn.Module, loss: Callable[[Any, Any], Tensor], batches: Iterable[Any], weight: Callable[[Any], float]
) -> Iterator[Term]:
    """The mean loss of each batch as a function of the trainable parameters."""
    evaluated = _Evaluated(model, loss)
    names = tuple(f"model.{name}" for name, p in model.named_parameters() if p.requires_grad)
    constants = {f"model.{name}": p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    buffers = {name: b.detach().clone() for name, b in evaluated.named_buffers()}
    modes = {module: module.training for module in model.modules()}
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    mixing = any(module.training and isinstance(module, _BatchNorm | _DropoutNd) for module in modes)

    def term(batch: Any, seed: int) -> Term:
        versions = [(t, t._version) for t in _tensors(batch) if not t.is_inference()]

        def at(values: Sequence[Tensor]) -> Tensor:
            if any(t._version != version for t, version in versions):
                raise ValueError(WRITTEN_BATCH)
            own = {name: b.clone() for name, b in buffers.items()}  # train-mode layers write into them
            state = {**constants, **own, **dict(zip(names, values, strict=True))}
            with _evaluation(modes, seed, devices):
                return functional_call(evaluated, state, (batch,))

        def parts(count: int) -> list[Term]:
            return [term(part, seed) for part in split(batch, count)]

        return Term(at, float(weight(batch)), None if mixing else parts)

    with _apart(devices):  # a shuffling loader draws from a global generator, and an augmentation from any
        kept = list(batches)
        seeds = torch.randint(2**62, (len(kept),)).tolist()
    return (term(batch, seed) for batch, seed in zip(kept, seeds, strict=True))


def split(batch: Any, count: int) -> list[Any]:
    """The batch in at most `count` parts of nearly equal length; as it is, where its tensors differ in length."""
    lengths = {len(tensor) for tensor in _tensors(batch) if tensor.ndim > 0}
    if len(lengths) != 1 or not _divisible(batch):
        return [batch]
    length = lengths.pop()
    ends = [length * k // count for k in range(count + 1)]
    return [_rows(batch, a, b) for a, b in itertools.pairwise(ends) if a < b]


def _divisible(batch: Any) -> bool:
    """Whether a batch is nothing but tensors in plain containers."""
    if type(batch) is dict:
        return all(map(_divisible, batch.values()))
    if type(batch) in (list, tuple) or hasattr(batch, "_fields"):
        return all(map(_divisible, batch))
    return batch is None or (isinstance(batch, Tensor) and batch.layout == torch.strided)


def _rows(batch: Any, start: int, stop: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[start:stop] if batch.ndim > 0 else batch
    if isinstance(batch, dict):
        return {key: _rows(part, start, stop) for key, part in batch.items()}
    if hasattr(batch, "_fields"):
        return type(batch)(*(_rows(part, start, stop) for part in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_rows(part, start, stop) for part in batch)
    return batch


class _Evaluated(nn.Module):
    """The loss as a module, for `functional_call` to put other weights under the whole of it."""

    def __init__(self, model: nn.Module, loss: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)


class _TwiceDifferentiable(TorchFunctionMode):
    """Calls whose gradient torch differentiates not at all, wrongly or slowly are computed in another, equal way."""

    def __init__(self) -> None:
        super().__init__()
        self.latest: _Layer | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch._weight_norm:  # noqa: SLF001
            return _weight_norm(*args, **kwargs)
        if func in (nn.functional.embedding, nn.functional.embedding_bag):
            kwargs["sparse"] = False
        if func is nn.functional.batch_norm and torch.is_grad_enabled():
            affine = _affine(*args, **kwargs)
            if affine is not None:
                return self._scaled(args[0] if args else kwargs["input"], *affine)
        with native(func, args):
            result = func(*args, **kwargs)
        if func in _LINEAR and torch.is_grad_enabled():
            self.latest = _Layer(result, result._version, func, args, kwargs)
        return result

    def _scaled(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """scale·x + shift for each channel; where a layer has just computed x its weights are scaled instead."""
        layer, self.latest = self.latest, None
        if layer is not None and layer.result is x and layer.version == x._version:
            folded = layer.scaled(scale, shift)
            if folded is not None:
                return folded
        shape = (1, -1, *[1] * (x.ndim - 2))
        return torch.addcmul(shift.view(shape), x, scale.view(shape))


@dataclass(frozen=True, eq=False)
class _Layer:
    """A call of a layer that is linear in its weights, one row of them a channel, and what it returned."""

    result: Tensor
    version: int
    function: Callable[..., Tensor]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    def scaled(self, scale: Tensor, shift: Tensor) -> Tensor | None:
        """What the layer returns with scaled weights; None where channels are not its second dimension."""
        given: dict[str, Any] = {**dict(zip(("input", "weight", "bias"), self.args, strict=False)), **self.kwargs}
        x, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
        if weight.ndim != self.result.ndim:  # one example without a batch dimension, or many
            return None
        weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
        bias = shift if bias is None else torch.addcmul(shift, bias, scale)
        return self.function(x, weight, bias, *self.args[3:], **given)


_LINEAR = (nn.functional.linear, nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _affine(  # noqa: PLR0913, the arguments of batch_norm
    x: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,  # noqa: FBT001, FBT002, as torch has it
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor] | None:
    """The scale and the shift that batch norm by running statistics is; the second derivatives of torch's are slow."""
    if training or mean is None or variance is None or x.dtype != mean.dtype:
        return None
    scale = (variance + eps).rsqrt() * (1 if weight is None else weight)
    return scale, (0 if bias is None else bias) - mean * scale


@contextlib.contextmanager
def _evaluation(modes: Mapping[nn.Module, bool], seed: int, devices: Sequence[int]) -> Iterator[None]:
    """All that makes a loss one function with two derivatives, for the length of the block."""
    with _uncompiled(), _modes(modes), _seeded(seed, devices), sdpa_kernel(SDPBackend.MATH), _TwiceDifferentiable():
        yield


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """What torch.compile has made of parts of a model is left aside: it has no second derivatives."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and to import it takes seconds
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextlib.contextmanager
def _modes(modes: Mapping[nn.Module, bool]) -> Iterator[None]:
    """Train or eval mode, module by module, for the length of the block."""
    before = {module: module.training for module in modes}
    try:
        for module, training in modes.items():
            module.training = training
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextlib.contextmanager
def _seeded(seed: int, devices: Sequence[int]) -> Iterator[None]:
    """The global generators start from the seed, and go on after the block as before: Python's, NumPy's and torch's."""
    with _apart(devices):
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002, the global one
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed devices that were not saved
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield


@contextlib.contextmanager
def _apart(devices: Sequence[int]) -> Iterator[None]:
    """The global generators go on after the block as before it."""
    ours, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(ours)
        np.random.set_state(numpys)  # noqa: NPY002


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for part in batch.values():
            yield from _tensors(part)
    elif isinstance(batch, list | tuple):
        for part in batch:
            yield from _tensors(part)
