"""What torch's optimisers cost, as the lectures say."""

import pytest
import torch


@pytest.mark.parametrize(
    ("make", "copies"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1),
        (lambda p: torch.optim.RMSprop(p), 1),
        (lambda p: torch.optim.Adam(p), 2),
    ],
)
def test_the_state_of_an_optimiser_takes_as_many_copies_of_the_weights_as_the_lecture_says(make, copies):
    w = torch.ones(1000, requires_grad=True)
    optimizer = make([w])
    w.grad = torch.ones(1000)
    optimizer.step()
    assert sum(x.numel() for x in optimizer.state[w].values() if torch.is_tensor(x) and x.dim()) == copies * 1000
