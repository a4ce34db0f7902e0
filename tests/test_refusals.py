"""What cannot be computed is refused with one sentence, whichever public function is asked for it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unstuck.critical import escape, examine, find_critical, gradient_noise, rate_limit, verify
from unstuck.curvature import (
    dense,
    density,
    diagonal,
    eigenpairs,
    empirical_fisher,
    fisher,
    gauss_newton,
    hessian,
    sampled_fisher,
    solve,
    to_scipy,
    trace,
    xtrace,
)
from unstuck.objective import Objective


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def product_with(matrix):
    return lambda o: matrix(o) @ o.point


def sgd(objective):
    return torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)


CALLS = {
    "gradient": lambda o: o.gradient(),
    "product": lambda o: o.product(o.point),
    "dense": lambda o: dense(hessian(o)),
    "restricted": lambda o: hessian(o, where=["bias"]) @ torch.ones(3),
    "to_scipy": lambda o: to_scipy(hessian(o)).matvec(o.point.numpy()),
    "eigenpairs": lambda o: eigenpairs(hessian(o)),
    "density": lambda o: density(hessian(o)),
    "trace": lambda o: trace(hessian(o)),
    "xtrace": lambda o: xtrace(hessian(o)),
    "diagonal": lambda o: diagonal(hessian(o)),
    "solve": lambda o: solve(hessian(o), o.point),
    "gauss_newton": product_with(gauss_newton),
    "fisher": product_with(fisher),
    "sampled_fisher": product_with(lambda o: sampled_fisher(o, 1)),
    "empirical_fisher": product_with(empirical_fisher),
    "examine": examine,
    "escape": escape,
    "find_critical": find_critical,
    "verify": lambda o: verify(o, o.point),
    "rate_limit": lambda o: rate_limit(o, nn.Linear(4, 3), sgd(o)),
    "gradient_noise": gradient_noise,
}
NO_SCALARS = {
    "a vector": (lambda m, b: m(b[0]), "got a torch.float32 of shape (5, 3)"),
    "a tuple": (lambda m, b: (cross_entropy(m, b), m(b[0])), "got a tuple"),
    "a dict": (lambda m, b: {"loss": cross_entropy(m, b)}, "got a dict"),
    "a string": (lambda m, b: "loss\nof two lines", "got a str"),
    "nothing": (lambda m, b: None, "got None"),
    "a float": (lambda m, b: cross_entropy(m, b).item(), "got 1."),
    "an integer": (lambda m, b: 3, "got 3"),
    "an integer tensor": (lambda m, b: (m(b[0]).argmax(1) == b[1]).sum(), "got a torch.int64"),
    "a complex number": (lambda m, b: torch.complex(cross_entropy(m, b), m.bias.sum()), "got a torch.complex64"),
}
NO_SLOPES = {
    "detached": lambda m, b: cross_entropy(m, b).detach(),
    "another model's": lambda m, b: F.cross_entropy(nn.Linear(4, 3)(b[0]), b[1]),
    "without gradients": torch.no_grad()(cross_entropy),
}


def objective_with(loss):
    torch.manual_seed(0)
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    return Objective(nn.Linear(4, 3), loss, [(x[:5], y[:5]), (x[5:], y[5:])])


def sentence(call, objective, kind):
    with pytest.raises(kind) as caught:
        CALLS[call](objective)
    said = str(caught.value)
    assert "\n" not in said
    assert ". " not in said
    assert len(said) < 300
    return said


@pytest.mark.parametrize("call", CALLS)
def test_a_loss_that_is_no_real_number_is_refused_by_what_it_is(call):
    for name, (loss, told) in NO_SCALARS.items():
        said = sentence(call, objective_with(loss), TypeError)
        assert "the loss must be a tensor with one real number" in said, name
        assert told in said


@pytest.mark.parametrize("call", CALLS)
def test_a_loss_that_no_weight_changes_is_refused(call):
    for name, loss in NO_SLOPES.items():
        said = sentence(call, objective_with(loss), ValueError)
        assert any(part in said for part in ("depends on none", "depend on none", "calls neither")), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("call", [name for name in CALLS if name != "gradient"])
def test_a_loss_that_is_not_finite_is_refused(call, bad):
    said = sentence(call, objective_with(lambda m, b: cross_entropy(m, b) * bad), ValueError)
    assert "finite" in said
    assert any(word in said for word in ("nan", "inf", "NaN"))


class Power(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        return 2 * ctx.saved_tensors[0] * slope


@pytest.mark.parametrize("call", [name for name in CALLS if name not in ("gradient", "gradient_noise")])
def test_a_loss_without_second_derivatives_is_refused(call):
    said = sentence(call, objective_with(lambda m, b: F.cross_entropy(Power.apply(m(b[0])), b[1])), ValueError)
    assert "second derivatives" in said


def test_loaders_without_batches_and_models_without_weights_are_refused():
    empty = torch.utils.data.DataLoader([], batch_size=4)
    with pytest.raises(ValueError, match="at least one batch, got none"):
        Objective(nn.Linear(4, 3), cross_entropy, empty)
    with pytest.raises(ValueError, match="parameter with requires_grad=True, the model has none"):
        Objective(nn.ReLU(), cross_entropy, [(torch.ones(1, 4), torch.zeros(1).long())])
    with pytest.raises(ValueError, match="at least one parameter, got none"):
        Objective.of_terms(objective_with(cross_entropy).terms, {})
