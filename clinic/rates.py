"""Finds a rate for every optimiser on every program, by one seed and a short list; keeps them in clinic/rates.json.

python -m clinic.rates                  those that are missing
python -m clinic.rates --program gru    of one program
"""

import argparse
import json
import math
from itertools import product
from pathlib import Path

import torch

from clinic import healthy
from clinic.programs import PROGRAMS
from clinic.train import prepared
from clinic.training import train

GRID = {  # three rates for each; a rate at the edge of its list is the best of the list, not more
    "SGD": (0.05, 0.2, 0.5),
    "momentum": (0.01, 0.05, 0.1),
    "Nesterov": (0.01, 0.05, 0.1),
    "Adam": (1e-3, 3e-3, 1e-2),
    "AdamW": (1e-3, 3e-3, 1e-2),
    "RMSprop": (5e-4, 2e-3, 5e-3),
    "Adagrad": (0.01, 0.03, 0.1),
    "Adadelta": (0.3, 1.0, 3.0),
    "NAdam": (1e-3, 3e-3, 1e-2),
    "RAdam": (3e-3, 1e-2, 3e-2),
    "Rprop": (1e-4, 1e-3, 1e-2),
    "LBFGS": (0.1, 0.3, 0.8),
}
PLACE = Path(__file__).parent / "rates.json"


def merit(program: str, optimiser: str, rate: float) -> tuple[float, float]:
    """The score after half of the steps, to a hundredth, and then the training loss."""
    healthy.RATES[optimiser] = {program: rate}
    training = prepared(program, optimiser=optimiser, seed=100)
    training.steps = max(training.steps // 2, 50)
    found = train(training, tell=lambda line: None)
    if math.isnan(found.score) or math.isnan(found.loss):
        return -math.inf, -math.inf
    return round(found.score, 2), -found.loss


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", action="append", default=[], choices=tuple(PROGRAMS))
    programs = parser.parse_args().program or PROGRAMS
    torch.set_num_threads(1)
    kept = json.loads(PLACE.read_text())
    for program, (optimiser, rates) in product(programs, GRID.items()):
        if program == "gan" and optimiser in ("LBFGS", "Rprop"):
            continue  # its losses change at every step
        if program in kept.setdefault(optimiser, {}):
            continue
        kept[optimiser][program] = max(rates, key=lambda rate: merit(program, optimiser, rate))
        PLACE.with_suffix(".part").write_text(json.dumps(kept, indent=1) + "\n")
        PLACE.with_suffix(".part").replace(PLACE)
        print(program, optimiser, kept[optimiser][program])


if __name__ == "__main__":
    main()
