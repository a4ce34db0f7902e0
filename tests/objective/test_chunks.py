"""What is kept of the graphs and what large batches are cut into, against products that keep and cut nothing."""

import gc
import weakref

import pytest
import torch
from torch import nn

from unstuck.objective import _division, _objective
from unstuck.objective._chunks import graph_storages
from unstuck.objective._matmul import fast_matmul
from unstuck.objective._objective import Objective, Term
from unstuck.objective._term import gradient_of


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 50), nn.Tanh(), nn.Linear(50, 5))


def data(count=600, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 20, generator=generator), torch.arange(count) % 5


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def batches(rows, count=600):
    x, y = data(count)
    return list(zip(x.split(rows), y.split(rows), strict=True))


def hooked_bytes(model, batch):
    """What autograd saves for two derivatives, as it says itself through its hooks."""
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        parameters = list(model.parameters())
        slopes = torch.autograd.grad(cross_entropy(model, batch), parameters, create_graph=True)
    for p in parameters:
        saved.pop(p.untyped_storage().data_ptr(), None)
    return sum(saved.values()), slopes


def test_the_measured_bytes_of_a_graph_are_those_that_autograd_saves():
    model = network()
    expected, slopes = hooked_bytes(model, data())
    measured = sum(graph_storages(slopes, list(model.parameters())).values())
    assert abs(measured - expected) <= 64  # a scalar or two, which the hooks see as copies


@pytest.mark.parametrize("first", ["product", "lead"])
def test_kept_graphs_hold_no_gradients(first, monkeypatch):
    gradients = []

    def watched(*args, **options):
        found = gradient_of(*args, **options)
        gradients.extend(map(weakref.ref, found))
        return found

    monkeypatch.setattr(_objective, "gradient_of", watched)
    objective = Objective(network(), cross_entropy, batches(200), memory=1e9)
    getattr(objective, first)(*[torch.ones(objective.size)] * (first == "product"))
    assert objective.plan is not None and objective.plan.kept == len(objective.terms)
    assert gradients and not any(alive() is not None for alive in gradients)


@pytest.mark.parametrize("memory", [1e9, 390e3, 350e3])
def test_products_are_the_same_whatever_is_kept(memory):
    model = network()
    ragged = batches(100, count=550)
    whole = Objective(model, cross_entropy, [data(550)])
    objective = Objective(model, cross_entropy, ragged, memory=memory)
    v = torch.randn(objective.size, generator=torch.Generator().manual_seed(1))
    expected = whole.product(v)
    assert objective.plan is None
    for _ in range(2):
        torch.testing.assert_close(objective.product(v), expected, rtol=1e-4, atol=1e-6)
    plan = objective.plan
    assert plan.kept + plan.rebuilt == parts_of(objective) >= 6
    assert plan.bytes + (2.5 if plan.rebuilt else 1.5) * plan.largest <= memory
    assert (plan.rebuilt == 0) == (memory == 1e9)
    assert plan.kept > 0
    assert f"{plan.kept} of {plan.kept + plan.rebuilt} graphs are kept" in str(plan)


def test_kept_graphs_are_not_built_again():
    calls = []

    def counted(model, batch):
        calls.append(len(batch[0]))
        return cross_entropy(model, batch)

    def calls_of_two_products(memory):
        objective = Objective(network(), counted, batches(200), memory=memory)
        v = torch.ones(objective.size)
        objective.product(v)
        calls.clear()
        objective.product(v)
        objective.product(v)
        return len(calls), objective.plan

    assert calls_of_two_products(1e9)[0] == 0
    built, plan = calls_of_two_products(450e3)
    assert built == 2 * plan.rebuilt > 0


