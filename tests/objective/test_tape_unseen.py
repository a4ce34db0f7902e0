"""What autograd does not see: a tape is exact about it or refuses. And when two steps are one program."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tape_programs import PROGRAMS
from tape_steps import assert_same, build, gradients, replayed, run, small
from torch import nn

from unstuck.objective import Recorder, TapeError, Vault


def stepped(body):
    """A recorder that saw body(layer, x, backward), and the gradients that the script then had."""
    layer, x = small()
    recorder = Recorder(list(layer.parameters()))

    def backward(loss):
        recorder.root([loss])
        loss.backward()

    with recorder:
        body(layer, x, backward)
    return recorder, gradients(recorder.leaves)


def overwritten(array, value=0.0):
    array[...] = value


def numpy_buffer(f, backward, *, late):
    buffer = np.ones((5, 3), np.float32)
    h = f(torch.from_numpy(buffer))
    if not late:
        overwritten(buffer)
    backward(h.square().sum())
    overwritten(buffer)


def weight_of_numpy(f, x, backward):
    owner = np.ones((3, 3), np.float32)
    f.weight = nn.Parameter(torch.from_numpy(owner))
    h = f(x)
    overwritten(owner)
    backward(h.sum())


def target_scaled_in_numpy(f, x, backward):
    with torch.no_grad():
        target = f(x + 1)
    overwritten(target.numpy(), 0.5)
    backward(F.mse_loss(f(x), target))


def evaluates_then_trains(f, x, backward, *, at_once):
    norm = nn.BatchNorm1d(3).eval()
    first = norm(f(x)).square().sum()
    if not at_once:
        backward(first)
    norm.train()
    second = norm(f(x)).pow(3).sum()
    backward(first + second if at_once else second)


def buffer_rectified(f, x, backward, *, late):
    """A buffer of NumPy's that the step adds to is rectified through .data, before or after f has seen it."""
    buffer = torch.from_numpy(x.numpy().copy())
    buffer.add_(f(x).detach().mean())
    if late:
        F.relu(buffer.data, True)
    h = f(buffer)
    if not late:
        F.relu(buffer.data, True)
    backward(h.square().sum())


@pytest.mark.parametrize(
    ("reason", "body"),
    [
        ("NumPy", lambda f, x, backward: numpy_buffer(f, backward, late=False)),
        ("NumPy", weight_of_numpy),
        ("NumPy", target_scaled_in_numpy),
        ("NumPy", lambda f, x, backward: (h := f(x), s := h.exp(), overwritten(s.detach().numpy()), backward(s.sum()))),
        (
            "NumPy",
            lambda f, x, backward: (
                h := f(x),
                overwritten(h.detach().numpy()),
                overwritten(h.detach().numpy()),
                backward(h.square().sum()),
            ),
        ),
        ("NumPy", lambda f, x, backward: (h := f(x), F.relu(x.data, True), backward(h.sum()))),
        ("NumPy", lambda f, x, backward: buffer_rectified(f, x, backward, late=False)),
        ("gradient was read", lambda f, x, backward: (backward(f(x).sum()), f.zero_grad(), backward(f(x).exp().sum()))),
        (
            "gradient was read",
            lambda f, x, backward: (backward(f(x).sum()), backward(f(x).exp().sum() * f.weight.grad.norm())),
        ),
        ("read back", lambda f, x, backward: (backward(s := f(x).exp().sum()), backward(f(x).sum() * (1 / s.item())))),
        ("batch norm evaluates", lambda f, x, backward: evaluates_then_trains(f, x, backward, at_once=True)),
    ],
)
def test_what_autograd_does_not_see_is_refused_with_the_reason(reason, body):
    recorder, _ = stepped(body)
    with pytest.raises(TapeError, match=reason):
        recorder.finish(Vault())


@pytest.mark.parametrize(
    "body",
    [
        lambda f, x, backward: numpy_buffer(f, backward, late=True),
        lambda f, x, backward: buffer_rectified(f, x, backward, late=True),
        lambda f, x, backward: (backward(f(x).exp().sum()), overwritten(x.numpy())),
        lambda f, x, backward: (h := f(x), s := h.exp().sum(), h.detach().numpy().sum(), backward(s)),
        lambda f, x, backward: evaluates_then_trains(f, x, backward, at_once=False),
        lambda f, x, backward: (
            backward(f(x).sum()),
            nn.utils.clip_grad_norm_(f.parameters(), 1e9),
            f.weight.grad.norm(),
        ),
    ],
)
def test_what_numpy_and_running_statistics_leave_alone_is_replayed(body):
    recorder, had = stepped(body)
    tape = recorder.finish(Vault())
    loss, found = replayed(tape, recorder.leaves)
    assert float(loss) == tape.loss
    assert_same(found, had, rtol=1e-6)


