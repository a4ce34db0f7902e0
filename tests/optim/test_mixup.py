"""Mixed batches: the identity of the mixed loss, the distribution of λ, and what may be mixed."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from unstuck.optim import mixup


def data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(20, 4, generator=generator, dtype=dtype), torch.randint(3, (20,), generator=generator)


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_cross_entropy_of_soft_labels_is_the_mixed_cross_entropy_of_the_pairs(dtype):
    x, y = data(dtype)
    marked = torch.cat([x, torch.eye(20, dtype=dtype)], dim=1)  # tells the partners and λ afterwards
    [(mixed, targets)] = mixup([(marked, y)], 0.4, classes=3, generator=seeded())
    assert targets.dtype == dtype
    shares = mixed[:, 4:]
    torch.testing.assert_close(mixed[:, :4], shares @ x)
    net = torch.randn(4, 3, generator=seeded(2), dtype=dtype)
    logits = mixed[:, :4] @ net
    pairs = (
        sum(shares[i, j] * cross_entropy(logits[i : i + 1], y[j : j + 1]) for i in range(20) for j in range(20)) / 20
    )
    assert abs(float(cross_entropy(logits, targets) - pairs)) < 1e-6


def test_one_share_is_drawn_for_a_batch_and_each_example_is_a_partner_once():
    eye = torch.eye(50, dtype=torch.float64)
    for mixed, targets in mixup([(eye, eye)] * 5, 1.0, generator=seeded()):
        assert torch.equal(mixed, targets)
        torch.testing.assert_close(mixed.sum(0), torch.ones(50, dtype=torch.float64))
        own = mixed.diagonal()[mixed.diagonal() < 1]
        assert float(own.max() - own.min()) == 0


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_the_share_is_beta_distributed(alpha):
    batch = (torch.tensor([[1.0], [0.0]], dtype=torch.float64), torch.zeros(2, 1))
    drawn = torch.cat([x[:1, 0] for x, _ in mixup([batch] * 4000, alpha, generator=seeded())])
    swapped = drawn[drawn < 1]  # where the permutation is not the identity
    assert float(swapped.mean()) == pytest.approx(0.5, abs=0.04)
    variance = 1 / (4 * (2 * alpha + 1))
    assert float(swapped.var()) == pytest.approx(variance, rel=0.1)


def test_any_loader_keeps_its_batches_ragged_end_and_length():
    x, y = data()
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    mixed = mixup(loader, 0.2, classes=3, generator=seeded())
    assert len(mixed) == 3
    assert [len(a) for a, _ in mixed] == [8, 8, 4]
    first, second = (torch.cat([a for a, _ in mixed]) for _ in range(2))
    assert not torch.equal(first, second)
    again = torch.cat([a for a, _ in mixup(loader, 0.2, classes=3, generator=seeded())])
    expected = torch.cat([a for a, _ in mixup(iter(list(loader)), 0.2, classes=3, generator=seeded())])
    assert torch.equal(again, expected)


def test_a_generator_leaves_the_global_one_alone_and_the_batches_too():
    x, y = data()
    kept, state = x.clone(), torch.get_rng_state()
    list(mixup([(x, y)], 0.2, classes=3, generator=seeded()))
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_alpha_is_no_mixing():
    x, y = data()
    [(mixed, targets)] = mixup([(x, y)], 0.0, classes=3)
    assert torch.equal(mixed, x)
    assert torch.equal(targets.argmax(1), y)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x, y: mixup([], -1.0), ValueError, "alpha is at least 0"),
        (lambda x, y: mixup([], 1.0, classes=0), ValueError, "classes=0"),
        (lambda x, y: list(mixup([(x, y)], 1.0)), ValueError, "needs classes="),
        (lambda x, y: list(mixup([(x, y)], 1.0, classes=2)), ValueError, "0 to 2"),
        (lambda x, y: list(mixup([(y, y)], 1.0, classes=3)), TypeError, "int64"),
        (lambda x, y: list(mixup([(x, y[:3])], 1.0, classes=3)), ValueError, "3 for 20"),
        (lambda x, y: list(mixup([{"x": x}], 1.0)), TypeError, "got a dict"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(call, error, words):
    with pytest.raises(error, match=words):
        call(*data())
