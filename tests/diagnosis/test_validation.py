"""What held-out rows show: each error of a validation is named where it was made, and nothing where there is none."""

import pytest
import torch
from runs import blobs, codes, verdict
from torch import nn
from torch.nn import functional as F

from unstuck.diagnosis import SHOWN
from unstuck.diagnosis._scales import scales_apart


class Task:
    """Noisy blobs, of which some rows are held out and evaluated after each epoch."""

    def __init__(self, *, width=32, drop=0.0, rows=600, noise=3.0, size=32, norm=False):
        torch.manual_seed(0)
        x, y = blobs(rows + 400, noise=noise)
        x = x / x.std()
        self.x, self.y = x[:rows], y[:rows]
        self.held, self.aims = x[rows:], y[rows:]
        layers = [nn.Linear(8, width), *([nn.BatchNorm1d(width)] if norm else []), nn.ReLU(), nn.Dropout(drop)]
        self.model = nn.Sequential(*layers, nn.Linear(width, 4))
        self.size, self.epochs, self.lr = size, 12, 0.1
        self.evaluate = True  # in eval mode
        self.kind = torch.optim.SGD

    def run(self, folder):
        return verdict(folder, self.loop)

    def loop(self):
        optimizer = self.kind(self.model.parameters(), lr=self.lr)
        for _ in range(self.epochs):
            self.model.train()
            for rows in torch.randperm(len(self.x)).split(self.size):
                optimizer.zero_grad()
                F.cross_entropy(self.model(self.x[rows]), self.y[rows]).backward()
                optimizer.step()
            if self.evaluate:
                self.model.eval()
            with torch.no_grad():
                (self.model(self.held).argmax(1) == self.aims).float().mean().item()


def in_training_mode():
    t = Task(drop=0.5)
    t.evaluate = False
    return t


def with_batch_norm_on():
    t = Task(norm=True)
    t.evaluate = False
    return t


def on_another_scale():
    t = Task()
    t.held = t.held * 4 + 3
    return t


def on_a_slightly_other_scale():
    t = Task()
    t.held = t.held * 2 + 1
    return t


def column_by_column():
    """Each column stretched or squeezed, so that all of them together are as wide as before."""
    t = Task()
    t.held = t.held * torch.tensor([3.0, 1 / 3]).repeat(4)
    return t


def by_another_map():
    t = Task(noise=1.0)
    t.aims = (t.aims + 1) % 4
    return t


def two_names_exchanged():
    t = Task(noise=1.0)
    t.aims = torch.where(t.aims == 0, 2, torch.where(t.aims == 2, 0, t.aims))
    return t


def leaking():
    t = by_heart()
    t.x, t.y = torch.cat([t.x, t.held[:200]]), torch.cat([t.y, t.aims[:200]])
    t.epochs = 150
    return t


def by_heart():
    t = Task(rows=80, width=128)
    t.kind, t.lr, t.epochs = torch.optim.Adam, 1e-2, 120
    return t


def wrong_labels():
    """A third of the labels are wrong, and learned by heart."""
    t = Task(width=256, noise=1.0)
    wrong = torch.randperm(600)[:200]
    t.y[wrong] = (t.y[wrong] + 1 + torch.randint(3, (200,))) % 4
    t.kind, t.lr, t.epochs = torch.optim.Adam, 1e-2, 100
    return t


class Rare(Task):
    """Two classes, asked by one output, of which one makes an eightieth of the rows: none are in the latest batches."""

    def __init__(self):
        super().__init__(rows=1200, noise=2.0)
        self.y, self.aims = self.y % 2, self.aims % 2
        kept = (self.y == 0) | (torch.arange(len(self.y)) % 40 == 0)
        self.x, self.y = self.x[kept], self.y[kept]
        self.model[-1] = nn.Linear(32, 1)
        common, rare = (self.y == 0).nonzero().flatten(), self.y.nonzero().flatten()
        cut = len(common) - 5 * self.size
        mixed = torch.cat([common[:cut], rare])
        self.order = torch.cat([mixed[torch.randperm(len(mixed))], common[cut:]])

    def loop(self):
        optimizer = self.kind(self.model.parameters(), lr=self.lr)
        for _ in range(self.epochs):
            self.model.train()
            for rows in self.order.split(self.size):
                optimizer.zero_grad()
                loss = F.binary_cross_entropy_with_logits(self.model(self.x[rows])[:, 0], self.y[rows].float())
                loss.backward()
                optimizer.step()
            self.model.eval()
            with torch.no_grad():
                ((self.model(self.held)[:, 0] > 0).long() == self.aims).float().mean().item()


