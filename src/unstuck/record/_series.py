"""The numbers of a run's steps, in columns."""

from array import array
from collections.abc import Sequence
from typing import Any

from unstuck.record._log import NONFINITE


class Series:
    """What was measured at the steps of a run, by name; a step takes eight bytes for each, and no dictionary."""

    def __init__(self) -> None:
        self._columns: dict[str, _Column] = {}
        self._rows = 0

    def extend(self, records: Sequence[dict[str, Any]]) -> None:
        """Adds steps as the log has them. What is no number is left out."""
        records = [r for r in records if isinstance(r.get("step"), int)]
        for name in set().union(*records):
            self._columns.setdefault(name, _Column()).extend([r.get(name) for r in records], self._rows)
        self._rows += len(records)

    def last(self, name: str) -> float | None:
        column = self._columns.get(name)
        return column.values[-1] if column and column.values else None

    def get(self, name: str) -> tuple[list[int], list[float]]:
        """The steps at which a quantity was measured, and its values."""
        column = self._columns.get(name)
        if column is None:
            return [], []
        steps = list(map(int, self._columns["step"].values))
        if column.rows is None:
            return steps[: len(column.values)], column.values.tolist()
        return [steps[row] for row in column.rows], column.values.tolist()


class _Column:
    """Values, and the rows that they stand in, unless these are the first ones without a gap."""

    def __init__(self) -> None:
        self.values = array("d")
        self.rows: array | None = None

    def extend(self, found: list[Any], first: int) -> None:
        """Adds what was found in the rows from `first` on."""
        dense = self.rows is None and len(self.values) == first
        try:
            numbers = array("d", found)
        except (TypeError, OverflowError):  # there are gaps, or words for what is not finite
            known = [(row, value) for row, x in enumerate(found, first) if (value := _number(x)) is not None]
            numbers, rows = array("d", [value for _, value in known]), array("q", [row for row, _ in known])
            dense = dense and len(rows) == len(found)
        else:
            rows = range(first, first + len(found))
        if not dense:
            if self.rows is None:
                self.rows = array("q", range(len(self.values)))
            self.rows.extend(rows)
        self.values += numbers


def _number(x: Any) -> float | None:
    try:
        return float(x) if isinstance(x, (int, float)) or x in NONFINITE else None
    except OverflowError:
        return None
