"""The loss as a function of parameters: of a model and its data, or of a recorded step of somebody else's loop."""

from unstuck.objective._program import Instruction, Program, Tape, TapeError, tensors
from unstuck.objective._recorder import Recorder, Vault, caller
from unstuck.objective._tapefile import pack, unpack

__all__ = ["Instruction", "Program", "Recorder", "Tape", "TapeError", "Vault", "caller", "pack", "tensors", "unpack"]
