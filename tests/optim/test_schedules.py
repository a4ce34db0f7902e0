"""Schedules against their closed forms, torch's own schedules, and the sums of the lectures."""

import copy
import math

import pytest
import torch
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.optimizer import register_optimizer_step_pre_hook

from unstuck.optim import InverseTime, WarmupPlateau, describe, linear_scaling


def sgd(*rates, **options):
    return torch.optim.SGD([{"params": [torch.ones(2)], "lr": rate} for rate in rates or (1.0,)], **options)


def follow(optimizer, schedule, steps, given=()):
    """The rates of the first group before each step."""
    found = []
    for k in range(steps):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step(*given[k : k + 1])
    return found


# Inverse time


@pytest.mark.parametrize("power", [1, 2, 0.5])
def test_inverse_time_is_its_closed_form(power):
    optimizer = sgd(0.3, 0.02)
    schedule = InverseTime(optimizer, rate=1 / 50, power=power)
    follow(optimizer, schedule, 500)
    assert schedule.get_last_lr() == pytest.approx([0.3 / 11**power, 0.02 / 11**power], rel=1e-13)
    assert schedule.get_last_lr() == [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize(
    ("make", "total", "limit"),  # lecture 004, slide 99; sums to 10⁵ steps
    [
        (lambda optimizer: InverseTime(optimizer, rate=1), "12.09", math.inf),
        (lambda optimizer: InverseTime(optimizer, rate=1, power=2), "1.644924", math.pi**2 / 6),
        (lambda optimizer: ExponentialLR(optimizer, gamma=math.exp(-0.1)), "10.50833", 1 / (1 - math.exp(-0.1))),
    ],
)
def test_the_decays_of_the_lecture_have_its_sums(make, total, limit):
    course = describe(make(sgd()), 100_000)
    assert f"{course.total:.{len(total.split('.')[1])}f}" == total
    assert course.reaches == math.isinf(limit)
    assert course.reaches or course.total == pytest.approx(limit, abs=1.1e-5)


def test_the_exponential_decay_of_the_lecture_is_torchs_with_gamma_e_to_minus_beta():
    optimizer = sgd(0.7)
    found = follow(optimizer, ExponentialLR(optimizer, gamma=math.exp(-0.05)), 100)
    assert found == pytest.approx([0.7 * math.exp(-0.05 * k) for k in range(100)], rel=1e-12)


def test_inverse_time_goes_on_from_its_state_to_the_last_bit():
    optimizer = sgd(0.1)
    schedule = InverseTime(optimizer, rate=0.1)
    follow(optimizer, schedule, 20)
    kept = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    straight = follow(optimizer, schedule, 20)
    other = sgd(0.1)
    resumed = InverseTime(other, rate=0.7, power=2)
    other.load_state_dict(kept[0])
    resumed.load_state_dict(kept[1])
    assert follow(other, resumed, 20) == straight


def test_inverse_time_goes_on_from_its_last_epoch_as_torchs_schedules_do():
    for make in (lambda o, k: InverseTime(o, rate=0.5, last_epoch=k), lambda o, k: ExponentialLR(o, 0.9, last_epoch=k)):
        optimizer = sgd()
        schedule = make(optimizer, -1)
        follow(optimizer, schedule, 6)
        expected = optimizer.param_groups[0]["lr"]
        resumed = make(optimizer, schedule.last_epoch - 1)
        assert resumed.last_epoch == schedule.last_epoch
        assert optimizer.param_groups[0]["lr"] == expected
    with pytest.raises(KeyError, match="initial_lr"):
        InverseTime(sgd(), rate=0.5, last_epoch=3)


def test_inverse_time_can_be_chained_and_put_in_sequence():
    optimizer = sgd()
    chained = ChainedScheduler([InverseTime(optimizer, rate=1), ConstantLR(optimizer, factor=0.5, total_iters=2)])
    assert follow(optimizer, chained, 4) == pytest.approx([0.5, 0.25, 1 / 3, 0.25])
    optimizer = sgd()
    parts = [LinearLR(optimizer, start_factor=0.5, total_iters=2), InverseTime(optimizer, rate=1)]
    assert follow(optimizer, SequentialLR(optimizer, parts, [2]), 5) == pytest.approx([0.5, 0.75, 1, 1 / 2, 1 / 3])


def test_a_rate_that_is_a_tensor_stays_the_same_tensor():
    for make in (lambda o: InverseTime(o, rate=1.0), lambda o: WarmupPlateau(o, 2, start=0.5)):
        rate = torch.tensor(0.5)
        optimizer = torch.optim.Adam([torch.ones(2)], lr=rate, foreach=False, capturable=False)
        schedule = make(optimizer)
        follow(optimizer, schedule, 1)
        assert optimizer.param_groups[0]["lr"] is rate
        assert float(rate) == pytest.approx(0.25 if isinstance(schedule, InverseTime) else 0.375)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: InverseTime(sgd(), rate=-1.0), ValueError, "got rate=-1.0"),
        (lambda: InverseTime(sgd(), rate=1.0, power=0), ValueError, "got power=0"),
        (lambda: InverseTime(sgd(), rate=1.0, pwoer=2), TypeError, "pwoer"),
        (lambda: WarmupPlateau(sgd(), -1), ValueError, "got warmup=-1"),
        (lambda: WarmupPlateau(sgd(), 1, start=2.0), ValueError, "got start=2.0"),
        (lambda: WarmupPlateau(sgd(), 1, patiense=3), TypeError, "patiense"),
        (lambda: linear_scaling(0.1, 0, 4), ValueError, "positive"),
        (lambda: describe(lambda k: 1.0, 0), ValueError, "got steps=0"),
        (lambda: describe(lambda k: -1.0, 3), ValueError, "at least 0"),
        (lambda: describe(0.1, 3), TypeError, "got float"),
        (lambda: describe(ReduceLROnPlateau(sgd()), 3), ValueError, "waits for losses"),
        (lambda: describe(InverseTime(sgd(), rate=1), 3, group=1), ValueError, "one of the 1"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(call, error, words):
    with pytest.raises(error, match=words):
        call()


# Warm-up and then the plateau


def test_torch_still_refuses_a_plateau_behind_a_warm_up():
    optimizer = sgd()
    parts = [LinearLR(optimizer), ReduceLROnPlateau(optimizer)]
    with pytest.raises(ValueError, match="ReduceLROnPlateau"):
        SequentialLR(optimizer, parts, [2])
    with pytest.raises(ValueError, match="ReduceLROnPlateau"):
        ChainedScheduler(parts)


LOSSES = [9.0, 8, 9, 9, 7, 5, 5, 5, 4, 4, 4, 4, 4, 4, 3, 3, 3, 3, 3, 3]
PLATEAU = {"factor": 0.1, "patience": 1, "cooldown": 1}


def test_the_warm_up_is_torchs_ramp_and_the_plateau_is_torchs_own():
    optimizer, twin = sgd(0.4), sgd(0.4)
    found = follow(optimizer, WarmupPlateau(optimizer, 4, start=0.25, **PLATEAU), len(LOSSES), LOSSES)
    ramp = follow(twin, LinearLR(twin, start_factor=0.25, total_iters=4), 4)
    assert found[:4] == pytest.approx(ramp, rel=1e-14)
    twin = sgd(0.4)
    assert found[4:] == follow(twin, ReduceLROnPlateau(twin, **PLATEAU), len(LOSSES) - 4, LOSSES[4:])
    assert found[-1] < 0.4 / 50


def test_the_plateau_divides_by_ten_exactly_when_the_loss_stagnates():
    optimizer = sgd()
    falling, stagnant = [1 / (k + 1) for k in range(10)], [0.1] * 20
    found = follow(optimizer, WarmupPlateau(optimizer, 3, start=0.1, patience=4), 30, falling + stagnant)
    assert found[:4] == pytest.approx([0.1, 0.4, 0.7, 1])
    # the first loss of 0.1 is the tenth; the fifth that is no better exceeds a patience of four
    assert found[3:15] == [1.0] * 12
    assert found[15:20] == pytest.approx([0.1] * 5)


def test_steps_without_a_loss_only_warm_up():
    optimizer = sgd()
    schedule = WarmupPlateau(optimizer, 2, start=0.0, patience=0)
    assert follow(optimizer, schedule, 50) == [0.0, 0.5] + [1.0] * 48
    assert not schedule.warming
    assert schedule.num_bad_epochs == 0


def test_no_warm_up_is_torchs_plateau():
    optimizer, twin = sgd(), sgd()
    found = follow(optimizer, WarmupPlateau(optimizer, 0, **PLATEAU), len(LOSSES), LOSSES)
    assert found == follow(twin, ReduceLROnPlateau(twin, **PLATEAU), len(LOSSES), LOSSES)


@pytest.mark.parametrize("stop", [2, 4, 11])
def test_warm_up_and_plateau_go_on_from_their_state_to_the_last_bit(stop):
    optimizer = sgd(0.3, 0.2)
    schedule = WarmupPlateau(optimizer, 4, **PLATEAU)
    follow(optimizer, schedule, stop, LOSSES)
    kept = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    straight = follow(optimizer, schedule, 20 - stop, LOSSES[stop:])
    other = sgd(0.3, 0.2)
    resumed = WarmupPlateau(other, 1)
    other.load_state_dict(kept[0])
    resumed.load_state_dict(kept[1])
    assert follow(other, resumed, 20 - stop, LOSSES[stop:]) == straight


# Linear scaling


def test_linear_scaling_with_warm_up_rises_from_the_small_batchs_rate_to_the_large_ones():
    rate = linear_scaling(0.1, 256, 8192)
    assert rate == pytest.approx(3.2)
    optimizer = sgd(rate)
    found = follow(optimizer, LinearLR(optimizer, start_factor=256 / 8192, total_iters=10), 20)
    assert found[0] == pytest.approx(0.1)
    assert found[5] == pytest.approx((0.1 + 3.2) / 2)
    assert found[10:] == pytest.approx([3.2] * 10)


# Courses


SCHEDULES = {
    "inverse": lambda o: InverseTime(o, rate=0.5),
    "lambda": lambda o: LambdaLR(o, lambda k: 1 / (k + 1)),
    "cosine": lambda o: CosineAnnealingLR(o, T_max=30),
    "step": lambda o: StepLR(o, 10),
    "cyclic": lambda o: CyclicLR(o, 0.1, 1.0, step_size_up=5),
    "one cycle": lambda o: OneCycleLR(o, max_lr=1.0, total_steps=60),
    "sequence": lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=5), InverseTime(o, rate=1)], [5]),
    "chain": lambda o: ChainedScheduler([InverseTime(o, rate=1), ConstantLR(o, total_iters=4)]),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ahead", [0, 7])
