"""The log of a run: strict JSON, one object a line, one writer a file."""

import contextlib
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

NAME = "log.jsonl"


class Log:
    """Appends records to the log of a run folder.

    Every line reaches the operating system at once, so that it outlives the process. A half line that a crash left is
    cut off when the file is opened. A disk that refuses to write costs the log, never the training: it warns, once.
    """

    def __init__(self, folder: Path) -> None:
        self.failed: str | None = None
        self._file: BinaryIO | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = _sealed(folder / NAME)
        except OSError as error:
            self.fail(str(error))

    def write(self, kind: str, **values: Any) -> None:
        if self._file is None:
            return
        line = json.dumps({"kind": kind, **strict(values)}, allow_nan=False, ensure_ascii=False)
        try:
            data = line.encode(
                errors="backslashreplace"
            )  # what is no character becomes the escape that JSON has for it
            if self._file.write(data + b"\n") <= len(data):
                self.fail("the disk is full")
        except OSError as error:
            self.fail(str(error))

    def fail(self, because: str) -> None:
        """Gives up writing and says so, once."""
        if self.failed is None:
            self.failed = because
            warn(f"the run is not recorded any further: {because}; the training goes on")
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


def read_log(path: Path, start: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The records of a log from byte `start` on, numbers read back as numbers, and the byte where they end.

    A torn last line is left out, and so is all that follows a broken one.
    """
    records: list[dict[str, Any]] = []
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            record = _record(line)
            if record is None:
                break
            records.append(record)
            start += len(line)
    return records, start


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = loose(json.loads(line)) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) and "kind" in record else None


def warn(text: str) -> None:
    """Tells the user of a loss; where the script makes errors of warnings, the training matters more."""
    with contextlib.suppress(Warning):
        warnings.warn(text, stacklevel=4)


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
