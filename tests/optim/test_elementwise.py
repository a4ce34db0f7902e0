"""Weight by weight: each rule against its own words, the lectures' numbers and torch."""

import pytest
import torch

from unstuck.optim import Quickprop, RMSAdagrad, RMSpropFirst, RpropPlus


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def given(optimizer_of, gradients, *, start=None, **options):
    """Where a parameter stands before and after each step along given gradients: (steps + 1, ...)."""
    gradients = torch.as_tensor(gradients, dtype=torch.float64)
    w = torch.nn.Parameter(torch.zeros_like(gradients[0]) if start is None else start.clone())
    optimizer = optimizer_of([w], **options)
    path = [w.detach().clone()]
    for g in gradients:
        w.grad = g.clone()
        optimizer.step()
        path.append(w.detach().clone())
    return torch.stack(path)


def descended(optimizer_of, loss, start, steps, **options):
    """Where a parameter stands after some steps down a loss."""
    w = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = optimizer_of([w], **options)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(w).backward()
        optimizer.step()
    return w.detach()


# gradients with long runs of one sign, changes and exact zeros
MIXED = torch.randn(60, 50, generator=seeded(), dtype=torch.float64).cumsum(0).round(decimals=1) / 5


# Quickprop


def fahlman(s, p, d, epsilon, mu):
    """The next step of one weight from its slope, the slope before and the step before, in Fahlman's own cases."""
    shrink = mu / (1 + mu)
    step = 0.0
    if d < 0:
        if s > 0:
            step -= epsilon * s
        step += mu * d if s >= shrink * p else d * s / (p - s)
    elif d > 0:
        if s < 0:
            step -= epsilon * s
        step += mu * d if s <= shrink * p else d * s / (p - s)
    else:
        step -= epsilon * s
    return step


@pytest.mark.parametrize("decay", [0.0, 0.02])
def test_quickprop_takes_fahlmans_steps_case_by_case(decay):
    path = given(Quickprop, MIXED, start=MIXED[3], lr=0.3, growth=1.75, weight_decay=decay)
    for k in range(MIXED.shape[1]):
        w, p, d = float(MIXED[3, k]), 0.0, 0.0
        for t, g in enumerate(MIXED[:, k].tolist()):
            s = g + decay * w
            p, d = s, fahlman(s, p, d, 0.3, 1.75)
            w += d
            assert float(path[t + 1, k]) == pytest.approx(w, rel=1e-9, abs=1e-12), (k, t)


def test_quickprops_second_step_lands_on_the_minimum_of_a_separable_quadratic():
    a = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)

    def loss(w):
        return (a * (w - 2) ** 2).sum() / 2

    # from 0 each coordinate keeps less than 7/11 of its slope after the first step
    landed = descended(Quickprop, loss, [0.0, 0.0, 0.0], 2, lr=0.9)
    secant_only = torch.tensor([False, False, True])  # the others have not changed sign, and go on by −lr·s
    beyond = 0.9 * a * 2 * (1 - 0.9 * a)
    torch.testing.assert_close(landed, torch.where(secant_only, 2.0, 2.0 + beyond))


def test_quickprop_rests_where_it_was_never_pushed_and_moves_again_when_pushed():
    path = given(Quickprop, [[0.0], [0.0], [1.0], [0.0], [0.0], [2.0]], lr=0.1)
    torch.testing.assert_close(path.flatten().diff(), torch.tensor([0, 0, -0.1, 0, 0, -0.2], dtype=torch.float64))


def test_a_small_type_is_enough_for_quickprop():
    w = torch.nn.Parameter(torch.tensor([1.0, 0.0], dtype=torch.float16))
    optimizer = Quickprop([w], lr=1.5)
    for _ in range(2):
        w.grad = w.detach().clone()
        optimizer.step()
    assert w.tolist() == pytest.approx([0.0, 0.0], abs=1e-3)


# Rprop


def riedmiller(gradients, start, etas, limits, first):
    """The path of one weight under Rprop⁺ in the words of its authors."""
    w, size, before, moved = start, first, 0.0, 0.0
    path = [w]
    for g in gradients:
        if before * g > 0:
            size = min(size * etas[1], limits[1])
            moved = -size if g > 0 else size
            w, before = w + moved, g
        elif before * g < 0:
            size = max(size * etas[0], limits[0])
            w, before = w - moved, 0.0
        else:
            moved = -size if g > 0 else size if g < 0 else 0.0
            w, before = w + moved, g
        path.append(w)
    return path


