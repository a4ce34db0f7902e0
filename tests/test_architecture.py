"""The house: rooms in one order, doors at the end, and nobody imports a door."""

import ast
import importlib
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1] / "src" / "unstuck"
ROOMS = ("objective", "curvature", "critical", "optim", "surface", "record", "diagnosis", "racing", "report")
DOORS = ("studies", "integrations", "cli", "__main__", "testing", "demo")
FILES = sorted(HOUSE.rglob("*.py"))
LINES = 450


def place(path):
    """The room or door that a file belongs to; "" is the front of the house."""
    first = path.relative_to(HOUSE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported(tree):
    """What of the house is imported, by full name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "unstuck")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            if module == "unstuck":
                yield from (f"unstuck.{alias.name}" for alias in node.names)
            elif module.startswith("unstuck."):
                yield module


@pytest.fixture(params=FILES, ids=lambda path: str(path.relative_to(HOUSE)))
def path(request):
    return request.param


@pytest.fixture
def tree(path):
    return ast.parse(path.read_text())


def test_every_file_is_in_a_room_or_a_door(path):
    assert place(path) in ("", *ROOMS, *DOORS)


def test_a_room_imports_only_rooms_before_it_and_by_their_door(path, tree):
    here = place(path)
    for name in imported(tree):
        there, *inside = name.split(".")[1:]
        if there == here:
            continue
        assert not inside, f"{name} is inside a room: import it from unstuck.{there}"
        if here in ROOMS:
            assert there in ROOMS, f"{here} imports {there}, which is no room"
            assert ROOMS.index(there) < ROOMS.index(here), f"{here} comes before {there}"
        elif here == "":
            assert there in ROOMS
        elif here not in ("cli", "__main__"):  # the command shows the demonstration
            assert there not in DOORS, f"{here} imports a door"


def test_imports_stand_at_the_top_except_in_doors(path, tree):
    if place(path) not in DOORS:
        for_types = [n for top in tree.body if isinstance(top, ast.If) for n in top.body]  # if TYPE_CHECKING:
        top = [*tree.body, *for_types]
        inner = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) and n not in top]
        assert [n.lineno for n in inner] == []


def test_no_file_is_too_long(path):
    assert len(path.read_text().splitlines()) <= LINES


def test_a_folder_shows_only_its_door(path):
    folder = path.parent
    if folder != HOUSE and folder.name not in DOORS and not path.name.startswith("_"):
        door = importlib.import_module(f"unstuck.{folder.name}")
        assert path.stem in door.__all__, "the files of a room are underscored, unless its door lists them"


def test_a_class_inherits_at_most_once_inside_the_house():
    bases = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [b.id for b in node.bases if isinstance(b, ast.Name)]

    def depth(name):
        return max((1 + depth(base) for base in bases[name] if base in bases), default=0)

    assert {name: depth(name) for name in bases if depth(name) > 1} == {}


def test_no_global_switches(path, tree):
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Global)]
    environment = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "environ"]
    assert environment == [] or path.name == "_ranks.py"  # torchrun tells a process its rank there
