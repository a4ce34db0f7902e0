"""Watches a live run: hooks, pulses, tapes, the log, and the Run that reads it."""

from unstuck.record._run import Memory, Run
from unstuck.record._script import Outcome, run_module, run_script
from unstuck.record._state import Optimizer, State
from unstuck.record._watch import FOLDER, Watch, new_folder, watch

__all__ = [
    "FOLDER",
    "Memory",
    "Optimizer",
    "Outcome",
    "Run",
    "State",
    "Watch",
    "new_folder",
    "run_module",
    "run_script",
    "watch",
]
