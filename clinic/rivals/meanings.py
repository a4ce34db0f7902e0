"""What each tool's names mean in the clinic's codes, read generously.

A name counts as right for every cause that the tool's own text gives for it (its message, its likely causes, its
README), and for the family where any of these causes is of the family of the one that was put in. A name that stands
for no fault of the clinic is an alarm all the same.
"""

from clinic.board import family

TOO_HIGH = ("lr-diverges", "lr-bounces", "warmup-missing", "momentum-too-high", "loss-summed", "killed")
TOO_LOW = ("lr-too-small", "lr-decayed-early", "scheduler-misused", "adam-constants")
SEVERED = ("graph-cut", "parameters-not-optimised", "wrong-order")
VANISHING = ("vanishing-gradient", "saturated", "init-too-small", "zero-init")
EXPLODING = ("exploding-gradient", "init-too-large", "lr-diverges")
OVERFLOW = ("non-finite-data", "forward-overflow", "non-finite-gradient", "lr-diverges", "exploding-gradient")
HALF = ("fp16-underflow", "scaler-skips")
FLAT = ("plateau", "saddle", "poor-minimum", "noise-floor", "batch-too-large", "constant-init")

MEANINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "training-doctor": {
        "Learning rate likely too high": TOO_HIGH,
        "Learning rate may be too low": TOO_LOW,
        "Training plateau detected": (*FLAT, "lr-bounces", "capacity-too-small", "label-noise"),
        "Overfitting detected": ("overfitting",),
        "Gradient instability detected": (*OVERFLOW, *EXPLODING, *VANISHING, *TOO_HIGH, "dead-units"),
    },
    "trainproof": {
        "TP-NAN": OVERFLOW,
        "TP-NAN-GRAD": (*OVERFLOW, *HALF),
        "TP-ZERO-LOSS": ("silent-broadcast", "wrong-loss", "same-batch"),
        "TP-ZERO-LOSS-ONSET": OVERFLOW,
        "TP-FLAT": (*SEVERED, *TOO_LOW, *FLAT, *VANISHING, "dead-units", "killed", "inputs-empty"),
        "TP-DIVERGE": (*TOO_HIGH, "wrong-sign"),
        "TP-DEAD-RUN": (
            *SEVERED,
            *TOO_LOW,
            *FLAT,
            *VANISHING,
            "dead-units",
            "killed",
            "inputs-empty",
            "labels-shuffled",
        ),
        "TP-ZERO-GRAD": ("graph-cut", "dead-units", "killed", "zero-init", "inputs-empty", "fp16-underflow"),
        "TP-GRAD-SPIKE": (*EXPLODING, "outliers", "lr-bounces", "labels-shuffled"),
        "TP-ZERO-LR": TOO_LOW,
        "TP-ZERO-LR-PARTIAL": TOO_LOW,
        "TP-OVERFIT": ("overfitting",),
    },
    "runmedic": {
        "non_finite": (*OVERFLOW, *TOO_HIGH, "scaler-skips"),
        "divergence": (*TOO_HIGH, "adam-constants", "weight-decay-too-large", "not-shuffled", "wrong-sign"),
        "no_learning": (*SEVERED, *TOO_LOW, "labels-shuffled", "label-map-wrong", "constant-init", "inputs-empty"),
        "overfitting": ("overfitting",),
        "loss_spikes": (*TOO_HIGH, "outliers", "labels-shuffled", "label-noise", "data-corrupted-in-place"),
        "grad_spikes": (*TOO_HIGH, *EXPLODING, "outliers"),
    },
    "NeuralDBG": {
        "gradient_vanishing": (*VANISHING, "dead-units", "killed"),
        "gradient_saturated": (*VANISHING, "dead-units", "killed"),
        "gradient_exploding": EXPLODING,
        "activation_dead": ("dead-units", "killed", "inputs-empty"),
        "activation_saturated": ("saturated", "init-too-large", "inputs-unscaled"),
        "activation_anomalous": OVERFLOW,
        "optimizer_loss_plateau": (*FLAT, *TOO_LOW),
        "optimizer_loss_spike": (*TOO_HIGH, "outliers"),
        "optimizer_diverging": (*OVERFLOW, *TOO_HIGH),
        "data_nan_detected": ("non-finite-data", "forward-overflow"),
        "data_inf_detected": ("non-finite-data", "forward-overflow"),
        "data_distribution_shift": ("data-corrupted-in-place", "preprocessing-mismatch", "outliers", "not-shuffled"),
    },
    "torchdiag": {
        "exploding": EXPLODING,
        "vanishing": (*VANISHING, "dead-units", "killed"),
        "disconnected": ("graph-cut", "wrong-order"),
        "dead neurons": ("dead-units", "killed", "lr-diverges", "init-too-small", "inputs-unscaled"),
        "not finite": ("non-finite-data", "forward-overflow"),
        "nothing changed": SEVERED,
        "all frozen": ("parameters-not-optimised",),
        "step failed": ("wrong-loss", "silent-broadcast"),
    },
}


def causes(tool: str, name: str) -> tuple[str, ...]:
    """The codes that a name of a tool stands for; of Unstuck's names each stands for itself."""
    return (name,) if tool == "Unstuck" else MEANINGS[tool].get(name, ())


def families(tool: str, name: str) -> set[str]:
    return {family(code) for code in causes(tool, name)}
