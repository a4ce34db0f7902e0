"""training-doctor, as its README's full script has it: one line in the loop, with all the metrics that it asks for."""

from pathlib import Path

from training_doctor import Doctor

from clinic.rivals.log import logged
from clinic.training import Training


def attach(t: Training, folder: Path):
    doctor = Doctor()
    logged(t, doctor.log)

    def said() -> list[str]:
        """The surest first: "each diagnosis has a confidence score"."""
        told = [d for d in doctor.diagnoses if d.severity.value in ("warning", "critical")]
        return [d.problem for d in sorted(told, key=lambda d: -d.confidence)]

    return said