def test_a_large_input_that_numpy_may_write_into_is_refused():
    layer, x = nn.Linear(3, 1), torch.from_numpy(np.ones((3_000_000, 3), np.float32))
    recorder = Recorder(list(layer.parameters()))
    with recorder:
        recorder.root([layer(x).mean()])
    with pytest.raises(TapeError, match="too large"):
        recorder.finish(Vault())


def test_a_number_that_moves_with_what_was_read_back_is_refused_beside_the_step_before():
    """Computed in Python from a number of the step, it cannot be told from one of the script's own by itself."""
    layer, x = small()
    programs = []
    for k in range(2):
        recorder = Recorder(list(layer.parameters()))
        with recorder:
            first = layer(x + k).exp().sum()
            recorder.root([first])
            first.backward()
            second = layer(x).square().sum() * (first.item() % 0.7)
            recorder.root([second])
            second.backward()
        if programs:
            with pytest.raises(TapeError, match="read back"):
                recorder.finish(Vault(), like=programs)
        else:
            programs.append(recorder.finish(Vault()).program)


@pytest.mark.parametrize("pair", [(1, True), (1.0, 1), (0.0, -0.0)])
def test_programs_whose_numbers_only_seem_equal_are_not_shared(pair):
    layer, x = small()
    tapes = []
    for number in pair:
        recorder = Recorder(list(layer.parameters()))
        with recorder:
            recorder.root([torch.mul(layer(x), number).sum()])
        tapes.append(recorder.finish(Vault(), like=[t.program for t in tapes[:1]]))
    assert tapes[0].program != tapes[1].program


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_step_that_is_known_already_shares_the_program_and_keeps_its_own_batch(name):
    leaves, step = build(PROGRAMS[name])
    tapes = []
    for _ in range(2):
        for p in leaves:
            p.grad = None
        state = torch.get_rng_state()
        recorder = Recorder(leaves)
        losses = run(step, recorder)
        tapes.append(recorder.finish(Vault(), like=[t.program for t in tapes[:1]]))
        torch.set_rng_state(state)
    assert tapes[1].program is tapes[0].program
    assert tapes[1].loss == float(sum(losses))
    loss, grads = replayed(tapes[1], leaves)
    torch.testing.assert_close(loss, torch.tensor(tapes[1].loss, dtype=loss.dtype), rtol=1e-6, atol=0)
    assert_same(grads, gradients(leaves), rtol=1e-6)


class Doubled(torch.autograd.Function):
    """Out of the recorder's sight."""

    @staticmethod
    def forward(ctx, x):
        with torch._C.DisableTorchFunction():  # as in a kernel of one's own
            return 2 * x

    @staticmethod
    def backward(ctx, slope):
        return 2 * slope


@pytest.mark.parametrize("cut", [torch.Tensor.detach, lambda h: h.data])
def test_a_state_that_is_carried_over_and_cut_is_a_constant(cut):
    f, x = small()
    state = f(x).tanh()  # of the step before
    recorder = Recorder(list(f.parameters()))
    with recorder:
        carried = cut(state)
        loss = f(carried).square().sum()
        recorder.root([loss])
        loss.backward()
    tape = recorder.finish(Vault())
    state = carried.clone()
    other = [p.detach() + 0.1 for p in f.parameters()]
    expected = F.linear(state, *other).square().sum()
    torch.testing.assert_close(tape.replay(other), expected)


def test_what_was_made_out_of_sight_in_this_step_is_no_state_when_it_is_cut():
    f, x = small()
    recorder = Recorder(list(f.parameters()))
    with recorder:
        target = Doubled.apply(f(x)).detach()
        loss = (f(x) - target).square().sum()
        recorder.root([loss])
        loss.backward()
    with pytest.raises(TapeError, match="made out of sight, by DoubledBackward"):
        recorder.finish(Vault())
