"""The objective against closed forms, the plain model and dense differentiation; and what it must leave alone."""

import copy

import pytest
import torch
from tests import oracles
from torch import Tensor, nn
from torch.func import functional_call

from unstuck.objective._objective import Objective, Term, examples

RAGGED = (7, 1)


def mean_squared(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def mean_cross_entropy(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ragged(x: Tensor, y: Tensor):
    return list(zip(x.split(RAGGED), y.split(RAGGED), strict=True))


def dense_hessian(objective: Objective) -> Tensor:
    return torch.stack([objective.product(e) for e in torch.eye(objective.size, dtype=objective.dtype)])


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_linear_regression_over_ragged_batches_has_the_closed_form(dtype, rtol):
    x, y = random(8, 3), random(8, 1, seed=1)
    model = nn.Linear(3, 1, bias=False).to(dtype)
    objective = Objective(model, mean_squared, ragged(x.to(dtype), y.to(dtype)))
    expected = oracles.linear_regression(x, y[:, 0], model.weight.detach().double()[0])
    found = (objective.value(), objective.gradient(), dense_hessian(objective))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=rtol)


def test_logistic_regression_has_the_closed_form():
    x, y = random(8, 3), (random(8, seed=1) > 0).double()
    model = nn.Linear(3, 1, bias=False).double()
    objective = Objective(
        model,
        lambda m, b: nn.functional.binary_cross_entropy_with_logits(m(b[0])[:, 0], b[1]),
        ragged(x, y),
    )
    value, gradient, hessian = oracles.logistic_regression(x, y, model.weight.detach()[0])
    torch.testing.assert_close(objective.value(), value)
    torch.testing.assert_close(objective.gradient(), gradient)
    torch.testing.assert_close(dense_hessian(objective), hessian)


def test_softmax_regression_has_the_closed_form():
    x, y = random(8, 3), torch.arange(8) % 4
    model = nn.Linear(3, 4, bias=False).double()
    objective = Objective(model, mean_cross_entropy, ragged(x, y))
    value, gradient, hessian = oracles.softmax_regression(x, y, model.weight.detach())
    torch.testing.assert_close(objective.value(), value)
    torch.testing.assert_close(objective.gradient(), gradient)
    torch.testing.assert_close(dense_hessian(objective), hessian)


class Tied(nn.Module):
    """A frozen first layer, two layers of one weight, and one that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3)
        self.one = nn.Linear(3, 3)
        self.two = nn.Linear(3, 3, bias=False)
        self.two.weight = self.one.weight
        self.unused = nn.Linear(2, 2, bias=False)
        self.frozen.requires_grad_(False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(self.frozen(x))))


def test_frozen_weights_are_constants_tied_ones_count_once_and_unused_ones_have_zero_rows():
    model = Tied()
    x, y = random(8, 3), random(8, 3, seed=1)
    objective = Objective(model, mean_squared, ragged(x, y))
    assert objective.names == ("one.weight", "one.bias", "unused.weight")
    assert objective.size == 9 + 3 + 4

    def whole(flat: Tensor) -> Tensor:  # all eight rows in one batch: the mean that the ragged batches must give
        weight, bias = flat[:9].view(3, 3), flat[9:12]
        h = x @ model.frozen.weight.T + model.frozen.bias
        return (torch.tanh(h @ weight.T + bias) @ weight.T - y).square().mean()

    point = objective.point.requires_grad_()
    torch.testing.assert_close(objective.value(), whole(point).detach())
    torch.testing.assert_close(objective.gradient(), torch.autograd.grad(whole(point), point)[0])
    torch.testing.assert_close(dense_hessian(objective), torch.autograd.functional.hessian(whole, point.detach()))
    assert (dense_hessian(objective)[12:] == 0).all()


def test_gradient_and_products_agree_with_finite_differences():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    objective = Objective(model, mean_cross_entropy, ragged(random(8, 4), torch.arange(8) % 3))
    d, h = random(objective.size, seed=3), 1e-5
    ahead, behind = objective.at(objective.point + h * d), objective.at(objective.point - h * d)
    # central differences err by h² times a third derivative, and by rounding over h
    torch.testing.assert_close(
        objective.gradient() @ d, (ahead.value() - behind.value()) / (2 * h), rtol=1e-7, atol=1e-8
    )
    difference = (ahead.gradient() - behind.gradient()) / (2 * h)
    torch.testing.assert_close(objective.product(d), difference, rtol=1e-6, atol=1e-8)


def test_weights_given_by_the_caller_replace_the_lengths():
    constant = Objective(
        nn.Linear(1, 1, bias=False).double(),
        lambda model, batch: 0 * model(batch["x"]).sum() + batch["loss"],
        [{"x": torch.ones(1, 1).double(), "loss": 1.0}, {"x": torch.ones(1, 1).double(), "loss": 5.0}],
        weight=lambda batch: 3 if batch["loss"] == 1 else 1,
    )
    assert constant.value() == 2.0


def test_the_length_of_the_first_tensor_is_the_number_of_examples():
    assert examples({"id": "a", "scale": torch.tensor(2.0), "x": [torch.zeros(5, 2)]}) == 5


class Busy(nn.Module):
    """Layers that write into buffers and draw from the global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
        self.layers[2].eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def busy():
    torch.manual_seed(5)
    model = Busy().double()
    batches = [(random(7, 4), torch.arange(7) % 3), (random(5, 4, seed=2), torch.arange(5) % 3)]
    mean_cross_entropy(model, batches[0]).backward()
    return model, batches


def test_dropout_masks_and_modes_are_fixed_when_the_objective_is_built():
    model, batches = busy()
    objective = Objective(model, mean_cross_entropy, batches)
    value, v = objective.value(), random(objective.size)
    torch.rand(10)
    model.eval()
    with torch.no_grad():
        model.layers[1].running_mean.add_(1)
        model.layers[0].weight.zero_()
    assert torch.equal(objective.value(), value)
    assert torch.equal(objective.at(objective.point).product(v), objective.product(v))
    h = 1e-6  # with one mask throughout, differences of values see the gradient; with fresh masks they see noise
    slope = (objective.at(objective.point + h * v).value() - objective.at(objective.point - h * v).value()) / (2 * h)
    torch.testing.assert_close(objective.gradient() @ v, slope, rtol=1e-6, atol=1e-8)


class Counting(nn.Module):
    """Its output depends on how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.weight * self.calls * x


def test_every_evaluation_starts_from_the_buffers_as_they_were():
    objective = Objective(Counting(), lambda m, b: m(b).sum(), [torch.ones(1), torch.ones(1)])
    assert [objective.value().item(), objective.gradient().item(), objective.value().item()] == [1, 1, 1]


def test_batches_have_masks_of_their_own():
    x = torch.ones(1, 64)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 1, bias=False))
    objective = Objective(model, lambda m, b: m(b).sum(), [x, x])
    masks = [torch.autograd.grad(t.loss([w := torch.ones(1, 64, requires_grad=True)]), w)[0] for t in objective.terms]
    assert not torch.equal(masks[0], masks[1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(x)[:, None].chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]


def test_default_attention_has_second_derivatives_and_they_are_right():
    model = Attention().double()
    x, y = random(3, 5, 4), random(3, 5, 4, seed=1)
    objective = Objective(model, mean_squared, [(x, y)])

    def by_hand(flat: Tensor) -> Tensor:
        q, k, v = (x @ flat.view(12, 4).T).chunk(3, dim=-1)
        scores = (q @ k.transpose(1, 2) / 2).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
        return (scores.softmax(-1) @ v - y).square().mean()

    torch.testing.assert_close(
        dense_hessian(objective), torch.autograd.functional.hessian(by_hand, objective.point), rtol=1e-9, atol=1e-12
    )


def test_a_recurrent_network_is_a_function_of_the_given_weights():
    model = nn.GRU(3, 2, batch_first=True).double()
    x = random(4, 5, 3)
    objective = Objective(model, lambda m, b: m(b)[0].square().mean(), [x])
    other = random(objective.size, seed=4)
    twin = copy.deepcopy(model)
    nn.utils.vector_to_parameters(other, twin.parameters())
    torch.testing.assert_close(objective.at(other).value(), twin(x)[0].square().mean().detach())
    loss = twin(x)[0].square().mean()
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(twin.parameters()))])
    torch.testing.assert_close(objective.at(other).gradient(), expected)


def test_low_precision_weights_give_float32_vectors():
    model = nn.Sequential(nn.Linear(3, 2).bfloat16(), nn.Linear(2, 1))
    objective = Objective(model, lambda m, b: m[1](m[0](b.bfloat16()).float()).square().mean(), [torch.ones(2, 3)])
    assert objective.gradient().dtype == objective.product(objective.point).dtype == torch.float32
    assert [piece.dtype for piece in objective.unflatten(objective.point)][::2] == [torch.bfloat16, torch.float32]


def test_terms_are_functions_of_the_values_in_order():
    a, b = torch.tensor([2.0, 3.0]), torch.tensor(5.0)
    term = Term(lambda values: (values[0] ** 2).sum() * values[1], weight=4)
    objective = Objective.of_terms([term], {"a": a, "b": b})
    assert objective.value() == 65
    assert objective.gradient().tolist() == [20, 30, 13]
    assert dense_hessian(objective).tolist() == [[10, 0, 4], [0, 10, 6], [4, 6, 0]]


def test_a_linear_loss_has_hessian_zero():
    objective = Objective.of_terms([Term(lambda values: values[0].sum(), 1)], {"a": torch.ones(3)})
    assert objective.product(torch.ones(3)).tolist() == [0, 0, 0]


def test_writing_into_the_point_changes_nothing():
    objective = Objective.of_terms([Term(lambda values: values[0].square().sum(), 1)], {"a": torch.ones(3)})
    objective.point.zero_()
    assert objective.value() == 3
    assert objective.gradient().tolist() == [2, 2, 2]


def test_gradients_are_found_inside_no_grad():
    objective = Objective.of_terms([Term(lambda values: values[0].square().sum(), 1)], {"a": torch.ones(1)})
    with torch.no_grad():
        assert objective.gradient().item() == objective.product(torch.ones(1)).item() == 2


def test_a_loss_that_is_not_finite_is_a_value_but_has_no_curvature():
    objective = Objective.of_terms([Term(lambda values: values[0].log().sum(), 1)], {"a": -torch.ones(2)})
    assert objective.value().isnan()
    with pytest.raises(ValueError, match="curvature needs a finite loss, got nan"):
        objective.product(torch.ones(2))


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda m, b: m(b), TypeError, r"shape \(2, 1\)"),
        (lambda m, b: 1.0, TypeError, "got 1.0"),
        (lambda m, b: m(b).sum().detach(), ValueError, "depends on none"),
        (lambda m, b: torch.ones((), requires_grad=True) * 2, ValueError, "depends on none"),
    ],
)
def test_a_loss_that_cannot_be_differentiated_is_named(loss, error, message):
    objective = Objective(nn.Linear(3, 1), loss, [torch.ones(2, 3)])
    with pytest.raises(error, match=message):
        objective.gradient()


def test_bad_input_is_named():
    model, batch = nn.Linear(3, 1), torch.ones(2, 3)
    with pytest.raises(ValueError, match="unfreeze"):
        Objective(copy.deepcopy(model).requires_grad_(False), mean_squared, [batch])
    used = iter([batch])
    list(used)
    with pytest.raises(ValueError, match="got none: an iterator can be read only once"):
        Objective(model, mean_squared, used)
    for model_of, kind in ((nn.LazyLinear(2), "lazy"), (nn.Linear(3, 1, dtype=torch.complex64), "complex")):
        with pytest.raises(ValueError, match=f"real parameters with a shape, got a {kind} one, weight"):
            Objective(model_of, mean_squared, [batch])
    for ask in (lambda o: o.value(), lambda o: o.gradient(), lambda o: o.product(o.point)):
        asked = Objective(model, lambda m, b: m(b).mean(), [batch])
        with torch.inference_mode(), pytest.raises(ValueError, match="ask outside of it"):
            ask(asked)
        ask(asked)
    with pytest.raises(ValueError, match="pass weight="):
        Objective(model, mean_squared, ["text"])
    with pytest.raises(ValueError, match="their sum is positive"):
        Objective(model, mean_squared, [batch], weight=lambda b: -1)
    with pytest.raises(ValueError, match="their sum is positive"):
        Objective(model, mean_squared, [batch], weight=lambda b: float("nan"))
    objective = Objective(model, lambda m, b: m(b).mean(), [batch])
    with pytest.raises(ValueError, match=r"shape \(4,\) is needed"):
        objective.product(torch.ones(3))


def test_the_value_is_that_of_the_model_itself_to_the_last_bit():
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    batch = (random(9, 5, dtype=torch.float32), torch.arange(9) % 3)
    objective = Objective(model, mean_cross_entropy, [batch])
    assert torch.equal(objective.value(), mean_cross_entropy(model, batch).detach())
    other = objective.at(objective.point * 2)
    doubled = {name: 2 * p.detach() for name, p in model.named_parameters()}
    expected = nn.functional.cross_entropy(functional_call(model, doubled, (batch[0],)), batch[1])
    assert torch.equal(other.value(), expected)