def test_a_course_is_what_the_schedule_then_does_and_leaves_it_alone_to_the_last_bit(name, ahead):
    optimizer, twin = (sgd(0.5, 0.2, momentum=0.9) for _ in range(2))
    schedule, other = SCHEDULES[name](optimizer), SCHEDULES[name](twin)
    follow(optimizer, schedule, ahead)
    follow(twin, other, ahead)
    kept = copy.deepcopy((optimizer.state_dict(), optimizer.param_groups))
    course = describe(schedule, 40)
    assert optimizer.state_dict() == kept[0]
    assert follow(optimizer, schedule, 40) == follow(twin, other, 40) == course.rates.tolist()
    assert torch.equal(optimizer.param_groups[0]["params"][0], torch.ones(2))


def test_a_course_is_of_the_group_that_was_asked_for():
    schedule = InverseTime(sgd(0.5, 0.2), rate=1.0)
    assert describe(schedule, 3, group=1).rates.tolist() == pytest.approx([0.2, 0.1, 0.2 / 3])


def test_the_weights_are_not_copied():
    optimizer = torch.optim.SGD([torch.zeros(1, device="meta", requires_grad=True)], lr=1.0)  # cannot be stepped
    assert describe(InverseTime(optimizer, rate=1.0), 2).total == 1.5


