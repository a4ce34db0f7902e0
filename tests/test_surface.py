"""What a user can import is a list, and the list is the whole of it."""

import importlib
import inspect
from pathlib import Path
from types import ModuleType

import pytest

import unstuck

HOUSE = Path(unstuck.__file__).parent
ROOMS = sorted(
    name
    for path in HOUSE.iterdir()
    if (name := path.stem) not in ("cli", "demo", "testing") and not name.startswith("_")
    if path.suffix == ".py" or (path / "__init__.py").is_file()
)


def public(module):
    return {name for name, x in vars(module).items() if not name.startswith("_") and not isinstance(x, ModuleType)}


def own(module):
    """The public names of a module that are its own and not imported for its use."""
    return {name for name in public(module) if getattr(vars(module)[name], "__module__", "") == module.__name__}


def test_public_names_are_exactly_all():
    assert public(unstuck) == set(unstuck.__all__)
    assert unstuck.__all__ == sorted(unstuck.__all__)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_shows_exactly_its_list(room):
    module = importlib.import_module(f"unstuck.{room}")
    shown = getattr(module, "__all__", None)
    if shown is None:
        assert (HOUSE / f"{room}.py").is_file(), "the door of a folder lists what it shows"
        shown = own(module)
    assert len(set(shown)) == len(shown)
    if (HOUSE / room).is_dir():
        rooms_within = {name for name in shown if isinstance(vars(module).get(name), ModuleType)}
        assert set(shown) - rooms_within == public(module)
        for name in rooms_within:
            assert set(vars(module)[name].__all__) == own(vars(module)[name])


@pytest.mark.parametrize("name", unstuck.__all__)
def test_a_public_name_says_what_it_is(name):
    thing = getattr(unstuck, name)
    assert inspect.getdoc(thing)
    if inspect.isfunction(thing):
        for parameter in list(inspect.signature(thing).parameters.values())[3:]:
            assert parameter.kind is parameter.KEYWORD_ONLY, f"{name}: {parameter.name} is an option"
        assert not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(thing).parameters.values())
