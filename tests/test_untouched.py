"""What every public call must leave as it was, whether it returns, raises or is interrupted."""

import copy
import dataclasses
import random
import signal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
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
from unstuck.testing import check_operator


class Everything(nn.Module):
    """Train-mode batch norm and dropout, a layer in eval mode, a frozen and a tied weight, and a hook."""

    def __init__(self):
        super().__init__()
        self.frozen, self.norm, self.still = nn.Linear(3, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2)
        self.drop, self.one, self.two = nn.Dropout(0.3), nn.Linear(2, 2), nn.Linear(2, 2)
        self.two.weight = self.one.weight
        self.frozen.requires_grad_(False)
        self.still.eval()
        self.seen = []  # training flags, as a hook of the user finds them
        self.register_forward_hook(lambda module, args, out: self.seen.append([m.training for m in module.modules()]))

    def forward(self, x):
        return self.two(torch.tanh(self.one(self.still(self.drop(self.norm(self.frozen(x)))))))


class World:
    """A training at rest, with a loss that writes, draws and may break off at its n-th call or backward pass."""

    def __init__(self):
        torch.manual_seed(4)
        self.model = Everything().double()
        x, y = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 2
        self.batches = [(x[:5], y[:5]), (x[5:], y[5:])]
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        F.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        self.model.two.bias.grad = None
        self.events, self.fatal, self.error = {"loss": 0, "backward": 0}, {}, KeyError
        self.flags = [m.training for m in self.model.modules()]
        self.objective = Objective(self.model, self.loss, self.batches)

    def loss(self, model, batch):
        z = model(batch[0])
        model.eval()
        scale = 1 + 0.1 * (float(torch.rand(())) + random.random() + float(np.random.rand()))
        self.happens("loss")
        if z.requires_grad:
            z.register_hook(lambda slope: self.happens("backward"))
        return scale * F.cross_entropy(z, batch[1])

    def happens(self, event):
        self.events[event] += 1
        if self.events[event] == self.fatal.get(event):
            if self.error is KeyboardInterrupt:
                signal.raise_signal(signal.SIGINT)  # Ctrl-C
            raise self.error

    def surroundings(self):
        """All that is not ours, in values that can be compared."""
        precision = torch.backends.mkldnn.matmul.fp32_precision
        return copy.deepcopy(
            {
                "state": self.model.state_dict(),
                "gradients": [p.grad for p in self.model.parameters()],
                "leaves": [p.requires_grad for p in self.model.parameters()],
                "modes": [m.training for m in self.model.modules()],
                "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.model.modules()],
                "optimizer": self.optimizer.state_dict(),
                "batches": self.batches,
                "generators": (torch.get_rng_state(), random.getstate(), list(np.random.get_state())),
                "precision": (precision, torch.get_float32_matmul_precision(), torch.get_default_dtype()),
                "gradient mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
                "deterministic": (
                    torch.are_deterministic_algorithms_enabled(),
                    torch.is_deterministic_algorithms_warn_only_enabled(),
                ),
                "attention": [getattr(torch.backends.cuda, f"{k}_sdp_enabled")() for k in ("math", "flash", "cudnn")],
                "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
                "threads": torch.get_num_threads(),
            }
        )


