"""What a kept result depends on, in sixteen digits: where they have changed, it is measured again."""

import functools
import hashlib
import inspect
from pathlib import Path
from typing import Any

import unstuck
from clinic import data, programs, training
from clinic.cells import SCRIPTS, Case
from clinic.faults import FAULTS
from clinic.healthy import OPTIMISERS, RATES, VARIANTS


def digits(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@functools.cache
def of_package() -> str:
    """Of the sources of unstuck."""
    package = Path(unstuck.__file__).parent
    return digits(*(path.read_text() for path in sorted(package.rglob("*.py"))))


def of_case(case: Case) -> str:
    """Of the sources of what is run."""
    if case.program in SCRIPTS:
        return digits(SCRIPTS[case.program].read_text())
    parts = [inspect.getsource(m) for m in (data, training, inspect.getmodule(programs.PROGRAMS[case.program]))]
    if case.fault:
        fault = FAULTS[case.fault]
        parts += [_source(fault.change), _source(fault.value(case.program, case.strength))]
    if case.variant:
        parts.append(_source(VARIANTS[case.variant].change))
    if case.optimiser:
        parts += [_source(OPTIMISERS[case.optimiser]), str(RATES[case.optimiser].get(case.program))]
    return digits(*parts)


def _source(value: Any) -> str:
    return inspect.getsource(value) if inspect.isfunction(value) else repr(value)
