"""The log of a run: strict JSON, one object a line, one writer a file."""

import contextlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from json import encoder
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import Any, BinaryIO

NAME = "log.jsonl"
LINES, SECONDS = 64, 0.2  # the most that a crash can take
AT_ONCE = ("fact", "end")
FACT = b'{"kind":"fact",'
BLOCK = 1 << 20  # bytes that are parsed together
NONFINITE = ("nan", "inf", "-inf")


class Log:
    """Appends records to the log of a run folder.

    Lines are gathered: a line is written at once where the last ones were written 0.2 s ago or more, where it tells a
    fact or the end, or where 64 wait; otherwise with the next ones, all by one system call. What is written outlives
    the process. A half line that a crash left is cut off when the file is opened. A disk that refuses to write, or a
    file that is gone, costs the log, never the training: it warns, once. A forked process writes nothing.
    """

    def __init__(self, folder: Path, name: str = NAME) -> None:
        self.failed: str | None = None
        self._file: BinaryIO | None = None
        self._lines: list[str] = []
        self._lock = Lock()  # an optimiser may step in a thread of its own
        self._written = -math.inf
        self._process = os.getpid()
        try:
            self._path = placed(folder) / name
            folder.mkdir(parents=True, exist_ok=True)
            self._file = _sealed(self._path)
        except OSError as error:
            self.fail(str(error))

    def write(self, kind: str, **values: Any) -> None:
        if self._file is None:
            return
        try:
            text = _encoded(values)
        except ValueError:  # not finite, which is rare
            text = _encoded(strict(values))
        self._lines.append(f'{{"kind":"{kind}",{text[1:]}\n' if values else f'{{"kind":"{kind}"}}\n')
        if len(self._lines) >= LINES or kind in AT_ONCE or monotonic() - self._written >= SECONDS:
            self.flush()

    def add(self, line: str) -> None:
        """A line as `write` would make it, to be written with the next ones."""
        if self._file is not None:
            self._lines.append(line)

    def flush(self) -> None:
        """Writes the lines that wait, and gives up where the log is no longer where it was opened."""
        if self._file is None or os.getpid() != self._process:
            return
        with self._lock:
            lines = self._lines[:]
            del self._lines[: len(lines)]  # one more may have come
            try:
                if not os.path.samestat(self._path.stat(), os.fstat(self._file.fileno())):
                    raise FileNotFoundError
            except OSError:
                self.fail(f"{self._path} is gone")
                return
            if not lines:
                return
            self._written = monotonic()
            try:
                # what is no character becomes the escape that JSON has for it
                _append(self._file, "".join(lines).encode(errors="backslashreplace"))
            except OSError as error:
                self.fail(str(error))

    def fail(self, because: str) -> None:
        """Gives up writing and says so, once."""
        if self.failed is None:
            self.failed = because
            warn(f"the run is not recorded any further: {because}; the training goes on")
        self._shut()

    def close(self) -> None:
        self.flush()
        self._shut()

    def _shut(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


def _encoder() -> Callable[[Any], str]:
    """Strict JSON of plain values; ValueError where a number is not finite."""
    known = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":"))
    make, quoted = getattr(encoder, "c_make_encoder", None), getattr(encoder, "c_encode_basestring", None)
    if make is None or quoted is None:
        return known.encode
    parts = make(None, known.default, quoted, None, ":", ",", False, False, False)  # json builds it for every line
    return lambda x: "".join(parts(x, 0))


_encoded = _encoder()


def _append(file: BinaryIO, data: bytes) -> None:
    """Appends whole lines by one system call; what a full disk cuts off is taken back to the end of a line."""
    written = file.write(data)
    if written < len(data):
        with contextlib.suppress(OSError):
            file.truncate(file.seek(0, os.SEEK_END) - written + data.rfind(b"\n", 0, written) + 1)
        raise OSError("the disk is full")


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
    for block, end in blocks(path, start):
        records += map(loose, block)
        start = end
    return records, start


def read_facts(path: Path, start: int = 0) -> tuple[list[dict[str, Any]], int]:
    """As `read_log`, the facts alone: other lines are not parsed, and take no memory."""
    facts: list[dict[str, Any]] = []
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                break
            start += len(line)
            if line.startswith(FACT):
                facts += map(loose, _one_by_one(line)[0])
    return facts, start


def blocks(path: Path, start: int = 0) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """The records as they are written, some thousand at a time, each time with the byte where they end."""
    with path.open("rb") as file:
        file.seek(start)
        while data := file.read(BLOCK):
            data += file.readline()
            whole = data[: data.rfind(b"\n") + 1]
            records, end = _together(whole), len(whole)
            if records is None:
                records, end = _one_by_one(whole)
            start += end
            yield records, start
            if end < len(data):
                return


def _together(lines: bytes) -> list[dict[str, Any]] | None:
    """The records of whole lines, parsed at once, which is several times faster; None where a line may be broken."""
    count = lines.count(b"\n")
    if not lines.startswith(b"{") or not lines.endswith(b"}\n") or lines.count(b"}\n{") != count - 1:
        return None
    try:
        records = json.loads("[" + lines[:-1].decode().replace("\n", ",") + "]")
    except ValueError:
        return None
    return records if len(records) == count and all("kind" in r for r in records) else None


def _one_by_one(lines: bytes) -> tuple[list[dict[str, Any]], int]:
    """The records before the first broken line, and how many bytes they take."""
    records: list[dict[str, Any]] = []
    end = 0
    for line in lines.split(b"\n")[:-1]:
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or "kind" not in record:
            break
        records.append(record)
        end += len(line) + 1
    return records, end


def placed(folder: Path) -> Path:
    """The folder wherever the script goes: it may change its working directory."""
    try:
        return folder.absolute()
    except OSError:
        return folder  # there is no working directory any more


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
    if isinstance(x, str):
        return float(x) if x in NONFINITE else x
    if isinstance(x, dict):
        return {k: loose(v) for k, v in x.items()}
    return [loose(v) for v in x] if isinstance(x, list) else x
