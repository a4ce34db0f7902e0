"""Models of every kind as functions of their weights, against arithmetic; and what an evaluation must not touch."""

import collections
import types

import pytest
import torch
from tests.objective.test_objective import busy, dense_hessian, mean_cross_entropy, random
from torch import Tensor, nn
from torch.nn import functional as F

from unstuck.curvature import dense, gauss_newton, hessian
from unstuck.objective import Objective, Recorder, Tape, Term, Vault


def test_an_objective_stays_where_it_was_built_when_the_model_moves_on():
    model, batches = busy()
    model.layers[0].requires_grad_(False)  # a frozen layer is copied too
    objective, v = Objective(model, mean_cross_entropy, batches), random(27 + 16)
    before = objective.value(), objective.gradient(), objective.product(v), gauss_newton(objective) @ v
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    mean_cross_entropy(model.eval(), batches[0]).backward()
    optimizer.step()
    for p in model.parameters():  # the first weight and the last bias among them
        p.data.mul_(2)  # unseen by autograd's counters
    model.load_state_dict({name: t + 1 for name, t in model.state_dict().items()})
    model.layers[1].running_mean.add_(1)
    after = objective.value(), objective.gradient(), objective.product(v), gauss_newton(objective) @ v
    anew = objective.at(objective.point)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new)
    assert torch.equal(anew.product(v), before[2])
    assert not torch.equal(Objective(model, mean_cross_entropy, batches).value(), before[0])


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("before", ["value", "point", "product"])
def test_a_batch_that_is_written_into_is_noticed(before, part):
    model, batches = busy()
    objective = Objective(model, mean_cross_entropy, batches)
    objective.product(objective.point) if before == "product" else getattr(objective, before)
    batches[1][part].copy_(batches[1][part].flip(0))
    for ask in (objective.value, objective.gradient, lambda: objective.product(objective.point)):
        with pytest.raises(ValueError, match="batches as they were"):
            ask()


def closed_form_of_a_table(weights: Tensor, rows: Tensor) -> Tensor:
    return weights[rows].pow(4).sum(2).mean()


def test_sparse_gradients_become_dense_ones():
    layer, rows = nn.Embedding(5, 2, sparse=True).double(), torch.tensor([[0, 1], [3, 1], [0, 0]])
    objective = Objective(layer, lambda m, b: m(b).pow(4).sum(2).mean(), [rows])
    point = objective.point.view(5, 2).requires_grad_()
    loss = closed_form_of_a_table(point, rows)
    torch.testing.assert_close(objective.value(), loss.detach())
    torch.testing.assert_close(objective.gradient(), torch.autograd.grad(loss, point)[0].reshape(-1))
    expected = torch.autograd.functional.hessian(lambda w: closed_form_of_a_table(w.view(5, 2), rows), objective.point)
    torch.testing.assert_close(dense_hessian(objective), expected)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_weight_norm_has_its_true_second_derivatives(wrap):
    model = wrap(nn.Linear(3, 2, bias=False).double())
    x = random(4, 3)
    objective = Objective(model, lambda m, b: m(b).pow(3).mean(), [x])

    def by_hand(flat: Tensor) -> Tensor:
        g, v = flat[:2, None], flat[2:].view(2, 3)
        return (x @ (g * v / v.norm(dim=1, keepdim=True)).T).pow(3).mean()

    # torch's own kernel is wrong here: it takes the norm for a constant
    expected = torch.autograd.functional.hessian(by_hand, objective.point)
    torch.testing.assert_close(dense_hessian(objective), expected)
    torch.testing.assert_close(model(x), model(x))


def test_batches_may_be_of_any_plain_make():
    Pair = collections.namedtuple("Pair", "x y")
    model = nn.Linear(3, 2).double()
    x, y = random(5, 3), torch.arange(5) % 2
    expected = Objective(model, mean_cross_entropy, [(x, y)])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2)
    for loss, batches in [
        (mean_cross_entropy, loader),
        (mean_cross_entropy, (pair for pair in loader)),
        (mean_cross_entropy, [Pair(x, y)]),
        (lambda m, b: mean_cross_entropy(m, (b["inputs"], b["labels"])), [{"inputs": x, "labels": y}]),
    ]:
        objective = Objective(model, loss, batches)
        torch.testing.assert_close(objective.value(), expected.value())
        torch.testing.assert_close(dense(hessian(objective)), dense(hessian(expected)))


