"""Which rows are trained on: a hash of each, no more than they may cost, and nothing left on the models."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import unstuck
from unstuck.record import Hashes, _rows
from unstuck.record._rows import Rows

X, Y = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 3
HELD, AIMS = torch.randn(12, 6, generator=torch.Generator().manual_seed(2)), torch.arange(12) % 3


class Net(nn.Module):
    """Changes its inputs before a parameter meets them, and writes into them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        return self.body(x.mul_(0.5).add(1))


def hashed(x):
    return Hashes().of([x]).unique()


def trained(folder, *, model=None, between=lambda model: None, epochs=3, budget=0.02):
    model = model or Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with unstuck.watch(folder=folder, budget=budget) as run:
        for _ in range(epochs):
            model.train()
            for x, y in zip(X.split(10), Y.split(10), strict=True):
                optimizer.zero_grad()
                F.cross_entropy(model(x.clone()), y).backward()
                optimizer.step()
            between(model)
    return run.memory(), model


def by_loss(model):
    model.eval()
    with torch.no_grad():
        return sum(
            F.cross_entropy(model(x.clone()), y).item() for x, y in zip(HELD.split(5), AIMS.split(5), strict=True)
        )


NUMBERS = torch.empty(64, dtype=torch.int64).random_(
    -(2**63), None, generator=torch.Generator().manual_seed(_rows.SEED)
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool])
def test_a_hash_is_the_sum_of_words_times_numbers_modulo_two_to_the_64(dtype):
    x = (4 * torch.randn(5, 3, 2)).to(dtype)
    bits = {1: "u1", 2: "<i2"}.get(x.element_size(), "<i4")
    for row, found in zip(x, Hashes().of([x]).tolist(), strict=True):
        words = memoryview(row.numpy().tobytes())
        size = int(bits[-1])
        ints = [
            int.from_bytes(words[k : k + size], "little", signed=bits[-2] == "i") for k in range(0, len(words), size)
        ]
        assert found % 2**64 == sum(a * b for a, b in zip(ints, NUMBERS.tolist(), strict=False)) % 2**64


def test_rows_are_the_same_in_any_layout_and_any_pieces(monkeypatch):
    x = torch.randn(7, 4, 6)
    whole = Hashes().of([x])
    assert torch.equal(whole, Hashes().of([x.flatten(1)]))
    assert torch.equal(whole, Hashes().of([x.transpose(1, 2).contiguous().transpose(1, 2)]))
    wider = Hashes()
    wider.of([torch.zeros(2, 1000)])
    assert torch.equal(whole, wider.of([x]))
    monkeypatch.setattr(_rows, "PIECE", 48)
    assert torch.equal(whole, Hashes().of([x]))


def test_different_rows_have_different_hashes():
    """Zeros and ones, whose bits end in many zeros, are the worst of all."""
    bits = ((torch.arange(2**16)[:, None] >> torch.arange(16)) & 1).flip(0)
    for x in (bits.float(), bits.double(), bits, bits.half(), bits.bool()):
        assert len(hashed(x)) == 2**16
    a, b = torch.randn(50, 1), torch.randn(50, 1)
    assert not torch.isin(Hashes().of([a, b]), Hashes().of([b, a])).any()


def test_the_rows_that_are_trained_on_are_known_and_no_others(tmp_path):
    def between(model):
        by_loss(model)
        F.cross_entropy(model(HELD.clone()), AIMS).item()  # with gradients, though nobody asks for them

    memory, _ = trained(tmp_path / "run", between=between)
    assert torch.equal(memory.rows, hashed(X))
    assert torch.equal(memory.evaluations[-1].hashes, Hashes().of([HELD]))
    assert all(e.hashes is None for e in memory.evaluations[:-1])


