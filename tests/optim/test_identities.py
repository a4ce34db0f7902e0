"""What torch's own optimisers are in the words of the lectures."""

import pytest
import torch


def pushed(optimizer_of, gradients, **options):
    """The steps of one weight along given gradients."""
    w = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = optimizer_of([w], **options)
    path = [0.0]
    for g in gradients:
        w.grad = torch.full_like(w, g)
        optimizer.step()
        path.append(float(w.detach()))
    return torch.tensor(path, dtype=torch.float64).diff()


def test_momentum_steps_are_the_weighted_sum_of_all_gradients_so_far():
    steps = pushed(torch.optim.SGD, [1.0, 1.0, 1.0, 0.0], lr=0.1, momentum=0.9)
    torch.testing.assert_close(steps, torch.tensor([-0.1, -0.19, -0.271, -0.2439], dtype=torch.float64))
    one = pushed(torch.optim.SGD, [1.0, *[0.0] * 6], lr=0.1, momentum=0.9)
    torch.testing.assert_close(one, -0.1 * 0.9 ** torch.arange(7, dtype=torch.float64))


def test_momentum_multiplies_a_constant_gradient_by_ten_and_halves_an_alternating_one():
    constant = pushed(torch.optim.SGD, [1.0] * 400, lr=1.0, momentum=0.9)
    alternating = pushed(torch.optim.SGD, [1.0, -1.0] * 200, lr=1.0, momentum=0.9)
    assert abs(float(constant[-1])) == pytest.approx(1 / (1 - 0.9))
    assert abs(float(alternating[-1])) == pytest.approx(1 / (1 + 0.9))


def test_torchs_momentum_is_the_lectures_only_while_the_rate_stays():
    w = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    lectures, v, gaps = 0.0, 0.0, []
    for k in range(30):
        optimizer.param_groups[0]["lr"] = rate = 0.1 if k < 5 else 0.01
        w.grad = torch.ones_like(w)
        optimizer.step()
        v = 0.9 * v + rate
        lectures -= v
        gaps.append(abs(float(w.detach()) - lectures))
    assert max(gaps[:5]) < 1e-15
    # the lectures' buffer holds steps, and goes on at the old rate; torch's holds gradients
    owed = 0.09 * sum(0.9**j for j in range(5)) * 0.9
    assert gaps[5] == pytest.approx(owed)
    assert gaps[-1] == pytest.approx(owed * (1 - 0.9**25) / 0.1)


def test_where_the_rate_drops_to_a_tenth_the_two_momentums_part_on_a_bowl():
    # 002: ½w² from 1, the rate 0.1 divided by ten after five steps; the gaps after six and after ten
    w = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    theta, v, gaps = 1.0, 0.0, []
    for k in range(10):
        optimizer.param_groups[0]["lr"] = rate = 0.1 if k < 5 else 0.01
        w.grad = w.detach().clone()
        optimizer.step()
        v = 0.9 * v + rate * theta
        theta -= v
        gaps.append(abs(float(w.detach()) - theta))
    assert max(gaps[:5]) < 1e-15
    assert [gaps[5], gaps[9]] == pytest.approx([0.21, 0.81], abs=5e-3)


def test_torchs_nesterov_weights_are_the_lectures_look_ahead_point():
    A = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    start = torch.tensor([1.0, -1.0], dtype=torch.float64)
    w = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9, nesterov=True)
    theta, v, apart = start.clone(), torch.zeros(2, dtype=torch.float64), 0.0
    for _ in range(50):
        w.grad = A @ w.detach()
        optimizer.step()
        v = 0.9 * v + 0.1 * (A @ (theta - 0.9 * v))
        theta = theta - v
        apart = max(apart, float((w.detach() - (theta - 0.9 * v)).abs().max()))
    assert apart <= torch.finfo(torch.float64).eps  # 1.7e-16 in 50 steps


def test_torchs_adagrad_steps_shrink_like_one_over_the_root_of_time():
    steps = pushed(torch.optim.Adagrad, [1.0] * 4, lr=0.1)
    torch.testing.assert_close(steps, -0.1 / torch.arange(1, 5, dtype=torch.float64).sqrt())


def test_the_lectures_exponential_schedule_is_torchs_with_the_base_to_the_minus_beta():
    w = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([w], lr=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=torch.tensor(-0.1).double().exp().item())
    for k in range(20):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 2.718281828459045 ** (-0.1 * k))
        optimizer.step()
        schedule.step()