@pytest.mark.parametrize("limits", [(1e-6, 50.0), (0.05, 0.2)])
def test_rprop_plus_takes_the_steps_of_its_authors(limits):
    path = given(RpropPlus, MIXED, lr=0.1, step_sizes=limits)
    for k in range(MIXED.shape[1]):
        wanted = riedmiller(MIXED[:, k].tolist(), 0.0, (0.5, 1.2), limits, 0.1)
        assert path[:, k].tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_rprop_plus_goes_like_torchs_until_a_sign_changes_and_then_back():
    gradients = [[1.0], [1.0], [1.0], [-1.0]]
    ours, theirs = given(RpropPlus, gradients, lr=0.1), given(torch.optim.Rprop, gradients, lr=0.1)
    torch.testing.assert_close(ours[:4], theirs[:4])
    torch.testing.assert_close(ours[4], ours[2])  # back
    torch.testing.assert_close(theirs[4], theirs[3])  # torch waits


def test_the_size_of_a_gradient_is_nothing_to_rprop_even_where_its_square_underflows():
    far = given(RpropPlus, MIXED * 1e-200, lr=0.1)
    assert torch.equal(far, given(RpropPlus, MIXED, lr=0.1))


# The root-mean-square forms, with the lectures' numbers

PUSHES = [[1.0], [3.0], [0.5], [2.0]]


def test_the_mean_form_of_adagrad_takes_the_lectures_steps():
    steps = given(RMSAdagrad, PUSHES, lr=0.1).flatten().diff()
    wanted = torch.tensor([-0.1, -0.134164, -0.02705, -0.105963], dtype=torch.float64)
    torch.testing.assert_close(steps, wanted, atol=5e-7, rtol=0)


def test_the_mean_form_is_torchs_adagrad_at_a_rate_that_grows_with_the_root_of_time():
    w = torch.nn.Parameter(torch.zeros(50, dtype=torch.float64))
    optimizer = torch.optim.Adagrad([w], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (t + 1) ** 0.5)
    path = [w.detach().clone()]
    for g in MIXED:
        w.grad = g.clone()
        optimizer.step()
        schedule.step()
        path.append(w.detach().clone())
    torch.testing.assert_close(given(RMSAdagrad, MIXED, lr=0.1), torch.stack(path), atol=1e-13, rtol=1e-13)


def test_rmsprop_from_the_first_gradient_takes_the_lectures_steps():
    steps = given(RMSpropFirst, PUSHES, lr=0.1, alpha=0.9).flatten().diff()
    wanted = torch.tensor([-0.1, -0.223607, -0.038984, -0.145846], dtype=torch.float64)
    torch.testing.assert_close(steps, wanted, atol=5e-7, rtol=0)


def test_torchs_first_rmsprop_step_is_ten_times_the_rate_and_ours_is_the_rate():
    for g in (1e-3, 1.0, 40.0):
        assert float(given(torch.optim.RMSprop, [[g]], lr=0.1)[1]) == pytest.approx(-1.0, rel=1e-3)
        assert float(given(RMSpropFirst, [[g]], lr=0.1)[1]) == pytest.approx(-0.1, rel=1e-3)


def test_only_the_recent_form_finds_back_to_its_step_when_gradients_fall():
    gradients = [[1.0]] * 500 + [[0.01]] * 1500
    forgetful = given(RMSpropFirst, gradients, lr=1.0, alpha=0.9).flatten().diff().abs()[500:]
    assert int((forgetful >= 0.5).nonzero()[0]) == 76
    assert given(RMSAdagrad, gradients, lr=1.0).flatten().diff().abs()[500:].max() < 0.5


@pytest.mark.parametrize(("lr", "steps"), [(0.003, 352), (0.01, 123), (0.03, 53)])
def test_each_weight_having_its_own_rate_makes_light_of_bad_scaling(lr, steps):
    a = torch.tensor([1.0, 1000.0], dtype=torch.float64)
    w = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = RMSpropFirst([w], lr=lr, alpha=0.9)
    losses = []
    while not losses or losses[-1] > 1e-3 * losses[0]:
        optimizer.zero_grad()
        loss = (a * w**2).sum() / 2
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert len(losses) - 1 == steps


# What they refuse


@pytest.mark.parametrize(
    ("optimizer_of", "options"),
    [
        (Quickprop, {"lr": -1.0}),
        (Quickprop, {"growth": 0.0}),
        (Quickprop, {"weight_decay": -0.1}),
        (RpropPlus, {"etas": (1.2, 0.5)}),
        (RpropPlus, {"step_sizes": (1.0, 0.1)}),
        (RMSAdagrad, {"eps": -1.0}),
        (RMSpropFirst, {"alpha": 1.0}),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_in_the_default_and_in_a_group(optimizer_of, options):
    w, v = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    with pytest.raises(ValueError, match=str(next(iter(options)))):
        optimizer_of([w], **options)
    optimizer = optimizer_of([w])
    with pytest.raises(ValueError, match=str(next(iter(options)))):
        optimizer.add_param_group({"params": [v], **options})
    assert len(optimizer.param_groups) == 1