def test_steps_that_add_up_several_batches_and_models_in_parts_are_heard(tmp_path):
    first, second = nn.Linear(6, 8), nn.Linear(8, 3)
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)

    def answer(x):
        return second(torch.relu(first(x)))

    with unstuck.watch(folder=tmp_path / "run") as run:
        for _ in range(3):
            optimizer.zero_grad()
            for x, y in zip(X.split(10), Y.split(10), strict=True):
                F.cross_entropy(answer(x), y).backward()
            optimizer.step()
            with torch.no_grad():
                F.cross_entropy(answer(HELD), AIMS).item()
    assert torch.equal(run.memory().rows, hashed(X))
    assert torch.equal(run.memory().evaluations[-1].hashes, Hashes().of([HELD]))


def test_what_is_given_by_name_is_heard_where_it_is_handed_on(tmp_path):
    class Named(Net):
        def forward(self, *, inputs):
            return self.body(inputs)

    model = Named()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with unstuck.watch(folder=tmp_path / "run") as run:
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs=X), Y).backward()
            optimizer.step()
    assert torch.equal(run.memory().rows, hashed(X))


def test_the_run_is_the_same_to_the_last_bit(tmp_path):
    torch.manual_seed(3)
    plain, before = Net(), len(nn.modules.module._global_forward_pre_hooks)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(3):
        for x, y in zip(X.split(10), Y.split(10), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(plain(x.clone()), y).backward()
            optimizer.step()
    state = torch.get_rng_state()
    _, watched = trained(tmp_path / "run", budget=100.0)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(nn.modules.module._global_forward_pre_hooks) == before


def test_a_model_that_is_copied_or_saved_on_the_way_takes_nothing_with_it(tmp_path):
    copies = []

    def between(model):
        copies.append(copy.deepcopy(model))
        torch.save(model, io.BytesIO())

    trained(tmp_path / "run", between=between)
    assert not any(m._forward_pre_hooks for c in copies for m in c.modules())


def test_a_transform_or_a_mode_of_the_script_sees_nothing_of_it(tmp_path):
    class Seen(TorchDispatchMode):
        names = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names = (*self.names, str(func))
            return func(*args, **(kwargs or {}))

    model = Net().body
    with unstuck.watch(folder=tmp_path / "run"):
        torch.func.vmap(lambda x: model(x))(X)
        with Seen() as mode:
            F.cross_entropy(model(X), Y).backward()
    assert "aten.addmm.default" in mode.names
    assert "aten.mv.default" not in mode.names  # the product that makes the hashes


def test_numbers_stay_on_the_processor_whatever_the_script_takes_as_its_device():
    x = torch.randn(5, 4)
    with torch.device("meta"):
        found = Hashes().of([x])
    assert torch.equal(found, Hashes().of([x]))


def listening(rows):
    return rows._handle is not None


def test_it_takes_no_more_than_its_share_of_the_time():
    rows = Rows(lambda: False, 0.02)
    share = _rows.SHARE * 0.02
    rows.put()
    assert listening(rows)
    for elapsed in (0.0, 10.0, 1000.0):
        rows.seconds = share * elapsed + 2 * _rows.FREE
        rows.listen(elapsed)
        assert not listening(rows)
        rows.seconds = share * elapsed + 0.5 * _rows.FREE
        rows.listen(elapsed)
        assert listening(rows)
    rows.remove()
    rows.listen(1e9)
    assert not listening(rows)


def test_calls_that_are_given_no_rows_are_not_heard_for_long(monkeypatch):
    monkeypatch.setattr(_rows, "CALLS", 5)
    rows = Rows(lambda: False, 0.02)
    rows.put()
    with torch.no_grad():
        for _ in range(6):
            nn.Linear(6, 3)(X)
    assert not listening(rows)
    rows.listen(1.0)
    assert listening(rows)
    rows.remove()


def test_only_so_many_hashes_are_kept(monkeypatch):
    monkeypatch.setattr(_rows, "MOST", 20)
    monkeypatch.setattr(_rows, "WAITING", 10)
    rows, model = Rows(lambda: False, 100.0), nn.Linear(6, 3)
    rows.put()
    for _ in range(20):
        model(torch.randn(5, 6)).sum()
        rows.trained()
        assert len(rows._known) + rows._count <= 20 + 10 + 5
    assert len(rows.all()) == 20
    assert not listening(rows)
