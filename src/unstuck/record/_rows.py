"""Which rows a network is trained on: a hash of each, from many more steps than are recorded."""

import threading
import weakref
from collections.abc import Callable, Sequence
from time import thread_time
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.nn.modules.module import register_module_forward_pre_hook

from unstuck.objective import tensors
from unstuck.record._deck import anything_compiled

SHARE = 1 / 24  # of the promised share of time
FREE = 0.05  # seconds beyond it, which hash all rows of a small training
MOST = 1 << 20  # different hashes, of 8 bytes each; rows that come later are not known
WAITING = 1 << 17  # hashes that have not been compared with the others yet,
PARTS = 1 << 10  # and tensors that they come in: on a GPU the first look at either waits for it
CALLS = 1 << 10  # that are heard in a step before its inputs are given up
PIECE = 1 << 15  # words that are multiplied at a time: more memory than that costs steps of 2 ms a twentieth
WIDEST = 1 << 20  # words of one row
SEED = 0x5EED
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}  # by the bytes of a number
_is_traced = torch.compiler.is_dynamo_compiling


class Hashes:
    """A hash of 64 bits for each row: the sum of its words, each times a random number, modulo 2⁶⁴.

    Two different rows have the same one with a probability of 2⁻⁴⁰ or less: words of 32 bits keep what no multiple of
    a high power of 2 would tell apart. The random numbers are the same ones always.
    """

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(SEED)
        self._numbers = torch.empty(0, dtype=torch.int64, device="cpu")
        self._there: dict[torch.device, Tensor] = {}

    def of(self, parts: Sequence[Tensor]) -> Tensor | None:
        """One number for each row of tensors that lie beside one another; None where they cannot be read as words."""
        total: Tensor | None = None
        for k, x in enumerate(parts):
            each = self._of_one(x.detach())
            if each is None:
                return None
            total = each if total is None else total + (2 * k + 1) * each
        return total

    def _of_one(self, x: Tensor) -> Tensor | None:
        words = _WORDS.get(x.element_size())
        if words is None or x.is_complex():
            return None
        rows = x.reshape(x.shape[0], -1).contiguous().view(words)
        if not 0 < rows.shape[1] <= WIDEST:
            return None
        numbers = self._of_device(rows.shape[1], x.device)
        if rows.numel() <= PIECE:
            return _products(rows, numbers)
        return torch.cat([_products(part, numbers) for part in rows.split(max(PIECE // rows.shape[1], 1))])

    def _of_device(self, width: int, device: torch.device) -> Tensor:
        known = self._numbers.shape[0]
        if known < width:
            more = torch.empty(max(width, 2 * known) - known, dtype=torch.int64, device="cpu")
            more.random_(-(2**63), None, generator=self._generator)
            self._numbers = torch.cat([self._numbers, more])
            self._there.clear()
        if device not in self._there:
            self._there[device] = self._numbers.to(device)
        return self._there[device][:width]


def _products(rows: Tensor, numbers: Tensor) -> Tensor:
    """The sums modulo 2⁶⁴; a GPU has no product of a matrix and a vector of integers."""
    return rows.long() @ numbers if rows.is_cpu else (rows * numbers).sum(1)


def beside(given: Any) -> list[Tensor]:
    """The tensors of a call that hold a row for each of those of the first; none where they are not plain numbers."""
    found = [x for x in tensors(given) if x.dim()]
    found = [x for x in found if x.shape[0] == found[0].shape[0]]
    plain = all(type(x) is Tensor and x.layout is torch.strided and x.numel() for x in found)
    return found if plain and not _transformed() else []


def learns(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _transformed() -> bool:
    """Whether calls are seen by a mode of the script's, or are part of a transform or of a trace."""
    inside = peek_interpreter_stack() is not None
    return inside or torch._C._len_torch_dispatch_stack() > 0 or torch.jit.is_tracing()  # noqa: SLF001


class Rows:
    """Hears the inputs of training steps, as often as a small share of the time allows, and keeps their hashes.

    A step is listened to by a hook that every module calls, until the first one that learns is given a tensor: these
    are the inputs. They count as trained on once backward() is called; then the next ones are listened to, since a step
    may add up several. Nothing is left on a module, where it would be copied and saved with it.
    """

    def __init__(self, deaf: Callable[[], bool], budget: float) -> None:
        self.seconds = 0.0
        self.hashes = Hashes()
        self._deaf = deaf
        self._share = SHARE * budget
        self._handle: Any = None
        self._closed = True
        self._calls = 0
        self._elapsed = 0.0
        self._found: Tensor | None = None  # of inputs that no backward() has followed yet
        self._waiting: list[Tensor] = []
        self._count = 0  # hashes among them
        self._known = torch.empty(0, dtype=torch.int64, device="cpu")  # different ones, sorted
        self._learns: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
        self._thread = threading.get_ident()

    def put(self) -> None:
        self._closed = False
        self.listen(0.0)

    def remove(self) -> None:
        """Listens no more."""
        self._closed = True
        self._silence()

    def listen(self, elapsed: float) -> None:
        """Listens to the next inputs, if there is time for it so many seconds after the start."""
        self._elapsed, self._found, self._calls = elapsed, None, 0
        due = self._share * elapsed - self.seconds > -FREE
        if self._handle is None and not (due and not self._closed):
            return
        if anything_compiled():  # it would have to compile again
            self.remove()
        elif not due:
            self._silence()
        elif self._handle is None:
            self._handle = register_module_forward_pre_hook(self._called)

    def trained(self) -> None:
        """A backward() begins: it is for the inputs that were heard."""
        if self._found is not None:
            self._waiting.append(self._found)
            self._count += self._found.shape[0]
            self.listen(self._elapsed)

    def all(self) -> Tensor:
        """The different hashes, sorted, on the CPU."""
        if self._waiting:
            with torch._C.DisableTorchFunction():  # noqa: SLF001
                new = torch.cat([x.cpu() for x in self._waiting])
                self._known = torch.cat([self._known, new]).unique()[:MOST]
            self._waiting, self._count = [], 0
        return self._known

    def _silence(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def timed(self, work: Callable[..., None], *args: Any) -> bool:
        """Whether it was done: an error is ours, and the script goes on. Its time is that of this thread alone."""
        began = thread_time()
        try:
            with torch._C.DisableTorchFunction():  # noqa: SLF001
                work(*args)
            return True
        except Exception:
            return False
        finally:
            self.seconds += thread_time() - began

    def _called(self, module: nn.Module, given: Any) -> None:
        if _is_traced() or threading.get_ident() != self._thread:
            return
        if not self.timed(self._hear, module, given):
            self.remove()

    def _hear(self, module: nn.Module, given: Any) -> None:
        self._calls += 1
        if self._calls > CALLS:
            self._silence()
        if not (module.training and torch.is_grad_enabled()) or self._deaf():
            return
        inputs = beside(given)
        if not inputs or any(x.requires_grad for x in inputs) or not self._fits(module):
            return
        self._silence()
        if self._count >= WAITING or len(self._waiting) >= PARTS:
            self.all()
        self._found = self.hashes.of(inputs)
        if len(self._known) >= MOST:
            self.remove()

    def _fits(self, module: nn.Module) -> bool:
        if module not in self._learns:
            self._learns[module] = learns(module)
        return self._learns[module]
