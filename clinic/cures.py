"""Does the cure that belongs to a fault win? Tried from the end of the faulty run, beside a control.

python -m clinic.cures --seeds 3 --output clinic/results/cures.json

Each arm goes on for 60 steps and then cools for 30 to a rate of zero, so that what counts is where the weights stand
and not how they jitter. The trainings are not touched: a hook on the optimiser's step changes the rate or the weights.
It judges the suite, not unstuck, and shares no line with unstuck's own trials.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.optim.optimizer import register_optimizer_step_pre_hook

from clinic import kept
from clinic.faults import FAULTS
from clinic.train import prepared
from clinic.training import train

GO_ON, COOL = 60, 30  # steps: the two parts of an arm


def rerandomise(optimizer):
    """Adds half of a usual initialisation to every weight matrix."""
    with torch.no_grad():
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.dim() > 1:
                    p.add_(torch.randn_like(p), alpha=0.5 / math.sqrt(p[0].numel()))


CURES = {  # fault: factor on the rate, change of the weights
    "lr-bounces": (1 / 3, None),
    "lr-too-small": (100.0, None),
    "saddle": (1.0, rerandomise),
    "zero-init": (1.0, rerandomise),
}


def final_loss(program, fault, seed, *, factor, change=None):
    """The training loss after an arm that multiplies the rate by `factor` and changes the weights first."""
    training = prepared(program, fault=fault, seed=seed)
    end = training.steps
    training.steps += GO_ON + COOL
    step = -1
    rates = []

    def intervene(optimizer, *_):
        nonlocal step, rates
        step += 1
        if step < end:
            rates = [group["lr"] for group in optimizer.param_groups]
            return
        if step == end and change:
            change(optimizer)
        cooling = min(1.0, (end + GO_ON + COOL - step) / COOL)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = factor * cooling * rate

    handle = register_optimizer_step_pre_hook(intervene)
    try:
        return train(training, tell=lambda line: None).loss
    finally:
        handle.remove()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="where to store the table as JSON")
    args = parser.parse_args()

    table = Table("program", "fault", "control", "cure", "wins", title="training loss, seed by seed, both arms cooled")
    rows = []
    for fault, (factor, change) in CURES.items():
        for program in (p for p in FAULTS[fault].strengths if p != "gan"):  # whose two optimisers take turns
            control = [final_loss(program, fault, seed, factor=1.0) for seed in range(args.seeds)]
            cure = [final_loss(program, fault, seed, factor=factor, change=change) for seed in range(args.seeds)]
            wins = all(a < 0.9 * b for a, b in zip(cure, control, strict=True))
            shown = [" ".join(f"{loss:.3g}" for loss in arm) for arm in (control, cure)]
            table.add_row(program, fault, *shown, "yes" if wins else "NO")
            rows.append({"program": program, "fault": fault, "control": control, "cure": cure, "wins": wins})
    Console().print(table)
    if args.output:
        args.output.write_text(json.dumps({"environment": kept.environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
