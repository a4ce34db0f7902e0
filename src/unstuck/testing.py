"""The entrance exams that our own parts pass, for parts that users write."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unstuck.curvature import Operator, draws

Residuals = Callable[[], Tensor]
Drive = Callable[[torch.optim.Optimizer, Residuals], Any]
Factory = Callable[[Any], torch.optim.Optimizer]


def check_operator(A: Operator, *, generator: torch.Generator | None = None) -> None:
    """Raises AssertionError unless A is finite, repeatable, linear and symmetric, and leaves its vectors alone.

    Linearity and symmetry are asked for to √ulp of the operator's dtype, relative to the vectors that meet.
    """
    generator = draws(generator, A.device)
    u, v = torch.randn(2, A.size, generator=generator, dtype=A.dtype, device=generator.device).to(A.device)
    kept = v.clone()
    Au, Av = A @ u, A @ v
    tolerance = torch.finfo(A.dtype).eps ** 0.5
    _expect(torch.equal(v, kept), "a product must leave its vector alone, got another one back: copy before writing")
    _expect(
        Av.shape == v.shape and Av.dtype == v.dtype, f"a product must be like its vector, got {Av.dtype} {Av.shape}"
    )
    _expect(bool(Av.isfinite().all()), "products must be finite, got NaN or infinity")
    _expect(
        torch.equal(A @ v, Av), "a product must be repeatable, got two results: fix random masks and train-mode layers"
    )
    bent = (A @ (2 * u - 3 * v) - (2 * Au - 3 * Av)).norm() / (Au.norm() + Av.norm()).clamp(min=tolerance**4)
    _expect(
        float(bent) <= tolerance, f"an operator must be linear, got A(2u − 3v) off by {float(bent):.1g} of its size"
    )
    # against ‖u‖‖Av‖ and not u·Av, which may be small by chance
    skew = (A.dot(u, Av) - A.dot(v, Au)).abs() / (u.norm() * Av.norm()).clamp(min=tolerance**4)
    _expect(float(skew) <= tolerance, f"an operator must be symmetric, got u·Av and v·Au {float(skew):.1g} apart")


def by_gradients(optimizer: torch.optim.Optimizer, residuals: Residuals) -> Any:
    """One step of a first-order optimiser on the mean of the squared residuals; what `step` returns."""
    optimizer.zero_grad()
    residuals().square().mean().backward()
    return optimizer.step()


def check_optimizer(factory: Factory, *, step: Drive = by_gradients) -> None:
    """Raises AssertionError unless what `factory(params)` makes behaves as an optimiser of torch is expected to.

    It takes parameters or groups of them, float32 and float64; skips a parameter without a gradient; refuses sparse
    gradients and complex parameters in so many words, or treats them rightly; calls a closure and returns its loss;
    leaves `.grad`, the global generator and the grad mode alone; maximizes where it offers to; refuses a misspelt
    keyword; goes on from its state_dict, saved and loaded, as if it had never stopped, bit for bit.

    `step(optimizer, residuals)` takes one step on the mean of residuals()², and returns what the optimiser does. For
    one whose closure returns the loss itself: `lambda optimizer, r: optimizer.step(lambda: r().square().mean())`.

    >>> check_optimizer(lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))
    """
    for check in (
        _check_step,
        _check_closure,
        _check_types,
        _check_resumption,
        _check_groups,
        _check_missing,
        _check_sparse,
        _check_complex,
        _check_maximize,
        _check_keywords,
    ):
        check(factory, step)


class _Fit:
    """A small fit, to whose parameters an optimiser is put."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        own = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=own, dtype=torch.float64).to(dtype)

        self.x, self.y = drawn(7, 3), drawn(7, 2)
        self.w, self.b = torch.nn.Parameter(drawn(3, 2)), torch.nn.Parameter(drawn(2))

    @property
    def params(self) -> list[Tensor]:
        return [self.w, self.b]

    def residuals(self) -> Tensor:
        return torch.tanh(self.x @ self.w + self.b) - self.y

    def without_b(self) -> Tensor:
        return torch.tanh(self.x @ self.w) - self.y

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def _check_step(factory: Factory, step: Drive) -> None:
    fit = _Fit()
    optimizer = factory(fit.params)
    _expect(
        isinstance(optimizer, torch.optim.Optimizer),
        f"a torch.optim.Optimizer is needed, got {type(optimizer).__name__}",
    )
    start, drawn = fit.values(), torch.get_rng_state()
    kept: list[tuple[Tensor, Tensor]] = []

    def note(*_: object) -> None:
        for p in fit.params:
            if p.grad is None:
                p.grad = torch.ones_like(p)
        kept[:] = [(p.grad, p.grad.clone()) for p in fit.params if p.grad is not None]

    optimizer.register_step_pre_hook(note)
    step(optimizer, fit.residuals)
    moved = [not torch.equal(p, before) for p, before in zip(fit.params, start, strict=True)]
    _expect(all(moved), f"a step must move every parameter that has a gradient, got {sum(moved)} of {len(moved)} moved")
    _expect(bool(kept), "hooks of torch.optim.Optimizer must be called, got a step without: call super().__init__()")
    same = all(p.grad is g and torch.equal(g, copy) for p, (g, copy) in zip(fit.params, kept, strict=True))
    _expect(same, "a step must leave .grad alone, got another one after it: copy before writing")
    _expect(
        torch.equal(drawn, torch.get_rng_state()), "a step must not draw from the global generator: pass a generator"
    )
    _expect(torch.is_grad_enabled(), "a step must leave the grad mode alone, got gradients switched off after it")


