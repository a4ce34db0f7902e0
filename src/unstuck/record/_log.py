"""The log of a run: strict JSON, one object a line, one writer a file."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

NAME = "log.jsonl"


class Log:
    """Appends records to the log of a run folder.

    Every line reaches the operating system at once, so that it outlives the process. A half line that a crash left is
    cut off when the file is opened. A disk that refuses to write costs the log, never the training: `failed` says why.
    """

    def __init__(self, folder: Path) -> None:
        self.failed: str | None = None
        self._file: BinaryIO | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = _sealed(folder / NAME)
        except OSError as error:
            self.failed = str(error)

    def write(self, kind: str, **values: Any) -> None:
        if self._file is None:
            return
        line = json.dumps({"kind": kind, **strict(values)}, allow_nan=False, ensure_ascii=False)
        try:
            self._file.write(line.encode() + b"\n")
        except OSError as error:
            self.failed = str(error)
            self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _sealed(path: Path) -> BinaryIO:
    file = path.open("a+b", buffering=0)
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
    return file


def read_log(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of a run folder, numbers read back as numbers. A torn last line is left out."""
    with (folder / NAME).open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                yield loose(json.loads(line))
            except json.JSONDecodeError:
                return  # what follows a broken line is not to be trusted


def strict(x: Any) -> Any:
    """NaN and infinity as the strings that JSON can carry."""
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)
    if isinstance(x, Mapping):
        return {str(k): strict(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [strict(v) for v in x]
    return x


def loose(x: Any) -> Any:
    """The inverse of `strict`."""
    if isinstance(x, str) and x in ("nan", "inf", "-inf"):
        return float(x)
    if isinstance(x, dict):
        return {k: loose(v) for k, v in x.items()}
    return [loose(v) for v in x] if isinstance(x, list) else x
