"""Batches mixed with themselves."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Mixup:
    """The batches of a loader, each mixed with a permutation of itself; made by `mixup`."""

    def __init__(
        self, loader: Iterable[Any], alpha: float, classes: int | None, generator: torch.Generator | None
    ) -> None:
        self._loader, self._alpha, self._classes, self._generator = loader, alpha, classes, generator

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._loader:
            if not (isinstance(batch, (tuple, list)) and [isinstance(part, Tensor) for part in batch] == [True, True]):
                raise TypeError(f"mixup needs batches (inputs, labels) of tensors, got a {type(batch).__name__}")
            yield self._mixed(*batch)

    def __len__(self) -> int:
        return len(self._loader)  # pyright: ignore[reportArgumentType] as of a loader that has none

    def _mixed(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if not inputs.is_floating_point():
            raise TypeError(f"mixup needs real inputs, got {inputs.dtype}: scale pixels, and mix embeddings of tokens")
        targets = self._soft(labels, inputs.dtype).to(inputs.device)
        if len(inputs) != len(targets):
            raise ValueError(f"mixup needs one label for each input, got {len(labels)} for {len(inputs)}")
        order = torch.randperm(len(inputs), generator=self._generator).to(inputs.device)
        share = self._share()
        return share * inputs + (1 - share) * inputs[order], share * targets + (1 - share) * targets[order]

    def _soft(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        if labels.is_floating_point():
            return labels
        if self._classes is None:
            raise ValueError("mixup needs classes= to mix integer labels, got none: say how many there are")
        if int(labels.min()) < 0 or int(labels.max()) >= self._classes:
            raise ValueError(
                f"labels lie between 0 and classes − 1 = {self._classes - 1}, got {int(labels.min())} to "
                f"{int(labels.max())}"
            )
        return torch.nn.functional.one_hot(labels.long(), self._classes).to(dtype)

    def _share(self) -> float:
        if self._alpha == 0:
            return 1.0
        # torch's Beta takes no generator
        seed = int(torch.randint(2**63 - 1, (), generator=self._generator))
        return float(np.random.default_rng(seed).beta(self._alpha, self._alpha))


def mixup(
    loader: Iterable[Any], alpha: float, *, classes: int | None = None, generator: torch.Generator | None = None
) -> Mixup:
    """The batches (inputs, labels) of any loader as λx + (1−λ)x', λy + (1−λ)y' with one λ ∼ Beta(α, α) a batch.

    x', y' are a permutation of the batch (Zhang et al. 2018; lecture 002 prints two loaders). Integer labels (N,)
    become rows (N, classes) that torch's cross_entropy takes as they are; then CE(mix) = λ CE(y) + (1−λ) CE(y'). Real
    labels are mixed as given: regression, or probabilities. `alpha` is 0 for no mixing, and 0.1 to 0.4 for images.

    `generator` is one of the CPU; with the loader's own order it fixes the batches. As long as the loader.

    >>> batch = (torch.eye(2), torch.tensor([0, 1]))
    >>> [(x, y)] = mixup([batch], 0.4, classes=2, generator=torch.Generator().manual_seed(0))
    >>> torch.equal(x, y)
    True
    """
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha is at least 0 and finite, got {alpha}")
    if classes is not None and classes < 1:
        raise ValueError(f"at least one class is needed, got classes={classes}")
    return Mixup(loader, alpha, classes, generator)
