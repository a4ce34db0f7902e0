"""Programs that nothing was tuned for: ordinary scripts, as different as can be, healthy unless told otherwise."""

from pathlib import Path

_FOLDER = Path(__file__).parent

PROGRAMS = {path.stem: path for path in sorted(_FOLDER.glob("*.py")) if not path.stem.startswith("_")}

FAULTS = (  # that a held-out program may have an option for
    "lr-diverges",
    "lr-bounces",
    "lr-too-small",
    "saddle",
    "zero-init",
    "dead-units",
    "zero-grad-missing",
    "parameters-not-optimised",
    "graph-cut",
    "non-finite-data",
    "train-while-validating",
    "preprocessing-mismatch",
    "label-map-wrong",
    "same-batch",
    "leakage",
    "class-imbalance",
    "label-noise",
    "overfitting",
)
STEPS, HELD = FAULTS[:10], FAULTS[10:]  # what shows in the training, and what in the validation

FAULTY = {  # the programs that have `--fault`, and the faults that apply to them
    "autoencoder": STEPS,
    # no ReLU, no numbers; AdamW, whose first steps are of the rate's size, leaves a saddle at once
    "char_transformer": tuple(f for f in STEPS if f not in ("dead-units", "non-finite-data", "saddle")),
    "diabetes": (*STEPS, "preprocessing-mismatch", "label-noise", "overfitting"),
    "lines": HELD,
}
