"""The parameters of a run, and their names: as the models have them, which a script need not tell anybody."""

import gc
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

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

    def modules(self, modules: Sequence[nn.Module]) -> list[str]:
        """The names of modules, as those of their parameters begin."""
        return module_names(modules, self.tensors, self.models)


def models_alive() -> list[nn.Module]:
    """The outermost modules that exist in the process and have parameters; a look at all objects, some 0.1 s."""
    return _outermost(m for m in gc.get_objects() if issubclass(type(m), nn.Module) and "_modules" in vars(m))


def _outermost(modules: Iterable[nn.Module]) -> list[nn.Module]:
    found = list(modules)
    inner = {id(child) for m in found for child in m._modules.values() if child is not None}
    return [m for m in found if id(m) not in inner and next(m.parameters(), None) is not None]


def parameter_names(leaves: Sequence[Tensor], models: Iterable[nn.Module]) -> list[str]:
    """A name for each leaf: as its model has it, or `tensor[k]` where no model owns it."""
    names = {id(p): prefix + name for prefix, _, owned in _owners(leaves, models) for name, p in owned}
    return [names.get(id(leaf), f"tensor[{k}]") for k, leaf in enumerate(leaves)]


def module_names(modules: Sequence[nn.Module], leaves: Sequence[Tensor], models: Iterable[nn.Module]) -> list[str]:
    """A name for each module, as the names of its parameters begin: a model's is its class's, and "" that of others."""
    names: dict[int, str] = {}
    for prefix, model, _ in _owners(leaves, models):
        for name, module in model.named_modules():
            names.setdefault(id(module), prefix + name if name else type(model).__name__)
    return [names.get(id(module), "") for module in modules]


def _owners(
    leaves: Sequence[Tensor], models: Iterable[nn.Module]
) -> Iterator[tuple[str, nn.Module, Sequence[tuple[str, Tensor]]]]:
    """Each model with the leaves that it is the first to own, and what their names begin with to be no others'."""
    wanted = {id(leaf) for leaf in leaves}
    taken: set[str] = set()
    for model in models:
        owned = [(name, p) for name, p in model.named_parameters() if id(p) in wanted]
        wanted.difference_update(id(p) for _, p in owned)
        prefix = f"{type(model).__name__}." if any(name in taken for name, _ in owned) else ""
        taken.update(prefix + name for name, _ in owned)
        yield prefix, model, owned
