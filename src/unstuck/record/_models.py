"""The parameters of a run, and their names: as the models have them, which a script need not tell anybody."""

import gc
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook


class Called:
    """Notes the modules that are called until it is closed: they are the models, or parts of them."""

    def __init__(self) -> None:
        self._modules: dict[int, nn.Module] = {}
        self._handle = register_module_forward_pre_hook(self._note)

    def models(self) -> list[nn.Module]:
        """The outermost ones that have parameters."""
        return _outermost(self._modules.values())

    def close(self) -> None:
        self._handle.remove()
        self._modules.clear()

    def _note(self, module: nn.Module, _: Any) -> None:
        self._modules.setdefault(id(module), module)


class Leaves:
    """The parameters that a run moves or computes with, in the order in which they came to be known.

    Their names are kept, since a model may be gone before its run is written.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.tensors: list[Tensor] = []
        self.names: list[str] = []
        self.models = list(models)
        self._called: Called | None = None
        self._searched = False

    def look_out(self) -> None:
        """Notes the modules that are called from now on."""
        self._called = Called()

    def found(self) -> None:
        """Looks out no longer."""
        if self._called is not None:
            self.learn()
            self._called.close()
            self._called = None

    @property
    def looks_out(self) -> bool:
        return self._called is not None

    @property
    def nameless(self) -> bool:
        """Whether some belong to no known model."""
        return any(name.startswith("tensor[") for name in self.names)

    @property
    def nbytes(self) -> int:
        return sum([p.nbytes for p in self.tensors])

    def learn(self, *, thoroughly: bool = False) -> None:
        """Names the parameters by the models that own them."""
        self.names = parameter_names(self.tensors, self.models)
        if self.nameless and self._called is not None:
            self.models = self._called.models() or self.models
            self.names = parameter_names(self.tensors, self.models)
        if self.nameless and thoroughly:
            self.models = models_alive() or self.models
            self.names = parameter_names(self.tensors, self.models)

    def name(self, leaf: Tensor) -> str:
        if len(self.tensors) != len(self.names) or self.nameless:
            self.learn(thoroughly=not self._searched)
            self._searched = True  # which takes its time, and is worth it once
        return next((n for n, p in zip(self.names, self.tensors, strict=True) if p is leaf), "")

    def spoilt(self) -> set[torch.Size]:
        """The shapes of the models' buffers that are not finite."""
        buffers = (b for m in self.models for b in m.buffers() if b.is_floating_point())
        return {b.shape for b in buffers if not bool(b.isfinite().all())}


def models_alive() -> list[nn.Module]:
    """The outermost modules that exist in the process and have parameters; a look at all objects, some 0.1 s."""
    return _outermost(m for m in gc.get_objects() if issubclass(type(m), nn.Module) and "_modules" in vars(m))


def _outermost(modules: Iterable[nn.Module]) -> list[nn.Module]:
    found = list(modules)
    inner = {id(child) for m in found for child in m._modules.values() if child is not None}
    return [m for m in found if id(m) not in inner and next(m.parameters(), None) is not None]


def parameter_names(leaves: Sequence[Tensor], models: Iterable[nn.Module]) -> list[str]:
    """A name for each leaf: as its model has it, or `tensor[k]` where no model owns it."""
    names: dict[int, str] = {}
    taken: set[str] = set()
    wanted = {id(leaf) for leaf in leaves}
    for model in models:
        owned = [(name, p) for name, p in model.named_parameters() if id(p) in wanted and id(p) not in names]
        prefix = f"{type(model).__name__}." if any(name in taken for name, _ in owned) else ""
        names.update((id(p), prefix + name) for name, p in owned)
        taken.update(prefix + name for name, _ in owned)
    return [names.get(id(leaf), f"tensor[{k}]") for k, leaf in enumerate(leaves)]