def test_hooks_that_watch_all_optimisers_do_not_see_the_copy():
    seen = []
    handle = register_optimizer_step_pre_hook(lambda *args: seen.append(args))
    try:
        describe(InverseTime(sgd(), rate=1.0), 5)
    finally:
        handle.remove()
    assert seen == []


@pytest.mark.parametrize(
    ("rate", "reaches", "settles"),
    [
        (lambda k: 0.1, True, False),
        (lambda k: 1 / (k + 1) ** 0.5, True, False),
        (lambda k: 1 / (k + 1) ** 0.7, True, True),
        (lambda k: 1 / (k + 1), True, True),
        (lambda k: 1 / (1 + k / 300), True, True),
        (lambda k: 1 / (1 + k / 300) ** 2, False, True),
        (lambda k: math.exp(-0.01 * k), False, True),
        (lambda k: 0.1 ** (k // 100), False, True),
        (lambda k: 1 + math.sin(k), True, False),
        (lambda k: max(0.0, 1 - k / 500), False, True),
    ],
)
def test_a_course_tells_from_the_tail_whether_it_reaches_and_settles(rate, reaches, settles):
    course = describe(rate, 1000)
    assert (course.reaches, course.settles) == (reaches, settles)


@pytest.mark.parametrize("power", [0.4, 0.5, 0.7, 1, 1.01, 2])
def test_the_power_of_inverse_time_is_known_after_one_step(power):
    course = describe(InverseTime(sgd(), rate=1e-3, power=power), 1)
    assert (course.power, course.reaches, course.settles) == (power, power <= 1, power > 0.5)


def test_an_exponential_stops_short_however_slow_it_is():
    course = describe(ExponentialLR(sgd(), gamma=0.999999), 10)
    assert (course.power, course.reaches, course.settles) == (math.inf, False, True)


def test_few_steps_do_not_tell():
    course = describe(lambda k: 1 / (k + 1), 10)
    assert course.reaches is None
    assert course.settles is None
    assert "cannot tell" in str(course)


def test_what_a_course_leaves_is_what_torch_leaves_on_a_quadratic():
    w = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.4)
    schedule = InverseTime(optimizer, rate=1.0, power=2)
    left = describe(schedule, 200).left(0.5)
    for _ in range(200):
        w.grad = 0.5 * w.detach()
        optimizer.step()
        schedule.step()
    assert w.item() == pytest.approx(left, rel=1e-12)
    assert left > 0.7  # quadratic decay stops short


def test_a_rate_above_the_limit_that_decays_finds_the_lowest_of_many_valleys():
    # 004, slides 96-98; f = 0.05x² + 0.3cos 3x, whose two lowest valleys are at ±1.01 and hold −0.2469
    def share(rate, decay):
        x = torch.linspace(-8, 8, 500, dtype=torch.float64).requires_grad_()
        optimizer = torch.optim.SGD([x], lr=rate)
        schedule = ExponentialLR(optimizer, gamma=math.exp(-decay))
        for _ in range(2000):
            x.grad = 0.1 * x.detach() - 0.9 * torch.sin(3 * x.detach())
            optimizer.step()
            schedule.step()
        return float((0.05 * x**2 + 0.3 * torch.cos(3 * x) < -0.24).double().mean())

    assert share(0.02, 0) == pytest.approx(0.290, abs=0.03)
    assert share(1.2, 0) == pytest.approx(0.070, abs=0.03)  # always above the limit: it never settles
    assert share(1.2, 0.005) == pytest.approx(0.346, abs=0.03)
    assert share(3.0, 0.005) == 1.0
