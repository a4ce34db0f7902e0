"""Curvature, critical points and optimisers on a GPU agree with a CPU in double precision."""

import pytest
import torch
from gpu_programs import Block, Recurrent
from torch import nn
from torch.nn import functional as F

import unstuck
from unstuck import Objective, optim
from unstuck.critical import examine, find_critical, rate_limit
from unstuck.testing import check_operator


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.head = Block(8, 2, 0.0), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.block(x).mean(1))


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)), (6,)),
    "cnn": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)),
        (2, 6, 6),
    ),
    "lstm": (lambda: nn.Sequential(Recurrent(), nn.Tanh(), nn.Linear(4, 3)), (5, 6)),
    "attention": (Attentive, (5, 8)),
}


def objective(name, device, dtype, *, rows=(12, 12, 7), **options):
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().double()
    g = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(n, *shape, generator=g, dtype=torch.float64), torch.randint(0, 3, (n,), generator=g)) for n in rows
    ]
    model = model.to(device, dtype).eval()
    moved = [(x.to(device, dtype), y.to(device)) for x, y in batches]
    return Objective(model, loss, moved, **options), model


def pair(name, device, dtype=torch.float32, **options):
    return objective(name, device, dtype, **options)[0], objective(name, "cpu", torch.float64)[0]


