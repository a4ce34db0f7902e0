"""What `unstuck run` does while the script runs: a line for each fault, the live screen, the end at a fault."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from rich.console import Console

if TYPE_CHECKING:
    from unstuck.diagnosis import Finding, Lookout
    from unstuck.record import Run
    from unstuck.report import LiveScreen


@contextlib.contextmanager
def watching(console: Console, *, live: bool, stop: bool) -> Iterator[tuple[Callable[["Run"], None], "Lookout"]]:
    """What looks at the run on its way, and the lookout that it looks with."""
    from unstuck.diagnosis import Lookout
    from unstuck.record import on_sigterm
    from unstuck.report import LiveScreen

    if not live:
        lookout = Lookout(whole=stop)
        yield lambda run: _look(run, lookout, console, None, stop=stop), lookout
        return
    with LiveScreen(console) as screen, on_sigterm(screen.close):
        if not screen.usable:
            console.print(
                "unstuck: --live needs a terminal of 60 columns and 20 rows on stderr: there is none.", soft_wrap=True
            )
        lookout = Lookout(whole=True, progress=screen.note)
        yield lambda run: _look(run, lookout, console, screen, stop=stop), lookout


def _look(run: "Run", lookout: "Lookout", console: Console, screen: "LiveScreen | None", *, stop: bool) -> None:
    from unstuck.record import Stopped

    found = lookout.look(run)
    if screen is not None and _first_rank():
        screen.show(run, lookout)
    if screen is None or not screen.shown:  # else it says so
        for finding in found:
            console.print(_warning(finding, run), markup=False, highlight=False, soft_wrap=True)
    if stop and found:
        raise Stopped(found[0].code)


def _warning(finding: "Finding", run: "Run") -> str:
    place = f" in {finding.where}" if finding.where and finding.where not in finding.claim else ""
    said = "".join(c if c.isprintable() else " " for c in f"{finding.code}{place}. {finding.claim}")
    return f"unstuck: step {run.taken}: {finding.word} {said}"


def _first_rank() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank())
