"""Keeps what watching takes at a share of the time that the run takes."""

import math


class Clock:
    """When a reading is due that takes time: as often as its share allows, and no oftener than every `least` steps."""

    def __init__(self, share: float, least: int = 1) -> None:
        self.every = least
        self._share = share
        self._least = least
        self._next = least
        self._cost = 0.0  # seconds of one reading, the latest counting most

    def due(self, step: int) -> bool:
        return step >= self._next

    def took(self, step: int, seconds: float, pace: float) -> None:
        """A reading at `step` took so long, where a step takes `pace` seconds without us."""
        self._cost = seconds if not self._cost else 0.7 * self._cost + 0.3 * seconds
        allowed = self._share * pace
        longest = max(10 * self.every, self._least)  # one slow reading, as the first is, does not end them
        self.every = min(max(self._least, math.ceil(self._cost / allowed) if allowed > 0 else longest), longest)
        self._next = step + self.every


class Alarm:
    """Rings when the loss stops falling, rises or is no number; at most once each time that the steps double."""

    FAST, SLOW = 20, 200  # steps that the two means look back

    def __init__(self) -> None:
        self._fast = self._slow = math.nan
        self._count = 0
        self._quiet = self.SLOW  # until this many steps

    def rings(self, loss: float) -> bool:
        self._count += 1
        if not math.isfinite(loss):
            return self._count >= self._quiet / 2 and self._rung()
        if self._count == 1 or not math.isfinite(self._slow):
            self._fast = self._slow = loss
        self._fast += (loss - self._fast) / min(self._count, self.FAST)
        self._slow += (loss - self._slow) / min(self._count, self.SLOW)
        falls = self._fast < self._slow - 0.02 * abs(self._slow)
        return not falls and self._count >= self._quiet and self._rung()

    def _rung(self) -> bool:
        self._quiet = 2 * max(self._count, self.SLOW)
        return True
