"""Errors that the recorded program gives away, and what looks like them and is right."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from runs import batches, blobs, case, codes, mlp, recorded, train, verdict
from torch import nn

from unstuck.diagnosis._exact import EXACT, told_findings
from unstuck.diagnosis._findings import SHOWN
from unstuck.diagnosis._wiring import WIRING, wiring_findings


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def numbers(n=160):
    """Points and a quantity around 0."""
    x = torch.randn(n, 8)
    return x, x[:, :2].sum(1)


def found(folder, model, loss, data=None, *, optimizer=None, steps=12, size=16):
    """The codes of what the steps of an ordinary loop give away."""
    x, y = blobs(160) if data is None else data
    optimizer = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    run = recorded(folder, train(model, optimizer, batches(x, y, size), steps, loss))
    return [f.code for f in wiring_findings(case(run))]


class TestWhatEntersALoss:
    @pytest.mark.parametrize(
        "probabilities",
        [
            lambda z: z.softmax(1),
            lambda z: F.softmax(z, dim=-1).view(-1, 4),
            lambda z: torch.softmax(z, 1).float().contiguous(),
            lambda z: z.exp() / z.exp().sum(1, keepdim=True),
        ],
        ids=["method", "view", "float", "by hand"],
    )
    def test_a_softmax_before_cross_entropy(self, tmp_path, probabilities):
        assert found(tmp_path, mlp(), lambda m, x, y: F.cross_entropy(probabilities(m(x)), y)) == [
            "softmax-before-cross-entropy"
        ]

    def test_the_module_and_the_word_are_told(self, tmp_path):
        model = nn.Sequential(*mlp(), nn.Softmax(1))
        loss = nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        told = verdict(tmp_path, train(model, optimizer, batches(*blobs(160), 16), 12, lambda m, x, y: loss(m(x), y)))
        assert codes(told) == ["softmax-before-cross-entropy"]
        assert told.findings[0].word == SHOWN and "CrossEntropyLoss" in told.findings[0].where
        assert set(told.checked) == set(EXACT)
        assert all("mend that first" in why for why in told.not_checked.values())

    @pytest.mark.parametrize(
        "logits",
        [
            lambda z: z.log_softmax(1),
            lambda z: z.softmax(1).log(),
            lambda z: z / z.square().sum(1, keepdim=True).sqrt(),
            lambda z: 10 * z.tanh(),
            lambda z: z + (z.softmax(1) * z).mean(),
            lambda z: z.relu(),
            lambda z: F.hardtanh(z, -30.0, 30.0),
        ],
        ids=["log_softmax", "log", "cosine", "clipped", "attention", "relu", "bounded for safety"],
    )
    def test_logits_of_other_kinds_are_right(self, tmp_path, logits):
        assert found(tmp_path, mlp(), lambda m, x, y: F.cross_entropy(logits(m(x)), y)) == []

    def test_a_softmax_elsewhere_is_right(self, tmp_path):
        """Soft targets of the network itself, and a share of the loss that only looks at the probabilities."""

        def loss(m, x, y):
            z = m(x)
            entropy = -(z.softmax(1) * z.log_softmax(1)).sum(1).mean()
            return F.cross_entropy(z, y) + 0.01 * entropy + 0.1 * F.cross_entropy(z, z.detach().softmax(1))

        assert found(tmp_path, mlp(), loss) == []

    @pytest.mark.parametrize(
        "loss",
        [
            lambda z, y: F.binary_cross_entropy_with_logits(z[:, 0].sigmoid(), (y > 1).float()),
            lambda z, y: F.binary_cross_entropy_with_logits(input=torch.sigmoid(z), target=F.one_hot(y, 4).float()),
            lambda z, y: F.nll_loss(z.softmax(1), y),
            lambda z, y: F.nll_loss(z.sigmoid(), y),
            lambda z, y: F.kl_div(z.softmax(1), F.one_hot(y, 4).float(), reduction="batchmean"),
        ],
        ids=["bce", "bce by name", "nll", "nll of sigmoids", "kl"],
    )
    def test_a_loss_and_an_activation_that_do_not_belong_together(self, tmp_path, loss):
        assert found(tmp_path, mlp(), lambda m, x, y: loss(m(x), y)) == ["wrong-logits-pair"]

    @pytest.mark.parametrize(
        "loss",
        [
            lambda z, y: F.binary_cross_entropy(z[:, 0].sigmoid(), (y > 1).float()),
            lambda z, y: F.binary_cross_entropy_with_logits(z[:, 0].square(), (y > 1).float()),
            lambda z, y: F.nll_loss(z.log_softmax(1), y),
            lambda z, y: F.nll_loss(z.softmax(1).log(), y),
            lambda z, y: F.nll_loss(F.logsigmoid(z), y),
            lambda z, y: F.kl_div(z.log_softmax(1), F.one_hot(y, 4).float(), reduction="batchmean"),
        ],
        ids=["bce", "positive logits", "log_softmax", "log", "logsigmoid", "kl"],
    )
    def test_a_loss_and_an_activation_that_do(self, tmp_path, loss):
        assert found(tmp_path, mlp(), lambda m, x, y: loss(m(x), y)) == []

    @pytest.mark.parametrize("bounded", [torch.relu, torch.tanh, torch.sigmoid])
    def test_targets_that_the_outputs_cannot_reach(self, tmp_path, bounded):
        def loss(m, x, y):
            return F.mse_loss(bounded(m(x)).squeeze(1), 2 * y)

        assert found(tmp_path, mlp(classes=1), loss, numbers()) == ["output-out-of-range"]

    @pytest.mark.parametrize("bounded", [torch.tanh, torch.sigmoid, F.hardsigmoid])
    def test_logits_in_a_narrow_range(self, tmp_path, bounded):
        assert found(tmp_path, mlp(), lambda m, x, y: F.cross_entropy(bounded(m(x)), y)) == ["output-out-of-range"]

    @pytest.mark.parametrize(
        ("bounded", "reach"),
        [
            (torch.relu, lambda y: y.exp()),
            (torch.tanh, lambda y: (y / 2).sin()),
            (torch.sigmoid, lambda y: y.sigmoid()),
        ],
        ids=["relu", "tanh", "sigmoid"],
    )
    def test_targets_within_reach(self, tmp_path, bounded, reach):
        def loss(m, x, y):
            return F.mse_loss(bounded(m(x)).squeeze(1), reach(y))

        assert found(tmp_path, mlp(classes=1), loss, numbers()) == []

    def test_a_bounded_output_for_smoothed_classes(self, tmp_path):
        def loss(m, x, y):
            return F.cross_entropy(m(x).tanh(), y, label_smoothing=0.2)

        assert found(tmp_path, mlp(), loss) == []

    @pytest.mark.parametrize(
        "loss",
        [lambda z, y: F.mse_loss(z[:, 0], y.float()), lambda z, y: F.l1_loss(z.view(-1, 4)[..., 0], y.float())],
        ids=["square", "distance"],
    )
    def test_class_numbers_and_one_output_of_many(self, tmp_path, loss):
        assert found(tmp_path, mlp(), lambda m, x, y: loss(m(x), y)) == ["wrong-loss"]

    @pytest.mark.parametrize(
        "loss",
        [
            lambda z, y: F.mse_loss(z[:, 0], y.float()) + z[:, 1:].square().mean(),
            lambda z, y: F.mse_loss(z[:, 0], y + 0.5),
            lambda z, y: F.mse_loss(z[:, 0], y.float() + 10),
            lambda z, y: F.mse_loss(z[:, 0], (y > 1).float()),
            lambda z, y: F.mse_loss(z.mean(1), y.float()),
            lambda z, y: F.mse_loss(z, F.one_hot(y, 4).float()),
        ],
        ids=["the others, too", "fractions", "counts", "two values", "mean", "one hot"],
    )
    def test_whole_numbers_that_are_quantities(self, tmp_path, loss):
        assert found(tmp_path / "many", mlp(), lambda m, x, y: loss(m(x), y)) == []

    def test_ratings_and_a_single_output(self, tmp_path):
        assert found(tmp_path, mlp(classes=1), lambda m, x, y: F.mse_loss(m(x)[:, 0], y.float())) == []


def scores(z, y):
    p = z.sigmoid()
    t = (y > 0).float()
    return -(t * p.log() + (1 - t) * (1 - p).log()).mean()


def energy(z, y):
    """Twice the mean distance to the data, less that among the samples."""
    return 2 * (z - y).abs().mean() - (z - z.T).abs().mean()


class TestBroadcasting:
    @pytest.mark.filterwarnings("ignore:Using a target size")
    @pytest.mark.parametrize(
        "loss",
        [
            lambda z, y: ((z - y) ** 2).mean(),
            lambda z, y: (y - z).abs().mean(),
            lambda z, y: (z - y).pow(2).sum() / len(y),
            lambda z, y: F.mse_loss(z, y),
            lambda z, y: F.smooth_l1_loss(z, y, reduction="none").mean(),
            lambda z, y: ((z.sigmoid() - y) ** 2).mean() + 1e-3 * z.square().mean(),
            lambda z, y: F.l1_loss(z[:, 0], y[:, None]),
            scores,
        ],
        ids=["square", "abs", "sum", "mse", "none", "with a penalty", "other way", "cross-entropy by hand"],
    )
    def test_every_output_meets_every_target(self, tmp_path, loss):
        assert found(tmp_path, mlp(classes=1), lambda m, x, y: loss(m(x), y), numbers()) == ["silent-broadcast"]

    @pytest.mark.parametrize(
        "loss",
        [
            lambda z, y: ((z[:, 0] - y) ** 2).mean(),
            lambda z, y: ((z - y[:, None]) ** 2).mean(),
            lambda z, y: (z.square() * y[:, None].abs()).mean() + (z - 1.0).square().mean(),
            lambda z, y: ((z - z.T) ** 2).mean() + (z[:, 0] - y).square().mean(),
            lambda z, y: torch.cdist(z, y[:, None]).min(1).values.mean(),
            lambda z, y: (z - y).abs().min(1).values.mean(),
            lambda z, y: (-((z - y) ** 2)).exp().mean(),
            lambda z, y: ((-((z - y) ** 2)).softmax(1) @ y[:, None] - y[:, None]).square().mean(),
            lambda z, y: ((z - torch.ones(1)) ** 2).mean(),
            lambda z, y: F.mse_loss(z, torch.ones(len(z), 1)),
            lambda z, y: (z - torch.linspace(-1, 1, 16)).square().mean(),
            energy,
        ],
        ids=[
            "rows",
            "columns",
            "weights",
            "pairs",
            "cdist",
            "nearest",
            "kernel",
            "attention",
            "scalar",
            "same",
            "grid",
            "energy",
        ],
    )
    def test_shapes_that_are_meant(self, tmp_path, loss):
        assert found(tmp_path, mlp(classes=1), lambda m, x, y: loss(m(x), y), numbers()) == []

    def test_a_batch_of_one(self, tmp_path):
        assert found(tmp_path, mlp(classes=1), lambda m, x, y: (m(x) - y).square().mean(), numbers(20), size=1) == []

    def test_a_batch_as_large_as_the_layers_are_wide(self, tmp_path):
        """The layers' outputs are squares, too."""

        def loss(m, x, y):
            return (m(x) - y).square().mean()

        assert found(tmp_path / "one", mlp(width=16, classes=1), loss, numbers()) == ["silent-broadcast"]
        assert found(tmp_path / "many", mlp(width=16, classes=16), loss, numbers()) == []


