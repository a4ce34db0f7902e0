"""The search for critical points, and judgements of optimisers: their ends and their rates."""

import importlib.util
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
import torch
from tests import oracles
from torch import nn

from unstuck.critical import examine, find_critical, rate_limit, verify
from unstuck.objective._objective import Objective, Term

DOUBLE = torch.float64


def surface(f, *point, dtype=DOUBLE):
    return Objective.of_terms([Term(lambda values: f(values[0]), 1)], {"w": torch.tensor(point, dtype=dtype)})


@pytest.mark.parametrize("f", [oracles.product_pair, oracles.tanh_pair])
def test_a_search_that_starts_near_a_saddle_ends_there(f):
    found = find_critical(surface(f, 0.1, -0.2))
    assert found.outcome == "critical"
    torch.testing.assert_close(found.point, torch.zeros(2, dtype=DOUBLE), rtol=0, atol=1e-7)
    assert float(found.gradient_norms[-1]) <= 1.5e-8
    assert (found.gradient_norms.diff() < 0).all()
    assert "A critical point" in str(found)


def test_a_minimum_of_the_gradient_that_is_no_critical_point_is_gradient_flat():
    # the slope x² + 1/10 of x³/3 + x/10 is least at 0, where it is no zero and the curvature 2x is
    found = find_critical(surface(lambda w: w[0] ** 3 / 3 + w[0] / 10 + w[1] ** 2, 0.7, 0.3))
    assert found.outcome == "gradient-flat"
    assert not found.converged
    assert float(found.point[0]) == pytest.approx(0, abs=2e-3)
    assert float(found.gradient_norms[-1]) == pytest.approx(0.1, rel=1e-3)
    assert found.flatness <= 1e-3


def test_a_search_that_is_cut_off_says_so():
    found = find_critical(surface(oracles.product_pair, 3.0, 2.5), steps=1)
    assert (found.outcome, found.converged) == ("not converged", False)


def test_a_network_has_saddles_and_the_search_finds_one_whose_index_is_that_of_the_dense_matrix():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(30, 3, dtype=DOUBLE)
    y = torch.stack([x.prod(1), x[:, 0] * x[:, 1]], dim=1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    objective = Objective(model, lambda m, b: (m(b[0]) - b[1]).square().mean(), [(x, y)])
    found = find_critical(objective, steps=300)
    assert found.outcome == "critical"
    assert float(objective.at(found.point).gradient().norm()) <= 1.5e-8
    assert examine(objective.at(found.point)).kind in ("saddle", "degenerate", "minimum")
    assert found.products <= 300 * objective.size


def test_wishes_that_cannot_be_met_are_refused():
    with pytest.raises(ValueError, match="tol > 0"):
        find_critical(surface(oracles.product_pair, 1, 1), tol=-1.0)
    with pytest.raises(ValueError, match="got loss nan where it starts"):
        find_critical(surface(lambda w: w.log().sum(), -1, 1))


def test_what_scipy_calls_success_is_judged():
    objective = surface(oracles.product_pair, 1, 1)

    def f(w):
        return (1 - w[0] * w[1]) ** 2

    def slope(w):
        return -2 * (1 - w[0] * w[1]) * w[::-1]

    stuck = scipy.optimize.minimize(f, np.zeros(2))
    assert stuck.success
    assert not verify(objective, stuck).holds
    assert str(verify(objective, stuck)).startswith("The optimiser reports success. It reports a loss of 1; here it is")
    well = verify(objective, scipy.optimize.minimize(f, np.array([0.5, 0.4]), jac=slope, tol=1e-12))
    assert well.point.kind == "minimum"
    assert well.holds
    assert not replace(well, point=replace(well.point, converged=False)).holds


def regression():
    model = nn.Linear(2, 1)
    x, y = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)), torch.ones(20, 1)
    return model, Objective(model, lambda m, b: (m(b[0]) - b[1]).square().mean() + 1, [(x, y)])


def test_models_state_dicts_and_vectors_are_judged_alike():
    model, objective = regression()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.fill_(1)
    flat = torch.tensor([0.0, 0.0, 1.0])
    wrapped = torch.compile(nn.DataParallel(model), backend="eager")
    for found in (model, wrapped, model.state_dict(), wrapped.state_dict(), flat, flat.numpy()):
        judged = verify(objective, found)
        assert judged.point.kind == "minimum"
        assert judged.point.loss == 1
        assert judged.success is None
    torch._dynamo.reset()  # or the process would count as one that compiles
    with pytest.raises(ValueError, match="got none for bias"):
        verify(objective, {"weight": model.weight})
    with pytest.raises(ValueError, match=r"got \(2, 1\) for weight"):
        verify(objective, {"weight": model.weight.T, "bias": model.bias})
    with pytest.raises(TypeError, match="got int"):
        verify(objective, 3)