FAULTS = {
    "train-while-validating": (in_training_mode, with_batch_norm_on),
    "preprocessing-mismatch": (on_another_scale, on_a_slightly_other_scale, column_by_column),
    "label-map-wrong": (by_another_map, two_names_exchanged),
    "leakage": (leaking,),
    "label-noise": (wrong_labels,),
    "class-imbalance": (Rare,),
    "overfitting": (by_heart,),
}


@pytest.mark.parametrize(("code", "make"), [(code, m) for code, makes in FAULTS.items() for m in makes])
def test_it_is_shown_where_it_is_made(tmp_path, code, make):
    found = make().run(tmp_path / "run")
    assert codes(found) == [code]
    assert found.findings[0].word == SHOWN
    assert found.findings[0].where.startswith(__file__)


def test_a_validation_without_an_error_is_silent(tmp_path):
    for k, make in enumerate((Task, lambda: Task(drop=0.5), lambda: Task(norm=True), lambda: Task(noise=1.0))):
        found = make().run(tmp_path / str(k))
        assert not found.findings
        assert "overfitting" in found.checked


def test_classes_that_the_training_itself_mixes_up_are_no_other_map(tmp_path):
    t = Task(noise=1.0)
    t.y, t.aims = ((y + 1) % 4 for y in (t.y, t.aims))  # the same map for both is none
    assert codes(t.run(tmp_path / "run")) == []


def test_training_rows_that_are_evaluated_are_no_validation(tmp_path):
    t = by_heart()
    t.held, t.aims = t.x, t.y
    found = t.run(tmp_path / "run")
    assert not found.findings
    assert set(FAULTS) <= set(found.not_checked)


@pytest.mark.parametrize("shares", [(1.0,), (0.4,)])
def test_one_look_at_both_sets_is_no_leak(tmp_path, shares):
    """Even where but a part of the rows trained on is known."""
    t = by_heart()
    t.epochs = 60
    x, y = t.x, t.y
    t.x, t.y = (part[: int(shares[0] * len(x))] for part in (x, y))

    def loop():
        optimizer = t.kind(t.model.parameters(), lr=t.lr)
        for _ in range(t.epochs):
            for rows in torch.randperm(len(t.x)).split(t.size):
                optimizer.zero_grad()
                F.cross_entropy(t.model(t.x[rows]), t.y[rows]).backward()
                optimizer.step()
            with torch.no_grad():
                F.cross_entropy(t.model(x), y).item()
                F.cross_entropy(t.model(t.held), t.aims).item()

    assert "leakage" not in codes(verdict(tmp_path, loop))


def test_the_share_of_rows_that_leak_is_measured_though_few_steps_are_recorded(tmp_path):
    """Of 1,240 rows trained on, the last 120 steps hold 480; 120 of the 400 that are evaluated are among them all."""
    t = Task(rows=1120, size=4, width=256)
    t.x, t.y = torch.cat([t.x, t.held[:120]]), torch.cat([t.y, t.aims[:120]])
    t.kind, t.lr, t.epochs = torch.optim.Adam, 3e-3, 12
    found = t.run(tmp_path / "run")
    assert found.findings[0].code == "leakage"
    assert found.findings[0].evidence[0].value == 120 / 400
    assert found.findings[0].claim.startswith("30% of the 400 rows")


def test_what_is_told_of_wrong_labels_is_of_a_step_before_they_are_learned(tmp_path):
    found = wrong_labels().run(tmp_path / "run").findings[0]
    assert 1 < found.step < 400  # of 1,900: what is right is learned within a few epochs
    assert 0.1 < found.evidence[0].value < 0.4  # what a network that knows no wrong label misses is a third
    assert found.claim.startswith(f"At step {found.step}, before")


def test_rows_that_lie_elsewhere_by_nature_are_answered_as_they_are(tmp_path):
    """A drift that does no harm: to move them would."""
    t = Task(noise=1.0)
    some = t.aims < 2  # other classes, more than half of whose columns are off
    t.held, t.aims = t.held[some], t.aims[some]
    assert scales_apart(t.x, t.held, whole=False).surely
    assert codes(t.run(tmp_path / "run")) == []


def test_without_a_validation_its_causes_are_not_checked(tmp_path):
    t = Task()
    t.held = t.held[:0]
    t.aims = t.aims[:0]
    found = t.run(tmp_path / "run")
    assert set(FAULTS) <= set(found.not_checked)


def test_odd_validations_do_no_harm(tmp_path):
    """Labels that no class has, NaN among the held-out rows, half precision: nothing is told, and nothing breaks."""
    nan, outside, half = Task(), Task(), Task()
    nan.held[3, 2] = torch.nan
    outside.aims[5] = 77
    half.x, half.held = half.x.bfloat16(), half.held.bfloat16()
    half.model.to(torch.bfloat16)
    for k, t in enumerate((nan, outside, half)):
        assert codes(t.run(tmp_path / str(k))) == []
