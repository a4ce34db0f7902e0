"""Gauss–Newton and Fisher matrices against Jacobians that are multiplied out by hand."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from unstuck.curvature import dense, empirical_fisher, fisher, gauss_newton, hessian, identity, outputs, sampled_fisher
from unstuck.objective import Objective, Term
from unstuck.testing import check_operator


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


x = torch.randn(8, 4, generator=seeded(1), dtype=torch.float64)
labels = torch.arange(8) % 3
reals = torch.randn(8, 3, generator=seeded(2), dtype=torch.float64)
bits = (reals > 0).double()


def ragged(y):
    return [(x[:7], y[:7]), (x[7:], y[7:])]


def jacobian(model):
    """The derivatives (8, 3, size) of the outputs."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    parts = jacrev(lambda given: functional_call(model, given, (x,)))(parameters)
    return torch.cat([part.reshape(8, 3, -1) for part in parts.values()], 2)


def pulled_back(model, metric):
    """Σ Jᵢᵀ Mᵢ Jᵢ / 8 for metrics (8, 3, 3)."""
    J = jacobian(model)
    return torch.einsum("iaj,iab,ibk->jk", J, metric, J) / 8


def categorical(model):
    p = model(x).detach().softmax(1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


def bernoulli(model):
    p = model(x).detach().sigmoid()
    return torch.diag_embed(p * (1 - p)) / 3  # the mean is over the entries too


def normal(model):
    return (2 / 3 * torch.eye(3, dtype=torch.float64)).expand(8, 3, 3)


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def log_likelihood(model, batch):
    return F.nll_loss(F.log_softmax(model(batch[0]), dim=1), batch[1])


def log_likelihood_of_rows(model, batch):
    return nn.NLLLoss(reduction="none")(model(batch[0]).log_softmax(1), target=batch[1]).mean()


def binary(model, batch):
    return nn.BCEWithLogitsLoss()(model(batch[0]), batch[1])


def squared(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def squared_sum(model, batch):
    return F.mse_loss(input=model(batch[0]), target=batch[1], reduction="sum") / (3 * len(batch[0]))


def two_halves(model, batch):
    z = model(batch[0])
    return (F.cross_entropy(z, batch[1]) + F.cross_entropy(z, batch[1].flip(0))) / 2


LOSSES = [
    (cross_entropy, labels, categorical),
    (log_likelihood, labels, categorical),
    (log_likelihood_of_rows, labels, categorical),
    (two_halves, labels, categorical),
    (binary, bits, bernoulli),
    (squared, reals, normal),
    (squared_sum, reals, normal),
]


@pytest.mark.parametrize(("loss", "y", "metric"), LOSSES)
def test_gauss_newton_and_fisher_are_the_jacobians_around_the_metric_of_the_outputs(loss, y, metric):
    model = network()
    objective = Objective(model, loss, ragged(y))
    expected = pulled_back(model, metric(model))
    for A in (gauss_newton(objective), fisher(objective)):
        torch.testing.assert_close(dense(A), expected, rtol=1e-10, atol=1e-12)
        check_operator(A, generator=seeded())


@pytest.mark.parametrize(("loss", "y", "metric"), LOSSES)
def test_the_sampled_fisher_has_the_exact_one_as_its_mean(loss, y, metric):
    model = network()
    objective = Objective(model, loss, ragged(y))
    exact = dense(fisher(objective))
    A = sampled_fisher(objective, 1000, generator=seeded(5))
    check_operator(A, generator=seeded())
    # the spread of s sᵀ is of the size of its mean; five standard errors of 1000 samples
    assert (dense(A) - exact).norm() <= 5 * 1000**-0.5 * 2 * exact.norm()
    again = sampled_fisher(objective, 1, generator=seeded(5)), sampled_fisher(objective, 1, generator=seeded(6))
    same, other = (dense(B) for B in again)
    assert torch.equal(dense(sampled_fisher(objective, 1, generator=seeded(5))), same)
    assert not torch.equal(same, other)


def test_samples_are_the_same_where_graphs_are_built_again():
    calls = []

    def counted(model, batch):
        calls.append(1)
        return cross_entropy(model, batch)

    model = network()
    whole = Objective(model, counted, list(zip(x.split(2), labels.split(2), strict=True)))
    terms = [Term(term.loss, term.weight) for term in whole.terms]  # without parts, so that none is cut
    tight = Objective.of_terms(terms, dict(model.named_parameters()), memory=2250)
    v = torch.ones(whole.size, dtype=torch.float64)
    A, B = (sampled_fisher(o, 2, generator=seeded(3)) for o in (whole, tight))
    torch.testing.assert_close(A @ v, B @ v)
    calls.clear()
    torch.testing.assert_close(A @ v, B @ v)
    assert 0 < len(calls) <= 4


@pytest.mark.parametrize(
    ("loss", "y"), [(cross_entropy, labels), (log_likelihood, labels), (binary, bits), (squared, reals)]
)
def test_the_empirical_fisher_is_the_covariance_of_the_gradients_of_examples(loss, y):
    model = network()
    gradients = torch.stack([Objective(model, loss, [(x[i : i + 1], y[i : i + 1])]).gradient() for i in range(8)])
    A = empirical_fisher(Objective(model, loss, ragged(y)))
    torch.testing.assert_close(dense(A), gradients.T @ gradients / 8)


def test_padding_takes_no_part_in_any_of_them():
    model = network()
    padded = torch.where(torch.arange(8) < 5, labels, -100)
    whole, part = (Objective(model, cross_entropy, [b]) for b in [(x, padded), (x[:5], labels[:5])])
    for matrix in (gauss_newton, fisher, empirical_fisher):
        torch.testing.assert_close(dense(matrix(whole)), dense(matrix(part)))
    assert abs(dense(sampled_fisher(whole, 3000, generator=seeded())) - dense(fisher(part))).max() < 0.05


def test_a_linear_model_has_its_gauss_newton_matrix_as_hessian():
    objective = Objective(nn.Linear(4, 3).double(), cross_entropy, ragged(labels))
    torch.testing.assert_close(dense(gauss_newton(objective)), dense(hessian(objective)))


def test_images_of_classes_are_predictions_for_each_pixel():
    torch.manual_seed(0)
    model = nn.Conv2d(2, 3, 1).double()
    batch = torch.randn(2, 2, 2, 2, dtype=torch.float64), torch.randint(3, (2, 2, 2))
    objective = Objective(model, cross_entropy, [batch])
    torch.testing.assert_close(dense(fisher(objective)), dense(hessian(objective)))  # of a linear model


def test_models_that_return_their_loss_have_all_three():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x, labels):
            logits = self.inner(x)
            return {"loss": nn.CrossEntropyLoss()(logits.view(-1, 3), labels.view(-1)), "logits": logits}

    model = Classifier()
    batch = {"x": x, "labels": labels}
    objective = Objective(model, lambda m, b: m(**b)["loss"], [batch])
    expected = pulled_back(model.inner, categorical(model.inner))
    torch.testing.assert_close(dense(gauss_newton(objective)), expected)
    torch.testing.assert_close(dense(fisher(objective)), expected)


def test_marked_outputs_serve_any_loss():
    def quartic(model, batch):
        return (outputs(model(batch[0])) - batch[1]).pow(4).sum(1).mean()

    model = network()
    objective = Objective(model, quartic, ragged(reals))
    metric = torch.diag_embed(12 * (model(x).detach() - reals).square())
    torch.testing.assert_close(dense(gauss_newton(objective)), pulled_back(model, metric))
    gradients = torch.stack(
        [Objective(model, quartic, [(x[i : i + 1], reals[i : i + 1])]).gradient() for i in range(8)]
    )
    torch.testing.assert_close(dense(empirical_fisher(objective)), gradients.T @ gradients / 8)
    with pytest.raises(ValueError, match="calls neither cross_entropy"):
        fisher(objective) @ objective.point
    assert torch.equal(outputs(reals), reals)


def test_a_restricted_matrix_is_the_block_of_the_whole():
    objective = Objective(network(), cross_entropy, ragged(labels))
    last = slice(objective.size - 18, None)
    for matrix in (hessian, gauss_newton, fisher, empirical_fisher):
        block = dense(matrix(objective))[last, last]
        for where in (["2"], ["2.weight", "2.bias"], lambda name: name.startswith("2")):
            torch.testing.assert_close(dense(matrix(objective, where=where)), block)


def double_use(model, batch):
    z = model(batch[0])
    return F.cross_entropy(z, batch[1]) + F.mse_loss(F.log_softmax(z, 1), torch.zeros_like(z))


@pytest.mark.parametrize(
    ("matrix", "loss", "message"),
    [
        (gauss_newton, lambda m, b: (m(b[0]) ** 2).mean(), "calls neither cross_entropy"),
        (gauss_newton, lambda m, b: cross_entropy(m, b) + m[0].weight.square().sum(), "past these, as a penalty"),
        (gauss_newton, double_use, "computed from another"),
        (gauss_newton, lambda m, b: F.cross_entropy(m(b[0]).detach().requires_grad_(), b[1]), "depend on none"),
        (fisher, lambda m, b: F.cross_entropy(m(b[0]), b[1], label_smoothing=0.1), "with label_smoothing="),
        (fisher, lambda m, b: F.cross_entropy(m(b[0]), b[1], weight=torch.ones(3).double()), "with weight="),
        (fisher, lambda m, b: cross_entropy(m, b).exp(), "got a function of them"),
        (lambda o: sampled_fisher(o, 0), cross_entropy, "samples=0"),
        (empirical_fisher, lambda m, b: cross_entropy(m, b) + F.cross_entropy(m(b[0][:2]), b[1][:2]), "rows in one"),
    ],
)
def test_losses_without_such_a_matrix_are_refused_with_the_reason(matrix, loss, message):
    objective = Objective(network(), loss, [(x, labels)])
    with pytest.raises(ValueError, match=message):
        matrix(objective) @ objective.point


def test_a_penalty_is_added_as_an_operator():
    objective = Objective(network(), cross_entropy, ragged(labels))
    damped = gauss_newton(objective) + 0.1 * identity(objective.size, dtype=torch.float64)
    assert torch.linalg.eigvalsh(dense(damped))[0] > 0.1 - 1e-12
