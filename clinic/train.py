"""Trains one of the clinic's programs, as it is or with one thing changed.

python -m clinic.train mlp                                                trains well
python -m clinic.train mlp --fault dead-units --strength mild --seed 3    does not
python -m clinic.train mlp --variant cosine-tail --optimiser Adam         well again, though it may look odd
unstuck run -m clinic.train mlp --fault dead-units                        watched
"""

import argparse

import torch

from clinic.faults import FAULTS, HARMLESS, STRENGTHS
from clinic.healthy import OPTIMISERS, VARIANTS
from clinic.programs import PROGRAMS
from clinic.training import Training, train


def prepared(program, *, fault="", strength="clear", variant="", optimiser="", seed=0) -> Training:
    """A training that is ready to begin."""
    torch.manual_seed(seed)
    training = PROGRAMS[program]()
    if optimiser:
        OPTIMISERS[optimiser](training, program)
    if variant:
        VARIANTS[variant].change(training)
    if fault:
        FAULTS[fault].put_into(training, program, strength)
    return training


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=tuple(PROGRAMS))
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--fault", choices=tuple(FAULTS), default="", metavar="CODE")
    choice.add_argument("--variant", choices=tuple(VARIANTS), default="", metavar="NAME")
    parser.add_argument("--strength", choices=(*STRENGTHS, HARMLESS), default="clear")
    parser.add_argument("--optimiser", choices=tuple(OPTIMISERS), default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="instead of the program's own number")
    args = vars(parser.parse_args())
    steps = args.pop("steps")
    training = prepared(**args)
    training.steps = steps or training.steps
    train(training)


if __name__ == "__main__":
    main()
