"""Two gloo ranks with unequal shares of the data, as torchrun starts them, against one process that has all of it."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

import unstuck
from unstuck.critical import escape, examine, gradient_noise
from unstuck.curvature import density, eigenpairs, fisher, gauss_newton, hessian, sampled_fisher, trace
from unstuck.objective import Objective

ROOT, SOURCE = Path(__file__).parents[2], Path(unstuck.__file__).parents[1]

SHARES = {0: slice(0, 7), 1: slice(7, 8)}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 4, generator=generator, dtype=torch.float64), torch.arange(8) % 3


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def failing(model, batch):
    if len(batch[0]) == 1:
        raise KeyError("the bug of one rank")
    return cross_entropy(model, batch)


def answers(objective):
    v = torch.randn(objective.size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    H = hessian(objective)
    top = eigenpairs(hessian(objective), largest=3, smallest=0)
    found, spread, mean = eigenpairs(H), density(H, steps=20), trace(H, max_products=20)
    loss, gradient = objective.value_and_gradient()
    point, ends = examine(objective), examine(objective, dense_up_to=0)
    way, noise = escape(objective), gradient_noise(objective)
    return {
        "value": objective.value(),
        "loss": loss,
        "gradient": gradient,
        "elsewhere": objective.at(objective.point + v).gradient(),
        "hessian": objective.product(v),
        "block": hessian(objective, where=["2"]) @ v[-18:],
        "gauss_newton": gauss_newton(objective) @ v,
        "fisher": fisher(objective) @ v,
        "top": top.values,
        "values": found.values,
        "heights": spread.heights,
        "trace": [mean.estimate, mean.stderr],
        "spectrum": point.values,
        "ends": ends.values,
        "positive": [ends.positive.estimate, ends.positive.error],
        "point": [point.loss, point.gradient_norm, point.promise, point.noise.stderr, noise.stderr],
        "batches": [point.noise.batches, noise.batches],
        "way out": way.point,
        "weight": objective.weight,
    }


def refusals(rank, group, objective, mine):
    """What each rank says where one of them is wrong; none must wait for the other for ever."""
    said = {}

    def note(name, ask):
        try:
            ask()
            said[name] = "nothing"
        except (ValueError, RuntimeError, KeyError) as error:
            said[name] = f"{type(error).__name__}: {error}"

    ones = torch.ones(objective.size, dtype=torch.float64)
    note("vectors", lambda: objective.product(ones * (1 + rank)))
    broken = Objective(network(), failing, mine, group=group)
    note("value", broken.value)
    note("gradient", broken.gradient)
    note("product", lambda: broken.product(ones))
    other = network()
    with torch.no_grad():
        other[0].weight.mul_(1 + rank)
    note("weights", lambda: Objective(other, cross_entropy, mine, group=group))
    note("fine", lambda: objective.product(ones))
    drawn = sampled_fisher(objective, 1, generator=torch.Generator().manual_seed(4))
    said["drawn"] = drawn @ ones
    return said


def findings(rank, group):
    x, y = (part[SHARES[rank]] for part in data())
    wrapped = nn.parallel.DistributedDataParallel(network())
    objective = Objective(wrapped, cross_entropy, [(x, y)], group=group)
    found = answers(objective)
    nothing = Objective(network(), cross_entropy, [(x, y)] if rank == 0 else [], group=group)
    found["only the first"] = nothing.product(torch.ones(nothing.size, dtype=torch.float64))
    cross_entropy(wrapped, (x, y)).backward()  # the wrapper still works
    found["said"] = refusals(rank, group, objective, [(x, y)])
    return found


def work(results):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    torch.save(findings(rank, distributed.group.WORLD), f"{results}/{rank}")
    gc.collect()  # the wrapper holds the group, whose threads must end before the process does
    distributed.barrier()
    distributed.destroy_process_group()
    gc.collect()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join([str(SOURCE), str(ROOT)])
    done = subprocess.run(
        [*launcher, "-m", "tests.objective.test_ranks", str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / str(rank), weights_only=True) for rank in range(2)]


def test_ranks_with_unequal_shares_find_what_one_process_finds(ranks):
    x, y = data()
    expected = answers(Objective(network(), cross_entropy, [(x[part], y[part]) for part in SHARES.values()]))
    first = Objective(network(), cross_entropy, [(x[:7], y[:7])])
    expected["only the first"] = first.product(torch.ones(first.size, dtype=torch.float64))
    for found in ranks:
        for name, right in expected.items():
            torch.testing.assert_close(found[name], right, msg=lambda text, name=name: f"{name}: {text}")


def test_a_fault_of_one_rank_is_told_to_both(ranks):
    first, second = (found["said"] for found in ranks)
    for said in (first, second):
        assert "ValueError: all ranks must multiply the same vector" in said["vectors"]
        assert "ValueError: all ranks need the same weights" in said["weights"]
        assert said["fine"] == "nothing"
    for name in ("value", "gradient", "product"):
        assert "the bug of one rank" in second[name]
        assert "RuntimeError: all ranks are needed for a sum over data, got one that failed" in first[name]
    assert torch.equal(first["drawn"], second["drawn"])


if __name__ == "__main__":
    work(sys.argv[1])
