"""Programs that nothing was tuned for: ordinary scripts, as different as can be, healthy unless told otherwise."""

from pathlib import Path

from clinic import FAULTS

_FOLDER = Path(__file__).parent

PROGRAMS = {path.stem: path for path in sorted(_FOLDER.glob("*.py")) if not path.stem.startswith("_")}

FAULTY = {  # the programs that have `--fault`, and the faults that apply to them
    "autoencoder": FAULTS,
    # no ReLU, no numbers; AdamW, whose first steps are of the rate's size, leaves a saddle at once
    "char_transformer": tuple(f for f in FAULTS if f not in ("dead-units", "non-finite-data", "saddle")),
    "diabetes": FAULTS,
}

ENDS_AS = {("autoencoder", "lr-diverges"): "killed"}  # behind a sigmoid no squared error can blow up: the units die
