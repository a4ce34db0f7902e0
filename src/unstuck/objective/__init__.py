"""The loss as a function of parameters: of a model and its data, or of a recorded step of somebody else's loop."""

from unstuck.objective._calls import caller
from unstuck.objective._graph import Vault
from unstuck.objective._objective import Objective, Term
from unstuck.objective._program import Constant, Instruction, Program, Slot, Tape, TapeError, tensors
from unstuck.objective._recorder import Recorder
from unstuck.objective._tapefile import pack, unpack

__all__ = [
    "Constant",
    "Instruction",
    "Objective",
    "Program",
    "Recorder",
    "Slot",
    "Tape",
    "TapeError",
    "Term",
    "Vault",
    "caller",
    "pack",
    "tensors",
    "unpack",
]
