"""Watches the training inside a with block."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from unstuck.record._log import placed
from unstuck.record._moments import Stopped, Tick
from unstuck.record._run import Run
from unstuck.record._runs import new_folder
from unstuck.record._watch import Watch


@contextlib.contextmanager
def watch(
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    folder: str | Path | None = None,
    budget: float = 0.02,
    tick: Tick | None = None,
) -> Iterator[Run]:
    """Watches the training inside the block; the loop in it stays as it is.

    Model and optimiser are found by themselves where they are not given. The run is written to `folder` (by default a
    new one below `unstuck-runs`) and can be read at any time. `budget` is the share of the time that recording may
    take. `tick(run)` is called after a step, at most twice a second, and may raise `unstuck.record.Stopped` to end the
    run; any other error in it does the training no harm.
    """
    script = getattr(sys.modules.get("__main__"), "__file__", None) or "interactive session"
    place = Path(folder) if folder is not None else new_folder(Path(script).stem)
    place = placed(place)  # the training may change the working directory
    watcher = Watch(place, models=[] if model is None else [model], budget=budget, tick=tick)
    watcher.start(script, sys.argv[1:], [] if optimizer is None else [optimizer])
    outcome = "finished"
    run = Run(place, live=watcher, rank=watcher.rank)
    try:
        yield run
    except KeyboardInterrupt:
        outcome = "interrupted"
        raise
    except Stopped as stop:
        outcome = str(stop)
        raise
    except BaseException as error:
        outcome = f"raised {type(error).__name__}"
        raise
    finally:
        watcher.stop(outcome)
