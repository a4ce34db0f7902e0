"""The three networks on which curvature is measured, briefly trained, with their spectra to compare with.

An MLP on digits, a convolutional network with batch norm on Fashion-MNIST and a transformer on Python's own sources:
the workloads of the peers' comparison. Fashion-MNIST is read from the folder that Debian's package
`dataset-fashion-mnist` installs.
"""

import gzip
import hashlib
import json
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import unstuck
from unstuck.curvature import to_scipy
from unstuck.objective import Objective

FASHION = Path("/usr/share/datasets/fashion-mnist")
KEPT = Path(__file__).parent / ".references"

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Workload:
    """A network that stands somewhere on its way, with the data that its loss is the mean over."""

    name: str
    model: nn.Module  # in eval mode
    inputs: Tensor
    targets: Tensor
    batches: Sequence[tuple[Tensor, Tensor]]

    def objective(self, *, memory: float | None = None) -> Objective:
        return Objective(self.model, loss, self.batches, memory=memory)

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def reference(self) -> tuple[np.ndarray, np.ndarray]:
        """The ten largest and the three smallest eigenvalues, ascending, by ARPACK in float64."""
        digest = hashlib.sha256()
        for tensor in (*self.model.state_dict().values(), self.inputs, self.targets):
            digest.update(tensor.numpy().tobytes())
        kept = KEPT / f"{self.name}-{digest.hexdigest()[:16]}.json"
        if not kept.is_file():
            largest, smallest = self._spectrum()
            KEPT.mkdir(exist_ok=True)
            kept.write_text(json.dumps([largest.tolist(), smallest.tolist()]), encoding="utf-8")
        largest, smallest = json.loads(kept.read_text(encoding="utf-8"))
        return np.array(largest), np.array(smallest)

    def _spectrum(self) -> tuple[np.ndarray, np.ndarray]:
        model = build(self.name).to(torch.float64)
        state = self.model.state_dict()
        model.load_state_dict({name: x.double() if x.is_floating_point() else x for name, x in state.items()})
        batches = [(x.double() if x.is_floating_point() else x, y) for x, y in self.batches]
        H = unstuck.hessian(Objective(model.eval(), loss, batches))
        start = torch.randn(H.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
        ends = []
        for which, count in (("LA", 10), ("SA", 3)):
            found = eigsh(to_scipy(H), k=count, which=which, tol=1e-6, ncv=60, v0=start, return_eigenvectors=False)
            ends.append(np.sort(found))
        return ends[0], ends[1]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    outputs = model(batch[0])
    return F.cross_entropy(outputs.flatten(0, -2), batch[1].flatten())


def workload(name: str) -> Workload:
    """The workload of this name: "mlp", "cnn" or "gpt"."""
    model = build(name)
    inputs, targets, rows = DATA[name]()
    batches = list(zip(inputs.split(rows), targets.split(rows), strict=True))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same weights on any number of processors
    train(model, name)
    torch.set_num_threads(threads)
    return Workload(name, model.eval(), inputs, targets, batches)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def train(model: nn.Module, name: str) -> None:
    inputs, targets = TRAINING[name]()
    generator = torch.Generator().manual_seed(0)
    if name == "gpt":
        optimizer, steps, rows = torch.optim.Adam(model.parameters(), lr=1e-3), 150, 16
    else:
        optimizer, steps, rows = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), 120, 64
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (rows,), generator=generator)
        optimizer.zero_grad()
        loss(model, (inputs[chosen], targets[chosen])).backward()
        optimizer.step()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10))


def cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for into, out in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(into, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(576, 128), nn.ReLU(), nn.Linear(128, 10))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = (
            part.view(rows, length, self.heads, -1).transpose(1, 2) for part in self.mix(self.before(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        return x + self.narrow(F.gelu(self.widen(self.between(x))))


class GPT(nn.Module):
    """A causal transformer over characters, of 12·layers·width² weights and some more."""

    def __init__(self, *, width: int, layers: int, heads: int, length: int, symbols: int = 128) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(symbols, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.blocks(self.tokens(x) + self.places(places))))


def gpt() -> nn.Module:
    return GPT(width=128, layers=5, heads=4, length=64)


def digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    return torch.tensor(found.data / 16, dtype=torch.float32), torch.tensor(found.target)


def fashion(count: int) -> tuple[Tensor, Tensor]:
    if not FASHION.is_dir():
        raise SystemExit(f"Fashion-MNIST is needed below {FASHION}: install Debian's package dataset-fashion-mnist")
    with gzip.open(FASHION / "train-images-idx3-ubyte.gz") as images:
        pixels = np.frombuffer(images.read(16 + count * 784), np.uint8, offset=16).reshape(count, 1, 28, 28)
    with gzip.open(FASHION / "train-labels-idx1-ubyte.gz") as labels:
        classes = np.frombuffer(labels.read(8 + count), np.uint8, offset=8)
    return torch.tensor(pixels / 255, dtype=torch.float32), torch.tensor(classes.astype(np.int64))


def sources(rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Characters of Python's own modules, and the ones after them."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [library / f"{name}.py" for name in ("argparse", "ast", "calendar", "cmd")]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    codes = torch.tensor([min(ord(letter), 127) for letter in text])
    starts = torch.randint(len(codes) - length - 1, (rows,), generator=torch.Generator().manual_seed(1))
    pieces = torch.stack([codes[start : start + length + 1] for start in starts.tolist()])
    return pieces[:, :-1], pieces[:, 1:]


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "cnn": cnn, "gpt": gpt}
TRAINING: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "mlp": digits,
    "cnn": lambda: fashion(10_000),
    "gpt": lambda: sources(2400, 64),
}
DATA: dict[str, Callable[[], tuple[Tensor, Tensor, int]]] = {
    "mlp": lambda: (*digits(), 1797),
    "cnn": lambda: (*fashion(2000), 200),
    "gpt": lambda: (*sources(32, 64), 32),
}
