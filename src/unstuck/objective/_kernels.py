"""Which of torch's kernels compute a loss: on a GPU the usual ones round, and cannot be differentiated twice."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from unstuck.objective._calls import RECURRENT
from unstuck.objective._program import Tape

_ATTENTION = frozenset(("scaled_dot_product_attention", "multi_head_attention_forward"))


@contextlib.contextmanager
def second_order(tape: Tape) -> Iterator[None]:
    """Inside, a replay of the tape has second derivatives, from kernels that may round otherwise than the step's own.

    Attention that drops keeps its kernel: another one would draw other masks. On a CPU that one has second derivatives,
    on a GPU it has none, and torch says so when they are asked for.
    """
    drops = any(call.random and call.name in _ATTENTION for call in tape.program.instructions)
    with contextlib.nullcontext() if drops else sdpa_kernel(SDPBackend.MATH), _Native():
        yield


class _Native(TorchFunctionMode):
    """Recurrent networks are computed without cuDNN."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        with native(func, args):
            return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def native(func: Callable[..., Any], args: Sequence[Any]) -> Iterator[None]:
    """Inside, a recurrent network on a GPU does without cuDNN, which differentiates once and drops by its own masks."""
    if getattr(func, "__name__", "") not in RECURRENT or not (isinstance(args[0], Tensor) and args[0].is_cuda):
        yield
        return
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


@contextlib.contextmanager
def full_precision(devices: Iterable[torch.device]) -> Iterator[None]:
    """Inside, float32 products on a GPU keep all their digits: torch rounds those of convolutions to eleven bits.

    Matrix products are rounded so where the script has asked for it. A gradient near zero and the small eigenvalues of
    a Hessian would be nothing but that rounding.
    """
    switches = _switches() if any(device.type == "cuda" for device in devices) else ()
    before = [getattr(switch, name) for switch, name, _ in switches]
    try:
        for switch, name, exact in switches:
            setattr(switch, name, exact)
        yield
    finally:
        for (switch, name, _), value in zip(switches, before, strict=True):
            setattr(switch, name, value)


def _switches() -> Sequence[tuple[Any, str, Any]]:
    """Where torch keeps the precision of float32 products on a GPU, under which name, and its value for all digits."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(cudnn, "conv"):  # since torch 2.9
        return tuple((switch, "fp32_precision", "ieee") for switch in (cuda, cudnn.conv, cudnn.rnn))
    return (cuda, "allow_tf32", False), (cudnn, "allow_tf32", False)
