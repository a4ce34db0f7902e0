"""The clinic from outside: a few of its cells at every test run, all of them when time allows."""

import math

import pytest
from clinic.__main__ import cases, examine

CELLS = [("mlp", "healthy"), ("mlp", "lr-bounces"), ("cnn", "graph-cut"), ("gru", "dead-units")]


@pytest.mark.parametrize(("program", "run"), CELLS, ids=[f"{p} {r}" for p, r in CELLS])
def test_the_cause_that_was_put_in_comes_first(program, run):
    cell = examine(program, run, 0)
    assert cell.right, cell
    assert math.isfinite(cell.overhead)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("program", "run", "seed"), cases((), (), 1))
def test_the_whole_clinic(program, run, seed):
    cell = examine(program, run, seed)
    assert cell.right, cell
