"""What the lectures print is what torch computes, or differs by a known factor: reasons not to write it again."""

import math

import pytest
import torch
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR

F64 = torch.float64


def steps_of(optimizer, w, gradients, schedule=None):
    """The movements that an optimiser of one weight makes on given gradients."""
    moved = []
    for g in gradients:
        before = w.item()
        w.grad = torch.tensor([float(g)], dtype=F64)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        moved.append(w.item() - before)
    return moved


def weight():
    return torch.zeros(1, dtype=F64, requires_grad=True)


def test_torchs_nesterov_is_the_lectures_seen_from_the_point_that_looks_ahead():
    # 002: v ← γv + α∇L(θ − γv), θ ← θ − v; 004, slides 133-140, with the sign of v turned
    values = torch.tensor([0.02, 0.3, 1.0], dtype=F64)
    theta, v = torch.ones(3, dtype=F64), torch.zeros(3, dtype=F64)
    w = torch.ones(3, dtype=F64, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.5, momentum=0.9, nesterov=True)
    worst = 0.0
    for _ in range(50):
        v = 0.9 * v + 0.5 * values * (theta - 0.9 * v)
        theta = theta - v
        w.grad = values * w.detach()
        optimizer.step()
        worst = max(worst, float((w.detach() - (theta - 0.9 * v)).abs().max()))
    assert worst < 3e-16


def test_torchs_momentum_is_the_lectures_while_the_rate_stays():
    # 002: v ← γv + αg holds the rate of the day of each gradient; torch multiplies the sum by today's
    w = weight()
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    schedule = LambdaLR(optimizer, lambda k: 1 if k < 5 else 0.1)
    moved = steps_of(optimizer, w, [1] * 6, schedule)
    v, printed = 0.0, []
    for rate in [0.1] * 5 + [0.01]:
        v = 0.9 * v + rate
        printed.append(-v)
    assert moved[:5] == pytest.approx(printed[:5], abs=1e-15)
    assert moved[5] == pytest.approx(-0.01 * (1 - 0.9**6) / 0.1)
    assert printed[5] < 5 * moved[5]


def test_adagrads_steps_fall_as_the_root_of_their_number():
    w = weight()
    moved = steps_of(torch.optim.Adagrad([w], lr=0.1), w, [1] * 4)
    assert moved == pytest.approx([-0.1, -0.070711, -0.057735, -0.05], abs=1e-6)


def test_the_rms_form_with_the_mean_is_adagrad_times_the_root_of_the_step():
    w = weight()
    optimizer = torch.optim.Adagrad([w], lr=0.1)
    moved = steps_of(optimizer, w, [1, 3, 0.5, 2], LambdaLR(optimizer, lambda t: math.sqrt(t + 1)))
    squares, printed = 0.0, []
    for t, g in enumerate([1, 3, 0.5, 2]):
        squares += g**2
        printed.append(-0.1 * g / math.sqrt(squares / (t + 1)))  # 001: σᵗ = √(mean of the squares)
    assert moved == pytest.approx(printed, abs=1e-9)
    assert moved == pytest.approx([-0.1, -0.134164, -0.02705, -0.105963], abs=1e-6)


def test_torchs_rmsprop_takes_a_first_step_of_ten_times_the_rate():
    w = weight()
    assert steps_of(torch.optim.RMSprop([w], lr=0.1), w, [1])[0] == pytest.approx(-1, rel=1e-6)


def test_the_printed_adam_takes_three_to_five_times_torchs_steps():
    w = weight()
    moved = steps_of(torch.optim.Adam([w], lr=1.0), w, [1] * 4)
    v = G = 0.0
    printed = []
    for _ in range(4):
        v, G = 0.9 * v + 0.1, 0.999 * G + 0.001  # 002: no correction of the bias
        printed.append(v / math.sqrt(G))
    assert moved == pytest.approx([-1] * 4, rel=1e-6)
    assert printed == pytest.approx([3.162, 4.250, 4.950, 5.4416], abs=5e-4)


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


def test_a_rate_above_the_limit_that_decays_finds_the_lowest_of_many_valleys():
    # 004, slides 96-98; f = 0.05x² + 0.3cos 3x, whose two lowest valleys are at ±1.01 and hold −0.2469
    def share(rate, decay):
        x = torch.linspace(-8, 8, 500, dtype=F64).requires_grad_()
        optimizer = torch.optim.SGD([x], lr=rate)
        schedule = ExponentialLR(optimizer, gamma=math.exp(-decay))
        for _ in range(2000):
            x.grad = 0.1 * x.detach() - 0.9 * torch.sin(3 * x.detach())
            optimizer.step()
            schedule.step()
        return float((0.05 * x**2 + 0.3 * torch.cos(3 * x) < -0.24).double().mean())

    assert share(0.02, 0) == pytest.approx(0.290, abs=0.03)
    assert share(1.2, 0) < 0.1
    assert share(3.0, 0.005) > 0.99