def _check_closure(factory: Factory, step: Drive) -> None:
    fit, twin = _Fit(), _Fit()
    optimizer, asked = factory(fit.params), []

    def residuals() -> Tensor:
        asked.append(torch.is_grad_enabled())
        return fit.residuals()

    def closure() -> Any:  # torch's types say float
        optimizer.zero_grad()
        loss = residuals().square().mean()
        loss.backward()
        return loss

    wanted = float(fit.residuals().detach().square().mean())
    with torch.no_grad():  # as in a loop that forgot to switch back
        loss = optimizer.step(closure) if step is by_gradients else step(optimizer, residuals)
    _expect(bool(asked), "a step must call its closure, got one that did not")
    _expect(asked[0], "a step must switch gradients on for its closure, got it called without")
    found = None if loss is None else float(torch.as_tensor(loss).detach())
    _expect(
        found is not None and abs(found - wanted) <= 1e-5 * wanted,
        f"a step must return the loss that its closure gives, {wanted:.6g}, got {found}",
    )
    step(factory(twin.params), twin.residuals)
    _expect(_same(fit.values(), twin.values()), "a step with a closure must do what it does without, got another point")


def _check_types(factory: Factory, step: Drive) -> None:
    ends = []
    for dtype in (torch.float32, torch.float64):
        fit = _Fit(dtype)
        optimizer = factory(fit.params)
        step(optimizer, fit.residuals)
        ends.append(torch.cat([p.detach().double().flatten() for p in fit.params]))
        for _ in range(2):
            step(optimizer, fit.residuals)
        found = {p.dtype for p in fit.params}
        found |= {s.dtype for p in fit.params for s in _tensors(optimizer.state[p]) if s.is_floating_point() and s.ndim}
        _expect(found == {dtype}, f"parameters and state must keep the type {dtype}, got {sorted(map(str, found))}")
    apart = float((ends[0] - ends[1]).norm() / ends[1].norm())
    _expect(apart <= 1e-2, f"float32 and float64 must go the same way, got {apart:.1g} of the weights apart")


def _check_resumption(factory: Factory, step: Drive) -> None:
    whole, halved, again = _Fit(), _Fit(), _Fit()
    optimizer, first, second = factory(whole.params), factory(halved.params), factory(again.params)
    for _ in range(4):
        step(optimizer, whole.residuals)
        step(first, halved.residuals)
    _expect(_same(whole.values(), halved.values()), "steps must be repeatable, got two ends from one start")
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        again.w.copy_(halved.w)
        again.b.copy_(halved.b)
    for _ in range(4):
        step(optimizer, whole.residuals)
        step(second, again.residuals)
    _expect(
        _same(whole.values(), again.values()),
        "an optimiser must go on from its state_dict bit for bit, got another point 4 steps later: keep all that a "
        "step needs in self.state or in the groups",
    )


