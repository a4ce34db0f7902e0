"""The gradient as backward() makes it: before anything averages, clips or unscales it."""

import functools
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.utils.hooks import unserializable_hook


class Heard:
    """Hears what the backward() calls of one step bring to each leaf, and adds it up.

    A hook of a leaf is called before its gradient goes to `.grad`, and so before DistributedDataParallel averages over
    the ranks. It keeps a copy: torch makes the gradient itself the `.grad` only where nobody else holds it. The hooks
    are put in place when a backward() begins and taken away when it ends; where it never comes to its end, `stop` does.
    """

    def __init__(self) -> None:
        self.gradients: dict[int, Tensor] = {}  # what came, by the slot of the leaf
        self.stored: dict[int, Tensor] = {}  # `.grad` as the last backward() left it, by slot
        self.slots: set[int] = set()  # that were listened to
        self.seconds = 0.0  # inside of backward()
        self.failed = False
        self._leaves: list[tuple[int, Tensor]] = []
        self._handles: list[Any] = []
        self._running = False

    def listen(self, leaves: Sequence[Tensor]) -> None:
        """Listens to the backward() that is about to begin."""
        self._quietly(self._begin, leaves)

    def stop(self) -> None:
        """Takes the hooks away."""
        self._quietly(self._remove)

    def _begin(self, leaves: Sequence[Tensor]) -> None:
        self._remove()
        self._running = False
        self._leaves = [(slot, leaf) for slot, leaf in enumerate(leaves) if leaf.requires_grad]
        self.slots.update(slot for slot, _ in self._leaves)
        for slot, leaf in self._leaves:
            hook = functools.partial(self._inside, self._take, slot)
            self._handles.append(leaf.register_hook(unserializable_hook(hook)))

    def _take(self, slot: int, gradient: Tensor) -> None:
        if not self._running:
            self._running = True
            # twice, to come after what others have queued: DistributedDataParallel ends its averages there
            _at_the_end(functools.partial(self._inside, _at_the_end, functools.partial(self._inside, self._end)))
        copy = gradient.detach().clone()
        self.gradients[slot] = self.gradients[slot] + copy if slot in self.gradients else copy

    def _end(self) -> None:
        self._remove()
        self.stored = {slot: p.grad.detach().clone() for slot, p in self._leaves if p.grad is not None}

    def _remove(self) -> None:
        handles, self._handles = self._handles, []
        for handle, (_, leaf) in zip(handles, self._leaves, strict=False):
            handle.remove()
            if not leaf._backward_hooks:  # noqa: SLF001
                leaf._backward_hooks = None  # noqa: SLF001  # an empty dictionary costs every backward() its look

    def _inside(self, work: Callable[..., None], *args: Any) -> None:
        """Work that backward() calls for."""
        began = perf_counter()
        self._quietly(work, *args)
        self.seconds += perf_counter() - began

    def _quietly(self, work: Callable[..., None], *args: Any) -> None:
        """Out of sight of the script's own modes; what goes wrong costs the check, never the backward()."""
        try:
            with torch._C.DisableTorchFunction(), torch.no_grad():  # noqa: SLF001
                work(*args)
        except Exception:
            self.failed = True


def _at_the_end(work: Callable[[], None]) -> None:
    """Has `work` called when the backward() that runs has done everything else."""
    Variable._execution_engine.queue_callback(work)  # noqa: SLF001
