"""Finds the models of a script that told nobody about them, and names their parameters."""

import gc
from collections.abc import Iterable, Sequence

from torch import Tensor, nn


def models_alive() -> list[nn.Module]:
    """The outermost modules that exist in the process and have parameters."""
    modules = [m for m in gc.get_objects() if issubclass(type(m), nn.Module) and "_modules" in vars(m)]
    inner = {id(child) for m in modules for child in m._modules.values() if child is not None}
    return [m for m in modules if id(m) not in inner and next(m.parameters(), None) is not None]


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
