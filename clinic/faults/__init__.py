"""What goes wrong in training, as values: one file for each family of the catalogue."""

from clinic.faults import bad_data, batches, capacity, code_bugs, critical_points, initialisation, numerics, step_size
from clinic.faults._fault import HARMLESS, STRENGTHS, Fault

_FILES = (step_size, critical_points, initialisation, batches, code_bugs, bad_data, capacity, numerics)

FAULTS: dict[str, Fault] = {fault.code: fault for file in _FILES for fault in file.FAULTS}

__all__ = ["FAULTS", "HARMLESS", "STRENGTHS", "Fault"]
