"""Steps of which little was read are logged as those of which much was."""

import pytest
import torch

from unstuck.record._journal import Journal
from unstuck.record._log import Log, read_log


def logged(folder, take):
    told = []
    log = Log(folder)
    journal = Journal(log, lambda step, loss: told.append((step, loss)))
    take(journal)
    journal.settle()
    log.close()
    return read_log(folder / "log.jsonl")[0], told


@pytest.mark.parametrize("rate", [0.1, 1e-5, 1e22, 1])
@pytest.mark.parametrize("loss", [0.123456789012345, -3e-30, 5.0])
def test_a_step_that_was_noted_reads_as_one_that_was_added(tmp_path, rate, loss):
    whole = {"lr": float(rate), "backwards": 2, "loss": loss, "step": 7, "time": 1.234567, "optimizer": 1}
    noted = logged(tmp_path / "noted", lambda journal: journal.note(7, 1.2345671, 1, rate, loss, 2))
    assert noted == logged(tmp_path / "added", lambda journal: journal.add(whole))
    assert noted == ([{"kind": "step", **whole}], [(7, loss)])


@pytest.mark.parametrize(
    ("rate", "loss", "backwards", "known"),
    [
        (0.1, float("nan"), 1, {"lr": 0.1, "loss": float("nan"), "backwards": 1}),
        (0.1, float("inf"), 1, {"lr": 0.1, "loss": float("inf"), "backwards": 1}),
        (float("inf"), 2.0, 1, {"lr": float("inf"), "loss": 2.0, "backwards": 1}),
        (None, 2.0, 1, {"lr": None, "loss": 2.0, "backwards": 1}),
        (torch.tensor(0.25), torch.tensor(2.5), 1, {"lr": 0.25, "loss": 2.5, "backwards": 1}),
        (0.1, None, 0, {"lr": 0.1}),
        (0.1, 2.0, 0, {"lr": 0.1, "loss": 2.0}),  # of a closure
    ],
)
def test_what_is_no_plain_number_is_noted_too(tmp_path, rate, loss, backwards, known):
    records, _ = logged(tmp_path, lambda journal: journal.note(7, 0.5, 0, rate, loss, backwards))
    assert repr([sorted(r.items()) for r in records]) == repr(
        [sorted({"kind": "step", "step": 7, "time": 0.5, "optimizer": 0, **known}.items())]
    )
