"""Watching changes nothing: what is compared is the trained state itself, byte by byte."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor
from training_programs import PROGRAMS

import unstuck

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
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), np.random.get_state()[1].tobytes()


def trained(name, pause):
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    return flattened(PROGRAMS[name]()(pause)), generators()


@pytest.mark.parametrize("name", PROGRAMS)
def test_weights_optimiser_and_generators_are_those_of_the_unwatched_run(name, tmp_path):
    plain, generator = trained(name, lambda step: None)
    said = []
    with unstuck.watch(folder=tmp_path / "run") as run:
        watched, watched_generator = trained(name, lambda step: said.append((step, run.steps, run.diagnose())))
    assert said
    assert all(e["kind"] != "fact" or e["code"] not in ("watcher-failed", "not-saved") for e in run.events)
    assert watched == plain
    assert watched_generator == generator
    assert run.steps == (0 if name == "by hand without an optimiser" else 200)  # the steps of trials are not the run's
    memory = run.memory()
    assert (memory is None) == (name in UNRECORDED)
    assert memory is None or len(memory.tapes) == 120
