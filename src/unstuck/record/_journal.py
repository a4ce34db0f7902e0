"""What was read of the steps, on its way to the log."""

from collections.abc import Callable
from typing import Any

from unstuck.record._devices import wait
from unstuck.record._log import Log
from unstuck.record._pulses import on_devices, settled

STEPS, SECONDS = 64, 1.0  # that may wait: many at a time take less than each by itself
RARE = ("order", "training", "skipped")  # told when they change


class Journal:
    """Gathers the readings of steps and logs them some at a time, those that are still on a device read together."""

    def __init__(self, log: Log, look: Callable[[int, float], None]) -> None:
        self._log = log
        self._look = look  # is told the step and the loss of each
        self._waiting: list[dict[str, Any]] = []
        self._unread = False  # whether some of these may lie on a device
        self._since = 0.0
        self._told: dict[str, Any] = {"skipped": 0}
        self.waited = 0.0  # seconds, for devices to do what the script had asked of them

    def add(self, record: dict[str, Any], *, closely: bool = True) -> None:
        """Takes the readings of a step, as numbers or 0-d tensors, by name; with its number and time.

        Of a step that was not looked at `closely` only the loss may be a tensor.
        """
        self._waiting.append(record)
        self._unread = self._unread or closely or type(record.get("loss")) is not float
        if len(self._waiting) >= STEPS or record["time"] - self._since >= SECONDS:
            self._since = record["time"]
            self.settle()
            self._log.flush()

    def settle(self) -> None:
        """Logs what waits."""
        waiting, self._waiting = self._waiting, []
        if self._unread:
            self.waited += wait(on_devices(waiting))
            waiting, self._unread = settled(waiting), False
        for record in waiting:
            for name in RARE:
                if name in record:
                    if record[name] == self._told.get(name):
                        del record[name]
                    else:
                        self._told[name] = record[name]
            record["time"] = round(record["time"], 6)
            loss = record.get("loss")
            if loss is not None:
                self._look(record["step"], loss)
            self._log.write("step", **record)