class TestTheSignOfTheLoss:
    @pytest.mark.parametrize(
        "loss",
        [
            lambda z, y: -F.cross_entropy(z, y),
            lambda z, y: F.cross_entropy(z, y) * -1.0,
            lambda z, y: 1 - F.cross_entropy(z, y),
            lambda z, y: (0.0 - F.mse_loss(z, F.one_hot(y, 4).float())) / 4,
            lambda z, y: -F.nll_loss(z.log_softmax(1), y) + 1e-4 * z.square().mean(),
        ],
        ids=["minus", "times", "from one", "mse", "with a penalty"],
    )
    def test_minus_the_loss(self, tmp_path, loss):
        assert found(tmp_path, mlp(), lambda m, x, y: loss(m(x), y)) == ["wrong-sign"]

    def test_an_optimiser_that_maximises(self, tmp_path):
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, maximize=True)
        assert found(tmp_path, model, lambda m, x, y: F.cross_entropy(m(x), y), optimizer=optimizer) == ["wrong-sign"]

    def test_minus_the_loss_maximised(self, tmp_path):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, maximize=True)
        assert found(tmp_path, model, lambda m, x, y: -F.cross_entropy(m(x), y), optimizer=optimizer) == []

    @pytest.mark.parametrize(
        "loss",
        [
            lambda z, y: (F.cross_entropy(z, y, reduction="none") * (y - 2.0)).mean(),
            lambda z, y: F.cross_entropy(z, y) * torch.tensor(-3.0 - float(y[0])),
            lambda z, y: F.cross_entropy(z, y) - 0.1 * F.cross_entropy(z, z.detach().softmax(1)),
            lambda z, y: F.cross_entropy(z[:12], y[:12]) - 0.1 * F.cross_entropy(z[12:], y[12:]),
            lambda z, y: (-F.cross_entropy(z, y)).exp().neg(),
            lambda z, y: F.cross_entropy(-z, y),
        ],
        ids=["advantages", "reward", "entropy", "forgetting", "likelihood", "outputs"],
    )
    def test_losses_that_are_meant(self, tmp_path, loss):
        assert found(tmp_path, mlp(), lambda m, x, y: loss(m(x), y)) == []

    def test_an_attack_on_a_network_that_stays(self, tmp_path):
        model, (x, y) = mlp(), blobs(16)
        shift = torch.zeros_like(x, requires_grad=True)
        optimizer = torch.optim.SGD([shift], lr=0.1)

        def loss(_, x, y):
            return -F.cross_entropy(model(x + shift), y)

        assert found(tmp_path, model, loss, (x, y), optimizer=optimizer) == []

    def test_a_network_that_is_to_fool_another(self, tmp_path):
        judge, model = mlp().requires_grad_(False), nn.Linear(8, 8)
        assert found(tmp_path, model, lambda m, x, y: -F.cross_entropy(judge(x + m(x)), y)) == []

    def test_a_network_to_fool_that_nobody_moves(self, tmp_path):
        judge, model = mlp(), nn.Linear(8, 8)
        assert found(tmp_path, model, lambda m, x, y: -F.cross_entropy(judge(x + m(x)), y)) == []

    def test_a_loss_that_falls_all_the_same(self, tmp_path):
        """What is subtracted is next to nothing beside the decay of weights that were too large."""
        model = mlp()
        with torch.no_grad():
            model[2].weight.mul_(30)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1.0)
        assert found(tmp_path, model, lambda m, x, y: -1e-9 * F.cross_entropy(m(x), y), optimizer=optimizer) == []

    def test_two_players(self, tmp_path):
        one, other = nn.Linear(8, 8), mlp()
        a, b = torch.optim.SGD(one.parameters(), lr=0.01), torch.optim.SGD(other.parameters(), lr=0.01)
        x, y = blobs(16)

        def loop():
            for _ in range(12):
                b.zero_grad()
                F.cross_entropy(other(one(x).detach()), y).backward()
                b.step()
                a.zero_grad()
                (-F.cross_entropy(other(one(x)), y)).backward()
                a.step()

        assert wiring_findings(case(recorded(tmp_path, loop))) == []