@pytest.mark.parametrize("memory", [1e9, 390e3])
def test_the_gradient_that_leads_costs_no_graph_beyond_those_of_products(memory):
    calls = []

    def counted(model, batch):
        calls.append(len(batch[0]))
        return cross_entropy(model, batch)

    objective = Objective(network(), counted, batches(100), memory=memory)
    v = torch.ones(objective.size)
    lead = objective.lead()
    plan = objective.plan
    assert plan is not None and (plan.rebuilt > 0) == (memory < 1e9)
    calls.clear()
    product = objective.product(v)
    assert len(calls) == plan.rebuilt
    assert objective.plan is plan
    again = objective.lead()
    plain = Objective(network(), cross_entropy, batches(100))
    torch.testing.assert_close(lead, plain.gradient(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(again, plain.gradient())
    torch.testing.assert_close(product, plain.product(v), rtol=1e-4, atol=1e-6)


def test_a_batch_that_does_not_fit_is_cut_or_refused_with_its_size():
    fits = Objective(network(), cross_entropy, [data()], memory=400e3)
    fits.product(torch.ones(fits.size))
    assert fits.plan.largest < 400e3 / 2.5
    x, y = data()
    uneven = Objective(network(), lambda m, b: cross_entropy(m, (b[0], b[1][0])), [(x, [y])], memory=400e3)
    uneven.product(torch.ones(uneven.size))
    assert uneven.plan.largest < 400e3 / 2.5
    whole = Objective(network(), lambda m, b: cross_entropy(m, b["both"]), [{"both": (x, y), "id": 7}], memory=400e3)
    with pytest.raises(
        ValueError, match=r"graph of one batch and a product take .* MB, got memory=0.4 MB: give smaller"
    ):
        whole.product(torch.ones(whole.size))
    with pytest.raises(ValueError, match="positive number of bytes, got 0"):
        Objective(network(), cross_entropy, [data()], memory=0)


def test_graphs_die_with_their_objective():
    objective = Objective(network(), cross_entropy, [data()])
    objective.product(torch.ones(objective.size))
    kept = weakref.ref(next(iter(objective._hessian._kept.values())))
    gc.disable()
    try:
        del objective
        assert kept() is None  # at once, without a search for cycles
    finally:
        gc.enable()


def test_an_exception_in_the_first_product_decides_nothing():
    answers = iter([1.0, float("nan"), 1.0, 1.0, 1.0, 1.0])
    terms = [Term(lambda values: values[0].square().sum() * next(answers), 1) for _ in range(2)]
    objective = Objective.of_terms(terms, {"x": torch.ones(3)})
    with pytest.raises(ValueError, match="finite"):
        objective.product(torch.ones(3))
    assert objective.plan is None
    assert objective.product(torch.ones(3)).tolist() == [2, 2, 2]
    assert objective.plan.kept == 2


def parts_of(objective):
    return len(objective._divided(objective._leaves))


class Normed(nn.Module):
    """Train-mode batch norm in front of a head of zeros: every loss is log 5, cut or not."""

    def __init__(self):
        super().__init__()
        self.norm, self.inner, self.head = nn.BatchNorm1d(20), nn.Linear(20, 20), nn.Linear(20, 5)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(self.norm(x))))


class HandNormed(Normed):
    """The same, where no layer tells of it."""

    def forward(self, x):
        return self.head(torch.tanh(self.inner((x - x.mean(0)) / x.std(0))))


def contrastive(model, batch):
    scores = model(batch[0]) @ model(batch[0]).T
    return nn.functional.cross_entropy(scores, torch.arange(len(scores)))


@pytest.mark.parametrize(
    ("model", "loss", "cut"),
    [
        (network(), cross_entropy, True),
        (nn.Sequential(nn.BatchNorm1d(20), network()).eval(), cross_entropy, True),
        (Normed(), cross_entropy, False),
        (HandNormed(), cross_entropy, False),
        (nn.Sequential(nn.Dropout(0.5), network()), cross_entropy, False),
        (network(), lambda m, b: cross_entropy(m, b) * len(b[0]), False),
        (network(), contrastive, False),
    ],
)
def test_large_batches_are_cut_where_that_is_exact_and_only_there(model, loss, cut, monkeypatch):
    v = torch.randn(sum(p.numel() for p in model.parameters()), generator=torch.Generator().manual_seed(2))
    whole = Objective(model, loss, [data(550)])
    expected = whole.value(), whole.gradient(), whole.product(v)
    assert parts_of(whole) == 1
    monkeypatch.setattr(_division, "LARGEST", 30_000)  # of the hidden layer, 110 kB
    objective = Objective(model, loss, [data(550), data(7)])
    assert parts_of(objective) == (5 if cut else 2)
    only = Objective(model, loss, [data(550)])
    for ours, theirs in zip((only.value(), only.gradient(), only.product(v)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert parts_of(only.at(only.point)) == parts_of(only)


def test_a_token_mean_is_cut_only_with_the_number_of_tokens_as_weight(monkeypatch):
    monkeypatch.setattr(_division, "LARGEST", 30_000)
    x, y = data()
    y = torch.where(torch.arange(600) < 300, y, -100)  # the second half is padding
    by_rows = Objective(network(), cross_entropy, [(x, y)])
    by_tokens = Objective(network(), cross_entropy, [(x[300:], y[:300])], weight=lambda b: int((b[1] >= 0).sum()))
    assert parts_of(by_rows) == 1
    assert parts_of(by_tokens) > 1


def test_the_precision_of_products_is_the_callers_again_after_each():
    switch = torch.backends.mkldnn.matmul
    before = switch.fp32_precision, torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), fast_matmul():
        raise KeyError
    objective = Objective(network(), cross_entropy, [data()])
    objective.product(torch.ones(objective.size))
    assert (switch.fp32_precision, torch.get_float32_matmul_precision()) == before
    switch.fp32_precision = "tf32"
    try:
        with fast_matmul():
            assert switch.fp32_precision == "tf32"
    finally:
        switch.fp32_precision = before[0]


def test_fast_products_are_as_exact_as_slow_ones():
    a, b = torch.randn(2, 300, 300, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ b.double()
    with fast_matmul():
        error = (a @ b - exact).norm() / exact.norm()
    assert error < 1e-6