def _check_groups(factory: Factory, step: Drive) -> None:
    joint, apart, added, slow = _Fit(), _Fit(), _Fit(), _Fit()
    optimizers = [factory(joint.params), factory([{"params": [apart.w]}, {"params": [apart.b]}]), factory([added.w])]
    optimizers[2].add_param_group({"params": [added.b]})
    for _ in range(3):
        for optimizer, fit in zip(optimizers, (joint, apart, added), strict=True):
            step(optimizer, fit.residuals)
    _expect(
        _same(joint.values(), apart.values()) and _same(joint.values(), added.values()),
        "parameters in groups with the same options must go as in one group, got another point",
    )
    if "lr" not in optimizers[0].defaults:
        return
    rate = float(optimizers[0].defaults["lr"])
    optimizer = factory([{"params": [slow.w]}, {"params": [slow.b], "lr": rate / 2}])
    for _ in range(3):
        step(optimizer, slow.residuals)
    _expect(
        not torch.equal(joint.b, slow.b),
        "a group's own lr must be used, got the same steps at half the rate: read it from the group",
    )


def _check_missing(factory: Factory, step: Drive) -> None:
    fit = _Fit()
    optimizer = factory(fit.params)
    (w, b) = fit.values()
    for _ in range(2):
        step(optimizer, fit.without_b)
    _expect(torch.equal(fit.b, b), "a parameter without a gradient must be skipped, got it moved")
    _expect(not torch.equal(fit.w, w), "a parameter without a gradient must not hold up the others, got them unmoved")
    step(optimizer, fit.residuals)
    _expect(not torch.equal(fit.b, b), "a parameter must move once it has a gradient, got it unmoved")


def _check_sparse(factory: Factory, step: Drive) -> None:
    ends = []
    for sparse in (True, False):
        table = torch.nn.Parameter(torch.arange(12.0).view(6, 2) / 12)
        start = table.detach().clone()

        def residuals(table: Tensor = table, sparse: bool = sparse) -> Tensor:  # noqa: FBT001
            rows = torch.tensor([0, 2, 2, 5])
            return torch.nn.functional.embedding(rows, table, sparse=sparse) - 1

        optimizer = factory([table])
        try:
            step(optimizer, residuals)
        except (RuntimeError, ValueError, TypeError) as error:
            _expect(sparse, f"a dense gradient must be taken, got {error!r}")
            _expect("sparse" in str(error), f"a sparse gradient must be refused by name, got {error!r}")
            _expect(torch.equal(table, start), "a refused step must leave the weights alone, got them moved")
            return
        ends.append(table.detach())
    _expect(
        bool(torch.isclose(*ends, atol=1e-6).all()),
        "a sparse gradient must be refused, or do what the dense one does, got another point",
    )


def _check_complex(factory: Factory, step: Drive) -> None:
    ends = []
    for kind in (torch.view_as_real, torch.Tensor.clone):
        numbers = torch.tensor([1 + 2j, -0.5 + 0.3j])
        z = torch.nn.Parameter(numbers if kind is torch.Tensor.clone else torch.view_as_real(numbers).clone())

        def residuals(z: Tensor = z) -> Tensor:
            return torch.view_as_real(z) if z.is_complex() else 1.0 * z

        try:
            optimizer = factory([z])
            for _ in range(3):
                step(optimizer, residuals)
        except (RuntimeError, ValueError, TypeError) as error:
            _expect(z.is_complex(), f"real parameters must be taken, got {error!r}")
            _expect("complex" in str(error).lower(), f"complex parameters must be refused by name, got {error!r}")
            return
        ends.append(torch.view_as_real(z.detach()) if z.is_complex() else z.detach())
    _expect(
        bool(torch.isclose(*ends, atol=1e-6).all()),
        "complex parameters must be refused, or treated as pairs of real ones, got another point",
    )


def _check_maximize(factory: Factory, step: Drive) -> None:
    up, down = _Fit(), _Fit()
    if "maximize" not in factory(up.params).defaults:
        return
    climbing, falling = factory([{"params": up.params, "maximize": True}]), factory(down.params)

    for _ in range(3):
        climbing.zero_grad()
        falling.zero_grad()
        up.residuals().square().mean().backward()
        (-down.residuals().square().mean()).backward()
        climbing.step()
        falling.step()
    _expect(_same(up.values(), down.values()), "maximize must descend the negative loss, got another point")


def _check_keywords(factory: Factory, step: Drive) -> None:
    fit = _Fit()
    try:
        type(factory(fit.params))(fit.params, leaning_rate=0.1)  # type: ignore[call-arg]
    except TypeError:
        return
    raise AssertionError("a misspelt keyword must raise TypeError, got leaning_rate=0.1 accepted: take no **kwargs")


def _tensors(state: dict[str, Any]) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor)]


def _expect(holds: bool, otherwise: str) -> None:  # noqa: FBT001
    if not holds:
        raise AssertionError(otherwise)