def vector(size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(there, here, rtol):
    there = torch.as_tensor(there).detach().cpu().double()
    here = torch.as_tensor(here).detach().double()
    assert float((there - here).norm()) <= rtol * float(here.norm()), (there, here)


PRECISION = [(torch.float32, 2e-5), (torch.float64, 1e-11)]


@pytest.mark.parametrize(("dtype", "rtol"), PRECISION)
@pytest.mark.parametrize("name", MODELS)
def test_value_gradient_and_products(name, dtype, rtol, device):
    there, here = pair(name, device, dtype)
    v = vector(here.size)
    close(there.value(), here.value(), rtol)
    close(there.gradient(), here.gradient(), 5 * rtol)
    operators = {"hessian": unstuck.hessian, "gauss_newton": unstuck.gauss_newton, "fisher": unstuck.fisher}
    for kind in (*operators, "empirical"):
        make = operators.get(kind, unstuck.empirical_fisher)
        close(make(there) @ v.to(device, dtype), make(here) @ v, 5 * rtol)
    check_operator(unstuck.hessian(there))


def test_products_are_exact_though_the_script_has_asked_for_fewer_digits(device):
    torch.set_float32_matmul_precision("high")
    try:
        there, here = pair("cnn", device)
        v = vector(here.size)
        close(unstuck.hessian(there) @ v.to(device, torch.float32), unstuck.hessian(here) @ v, 1e-4)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("memory", [None, 3e5])
def test_memory_decides_on_a_device_too(memory, device):
    there, here = pair("mlp", device, memory=memory)
    v = vector(here.size)
    for _ in range(2):
        close(unstuck.hessian(there) @ v.to(device, torch.float32), unstuck.hessian(here) @ v, 1e-4)
    print(there.plan)
    assert there.plan.kept + there.plan.rebuilt >= 3


def generator():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_estimates_with_the_same_random_numbers(name, device):
    there, here = (unstuck.hessian(o) for o in pair(name, device, torch.float64))
    a, b = (unstuck.eigenpairs(H, largest=3, smallest=2, generator=generator()) for H in (there, here))
    close(a.values, b.values, 1e-6)
    close(unstuck.trace(there, generator=generator()).samples, unstuck.trace(here, generator=generator()).samples, 1e-8)
    close(
        unstuck.xtrace(there, generator=generator()).estimate,
        unstuck.xtrace(here, generator=generator()).estimate,
        1e-8,
    )
    a, b = (unstuck.diagonal(H, max_products=20, generator=generator()) for H in (there, here))
    close(a.estimate, b.estimate, 1e-8)
    a, b = (unstuck.density(H, steps=12, samples=2, generator=generator()) for H in (there, here))
    close(a.nodes, b.nodes, 1e-4)
    right = vector(here.size)
    close(
        unstuck.solve(there + 5 * unstuck.identity(there.size), right.to(device)).x,
        unstuck.solve(here + 5 * unstuck.identity(here.size), right).x,
        1e-3,
    )


def test_estimates_with_generators_of_the_device(device):
    there, here = (unstuck.hessian(o) for o in pair("mlp", device))
    exact = torch.linalg.eigvalsh(unstuck.dense(here))
    found = unstuck.eigenpairs(there, largest=2, smallest=2)
    close(found.values, torch.cat([exact[:2], exact[-2:]]), 1e-3)
    for estimate in (unstuck.trace(there), unstuck.xtrace(there)):
        assert abs(estimate.estimate - float(exact.sum())) <= 6 * estimate.stderr + 1e-3 * float(exact.abs().sum())
    own = torch.Generator(device).manual_seed(0)
    assert unstuck.density(there, generator=own).products > 0
    close(unstuck.dense(there), unstuck.dense(here), 1e-4)
    sampled = unstuck.sampled_fisher(pair("mlp", device)[0], 2000)
    close(
        sampled @ vector(here.size).to(device, torch.float32),
        unstuck.fisher(pair("mlp", device)[1]) @ vector(here.size),
        0.2,
    )


class Product(nn.Module):
    """(1 − a·b)² with a saddle at the origin."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return (x - self.w[0] * self.w[1]).square().mean()


def at_the_saddle(device):
    model = Product().to(device, torch.float64)
    return Objective(model, lambda m, x: m(x), [torch.ones(1, dtype=torch.float64, device=device)])


def test_a_saddle_is_named_and_left(device):
    there = at_the_saddle(device)
    point = examine(there)
    assert point.kind == "saddle"
    close(point.values, torch.tensor([-2.0, 2.0]), 1e-9)
    assert unstuck.escape(there).decrease == pytest.approx(1.0, abs=1e-6)
    assert str(point) == str(examine(at_the_saddle("cpu")))


def test_points_and_searches_are_those_of_a_cpu(device):
    there, here = pair("mlp", device, torch.float64)
    assert examine(there).to_json().keys() == examine(here).to_json().keys()
    assert examine(there).kind == examine(here).kind
    big = examine(there, dense_up_to=10)  # Lanczos and quadrature
    assert big.largest == pytest.approx(examine(here).largest, rel=5e-3)
    a, b = (find_critical(o, steps=3, space=20) for o in (there, here))
    close(a.gradient_norms, b.gradient_norms, 1e-3)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_the_rate_limit(kind, device):
    limits = []
    for where in (device, torch.device("cpu")):
        o, model = objective("mlp", where, torch.float64)
        optimizer = kind(model.parameters(), lr=0.01)
        o.gradient()
        for p, g in zip(model.parameters(), o.unflatten(o.gradient()), strict=True):
            p.grad = g
        optimizer.step()
        limits.append(rate_limit(o, model, optimizer).limit)
    assert limits[0] == pytest.approx(limits[1], rel=1e-2)


OPTIMISERS = {
    "Quickprop": lambda p: optim.Quickprop(p, lr=0.05),
    "RpropPlus": lambda p: optim.RpropPlus(p, lr=0.01),
    "RMSAdagrad": lambda p: optim.RMSAdagrad(p, lr=0.01),
    "RMSpropFirst": lambda p: optim.RMSpropFirst(p, lr=0.01),
    "Newton": lambda p: optim.Newton(p),
    "DampedNewton": lambda p: optim.DampedNewton(p),
    "DampedNewton from a Krylov space": lambda p: optim.DampedNewton(p, dense_up_to=10),
    "SaddleFreeNewton": lambda p: optim.SaddleFreeNewton(p),
    "LevenbergMarquardt": lambda p: optim.LevenbergMarquardt(p),
    "NegativeCurvatureEscape": lambda p: optim.NegativeCurvatureEscape(torch.optim.SGD(p, lr=0.1), small=10.0),
    "ScipyMinimize": lambda p: optim.ScipyMinimize(p, "trust-krylov", max_iter=3),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_optimiser_steps_as_on_a_cpu(name, device):
    if name == "ScipyMinimize":
        pytest.importorskip("scipy")
    ends = []
    for where in (device, torch.device("cpu")):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double().to(where)
        x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(where)
        y = x.prod(1, keepdim=True)
        optimizer = OPTIMISERS[name](list(model.parameters()))

        def closure(model=model, x=x, y=y, optimizer=optimizer):
            residuals = model(x) - y
            value = residuals if name == "LevenbergMarquardt" else residuals.square().mean()
            if name in ("Quickprop", "RpropPlus", "RMSAdagrad", "RMSpropFirst"):
                optimizer.zero_grad()
                value.backward()
            return value

        for _ in range(1 if name == "Newton" else 3):  # it may leap far along a small eigenvalue
            optimizer.step(closure)
        ends.append(torch.cat([p.detach().flatten().cpu() for p in model.parameters()]))
    close(ends[0], ends[1], 1e-3 if "Escape" in name else 1e-5)  # whose line search ends at a tolerance


@pytest.mark.parametrize("layer", [optim.BatchRenorm1d])
def test_batch_renormalisation_lies_where_its_input_does(layer, device):
    model = layer(5).to(device)
    out = model(torch.randn(8, 5, device=device))
    assert out.device.type == device.type
