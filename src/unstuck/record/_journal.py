"""What was read of the steps, on its way to the log."""

import math
from collections.abc import Callable
from typing import Any

from unstuck.record._devices import wait
from unstuck.record._log import Log
from unstuck.record._pulses import number, on_devices, settled

STEPS, SECONDS = 64, 1.0  # that may wait: many at a time take less than each by itself
NOTE = '{"kind":"step","lr":%r,"backwards":%d,"loss":%r,"step":%d,"time":%.6f,"optimizer":%d}\n'
RARE = ("order", "training", "skipped")  # told when they change

Note = tuple[float, int, float, int, float, int]  # in the order of NOTE


class Journal:
    """Gathers the readings of steps and logs them some at a time, those that are still on a device read together."""

    def __init__(self, log: Log, look: Callable[[int, float], None]) -> None:
        self._log = log
        self._look = look  # is told the step and the loss of each
        self._waiting: list[dict[str, Any] | Note] = []
        self._unread = False  # whether some of these may lie on a device
        self._since = 0.0
        self._told: dict[str, Any] = {"skipped": 0}
        self.waited = 0.0  # seconds, for devices to do what the script had asked of them

    def add(self, record: dict[str, Any]) -> None:
        """Takes the readings of a step, as numbers or 0-d tensors, by name; with its number and time."""
        self._unread = True
        self._take(record, record["time"])

    def note(self, step: int, time: float, optimizer: int, rate: Any, loss: Any, backwards: int) -> None:
        """Takes what is read of every step. Where all of it is numbers that takes next to nothing."""
        if type(loss) is float and type(rate) is float and backwards and math.isfinite(loss + rate):
            self._take((rate, backwards, loss, step, time, optimizer), time)
            return
        record = {"lr": number(rate), "step": step, "time": time, "optimizer": optimizer}
        if loss is not None:
            record |= {"backwards": backwards, "loss": loss} if backwards else {"loss": loss}
        self.add(record)

    def _take(self, record: "dict[str, Any] | Note", time: float) -> None:
        self._waiting.append(record)
        if len(self._waiting) >= STEPS or time - self._since >= SECONDS:
            self._since = time
            self.settle()
            self._log.flush()

    def settle(self) -> None:
        """Logs what waits."""
        waiting, self._waiting = self._waiting, []
        if self._unread:
            records = [r for r in waiting if isinstance(r, dict)]
            self.waited += wait(on_devices(records))
            known = iter(settled(records))
            waiting, self._unread = [next(known) if isinstance(r, dict) else r for r in waiting], False
        for record in waiting:
            if isinstance(record, dict):
                self._settle(record)
            else:
                self._look(record[3], record[2])
                self._log.add(NOTE % record)

    def _settle(self, record: dict[str, Any]) -> None:
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