def with_norm():
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def with_dropout():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4))


def classified(m, x, y):
    return F.cross_entropy(m(x), y)


class TestTheModeOfTheModel:
    @pytest.mark.parametrize("kind", [with_norm, with_dropout])
    def test_a_model_in_eval_mode(self, tmp_path, kind):
        assert found(tmp_path / "eval", kind().eval(), classified) == ["eval-while-training"]
        assert found(tmp_path / "train", kind(), classified) == []

    def test_no_difference_to_the_model(self, tmp_path):
        model = nn.Sequential(*mlp(), nn.Dropout(0.0)).eval()
        assert found(tmp_path, model, classified) == []

    def test_only_the_norms_in_eval_mode(self, tmp_path):
        model = with_norm()
        model[1].eval()
        assert found(tmp_path, model, classified) == []

    def test_a_new_head_in_training_mode(self, tmp_path):
        """The model was loaded in eval mode, and stays there on purpose: its head has been switched back."""
        model = nn.Sequential(*with_norm(), nn.Dropout(0.3)).eval()
        model[-1].train()
        assert found(tmp_path, model, classified) == []

    def test_a_frozen_backbone_in_eval_mode(self, tmp_path):
        model = nn.Sequential(with_norm().requires_grad_(False), nn.Linear(4, 4)).eval()
        assert found(tmp_path, model, classified) == []

    def test_a_frozen_network_that_measures(self, tmp_path):
        model, judge = nn.Linear(8, 8), nn.Sequential(*with_norm(), nn.Dropout(0.3)).requires_grad_(False).eval()
        assert found(tmp_path, model, lambda m, x, y: F.cross_entropy(judge(m(x)), y)) == []

    def test_back_to_training_after_the_first_epoch(self, tmp_path):
        model = with_dropout().eval()

        calls = itertools.count()

        def loss(m, x, y):
            m.train(next(calls) > 5)
            return classified(m, x, y)

        assert found(tmp_path, model, loss, steps=20) == []


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.cell, self.head = nn.Embedding(10, 6), nn.GRU(6, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, ids):
        return self.head(self.cell(self.table(ids))[0][:, -1])


