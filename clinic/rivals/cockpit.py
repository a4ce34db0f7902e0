"""Cockpit in its economy configuration, with the calls of its basic example. It draws gauges and names no fault.

It differentiates each sample by itself, and so takes a chain of layers, a loss that is a module, and a loop of its own.
"""

from pathlib import Path

import cockpit
from backpack import extend
from cockpit.utils.configuration import configuration
from torch import nn

from clinic import training
from clinic.training import Training

LOSSES = {"cross_entropy": nn.CrossEntropyLoss, "mse_loss": nn.MSELoss}


def attach(t: Training, folder: Path):
    if t.step is not training.step or t.clip:
        raise ValueError("the step is not the plain one, which Cockpit's calls stand in")
    kind = LOSSES[t.criterion.__name__] if hasattr(t.criterion, "__name__") else type(t.criterion)
    mean, single = extend(kind()), kind(reduction="none")
    made = t.make_optimizer
    gauges: list[cockpit.Cockpit] = []
    count = iter(range(t.steps))

    def make(t):
        t.model = extend(t.model)
        gauges.append(cockpit.Cockpit(t.model.parameters(), quantities=configuration("economy")))
        return made(t)

    def step(t, batch):
        k = next(count)
        t.optimizer.zero_grad()
        output = t.model(batch.x)
        loss = mean(output, batch.y)
        losses = single(output, batch.y).detach().reshape(len(batch), -1).mean(1)
        with gauges[0](k, info={"batch_size": len(batch), "individual_losses": losses, "loss": loss}):
            loss.backward(create_graph=gauges[0].create_graph(k))
        t.optimizer.step()
        return loss.item()

    t.make_optimizer, t.step = make, step
    return list
