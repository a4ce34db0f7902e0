"""Values of a step whose memory NumPy sees too, and may write into behind torch's back."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from unstuck.objective._graph import COPY_LIMIT, copied, memory_of
from unstuck.objective._program import tensors


class _Seen(NamedTuple):
    storage: StorageWeakRef
    place: tuple[torch.Size, tuple[int, ...], int]  # shape, strides and offset
    contents: Tensor


class Shared:
    """The contents of memory when it was handed out, to be compared with what it holds later."""

    def __init__(self) -> None:
        self._seen: dict[int, _Seen] = {}
        self._crowded = 16  # how many are looked through for dead ones

    def __len__(self) -> int:
        return len(self._seen)

    def note(self, tensor: Tensor) -> bool:
        """Keeps the contents of the memory that a tensor lies in; False where that would be too much.

        What is kept already stays: the memory may have been written into since.
        """
        seen = self._seen.get(memory_of(tensor))
        return (seen is not None and not seen.storage.expired()) or self._keep(tensor)

    def _keep(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        if storage.nbytes() > COPY_LIMIT:
            return False
        if len(self._seen) >= self._crowded:
            self._seen = {key: seen for key, seen in self._seen.items() if not seen.storage.expired()}
            self._crowded = max(16, 2 * len(self._seen))
        whole = torch.Size((storage.nbytes() // tensor.element_size(),)), (1,), 0
        contents = copied(tensor.detach().as_strided(*whole))
        self._seen[memory_of(tensor)] = _Seen(StorageWeakRef(storage), whole, contents)
        return True

    def renew(self, tensor: Tensor) -> None:
        """Keeps the contents anew, after torch has written into them."""
        if memory_of(tensor) in self._seen:
            self._keep(tensor)

    def changed(self, tensor: Tensor) -> bool:
        """Whether the memory that a tensor lies in has changed since."""
        seen = self._seen.get(memory_of(tensor))
        return seen is not None and _differs(seen)

    def any_changed(self) -> bool:
        """Whether any memory that is still in use has changed since."""
        return any(map(_differs, self._seen.values()))


def saved(root: Tensor) -> Iterator[tuple[Any, Tensor]]:
    """The tensors that autograd has saved for the backward pass of `root`, and the nodes that hold them."""
    seen: set[Any] = set()
    todo = [root.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_saved_"):
                with contextlib.suppress(RuntimeError):  # freed, or changed so that autograd will say so itself
                    yield from ((node, tensor) for tensor in tensors(getattr(node, name)))


def _differs(seen: _Seen) -> bool:
    storage = torch.UntypedStorage._new_with_weak_ptr(seen.storage.cdata)  # noqa: SLF001
    if storage is None:
        return False
    now = torch.empty(0, dtype=seen.contents.dtype).set_(storage, seen.place[2], seen.place[0], seen.place[1])
    return not torch.equal(_bits(now), _bits(seen.contents))  # bits, since NaN is not equal to itself


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.numel() else tensor