class TestTheInputs:
    @pytest.mark.parametrize("empty", [torch.zeros_like, lambda x: x[:1].expand_as(x)], ids=["zeros", "one for all"])
    @pytest.mark.parametrize("kind", [mlp, with_norm, with_dropout])
    def test_inputs_that_are_all_the_same(self, tmp_path, kind, empty):
        x, y = blobs(160)
        assert found(tmp_path, kind(), classified, (empty(x), y)) == ["inputs-empty"]

    def test_one_token_everywhere(self, tmp_path):
        y = torch.randint(4, (160,))
        assert found(tmp_path / "same", Reader(), classified, (torch.ones(160, 5, dtype=torch.long), y)) == [
            "inputs-empty"
        ]
        assert found(tmp_path / "others", Reader(), classified, (torch.randint(10, (160, 5)), y)) == []

    def test_the_whole_data_as_one_batch(self, tmp_path):
        x, y = blobs(64)
        assert found(tmp_path / "full", mlp(), classified, (x, y), size=64) == []
        assert found(tmp_path / "zero", mlp(), classified, (0 * x, y), size=64) == ["inputs-empty"]

    def test_what_still_tells_something(self, tmp_path):
        """One column of eight; a mask of ones beside the data; rows that are alike within a batch only; noise."""
        x, y = blobs(160)
        column = torch.cat([x[:, :1], torch.zeros(160, 7)], 1)
        groups = x[::16].repeat_interleave(16, 0)
        assert found(tmp_path / "column", mlp(), classified, (column, y)) == []
        assert found(tmp_path / "groups", mlp(), classified, (groups, y)) == []

        def masked(m, x, y):
            return F.cross_entropy(m(x) * torch.ones(len(x), 4), y)

        def noisy(m, x, y):
            return F.cross_entropy(m(torch.randn_like(x)), y)

        assert found(tmp_path / "mask", mlp(), masked, (x, y)) == []
        assert found(tmp_path / "noise", mlp(), noisy, (x, y)) == []

    def test_targets_that_do_not_differ_ask_for_nothing(self, tmp_path):
        x, y = blobs(160)
        assert found(tmp_path, mlp(), classified, (0 * x, 0 * y)) == []


class Own(torch.autograd.Function):
    """What cannot be replayed."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *g):
        return g[0].clone()


def test_without_a_tape_the_program_is_not_judged(tmp_path):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(m, x, y):
        return F.cross_entropy(Own.apply(m(x)), y)

    told = verdict(tmp_path, train(model, optimizer, batches(*blobs(160), 16), 40, loss))
    assert codes(told) == [] and not set(WIRING) & set(told.checked)
    assert all("Own" in told.not_checked[code] for code in WIRING)


def test_the_facts_alone_need_no_replay(tmp_path):
    model = nn.Sequential(*mlp(), nn.Softmax(1))
    run = recorded(tmp_path, train(model, torch.optim.SGD(model.parameters(), lr=0.1), batches(*blobs(160), 16), 12))
    assert told_findings(case(run)) == []
    assert [f.code for f in wiring_findings(case(run))] == ["softmax-before-cross-entropy"]
