"""Watching changes nothing: what is compared is the trained state itself, byte by byte."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor
from training_programs import PROGRAMS
from training_programs import STEPS as MANY
from training_styles import STEPS, STYLES

import unstuck

EVERYTHING = 100.0  # times the training may go into watching: every step is recorded
UNRECORDED = ("by hand without an optimiser", "closure", "steps inside backward")


def flattened(x):
    """Everything in nested containers, tensors as their bytes."""
    if isinstance(x, Tensor):
        return [(str(x.dtype), tuple(x.shape), x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())]
    if isinstance(x, dict):
        return [(repr(k), flattened(v)) for k, v in x.items()]
    if isinstance(x, (list, tuple)):
        return [flattened(v) for v in x]
    return [repr(x)]


def generators():
    _, keys, *rest = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), keys.tobytes(), rest


def trained(train, pause):
    """Everything that the program moves, and where it leaves the generators."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    return flattened(train(pause)), generators()


def trouble(run):
    """What kept the watcher from its work."""
    return [e for e in run.of("fact") if e["code"] in ("watcher-failed", "not-saved")]


def program(name):
    return lambda pause: PROGRAMS[name]()(pause)


@pytest.mark.parametrize("name", PROGRAMS)
def test_weights_optimiser_and_generators_are_those_of_the_unwatched_run(name, tmp_path):
    plain, generator = trained(program(name), lambda step: None)
    said = []
    with unstuck.watch(folder=tmp_path / "run", budget=EVERYTHING) as run:
        watched, watched_generator = trained(program(name), lambda step: said.append((step, run.steps, run.diagnose())))
    assert said
    assert not trouble(run)
    assert watched == plain
    assert watched_generator == generator
    assert run.steps == (0 if name == "by hand without an optimiser" else MANY)  # the steps of trials are not the run's
    memory = run.memory()
    assert (memory is None) == (name in UNRECORDED)
    assert memory is None or len(memory.tapes) == 120


# Optimiser steps, where they are not one for each step of the program
STEPPED = {"workers of a loader": 12, "a penalty on the gradient": 2 * STEPS, "sparse gradients": 2 * STEPS}


@pytest.mark.parametrize("name", STYLES)
def test_every_style_of_training_moves_as_it_does_unwatched(name, tmp_path):
    plain = trained(STYLES[name], lambda step: None)
    said = []
    with unstuck.watch(folder=tmp_path / "run", budget=EVERYTHING) as run:
        watched = trained(STYLES[name], lambda step: said.append(run.diagnose()))
    assert said
    assert watched == plain
    assert not trouble(run)
    if name == "a scaler that skips steps":
        assert 0 < run.steps < STEPS
    else:
        assert run.steps == STEPPED.get(name, STEPS)
