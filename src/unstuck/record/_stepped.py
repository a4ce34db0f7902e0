"""What is known of an optimiser that the run steps with, and which of its steps are looked at closely."""

import random
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from unstuck.record._governor import PART, Clock
from unstuck.record._pulses import Pulses

FIRST_LOOKS = 32  # steps of an optimiser that are looked at closely whatever it takes


class Stepped:
    """An optimiser, its `number` in the log, how many parameters it has, and whether its coming step is looked at.

    Of the other steps only the loss, the rate and the time are noted.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, number: int, budget: float) -> None:
        self.optimizer = optimizer
        self.number = number
        self.size = -1
        self.first: Tensor | None = None  # a parameter that tells for all who writes into them
        self.left = 0  # its version at the end of the last step
        self.writes = 0  # times that it was written into between two steps
        self.moved = False  # whether the weights are known to have left their start
        self.pulses = Pulses(optimizer, budget)
        self.closely = True
        self.steps = 0
        self._looks = Clock(PART * budget)
        self._dice = random.Random(0)
        self.next = FIRST_LOOKS  # step that is looked at

    def meets(self, parameters: Sequence[Tensor]) -> None:
        """Takes note of the parameters that the optimiser has now."""
        self.size = len(parameters)
        self.first = next((p for p in parameters if p.requires_grad and not p.is_inference()), None)
        self.left = 0 if self.first is None else self.first._version

    def passed(self) -> None:
        """A step was taken, and not looked at."""
        self.steps += 1
        if self.first is not None:
            self.left = self.first._version
        self.closely = self.steps + 1 >= self.next

    def was_looked_at(self, seconds: float, pace: float) -> None:
        """A step was taken and looked at, in so many seconds, or 0 where that tells nothing."""
        self.steps += 1
        if self.first is not None:
            self.left = self.first._version
        if self.steps >= FIRST_LOOKS - 1:
            if seconds:
                self._looks.took(self.steps, seconds, pace)
            # now and then a little later, lest a habit that the loop repeats is always met at one place
            late = self._dice.randrange(self._looks.every // 2 + 1)
            self.next = self.steps + (1 if self.pulses.compares else self._looks.every + late)
        self.closely = self.steps + 1 >= self.next or self.steps + 1 < FIRST_LOOKS


def stepping(optimizer: torch.optim.Optimizer | None) -> bool:
    """Whether this is called within a step of the optimiser: one that raised has left no other trace."""
    frame = sys._getframe()
    while frame is not None:
        if (
            frame.f_globals.get("__name__") == torch.optim.Optimizer.__module__
            and frame.f_locals.get("self") is optimizer
        ):
            return True
        frame = frame.f_back
    return False
