"""What is heard where a script turns gradients off: which rows, what they were compared with, and how often."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unstuck
from unstuck.record import _ear

X, Y = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 3
HELD, AIMS = torch.randn(12, 6, generator=torch.Generator().manual_seed(2)), torch.arange(12) % 3


def network(*, dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))


def trained(folder, validate, *, model=None, epochs=4):
    """The evaluations that were heard of a loop that validates after each epoch."""
    model = model or network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with unstuck.watch(folder=folder) as run:
        for _ in range(epochs):
            model.train()
            for x, y in zip(X.split(10), Y.split(10), strict=True):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            validate(model)
    return run.memory().evaluations


def by_argmax(model):
    model.eval()
    with torch.no_grad():
        return (torch.cat([model(x) for x in HELD.split(5)]).argmax(-1) == AIMS).float().mean().item()


def by_loss(model):
    model.eval()
    with torch.no_grad():
        return sum(F.cross_entropy(model(x), y).item() for x, y in zip(HELD.split(5), AIMS.split(5), strict=True))


@torch.no_grad()
def decorated(model):
    model.eval()
    correct = 0
    for x, y in zip(HELD.split(5), AIMS.split(5), strict=True):
        _, predicted = torch.max(model(x), 1)
        correct += (predicted == y).sum().item()
    return correct


def in_inference_mode(model):
    model.eval()
    with torch.inference_mode():
        return (model(HELD).softmax(1).argmax(1) == AIMS).float().mean()


def set_off(model):
    model.eval()
    with torch.set_grad_enabled(False):
        return nn.CrossEntropyLoss()(model(HELD), AIMS)


def in_a_buffer(model):
    model.eval()
    with torch.no_grad():
        answers = torch.zeros(12, 3)
        for k in range(0, 12, 4):
            answers[k : k + 4] = model(HELD[k : k + 4])
        return (answers.argmax(1) != AIMS).sum()


STYLES = (by_argmax, by_loss, decorated, in_inference_mode, set_off, in_a_buffer)


@pytest.mark.parametrize("validate", STYLES)
def test_rows_targets_and_outputs_are_those_of_the_script(tmp_path, validate):
    model = network()
    heard = trained(tmp_path / "run", validate, model=model)
    latest = heard[-1]
    assert torch.equal(latest.targets, AIMS)
    assert torch.equal(latest.inputs[0], HELD)
    model.eval()
    wanted = model(HELD).detach()
    torch.testing.assert_close(latest.outputs, wanted.softmax(1) if latest.squashed else wanted)
    assert latest.step == 16
    assert not latest.training
    assert latest.place.split()[0].rpartition(":")[0] == __file__


def test_a_validation_per_batch_is_heard_part_by_part(tmp_path):
    @torch.no_grad()
    def one(model, x, y):
        return F.cross_entropy(model(x), y).item()

    def validate(model):
        model.eval()
        return [one(model, x, y) for x, y in zip(HELD.split(4), AIMS.split(4), strict=True)]

    heard = trained(tmp_path / "run", validate)
    assert {e.part for e in heard} == {0, 1, 2}
    last = {e.part: e for e in heard}
    assert torch.equal(torch.cat([last[k].targets for k in range(3)]), AIMS)
    assert [len(e.inputs) for e in heard if e is not last[e.part]] == [0] * (len(heard) - 3)


def test_what_stays_in_training_mode_is_told(tmp_path):
    def validate(model):
        with torch.no_grad():
            return (model(HELD).argmax(1) == AIMS).float().mean()

    heard = trained(tmp_path / "run", validate, model=network(dropout=0.5))
    assert all(e.training and e.drawn == ["dropout"] for e in heard)
    assert not trained(tmp_path / "other", by_argmax, model=network(dropout=0.5))[-1].drawn


def test_numbers_and_odds(tmp_path):
    def by_difference(model):
        model.eval()
        with torch.no_grad():
            return (model(HELD)[:, 0] - HELD[:, 0]).square().mean()

    def by_sign(model):
        model.eval()
        with torch.no_grad():
            return ((torch.sigmoid(model(HELD)[:, 0]) > 0.5) == (AIMS > 0)).float().mean()

    numbers = trained(tmp_path / "numbers", by_difference)[-1]
    assert numbers.kind == "difference"
    assert torch.equal(numbers.targets, HELD[:, 0])
    odds = trained(tmp_path / "odds", by_sign)[-1]
    assert (odds.kind, odds.squashed) == ("equal", "sigmoid")
    assert torch.equal(odds.targets, AIMS > 0)


def test_what_is_compared_with_nothing_is_left_alone(tmp_path):
    def validate(model):
        with torch.no_grad():
            model(HELD)
            for p in model.parameters():
                p.mul_(1.0)

    assert trained(tmp_path / "run", validate) == ()


def test_nothing_is_left_behind_and_nothing_differs(tmp_path):
    before = [(c.__enter__, c.__exit__) for c in (torch.no_grad, torch.inference_mode, torch.set_grad_enabled)]
    hooks = len(nn.modules.module._global_forward_pre_hooks)
    watched = network(dropout=0.5)
    trained(tmp_path / "run", by_argmax, model=watched)
    after = [(c.__enter__, c.__exit__) for c in (torch.no_grad, torch.inference_mode, torch.set_grad_enabled)]
    assert before == after
    assert hooks == len(nn.modules.module._global_forward_pre_hooks)
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_context_that_a_generator_never_leaves(tmp_path):
    kept = []

    def answers(model):
        with torch.no_grad():
            for x in HELD.split(4):
                yield model(x)

    def validate(model):
        stream = answers(model)
        next(stream)
        kept.append(stream)
        torch.set_grad_enabled(True)

    trained(tmp_path / "run", validate)
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_validation_that_raises(tmp_path):
    def validate(model):
        try:
            with torch.no_grad():
                model(HELD)
                raise KeyError
        except KeyError:
            pass
        by_argmax(model)

    heard = trained(tmp_path / "run", validate)
    assert torch.equal(heard[-1].targets, AIMS)


def test_few_of_many_are_kept_evenly(tmp_path):
    heard = trained(tmp_path / "run", by_argmax, epochs=40)
    steps = [e.step for e in heard]
    assert len(heard) <= 12
    assert steps[0] == 4
    assert steps[-1] == 160
    assert steps == sorted(set(steps))


def test_a_step_that_is_recorded_across_a_validation_keeps_its_tape(tmp_path):
    heard = trained(tmp_path / "run", by_argmax)
    run = unstuck.Run(tmp_path / "run")
    assert {e.step for e in heard} >= {4, 8}
    assert [t.step for t in run.memory().tapes] == list(range(2, 17))  # the optimiser was there before
    assert run.of("end")[0]["refusals"] == {}


def test_inputs_of_which_fewer_rows_were_kept_are_left_out(tmp_path, monkeypatch):
    """They would lie beside the outputs of other rows."""
    monkeypatch.setattr(_ear, "BYTES", HELD[:6].nbytes)  # of the outputs twice as many rows fit
    for latest in (trained(tmp_path / style.__name__, style)[-1] for style in (by_argmax, by_loss)):
        assert len(latest.outputs) == 12
        assert not latest.inputs
