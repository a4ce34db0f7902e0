"""Watches a live run: hooks, pulses, tapes, the log, and the Run that reads it."""

from unstuck.record._block import watch
from unstuck.record._evaluations import Evaluation
from unstuck.record._memory import Memory
from unstuck.record._moments import Stopped, Tick, on_sigterm
from unstuck.record._objective import of_tapes
from unstuck.record._rows import Hashes
from unstuck.record._run import Run
from unstuck.record._runs import FOLDER, Summary, new_folder, records_since, runs
from unstuck.record._script import Outcome, run_module, run_script
from unstuck.record._state import Optimizer, State
from unstuck.record._watch import Watch

__all__ = [
    "FOLDER",
    "Evaluation",
    "Hashes",
    "Memory",
    "Optimizer",
    "Outcome",
    "Run",
    "State",
    "Stopped",
    "Summary",
    "Tick",
    "Watch",
    "new_folder",
    "of_tapes",
    "on_sigterm",
    "records_since",
    "run_module",
    "run_script",
    "runs",
    "watch",
]
