"""The examples in the docstrings of the room run and print what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

import unstuck.optim

FILES = sorted(path.stem for path in Path(unstuck.optim.__file__).parent.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", FILES)
def test_examples_print_what_they_say(name):
    found = doctest.testmod(importlib.import_module(f"unstuck.optim.{name}"))
    assert found.failed == 0
