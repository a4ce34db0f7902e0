"""torchdiag: a step is verified on a copy before the first one; gradients and units are checked once an epoch."""

import contextlib
import copy
import io
import re
from pathlib import Path

import torchdiag

from clinic.training import Training


def attach(t: Training, folder: Path):
    printed = io.StringIO()
    made, step = t.make_optimizer, t.step
    seen = {"step": 0}

    def make(t):
        optimizer = made(t)
        optimizer.register_step_post_hook(check_gradients)
        model, copied = copy.deepcopy((t.model, optimizer))  # it takes a step of its own
        some = t.train.rows(slice(t.batch_size))
        with contextlib.redirect_stdout(printed):
            torchdiag.summary(t.model)
            torchdiag.verify_step(model, copied, t.criterion, some.x, some.y)
        return optimizer

    def check_gradients(*_):
        if seen["step"] % t.epoch_length() == 0:
            with contextlib.redirect_stdout(printed):
                torchdiag.check_gradients(t.model)

    def stepped(t, batch):
        loss = step(t, batch)
        seen["step"] += 1
        if seen["step"] % t.epoch_length() == 0:
            with contextlib.redirect_stdout(printed):
                torchdiag.check_dead_neurons(t.model, batch.x)
        return loss

    t.make_optimizer, t.step = make, stepped
    return lambda: issues(printed.getvalue())


KINDS = (
    ("exploding", r"exploding"),
    ("vanishing", r"vanishing"),
    ("disconnected", r"disconnected from graph|None gradients"),
    ("dead neurons", r"neurons dead"),
    ("not finite", r"not finite"),
    ("nothing changed", r"No parameters changed"),
    ("all frozen", r"ALL parameters are frozen"),
    ("step failed", r"failed:"),
)


def issues(printed: str) -> list[str]:
    """The kinds of the issues that it has printed, each once, in their order."""
    kinds = [
        kind
        for line in re.findall(r"^  • (.+)$", printed, flags=re.M)
        for kind, words in KINDS
        if re.search(words, line)
    ]
    return list(dict.fromkeys(kinds))
