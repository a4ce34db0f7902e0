"""Numbers that Python brings into a step: which are the script's own, and which may hide a function of the weights."""

import io

import pytest
import torch
import torch.nn.functional as F
from tape_steps import assert_same, gradients, replayed, small

from unstuck.objective import Number, Recorder, TapeError, Vault, pack, unpack


def stepped(layer, body, *, like=()):
    """The tape of body(layer, backward), with what the script computed and the gradients that it had."""
    layer.zero_grad()
    losses = []
    recorder = Recorder(list(layer.parameters()))

    def backward(loss):
        recorder.root([loss])
        loss.backward()
        losses.append(loss.detach())

    with recorder:
        body(layer, backward)
    return recorder.finish(Vault(), like=like), sum(losses), gradients(recorder.leaves)


def loss_of(h, x, weight):
    return F.leaky_relu(h, 0.1).square().mean() + weight * h.abs().mean() + torch.lerp(h, x, weight).sum() * 0.1


def annealed(weights):
    """Steps whose loss has another weight each, and their tapes."""
    layer, x = small()
    steps, programs = [], []
    for weight in weights:
        steps.append(stepped(layer, lambda f, backward, w=weight: backward(loss_of(f(x), x, w)), like=programs))
        programs.append(steps[-1][0].program)
        with torch.no_grad():
            layer.weight.add_(0.01)
    return layer, x, steps


def test_a_weight_of_the_loss_that_moves_is_no_part_of_the_program():
    _, _, steps = annealed([0.1, 0.2, 0.30000000000000004, 0.0])
    programs = [tape.program for tape, _, _ in steps]
    assert programs[1] is programs[2] is programs[3]
    assert [tape.numbers for tape, _, _ in steps[1:]] == [(x, x) for x in (0.2, 0.30000000000000004, 0.0)]
    kept = [x for call in programs[1].instructions for x in call.leaves() if type(x) is float]
    assert sorted(kept) == [0.1, 0.1], "what stays the same is a part of it"


def test_each_step_replays_with_its_own_numbers_at_any_weights():
    layer, x, steps = annealed([0.1, 0.2, 0.3])
    other = [p.detach() + 0.3 for p in layer.parameters()]
    for weight, (tape, _, _) in zip([0.1, 0.2, 0.3], steps, strict=True):
        assert torch.equal(tape.replay(other), loss_of(F.linear(x, *other), x, weight))
    tape, loss, had = steps[-1]
    with torch.no_grad():
        layer.weight.sub_(0.01)  # as it was in that step
    found, slopes = replayed(tape, list(layer.parameters()))
    torch.testing.assert_close(found, loss)
    assert_same(slopes, had, rtol=1e-5)


def test_numbers_survive_the_disk():
    layer, _, steps = annealed([0.1, 0.2, 0.3])
    file = io.BytesIO()
    torch.save(pack([tape for tape, _, _ in steps]), file)
    file.seek(0)
    back = unpack(torch.load(file, weights_only=True))
    assert back[1].program is back[2].program
    assert any(type(x) is Number for call in back[1].program.instructions for x in call.leaves())
    for ours, (theirs, _, _) in zip(back, steps, strict=True):
        assert ours.numbers == theirs.numbers
        weights = list(layer.parameters())
        assert torch.equal(ours.replay(weights), theirs.replay(weights))


@pytest.mark.parametrize(
    "made_of",
    [lambda last: last, lambda last: 1 / (1 + last), lambda last: 0.9 * 0.4 + 0.1 * last],
    ids=["quoted", "computed", "averaged"],
)
def test_a_number_of_the_step_before_is_a_constant_of_this_one(made_of):
    layer, x = small()
    last, programs, tapes = 0.5, [], []
    for _ in range(4):
        weight = made_of(last)
        tape, loss, _ = stepped(layer, lambda f, backward, w=weight: backward(f(x).square().mean() * w), like=programs)
        last = loss.item()
        programs.append(tape.program)
        tapes.append((tape, weight))
        with torch.no_grad():
            layer.weight.mul_(0.9)
    assert programs[1] is programs[2] is programs[3]
    other = [p.detach() + 0.2 for p in layer.parameters()]
    for tape, weight in tapes:
        torch.testing.assert_close(tape.replay(other), F.linear(x, *other).square().mean() * weight)


