"""A log of JSON lines, the form that both readers of logs take."""

import json
from pathlib import Path
from statistics import fmean


class Lines:
    def __init__(self, path: Path):
        self.path = path
        self.file = path.open("w")

    def write(self, step: int, **values: float) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> Path:
        self.file.close()
        return self.path


class Means(Lines):
    """As the Hugging Face Trainer logs: every few steps their mean loss, with the rate and the norm of the last."""

    def __init__(self, path: Path, every: int):
        super().__init__(path)
        self.every = every
        self.losses: list[float] = []

    def write(self, step: int, **values: float) -> None:
        if "loss" not in values:
            super().write(step, **values)
            return
        self.losses.append(values.pop("loss"))
        if len(self.losses) == self.every:
            super().write(step, loss=fmean(self.losses), **values)
            self.losses = []
