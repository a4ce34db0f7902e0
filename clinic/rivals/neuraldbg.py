"""NeuralDBG, as its README has it: the loop inside its context, each step counted and each loss recorded.

Its package of causes is not published (`neuraldbg-engine` is not on PyPI), and without it `explain_failure` finds no
vanishing gradient. So what counts here is what it has recorded: the failures in the order in which they first occurred.
"""

from pathlib import Path

from neuraldbg import NeuralDbg

from clinic.training import Training


def attach(t: Training, folder: Path):
    watching: list[NeuralDbg] = []
    made, step = t.make_optimizer, t.step

    def make(t):
        optimizer = made(t)
        watching.append(NeuralDbg(t.model).__enter__())
        return optimizer

    def stepped(t, batch):
        loss = step(t, batch)
        watching[0].record_loss(loss)
        watching[0].step += 1
        return loss

    def said() -> list[str]:
        watching[0].__exit__(None, None, None)
        return list(watching[0].first_failure_step)

    t.make_optimizer, t.step = make, stepped
    return said
