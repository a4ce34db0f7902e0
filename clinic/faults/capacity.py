"""3.7 Regularisation and capacity."""

from clinic.faults._fault import SUPERVISED, Fault, on
from clinic.faults.bad_data import noisy_labels
from clinic.training import Training

CAPACITY = "capacity"
LARGE = tuple(p for p in SUPERVISED if p != "tabular")  # for which a line is enough


def dropout(t: Training, p: float) -> None:
    t.rebuild(dropout=p)


def few_rows_and_many_units(t: Training, rows: int) -> None:
    """A network twice as wide and rows so few that it learns them by heart, the wrong ones among them."""
    t.train = t.train.rows(slice(rows))
    if "width" in t.build.__kwdefaults__:
        t.rebuild(width=2 * t.build.__kwdefaults__["width"])
    if not t.train.y.is_floating_point():
        noisy_labels(t, 0.15)
    t.batch_size = min(t.batch_size, rows // 2)


def narrow(t: Training, width: int) -> None:
    t.rebuild(width=width)


def bottleneck(t: Training, code: int) -> None:
    t.rebuild(code=code)


def too_small(t: Training, size: int) -> None:
    (bottleneck if "code" in t.build.__kwdefaults__ else narrow)(t, size)


FAULTS = (
    Fault(57, "dropout-too-high", CAPACITY, dropout, on(LARGE, 0.7, 0.9, 0.97)),
    Fault(
        58,
        "overfitting",
        "overfitting",
        few_rows_and_many_units,
        on(SUPERVISED, 200, 100, 50, lstm=(400, 200, 80), transformer=(400, 200, 80)),
    ),
    Fault(
        59,
        "capacity-too-small",
        CAPACITY,
        too_small,
        on(LARGE, 3, 2, 1, transformer=(6, 4, 2), cnn=(2, 1, 1), lstm=(6, 4, 2)),
    ),
)
