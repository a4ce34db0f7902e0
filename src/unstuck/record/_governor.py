"""Keeps what watching takes at a share of the time that the run takes."""

import math

PART = 1 / 24  # of the promised share, that each kind of reading may take
GRANT_SECONDS, GRANT_SHARE = 0.2, 0.005  # for the steps that one alarm wants
MOST, MOST_NEEDED = 0.5, 2.0  # seconds beyond the share


class Clock:
    """When a reading is due that takes time: as often as its share allows, and no oftener than every `least` steps.

    What a reading took is made up for before the next one; one that took far longer than those before, as one that
    another program interrupts, only in part.
    """

    LONGER = 10  # times the last wait, at most

    def __init__(self, share: float, least: int = 1) -> None:
        self.every = least
        self._share = share
        self._least = least
        self._next = least

    def due(self, step: int) -> bool:
        return step >= self._next

    def took(self, step: int, seconds: float, pace: float) -> None:
        """A reading at `step` took so long, where a step takes `pace` seconds without us."""
        allowed = self._share * pace
        if allowed > 0:
            longest = self.LONGER * self.every
            self.every = min(max(self._least, math.ceil(min(seconds / allowed, longest))), longest)
        self._next = step + self.every


class Allowance:
    """The seconds beyond the promised share that steps wanted at once may take: what comes later makes up for them.

    The first steps, and those of a run whose loss is not finite, are needed, and may take more than others.
    """

    def __init__(self) -> None:
        self._until = GRANT_SECONDS / 2  # seconds spent: the first steps come cheap, and short runs have no others

    def grants(self, spent: float, elapsed: float) -> None:
        """More steps are wanted from now on."""
        self._until = spent + GRANT_SECONDS + GRANT_SHARE * elapsed

    def covers(self, spent: float, allowed: float, *, needed: bool) -> bool:
        """Whether one more may be taken, where so many seconds have been spent and so many are within the share."""
        if needed:
            return spent - allowed < MOST_NEEDED
        return spent < self._until and spent - allowed < MOST


class Alarm:
    """Rings when the loss does not fall: looked at each time that the steps have doubled, and where it leaps."""

    FIRST = 64  # steps
    FALL = 0.02  # of the mean over a quarter of the steps so far, from one quarter to the next
    LEAP = 4.0  # times the loss at first

    def __init__(self) -> None:
        self._count = 0
        self._look = self.FIRST
        self._third = self._fourth = 0.0  # sums over quarters of the steps up to the next look
        self._start = math.nan
        self._leapt = 0  # when it rang for a leap

    def rings(self, loss: float) -> bool:
        self._count += 1
        if self._count == 1:
            self._start = loss
        if not math.isfinite(loss) or loss > self.LEAP * abs(self._start):
            return self._leaps()
        if self._count > 3 * self._look // 4:
            self._fourth += loss
        elif self._count > self._look // 2:
            self._third += loss
        if self._count < self._look:
            return False
        falls = self._fourth < self._third - self.FALL * abs(self._third)
        self._look, self._third, self._fourth = 2 * self._count, 0.0, 0.0
        return not falls

    def _leaps(self) -> bool:
        again = self._leapt and self._count < 2 * self._leapt
        self._leapt = self._leapt if again else self._count
        return not again
