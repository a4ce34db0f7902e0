"""The fault suite: ordinary training scripts, the errors that users make in them, and healthy runs that look odd."""

from pathlib import Path

_FOLDER = Path(__file__).parent / "programs"

PROGRAMS = {name: _FOLDER / f"{name}.py" for name in ("mlp", "cnn", "gru")}

FAULTS = (
    "lr-diverges",
    "lr-bounces",
    "lr-too-small",
    "saddle",
    "zero-init",
    "dead-units",
    "zero-grad-missing",
    "parameters-not-optimised",
    "graph-cut",
    "non-finite-data",
)
"""Every fault applies to every program."""

VARIANTS = {
    "edge-of-stability": ("mlp",),  # under cross-entropy the sharpness falls again and the edge is left
    "cosine-tail": ("mlp", "cnn", "gru"),
    "gradient-accumulation": ("mlp", "cnn", "gru"),
    "sparse-relu": ("mlp", "cnn"),  # the one small ReLU layer of the GRU would lose units for good
    "converged": ("mlp", "cnn", "gru"),
}
"""Healthy runs and the programs that have them: whoever finds a fault in one of these is wrong."""