class Innocent:
    def __reduce__(self):
        return print, ("a file must not run anything",)


def test_weights_on_disk_are_judged(tmp_path, capsys):
    _, objective = regression()
    solved, path = nn.Linear(2, 1), tmp_path / "weights.pt"
    nn.init.zeros_(solved.weight)
    nn.init.ones_(solved.bias)
    state = solved.state_dict()
    for kept in (
        state,
        {"epoch": 3, "optimizer": {"lr": 1}, "model": state},
        {f"module.{k}": t for k, t in state.items()},
    ):
        torch.save(kept, path)
        for name in (path, str(path)):
            judged = verify(objective, name)
            assert (judged.point.kind, judged.point.loss) == ("minimum", 1)
    torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match="got none for weight"):
        verify(objective, path)
    for content in (Innocent(), None):
        torch.save(content, path) if content else path.write_bytes(b"not a file of weights")
        with pytest.raises(ValueError, match=r"state dict that torch\.save wrote is needed, got weights"):
            verify(objective, path)
    assert capsys.readouterr().out == ""
    with pytest.raises(FileNotFoundError, match="nowhere"):
        verify(objective, tmp_path / "nowhere.pt")


def test_safetensors_are_read_where_that_package_is(tmp_path):
    _, objective = regression()
    path = tmp_path / "weights.safetensors"
    if importlib.util.find_spec("safetensors") is None:
        with pytest.raises(ValueError, match="package safetensors is needed for weights"):
            verify(objective, path)
        return
    weights = {"weight": torch.zeros(1, 2), "bias": torch.ones(1)}
    importlib.import_module("safetensors.torch").save_file(weights, path)
    assert verify(objective, path).point.loss == 1


class Quadratic(nn.Module):
    def __init__(self, curvatures):
        super().__init__()
        self.curvatures = torch.tensor(curvatures, dtype=DOUBLE)
        self.w = nn.Parameter(torch.ones(len(curvatures), dtype=DOUBLE))

    def forward(self):
        return (self.curvatures * self.w.square()).sum() / 2


def grows(model, optimizer, steps=400):
    """Whether the optimiser moves away from the minimum at 0."""
    before = float(model().detach())
    for _ in range(steps):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    return float(model().detach()) > before


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"weight_decay": 1.0}])
def test_below_the_limit_descent_is_stable_and_above_it_is_not(options):
    for factor, unstable in ((0.98, False), (1.02, True)):
        model = Quadratic([1.0, 10.0])
        objective = Objective(model, lambda m, b: m(), [torch.ones(1)])
        limit = rate_limit(objective, model, torch.optim.SGD(model.parameters(), lr=0.1, **options)).limit
        optimizer = torch.optim.SGD(model.parameters(), lr=factor * limit, **options)
        assert rate_limit(objective, model, optimizer).share == pytest.approx(factor, rel=1e-6)
        assert grows(model, optimizer) == unstable


def test_the_limit_of_adam_is_that_of_its_frozen_preconditioner():
    model = Quadratic([1.0, 10.0])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    objective = Objective(model, lambda m, b: m(), [torch.ones(1)])
    with pytest.raises(ValueError, match="take a step first"):
        rate_limit(objective, model, optimizer)
    grows(model, optimizer, steps=3)
    found = rate_limit(objective, model, optimizer)
    state = optimizer.state[model.w]
    scales = (state["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8
    assert found.limit == pytest.approx(38 / float((model.curvatures / scales).max()))
    assert "below the limit" in str(found)


def test_optimisers_without_a_known_limit_are_refused():
    model = Quadratic([1.0])
    objective = Objective(model, lambda m, b: m(), [torch.ones(1)])
    with pytest.raises(TypeError, match="got Rprop"):
        rate_limit(objective, model, torch.optim.Rprop(model.parameters()))
    assert math.isinf(
        rate_limit(
            Objective(Quadratic([-1.0]), lambda m, b: m(), [torch.ones(1)]), model, torch.optim.SGD(model.parameters())
        ).limit
    )