def test_a_number_that_is_read_after_the_step_from_a_value_of_it_is_no_reading_of_the_next():
    layer, x = small()
    before = layer(x).mean()
    tape, _, _ = stepped(layer, lambda f, backward: backward(f(x).square().mean() * before.item()))
    other = [p.detach() + 0.2 for p in layer.parameters()]
    torch.testing.assert_close(tape.replay(other), F.linear(x, *other).square().mean() * before.item())


def test_a_branch_on_a_number_of_the_step_before_is_taken_as_it_was():
    layer, x = small()

    def body(f, backward, *, last):
        backward(f(x).square().mean() if last > 1 else f(x).abs().mean())

    high, _, _ = stepped(layer, lambda f, backward: body(f, backward, last=2.0))
    low, _, _ = stepped(layer, lambda f, backward: body(f, backward, last=0.5), like=[high.program])
    assert high.program != low.program
    other = [10 * p.detach() for p in layer.parameters()]
    torch.testing.assert_close(high.replay(other), F.linear(x, *other).square().mean())
    torch.testing.assert_close(low.replay(other), F.linear(x, *other).abs().mean())


def in_two_parts(read, use, *, weight=1.0):
    """Two losses in one step; of the first something is read back, and used in the second."""

    def body(f, backward):
        first = f(body.x).exp() * weight
        backward(first.sum())
        backward(use(f(body.x), read(first)).sum())

    _, body.x = small()
    return body


READS = {
    "item": lambda h: h.sum().item(),
    "float": lambda h: float(h.detach().mean()),
    "tolist": lambda h: h.tolist()[1][2],
    "numpy": lambda h: float(h.detach().numpy()[1, 2]),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_number_of_the_same_step_may_not_go_into_it_again(read):
    layer, _ = small()
    with pytest.raises(TapeError, match="read back may go into a later call"):
        stepped(layer, in_two_parts(read, lambda h, x: h * x))


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_number_of_the_same_step_that_nobody_uses_is_for_the_log(read):
    layer, _ = small()
    body = in_two_parts(read, lambda h, x: h * 0.25)
    tape, loss, _ = stepped(layer, body)
    assert float(tape.replay(list(layer.parameters())).detach()) == float(loss)
    other = [p.detach() + 0.2 for p in layer.parameters()]
    h = F.linear(body.x, *other)
    torch.testing.assert_close(tape.replay(other), h.exp().sum() + (h * 0.25).sum())


@pytest.mark.parametrize(
    "read", [*READS.values(), lambda h: (h > h.mean()).float().sum().item()], ids=[*READS, "count"]
)
def test_a_number_that_moves_after_something_was_read_casts_doubt_on_the_steps_before(read):
    """Computed from what was read, it shows only by moving: the first such step was taken for good."""
    layer, _ = small()
    body = in_two_parts(read, lambda h, x: h * (0.3 + x % 0.07))
    first, _, _ = stepped(layer, body)
    with torch.no_grad():
        layer.weight.add_(torch.linspace(-1, 1, 9).view(3, 3))
    with pytest.raises(TapeError, match="read back may go into a later call") as told:
        stepped(layer, body, like=[first.program])
    assert told.value.doubted is first.program


def test_a_number_that_the_step_took_before_it_read_anything_is_its_own():
    """Gradient accumulation that logs each loss, with a weight that is annealed."""
    layer, x = small()
    tapes = []
    for weight in (0.1, 0.2, 0.3):
        body = in_two_parts(READS["item"], lambda h, _, w=weight: h * w, weight=weight)
        tapes.append(stepped(layer, body, like=[t.program for t in tapes])[0])
    assert tapes[1].program is tapes[2].program
    other = [p.detach() + 0.2 for p in layer.parameters()]
    h = F.linear(x, *other)
    torch.testing.assert_close(tapes[2].replay(other), (h.exp() * 0.3).sum() + (h * 0.3).sum())


def test_of_two_programs_in_turn_each_is_known_again():
    layer, x = small()
    programs = []
    for k in range(8):
        weight = 0.1 * (k + 1)
        half = (lambda f: f(x).sin().sum()) if k % 2 else (lambda f: f(x).square().mean())
        tape, _, _ = stepped(layer, lambda f, backward, w=weight, h=half: backward(h(f) * w), like=programs)
        if tape.program not in programs:
            programs.append(tape.program)
    assert len(programs) == 4  # of each the first, and the one whose number moves
