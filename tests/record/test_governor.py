"""How often the watcher reads, and when it has steps recorded out of turn."""

import math
import random

import pytest

from unstuck.record._governor import Alarm, Allowance, Clock


def readings(clock, cost, pace, steps):
    count = 0
    for step in range(1, steps + 1):
        if clock.due(step):
            clock.took(step, cost, pace)
            count += 1
    return count


@pytest.mark.parametrize("pace", [1e-4, 1e-3, 1e-1])
@pytest.mark.parametrize("share", [0.001, 0.02])
def test_readings_take_their_share_of_the_time_or_come_at_every_step(share, pace):
    cost, steps = 5e-5, 100_000
    spent = cost * readings(Clock(share), cost, pace, steps) / (pace * steps)
    assert spent <= 1.05 * share + 3 * cost / (pace * steps)
    assert spent >= 0.5 * min(share, cost / pace)


def test_one_slow_reading_does_not_end_them():
    clock = Clock(0.01)
    clock.took(1, 10.0, 1e-3)  # the first, which sets things up
    assert readings(clock, 1e-6, 1e-3, 10_000) > 1000


def test_a_clock_is_never_quicker_than_it_is_told_and_waits_until_the_pace_is_known():
    assert readings(Clock(1.0, least=50), 1e-9, 1.0, 1000) == 20
    assert readings(Clock(1.0, least=50), 1e-9, 0.0, 1000) == 20


def rung(losses):
    alarm = Alarm()
    return [k for k, loss in enumerate(losses, 1) if alarm.rings(loss)]


def noisy(mean, steps=2000, noise=0.1):
    draw = random.Random(0)
    return [mean(k) * (1 + noise * draw.uniform(-1, 1)) for k in range(1, steps + 1)]


@pytest.mark.parametrize(
    "mean", [lambda k: 1 / k, lambda k: math.exp(-k / 300), lambda k: 2.3 * k**-0.3], ids=["1/k", "exp", "power"]
)
def test_a_loss_that_falls_rings_no_alarm(mean):
    assert not rung(noisy(mean))


def test_a_loss_that_does_not_fall_rings_whenever_the_steps_have_doubled():
    assert rung(noisy(lambda k: 2.3, noise=0.0)) == [64, 128, 256, 512, 1024]
    assert rung(noisy(lambda k: 1 + k / 1000)) == [64, 128, 256, 512, 1024]


def test_a_leap_rings_at_once_and_again_only_after_twice_the_steps():
    losses = [1 / k for k in range(1, 101)] + [math.nan] * 200
    assert rung(losses) == [101, 202]
    assert rung([1.0, 0.9, 50.0, *[0.1 / k for k in range(1, 40)]]) == [3]


def test_an_alarm_pays_for_some_steps_at_once_and_not_for_ever():
    allowance = Allowance()
    assert not allowance.covers(0.1, 0.1, needed=False)  # no alarm has rung
    allowance.grants(0.1, 10.0)
    assert allowance.covers(0.3, 0.1, needed=False)
    assert not allowance.covers(0.4, 0.1, needed=False)  # it has paid
    assert allowance.covers(0.4, 0.1, needed=True)
    for _ in range(20):  # alarms that ring again and again do not add up
        allowance.grants(0.7, 10.0)
    assert not allowance.covers(0.7, 0.1, needed=False)