def assert_same(a, b, where="", *, rtol=0.0, atol=0.0):
    """Bit for bit, if no tolerance is given."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where} {key}", rtol=rtol, atol=atol)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for k, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where} {k}", rtol=rtol, atol=atol)
    elif dataclasses.is_dataclass(a):
        assert_same(vars(a), vars(b), where, rtol=rtol, atol=atol)
    elif isinstance(a, Tensor | np.ndarray | float):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True, msg=where)
    else:
        assert a == b, where


def way_down(o):
    return torch.linspace(-1, 1, o.size, dtype=o.dtype)


def of_the_hessian(ask):
    return lambda w: ask(hessian(w.objective))


def once(matrix):
    return lambda w: matrix(w.objective) @ way_down(w.objective)


CALLS = {
    "Objective": lambda w: Objective(w.model, w.loss, w.batches).point,
    "value": lambda w: w.objective.value(),
    "gradient": lambda w: w.objective.gradient(),
    "value_and_gradient": lambda w: w.objective.value_and_gradient(),
    "product": lambda w: [w.objective.product(v) for v in torch.eye(w.objective.size, dtype=torch.float64)[:3]],
    "at": lambda w: w.objective.at(w.objective.point + 1).product(way_down(w.objective)),
    "restrict": lambda w: hessian(w.objective, where=["one"]) @ torch.ones(6, dtype=torch.float64),
    "gauss_newton": once(gauss_newton),
    "fisher": once(fisher),
    "sampled_fisher": once(lambda o: sampled_fisher(o, 2)),
    "empirical_fisher": once(empirical_fisher),
    "dense": of_the_hessian(dense),
    "eigenpairs": of_the_hessian(lambda H: eigenpairs(H, max_products=6)),
    "eigenpairs, warm": of_the_hessian(lambda H: eigenpairs(H, start=torch.ones(H.size), max_products=6)),
    "density": of_the_hessian(lambda H: density(H, steps=4, samples=2)),
    "trace": of_the_hessian(lambda H: trace(H, max_products=10)),
    "xtrace": of_the_hessian(lambda H: xtrace(H, products=8)),
    "diagonal": of_the_hessian(lambda H: diagonal(H, max_products=6)),
    "solve": of_the_hessian(lambda H: solve(H, torch.ones(H.size, dtype=H.dtype), max_products=8)),
    "to_scipy": of_the_hessian(lambda H: to_scipy(H).matvec(np.ones(H.size))),
    "check_operator": of_the_hessian(check_operator),
    "examine": lambda w: examine(w.objective),
    "examine, ends": lambda w: examine(w.objective, dense_up_to=0, max_products=8),
    "escape": lambda w: escape(w.objective),
    "find_critical": lambda w: find_critical(w.objective, steps=2, space=3),
    "verify": lambda w: verify(w.objective, w.model),
    "rate_limit": lambda w: rate_limit(w.objective, w.model, w.optimizer),
    "gradient_noise": lambda w: gradient_noise(w.objective),
}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_of_the_caller_s_changes_whether_a_call_returns_raises_or_is_interrupted(name):
    world, call = World(), CALLS[name]
    before = world.surroundings()
    expected = call(world)
    assert_same(before, world.surroundings(), "after success:")
    assert all(seen == world.flags for seen in world.model.seen[1:])  # the first was the training's
    counts = dict(world.events)
    rounding = {"rtol": 1e-7, "atol": 1e-9}  # a search amplifies what the alignment of its memory decides
    assert_same(expected, call(World()), "repeated:", **rounding)
    for error in (KeyError, KeyboardInterrupt):
        for event in ("loss", "backward"):
            for n in sorted({1, counts[event] // 2 + 1} if counts[event] else {}):
                world = World()
                before = world.surroundings()
                world.fatal, world.error = {event: n}, error
                with pytest.raises(error):
                    call(world)
                assert_same(before, world.surroundings(), f"{error.__name__} in {event} {n}:")
                world.fatal = {}
                assert_same(expected, call(world), f"used again after {error.__name__} in {event} {n}:", **rounding)


def test_a_shuffling_loader_draws_no_number_of_the_caller_s():
    world = World()
    rows = list(zip(*(torch.cat(part) for part in zip(*world.batches, strict=True)), strict=True))

    def augmented(batch):
        np.random.rand(), random.random()
        return torch.utils.data.default_collate(batch)

    before = world.surroundings()
    loader = torch.utils.data.DataLoader(rows, 3, shuffle=True, collate_fn=augmented)
    objective = Objective(world.model, world.loss, loader)
    assert [term.weight for term in objective.terms] == [3, 3, 2]
    objective.gradient()
    assert_same(before, world.surroundings())


def test_no_public_function_is_left_out():
    import unstuck.critical
    import unstuck.curvature

    asked = {name.partition(",")[0] for name in CALLS} | {"hessian"}
    pure = {"classify", "draws", "identity", "outputs"}  # evaluate nothing of the caller's
    for room in (unstuck.critical, unstuck.curvature):
        functions = {name for name in room.__all__ if name.islower()}
        assert functions <= asked | pure
