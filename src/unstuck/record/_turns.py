"""Which steps are recorded as time allows: on several ranks the same ones, as far as that can be without a word."""

LONGEST = 64  # steps from one turn to the next
AMPLE = 0.8  # of the time allowed: while less is spent, turns come twice as often


class Turns:
    """Steps that are recorded when time allows.

    A process that trains alone records whenever it may. Each of several ranks has its own time: so that they meet, a
    rank records at the multiples of a power of two, which it doubles where that is too often and halves where there is
    time to spare. The steps of the rank that records least are then steps of all.
    """

    def __init__(self, ranks: int) -> None:
        self.alone = ranks == 1
        self._every = 1
        self._took = False  # a turn, since turns were made rarer

    def due(self, step: int, spent: float, allowed: float) -> bool:
        """Whether `step` is to be recorded, where so many of the seconds that are allowed were spent."""
        if self.alone:
            return spent < allowed
        if step % self._every:
            return False
        if spent < allowed:
            if spent < AMPLE * allowed:
                self._every = max(self._every // 2, 1)
            self._took = True
            return True
        if self._took:  # else it is what the first steps took that has to be made up for
            self._every = min(2 * self._every, LONGEST)
            self._took = False
        return False