class Returning(nn.Module):
    """A model that returns its loss beside its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, 6)

    def forward(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.table(tokens)))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def test_token_weights_make_ragged_batches_the_mean_over_all_tokens():
    torch.manual_seed(0)
    model = Returning().double()
    tokens = torch.arange(20).view(4, 5) % 6
    labels = torch.where(tokens > torch.tensor([[0], [4], [2], [3]]), tokens, -100)
    whole = {"tokens": tokens, "labels": labels}
    batches = [{key: part[rows] for key, part in whole.items()} for rows in (slice(0, 1), slice(1, 4))]

    def own(model, batch):
        return model(**batch)["loss"]

    objective = Objective(model, own, batches, weight=lambda b: int((b["labels"] != -100).sum()))
    expected = Objective(model, own, [whole])
    assert objective.weight == int((labels != -100).sum())
    v = random(objective.size)
    torch.testing.assert_close(objective.value(), expected.value())
    torch.testing.assert_close(objective.gradient(), expected.gradient())
    torch.testing.assert_close(objective.product(v), expected.product(v))


def test_models_that_answer_as_transformers_do_are_asked_as_they_are():
    class Answering(Returning):
        def forward(self, **batch):
            return types.SimpleNamespace(**super().forward(**batch))

    model = Answering().double()
    tokens = torch.arange(20).view(4, 5) % 6
    whole = {"tokens": tokens, "labels": (tokens + 1) % 6}
    batches = [
        collections.UserDict({key: part[rows] for key, part in whole.items()}) for rows in (slice(3), slice(3, 4))
    ]
    objective = Objective(model, lambda m, b: m(**b).loss, batches)
    logits = model(**whole).logits.flatten(0, 1)
    torch.testing.assert_close(objective.value(), F.cross_entropy(logits, whole["labels"].flatten()).detach())
    single = Objective(model, lambda m, b: m(**b).loss, [whole])
    v = random(objective.size)
    torch.testing.assert_close(objective.product(v), single.product(v))
    torch.testing.assert_close(gauss_newton(objective) @ v, gauss_newton(single) @ v)


def test_a_forward_through_complex_numbers_has_the_curvature_of_its_closed_form():
    model, x, y = nn.Linear(4, 4, bias=False).double(), random(6, 4), random(6, 4, seed=1)
    objective = Objective(
        model,
        lambda m, b: torch.fft.fft(m(b[0]) - b[1]).abs().square().sum(1).mean(),
        list(zip(x.split(5), y.split(5), strict=False)),
    )
    residual = x @ model.weight.detach().T - y  # the transform is √4 times a rotation: Parseval
    torch.testing.assert_close(objective.value(), 4 * residual.square().sum(1).mean())
    torch.testing.assert_close(objective.gradient(), (8 * residual.T @ x / 6).reshape(-1))
    expected = torch.kron(torch.eye(4, dtype=torch.float64), 8 * x.T @ x / 6)
    torch.testing.assert_close(dense_hessian(objective), expected)


def tape_of(model: nn.Module, batch) -> Tape:
    recorder = Recorder(list(model.parameters()))
    with recorder:
        loss = mean_cross_entropy(model, batch)
        recorder.root([loss])
    return recorder.finish(Vault())


def test_tapes_are_terms():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    batches = [(random(n, 3, seed=n), torch.arange(n) % 2) for n in (7, 1)]
    tapes = [tape_of(model, batch) for batch in batches]
    terms = [Term(tape.replay, len(batch[0])) for tape, batch in zip(tapes, batches, strict=True)]
    objective = Objective.of_terms(terms, dict(model.named_parameters()))
    expected = Objective(model, mean_cross_entropy, batches)
    torch.testing.assert_close(objective.gradient(), expected.gradient())
    torch.testing.assert_close(dense(hessian(objective)), dense(hessian(expected)))
    torch.testing.assert_close(dense(gauss_newton(objective)), dense(gauss_newton(expected)))


def test_wrappers_for_compilation_are_taken_off():
    model, batches = nn.Linear(3, 2).double(), [(random(5, 3), torch.arange(5) % 2)]
    compiled = Objective(torch.compile(model, backend="eager"), mean_cross_entropy, batches)
    assert compiled.names == ("weight", "bias")
    torch.testing.assert_close(dense(hessian(compiled)), dense(hessian(Objective(model, mean_cross_entropy, batches))))
    torch._dynamo.reset()  # or the process would count as one that compiles


def test_bfloat16_curvature_is_that_of_the_same_weights_to_its_eight_bits():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).bfloat16()
    x, y = random(40, 6).bfloat16(), torch.arange(40) % 3
    exact = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    exact.load_state_dict(model.state_dict())

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]).float(), batch[1])

    rough = Objective(model, loss, [(x, y)])
    fine = Objective(exact.double(), loss, [(x.double(), y)])
    v = random(fine.size)
    for ours, theirs in [
        (rough.gradient(), fine.gradient()),
        (rough.product(v.float()), fine.product(v)),
        (gauss_newton(rough) @ v.float(), gauss_newton(fine) @ v),
    ]:
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 8 * 2**-8 * theirs.norm()  # a few roundings in a row


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        return 2 * ctx.saved_tensors[0] * slope


def ctc(model, batch):
    scores = model(batch)[:, None].log_softmax(2)
    return F.ctc_loss(scores, torch.tensor([[1, 2]]), torch.tensor([5]), torch.tensor([2]))


def bag(model, batch):
    return F.embedding_bag(torch.tensor([[0, 1]]), model.weight, mode="sum", sparse=True).square().sum()


@pytest.mark.parametrize("loss", [lambda m, b: OnceOnly.apply(m(b)).mean(), ctc, bag])
def test_a_loss_without_second_derivatives_has_a_gradient_and_says_so(loss):
    objective = Objective(nn.Linear(3, 4), loss, [torch.ones(5, 3)])
    assert objective.gradient().isfinite().all()
    with pytest.raises(ValueError, match="curvature needs second derivatives, got a loss that torch differentiates on"):
        objective.product(objective.point)


def clipping(model, batch):
    model.weight.data.clamp_(-0.1, 0.1)  # unseen by autograd's counters
    return model(batch).square().sum()


@pytest.mark.parametrize("loss", [lambda m, b: m(b).square().sum(), clipping])
def test_a_loss_that_writes_into_the_weights_is_refused(loss):
    table = nn.Embedding(4, 2, max_norm=None if loss is clipping else 0.1)
    objective = Objective(table, loss, [torch.tensor([0, 1])])
    for ask in 2 * (objective.value, objective.gradient, lambda: objective.product(objective.point)):
        with pytest.raises(ValueError, match="leave the parameters alone"):
            ask()


def test_tensors_given_as_parameters_may_change_afterwards():
    x = torch.full((3,), 2.0, requires_grad=True)
    objective = Objective.of_terms([Term(lambda values: values[0].pow(3).sum(), 1)], {"x": x})
    v = torch.arange(3.0)
    objective.product(v)
    with torch.no_grad():
        x.zero_()
    assert objective.value() == 24
    assert objective.product(v).tolist() == (12 * v).tolist()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4), (6, 3, 2, 2)])
def test_batch_norm_by_running_statistics_is_the_layers_own(shape, affine):
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}
    norm = kinds[len(shape)](3, affine=affine).double()
    norm(random(*shape, seed=9))  # statistics that are not 0 and 1
    model = nn.Sequential(norm.eval(), nn.Flatten(), nn.Linear(int(torch.tensor(shape[1:]).prod()), 2).double())
    if affine:
        nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(3))
    batch = random(*shape), torch.arange(6) % 2
    objective = Objective(model, mean_cross_entropy, [batch])

    def plain(flat: Tensor) -> Tensor:  # torch's layer
        pieces = dict(zip(objective.names, objective.unflatten(flat), strict=True))
        return F.cross_entropy(torch.func.functional_call(model, pieces, (batch[0],)), batch[1])

    point = objective.point
    torch.testing.assert_close(objective.value(), plain(point))
    torch.testing.assert_close(objective.gradient(), torch.autograd.functional.jacobian(plain, point))
    torch.testing.assert_close(dense_hessian(objective), torch.autograd.functional.hessian(plain, point))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 6), (8, 4)),
        (nn.Conv1d(4, 6, 3, padding=1, bias=False), (8, 4, 5)),
        (nn.Conv2d(4, 6, 3, stride=2, groups=2), (8, 4, 5, 5)),
        (nn.Linear(4, 6), (8, 6, 4)),  # the channels of the norm are not the outputs of the layer
        (nn.Sequential(nn.Conv1d(4, 6, 1), nn.ReLU(inplace=True)), (8, 4, 5)),
        (nn.Sequential(nn.Conv1d(4, 6, 1), nn.Hardtanh(-0.1, 0.1)), (8, 4, 5)),
    ],
    ids=["linear", "conv1d", "conv2d", "many rows", "in place", "between"],
)
def test_batch_norm_after_a_layer_is_the_two_of_them(layer, shape):
    norm = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(6).double()
    layer = layer.double()
    norm(layer(random(*shape, seed=9)).detach())  # statistics that are not 0 and 1
    model = nn.Sequential(layer, norm.eval(), nn.Tanh(), nn.Flatten(), nn.LazyLinear(2))
    model.to(torch.float64)(random(*shape))
    batch = random(*shape), torch.arange(8) % 2
    objective = Objective(model, mean_cross_entropy, [batch])

    def plain(flat: Tensor) -> Tensor:  # torch's layers
        pieces = dict(zip(objective.names, objective.unflatten(flat), strict=True))
        return F.cross_entropy(torch.func.functional_call(model, pieces, (batch[0],)), batch[1])

    point = objective.point
    assert objective.value() == plain(point)
    torch.testing.assert_close(objective.gradient(), torch.autograd.functional.jacobian(plain, point))
    torch.testing.assert_close(dense_hessian(objective), torch.autograd.functional.hessian(plain, point))
