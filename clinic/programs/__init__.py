"""The programs: small trainings, as different as users' are. Each module has a `setup()`."""

from collections.abc import Callable

from clinic.programs import autoencoder, cnn, gan, gru, lstm, mlp, regression, tabular, transformer
from clinic.training import Training

PROGRAMS: dict[str, Callable[[], Training]] = {
    "mlp": mlp.setup,
    "cnn": cnn.setup,
    "gru": gru.setup,
    "autoencoder": autoencoder.setup,
    "tabular": tabular.setup,
    "gan": gan.setup,
    "lstm": lstm.setup,
    "transformer": transformer.setup,
    "regression": regression.setup,
}

HELD_OUT = ("lstm", "transformer", "regression")  # no threshold of a diagnosis may be chosen by them
