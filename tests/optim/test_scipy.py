"""ScipyMinimize against SciPy with derivatives by hand, and against the lectures' table of solvers on a saddle."""

import copy
import importlib
import subprocess
import sys

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import nn

from unstuck import testing
from unstuck.objective import Objective
from unstuck.optim import ScipyMinimize

METHODS = ("BFGS", "L-BFGS-B", "CG", "Newton-CG", "trust-ncg", "trust-krylov", "trust-exact", "trust-constr")


def rosenbrock(w):
    return 100 * (w[1] - w[0] ** 2) ** 2 + (1 - w[0]) ** 2


def weights(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("method", METHODS)
def test_the_path_is_that_of_scipy_with_derivatives_by_hand(method):
    w = weights(-1.2, 1.0)
    optimizer = ScipyMinimize([w], method, max_iter=7)
    first = optimizer.step(lambda: rosenbrock(w))
    second = {"hess": scipy.optimize.rosen_hess} if method == "trust-exact" else {}
    if method in ("Newton-CG", "trust-ncg", "trust-krylov", "trust-constr"):
        second = {"hessp": scipy.optimize.rosen_hess_prod}
    found = scipy.optimize.minimize(
        scipy.optimize.rosen,
        [-1.2, 1.0],
        jac=scipy.optimize.rosen_der,
        method=method,
        options={"maxiter": 7},
        **second,
    )
    np.testing.assert_allclose(w.detach().numpy(), found.x, rtol=1e-8)
    assert float(first) == pytest.approx(24.2)
    assert optimizer.last.loss == pytest.approx(found.fun, rel=1e-7)
    assert optimizer.last.iterations == found.nit
    assert optimizer.last.message == found.message
    assert (optimizer.last.products > 0) == bool(second)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_method_finds_the_minimum_of_a_ravine(method, dtype):
    w = weights(-1.2, 1.0, dtype=dtype)
    optimizer = ScipyMinimize([w], method, max_iter=500)
    start = optimizer.step(lambda: rosenbrock(w))
    assert start.dtype == w.dtype == dtype
    torch.testing.assert_close(
        w.detach(), torch.ones(2, dtype=dtype), rtol=0, atol=0.05 if dtype.itemsize == 4 else 1e-3
    )


@pytest.mark.parametrize("method", [m for m in METHODS if m != "trust-constr"])
def test_only_trust_exact_leaves_the_stable_line_of_a_saddle_and_none_the_saddle(method):
    for start, leaves in (((0.1, 0.2), True), ((1e-3, -1e-3), False), ((0.5, -0.5), False), ((0.0, 0.0), False)):
        w = weights(*start)
        optimizer = ScipyMinimize([w], method)
        optimizer.step(lambda w=w: (1 - w[0] * w[1]) ** 2)
        leaves = leaves or (method == "trust-exact" and any(start))
        assert optimizer.last.loss == pytest.approx(0 if leaves else 1, abs=1e-5), start


def regression(seed=0):
    """A model, its batch, and a closure; a frozen and an unused parameter among them."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    model.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    model[2].bias.requires_grad_(False)
    x = torch.randn(20, 3, dtype=torch.float64)
    y = x.prod(1, keepdim=True)
    return model, lambda: nn.functional.mse_loss(model(x), y), (x, y)


def test_gradient_and_products_are_in_the_order_of_an_objective(monkeypatch):
    model, closure, batch = regression()
    objective = Objective(model, lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]), [batch])
    optimizer = ScipyMinimize(model.parameters(), "trust-ncg")
    seen = {}

    def minimize(fun, x0, **given):
        loss, slope = fun(x0)
        v = np.linspace(-1, 1, len(x0))
        seen.update(x=x0, loss=loss, slope=slope, v=v, bent=given["hessp"](x0, v))
        return scipy.optimize.OptimizeResult(x=x0, fun=loss, nit=0, success=True, message="")

    monkeypatch.setattr(scipy.optimize, "minimize", minimize)
    optimizer.step(closure)
    torch.testing.assert_close(torch.from_numpy(seen["x"]), objective.point, rtol=0, atol=0)
    torch.testing.assert_close(torch.from_numpy(seen["slope"]), objective.gradient())
    torch.testing.assert_close(torch.from_numpy(seen["bent"]), objective.product(torch.from_numpy(seen["v"])))


@pytest.mark.parametrize("method", METHODS)
def test_gradients_frozen_and_unused_parameters_are_left_alone(method):
    model, closure, _ = regression()
    marks = [torch.full_like(p, 7) for p in model.parameters()]
    for p, mark in zip(model.parameters(), marks, strict=True):
        p.grad = mark
    frozen, unused = model[2].bias.clone(), model.unused.clone()
    before = closure().item()
    optimizer = ScipyMinimize(model.parameters(), method, max_iter=30)
    assert optimizer.step(closure).item() == before
    assert all(p.grad is mark and bool((mark == 7).all()) for p, mark in zip(model.parameters(), marks, strict=True))
    assert torch.equal(model[2].bias, frozen)
    # in a direction without gradient or curvature trust-exact goes to the edge of its region
    assert method == "trust-exact" or torch.equal(model.unused, unused)
    assert optimizer.last.loss == closure().item() < before / 2


def test_steps_from_a_restored_state_are_those_of_the_straight_run():
    model, closure, _ = regression()
    optimizer = ScipyMinimize(model.parameters(), "L-BFGS-B", max_iter=3, options={"maxcor": 5})
    optimizer.step(closure)
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    optimizer.step(closure)
    other, again, _ = regression()
    resumed = ScipyMinimize(other.parameters(), "BFGS")
    other.load_state_dict(kept[0])
    resumed.load_state_dict(kept[1])
    resumed.step(again)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_copy_of_the_optimiser_goes_the_same_way():
    w = weights(-1.2, 1.0)
    optimizer = ScipyMinimize([w], "CG", max_iter=5)
    twin = copy.deepcopy(optimizer)
    (v,) = twin.param_groups[0]["params"]
    twin.step(lambda: rosenbrock(v))
    assert w.tolist() == [-1.2, 1.0]
    optimizer.step(lambda: rosenbrock(w))
    assert torch.equal(v, w)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_passes_the_exam_of_an_optimiser(method):
    testing.check_optimizer(
        lambda params: ScipyMinimize(params, method, max_iter=3),
        step=lambda optimizer, residuals: optimizer.step(lambda: residuals().square().mean()),
    )


def test_groups_and_names_of_parameters_are_one_vector():
    w, v = weights(-1.2), weights(1.0)
    optimizer = ScipyMinimize([{"params": [("w", w)]}, {"params": [("v", v)]}], "BFGS")
    optimizer.step(lambda: rosenbrock(torch.cat([w, v])))
    assert torch.cat([w, v]).tolist() == pytest.approx([1, 1], abs=1e-4)


def test_a_sparse_gradient_is_the_dense_one():
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(5, 2, sparse=sparse)
        rows = torch.tensor([0, 3])
        optimizer = ScipyMinimize(table.parameters(), "L-BFGS-B", max_iter=5)
        optimizer.step(lambda table=table, rows=rows: (table(rows) - 1).square().sum())
        found.append(table.weight.detach().clone())
    assert torch.equal(*found)
    assert torch.allclose(found[0][rows], torch.ones(2, 2), atol=1e-4)


def test_a_closure_that_raises_leaves_the_weights_as_they_were():
    w = weights(-1.2, 1.0)
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return rosenbrock(w)

    with pytest.raises(KeyboardInterrupt):
        ScipyMinimize([w], "BFGS").step(closure)
    assert w.tolist() == [-1.2, 1.0]


def test_a_closure_that_moves_the_weights_is_refused_and_they_are_put_back():
    w = weights(-1.2, 1.0)

    def closure():
        with torch.no_grad():
            w.mul_(2)
        return rosenbrock(w)

    with pytest.raises(ValueError, match="leave the parameters alone"):
        ScipyMinimize([w], "BFGS").step(closure)
    assert w.tolist() == [-1.2, 1.0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("method", ["BFGS", "CG", "trust-ncg"])
def test_a_loss_without_a_bottom_does_not_carry_the_weights_to_infinity(method):
    w = weights(1.0, 2.0, dtype=torch.float32)
    optimizer = ScipyMinimize([w], method, max_iter=1000)
    optimizer.step(lambda: -(w**4).sum())
    assert bool(w.isfinite().all())
    assert optimizer.last.loss == pytest.approx(-(w.detach() ** 4).sum().item())
    assert not optimizer.last.converged


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda w: ScipyMinimize([w], "BFSG"), ValueError, "one of BFGS.*got 'BFSG'"),
        (lambda w: ScipyMinimize([w], "BFGS", maxiter=3), TypeError, "maxiter"),
        (lambda w: ScipyMinimize([w], "BFGS", max_iter=0), ValueError, "max_iter=0"),
        (lambda w: ScipyMinimize([w], "BFGS", tol=-1.0), ValueError, "tol=-1"),
        (lambda w: ScipyMinimize([w], "BFGS", memory=30), ValueError, "use L-BFGS-B or trust-krylov"),
        (lambda w: ScipyMinimize([w.detach()], "BFGS"), ValueError, "unfreeze"),
        (lambda w: ScipyMinimize([w.to(torch.complex64).detach().requires_grad_()], "CG"), TypeError, "complex64"),
        (
            lambda w: ScipyMinimize([{"params": [w]}, {"params": [weights(1.0)], "tol": 1.0}], "CG"),
            ValueError,
            "same options",
        ),
        (lambda w: ScipyMinimize([w], "CG").step(), ValueError, "needs a closure"),
        (lambda w: ScipyMinimize([w], "CG").step(lambda: 3.0), TypeError, "got 3.0"),
        (lambda w: ScipyMinimize([w], "CG").step(lambda: w.detach().sum()), ValueError, "depend on a parameter"),
        (lambda w: ScipyMinimize([w], "CG").step(lambda: w.sum() / 0), ValueError, "finite loss, got"),
        (lambda w: ScipyMinimize([w], "CG", options={"gtoll": 1}).step(w.sum), ValueError, "gtoll"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(call, error, words):
    with pytest.raises(error, match=words):
        call(weights(-1.2, 1.0))


def test_a_closure_that_calls_backward_is_told_so():
    w = weights(-1.2, 1.0)

    def closure():
        loss = rosenbrock(w)
        loss.backward()
        return loss

    with pytest.raises(ValueError, match="leave backward"):
        ScipyMinimize([w], "BFGS").step(closure)


def test_without_scipy_the_room_can_be_imported_and_the_adapter_says_what_it_needs(monkeypatch):
    script = (
        "import sys; sys.modules['scipy'] = None; sys.modules['scipy.optimize'] = None\n"
        "import torch, unstuck.optim\n"
        "try:\n    unstuck.optim.ScipyMinimize([torch.ones(1, requires_grad=True)], 'BFGS')\n"
        "except ModuleNotFoundError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "ScipyMinimize needs SciPy, which is not installed: pip install 'unstuck[studies]'\n"
    assert importlib.util.find_spec("scipy")
