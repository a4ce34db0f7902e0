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

VARIANTS = ("edge-of-stability", "cosine-tail", "gradient-accumulation", "sparse-relu", "converged")
"""Healthy runs: whoever finds a fault in one of them is wrong."""
