"""Functions with a backward of the user's own: right ones are taken, and wrong ones are named before they lie."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unstuck.critical import examine
from unstuck.curvature import dense, eigenpairs, fisher, gauss_newton, hessian, outputs, trace
from unstuck.objective import Objective


def function(forward, backward):
    return type(
        "Own", (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )


def saving_the_input(f):
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return f(x)

    return forward


def saving_the_output(ctx, x):
    y = x.tanh()
    ctx.save_for_backward(y)
    return y


def saving_a_byproduct(ctx, x):
    y = x.tanh()
    ctx.save_for_backward(1 - y**2)
    return y


def keeping_the_output(ctx, x):
    ctx.y = x.tanh()
    return ctx.y.clone()


def without_grad(ctx, slope):
    with torch.no_grad():
        return slope * (1 - torch.tanh(ctx.saved_tensors[0]) ** 2)


def in_numpy(ctx, slope):
    rise = 1 - np.tanh(ctx.saved_tensors[0].detach().numpy()) ** 2
    return torch.from_numpy(slope.detach().numpy() * rise)


def sine_and_square(x):
    return torch.sin(x) + x**2


tanh = saving_the_input(torch.tanh)
WRONG = {
    "a detached input": function(tanh, lambda ctx, s: s * (1 - torch.tanh(ctx.saved_tensors[0].detach()) ** 2)),
    "a byproduct of the forward": function(saving_a_byproduct, lambda ctx, s: s * ctx.saved_tensors[0]),
    "an output kept aside": function(keeping_the_output, lambda ctx, s: s * (1 - ctx.y**2)),
    "half of it detached": function(
        saving_the_input(sine_and_square),
        lambda ctx, s: s * (torch.cos(ctx.saved_tensors[0].detach()) + 2 * ctx.saved_tensors[0]),
    ),
    "no_grad": function(tanh, without_grad),
    "NumPy": function(tanh, in_numpy),
    "a detached slope": function(tanh, lambda ctx, s: s.detach() * (1 - torch.tanh(ctx.saved_tensors[0]) ** 2)),
}
RIGHT = {
    "by its input": (function(tanh, lambda ctx, s: s * (1 - torch.tanh(ctx.saved_tensors[0]) ** 2)), torch.tanh),
    "by its output": (function(saving_the_output, lambda ctx, s: s * (1 - ctx.saved_tensors[0] ** 2)), torch.tanh),
    "a kink": (function(saving_the_input(F.relu), lambda ctx, s: s * (ctx.saved_tensors[0] > 0)), F.relu),
    "straight through": (function(lambda ctx, x: 2 * x, lambda ctx, s: 2 * s), lambda x: 2 * x),
}


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).to(dtype)


def objective_of(f, dtype=torch.float64, mark=lambda z: z):
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)

    def loss(model, batch):
        inner = model[3](model[2](f(model[0](batch[0]))))
        return F.cross_entropy(mark(model[4](f(inner))), batch[1])

    return Objective(network(dtype), loss, [(x[:8], torch.arange(8) % 3), (x[8:], torch.tensor([2]))])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WRONG)
def test_a_backward_that_hides_derivatives_is_named(name, dtype):
    if dtype == torch.bfloat16 and name in ("NumPy", "half of it detached"):
        pytest.skip("eight bits do not show a part of the movement, and NumPy has no bfloat16")
    objective = objective_of(WRONG[name].apply, dtype)
    assert objective.gradient().isfinite().all()
    with pytest.raises(ValueError, match="second derivatives, got the custom function Own, which hides some"):
        objective.product(objective.point)


@pytest.mark.parametrize("ask", [examine, lambda o: eigenpairs(hessian(o)), lambda o: trace(hessian(o))])
def test_whatever_asks_for_curvature_passes_it_on(ask):
    with pytest.raises(ValueError, match="custom function Own"):
        ask(objective_of(WRONG["a detached input"].apply))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RIGHT)
def test_one_that_hides_none_gives_the_curvature_of_the_same_function_of_torch(name, dtype):
    own, plain = RIGHT[name]
    objective, expected = objective_of(own.apply, dtype), objective_of(plain, dtype)
    if dtype == torch.bfloat16:
        objective.product(objective.point)
        return
    torch.testing.assert_close(dense(hessian(objective)), dense(hessian(expected)))
    torch.testing.assert_close(dense(gauss_newton(objective)), dense(gauss_newton(expected)))


def test_the_proof_costs_two_losses_and_is_made_once():
    own, calls = RIGHT["by its input"][0].apply, []

    def loss(model, batch):
        calls.append(1)
        return own(model(batch)).square().mean()

    objective = Objective(network(), loss, [torch.ones(2, 4, dtype=torch.float64)] * 5)
    objective.value()
    calls.clear()
    objective.product(objective.point)
    assert len(calls) == 5 + 2


def test_a_matrix_product_of_ones_own_passes():
    def backward(ctx, slope):
        x, w = ctx.saved_tensors
        return slope @ w, slope.T @ x

    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.T

    linear, model = function(forward, backward).apply, network()
    x = torch.randn(7, 4, dtype=torch.float64)
    own, plain = (
        Objective(model, lambda m, b, f=f: f(torch.tanh(f(b, m[0].weight)), m[4].weight).square().mean(), [x])
        for f in (linear, F.linear)
    )
    torch.testing.assert_close(dense(hessian(own)), dense(hessian(plain)))


@pytest.mark.parametrize("name", ["a detached input", "an output kept aside"])
def test_the_gauss_newton_matrix_needs_only_the_slopes_of_the_model(name):
    own, plain = objective_of(WRONG[name].apply), objective_of(torch.tanh)
    for matrix in (gauss_newton, fisher):
        torch.testing.assert_close(dense(matrix(own)), dense(matrix(plain)))
    for wrong in ("no_grad", "NumPy", "a detached slope"):
        with pytest.raises(ValueError, match="custom function Own"):
            gauss_newton(objective_of(WRONG[wrong].apply)) @ own.point


def test_and_the_second_derivatives_of_the_loss():
    def loss(of):
        return lambda model, batch: of(outputs(model(batch[0]))).square().mean()

    model, batch = network(), (torch.randn(5, 4, dtype=torch.float64),)
    with pytest.raises(ValueError, match="custom function Own"):
        A = gauss_newton(Objective(model, loss(WRONG["a detached input"].apply), [batch]))
        A @ torch.ones(A.size, dtype=torch.float64)
    own, plain = (Objective(model, loss(f), [batch]) for f in (RIGHT["by its input"][0].apply, torch.tanh))
    torch.testing.assert_close(dense(gauss_newton(own)), dense(gauss_newton(plain)))


def test_checkpoints_are_taken_but_for_the_reentrant_kind_which_hides_weights():
    def loss(model, batch, reentrant):
        z = checkpoint(model[:4], batch[0].clone().requires_grad_(), use_reentrant=reentrant)
        return F.cross_entropy(model[4](z), batch[1])

    batch = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3
    model = network()
    plain = Objective(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), [batch])
    taken, hidden = (Objective(model, lambda m, b, r=r: loss(m, b, r), [batch]) for r in (False, True))
    torch.testing.assert_close(dense(hessian(taken)), dense(hessian(plain)))
    for ask in (hidden.gradient, lambda: hidden.product(plain.point), lambda: gauss_newton(hidden) @ plain.point):
        with pytest.raises(ValueError, match="reentrant checkpoint, which hides them"):
            ask()


def test_compiled_parts_of_a_model_are_computed_as_they_were_written():
    def backend(graph, inputs):
        raise AssertionError("what it makes has no second derivatives")

    model, batch = network(), (torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3)
    expected = Objective(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), [batch])
    parts = nn.Sequential(torch.compile(model[:4], backend=backend), model[4])
    objective = Objective(parts, lambda m, b: F.cross_entropy(m(b[0]), b[1]), [batch])
    torch.testing.assert_close(dense(hessian(objective)), dense(hessian(expected)))
    torch.testing.assert_close(dense(gauss_newton(objective)), dense(gauss_newton(expected)))
    torch._dynamo.reset()  # or the process would count as one that compiles
