"""The tools by name, each as a function that has a training tell it what it wants to know."""

from collections.abc import Callable
from pathlib import Path

from clinic.rivals import cockpit, neuraldbg, runmedic, torchdiag, training_doctor, trainproof
from clinic.training import Training

Said = Callable[[], list[str]]  # after the run: the names of what is wrong, at the level of a warning or above


def nothing(t: Training, folder: Path) -> Said:
    return list


ATTACH: dict[str, Callable[[Training, Path], Said]] = {
    "nothing": nothing,
    "training-doctor": training_doctor.attach,
    "trainproof": trainproof.attach,
    "runmedic": runmedic.attach,
    "NeuralDBG": neuraldbg.attach,
    "torchdiag": torchdiag.attach,
    "Cockpit": cockpit.attach,
}
