"""A minimum that is no good, told from a loss that nothing lowers: by other first weights."""

import torch
from runs import batches, codes, fit, train, verdict
from torch import nn

from unstuck.diagnosis import SHOWN


class Wave(nn.Module):
    """a·sin(ωx + φ), all three to be found."""

    def __init__(self, frequency):
        super().__init__()
        self.amplitude, self.frequency = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(frequency))
        self.phase = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        return self.amplitude * torch.sin(self.frequency * x + self.phase)


def fitted(folder, model, x, y):
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return verdict(folder, train(model, optimizer, batches(x, y, 40), 200, fit))


def rows():
    return torch.rand(800, 1, generator=torch.Generator().manual_seed(2)) * 4 - 2


def test_a_wave_of_another_frequency_lies_in_a_poor_minimum(tmp_path):
    found = fitted(tmp_path, Wave(8.0), rows(), torch.sin(3 * rows())).findings
    assert [(f.word, f.code) for f in found] == [(SHOWN, "poor-minimum")]
    shown = {e.name: e.value for e in found[0].evidence}
    assert shown["what another start reaches"] < 0.5 < shown["what its own start reaches"]


def test_from_a_frequency_near_it_the_wave_gets_there(tmp_path):
    assert codes(fitted(tmp_path, Wave(3.2), rows(), torch.sin(3 * rows()))) == []


def test_where_no_start_gets_further_the_minimum_is_not_poor(tmp_path):
    """Nothing tells these targets: the best is their mean, from anywhere."""
    y = torch.randn(800, 1, generator=torch.Generator().manual_seed(3))
    assert "poor-minimum" not in codes(fitted(tmp_path, nn.Linear(1, 1), rows(), y))
