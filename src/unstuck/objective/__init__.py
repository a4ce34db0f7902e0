"""The loss as a function of parameters: of a model and its data, or of a recorded step of somebody else's loop."""

from unstuck.objective._calls import caller
from unstuck.objective._chunks import Chunk, Linear, Plan
from unstuck.objective._custom import both_sides, check_custom, check_linear
from unstuck.objective._devices import on_cpu
from unstuck.objective._graph import Vault, memory_of
from unstuck.objective._kernels import second_order
from unstuck.objective._model import examples, unwrapped
from unstuck.objective._objective import Objective
from unstuck.objective._places import Names
from unstuck.objective._program import (
    Constant,
    Instruction,
    Number,
    Place,
    Program,
    Slot,
    Tape,
    TapeError,
    joined,
    tensors,
)
from unstuck.objective._recorder import Recorder
from unstuck.objective._tapefile import pack, unpack
from unstuck.objective._term import Origin, Term, along, gradient_of, nodes_behind, origins, second_derivatives

__all__ = [
    "Chunk",
    "Constant",
    "Instruction",
    "Linear",
    "Names",
    "Number",
    "Objective",
    "Origin",
    "Place",
    "Plan",
    "Program",
    "Recorder",
    "Slot",
    "Tape",
    "TapeError",
    "Term",
    "Vault",
    "along",
    "both_sides",
    "caller",
    "check_custom",
    "check_linear",
    "examples",
    "gradient_of",
    "joined",
    "memory_of",
    "nodes_behind",
    "on_cpu",
    "origins",
    "pack",
    "second_derivatives",
    "second_order",
    "tensors",
    "unpack",
    "unwrapped",
]
