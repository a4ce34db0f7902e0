"""The faster of two matrix products that torch has on a CPU, where it is as exact as the other."""

import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def fast_matmul() -> Iterator[None]:
    """Float32 matrix products on the CPU take the faster library for the length of the block, if that costs no digits.

    torch sends them to MKL, unless they may be rounded to bfloat16: then to oneDNN, which does so only on processors
    with such instructions. On others it computes in float32, on some of them at twice the speed of MKL. Which holds
    here is measured once a process. A caller who has chosen a precision keeps it.
    """
    matmul = _switch()
    if matmul is None or matmul.fp32_precision not in ("none", "ieee") or not _relaxed_is_better():
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _switch() -> Any:
    """What says how oneDNN may round; the older switch would also change CUDA's products."""
    return getattr(torch.backends.mkldnn, "matmul", None) if torch.backends.mkldnn.is_available() else None


@functools.cache
def _relaxed_is_better() -> bool:
    """Whether relaxed products are as exact as strict ones and take at most 5/6 of their time, in some 20 ms."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 256, 256, generator=generator)
    exact = a.double() @ b.double()
    (strict, slow), (relaxed, fast) = (_measured(a, b, precision) for precision in ("ieee", "bf16"))
    errors = [float((product - exact).norm() / exact.norm()) for product in (strict, relaxed)]
    return errors[1] < max(2 * errors[0], 1e-6) and fast * 1.2 < slow


def _measured(a: Tensor, b: Tensor, precision: str) -> tuple[Tensor, float]:
    """A product and the seconds it takes at best."""
    matmul = _switch()
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        times, product = [], a @ b
        for _ in range(10):
            start = time.perf_counter()
            product = a @ b
            times.append(time.perf_counter() - start)
    finally:
        matmul.fp32_precision = before
    return product, min(times)
