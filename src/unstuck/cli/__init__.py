"""The command: each subcommand parses, calls one public function and prints. Verdicts go to stderr, data to stdout."""

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from unstuck.cli._task import CANNOT, loaded

if TYPE_CHECKING:
    from unstuck.critical import CriticalPoint
    from unstuck.diagnosis import Diagnosis
    from unstuck.record import Run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Finds out why a neural network stops training, and proves the cure.",
)
PASS_ON = {"allow_interspersed_args": False, "ignore_unknown_options": True}
JsonOut = Annotated[str | None, typer.Option("--json", metavar="OUT", help="Write the result as JSON; - is stdout.")]


@app.command(context_settings=PASS_ON)
def run(
    script: Annotated[str, typer.Argument(help="A Python script that trains; it stays as it is.")],
    args: Annotated[list[str] | None, typer.Argument(help="Its own arguments.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder (default: a new one below unstuck-runs).")] = None,
    json_out: JsonOut = None,
    budget: Annotated[float, typer.Option(help="The share of the time that recording may take.")] = 0.02,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 when a fault is SHOWN or PROVED.")] = False,
) -> None:
    """Runs SCRIPT with its arguments, watched, and says at the end why it is stuck, if it is.

    The script's own output and exit status pass through.
    """
    from unstuck.diagnosis import diagnose
    from unstuck.record import run_script

    _check_json(json_out)
    done = run_script(script, args or [], folder=out, budget=budget)
    console = _console()
    if done.run is None:
        console.print("unstuck: the run folder could not be written: there is nothing to diagnose.", soft_wrap=True)
        raise typer.Exit(done.status)
    if done.run.steps == 0:
        console.print(
            f"unstuck: no step of a torch.optim optimiser was seen in {script}: there is nothing to diagnose.",
            markup=False,
            soft_wrap=True,
        )
        if json_out is not None:
            _write_json(diagnose(done.run), json_out)
        raise typer.Exit(done.status)
    if done.interrupted:
        console.print("unstuck: diagnosing… (Ctrl-C again leaves at once)")
    try:
        fault = _is_fault(_verdict(done.run, console, json_out))
    except Exception as error:  # whatever it is, the status stays the script's own
        console.print(f"unstuck: the diagnosis failed: {type(error).__name__}: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(done.status) from None
    raise typer.Exit(1 if check and fault and done.status == 0 else done.status)


@app.command()
def diagnose(
    folder: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="A run folder (default: the latest).")] = None,
    json_out: JsonOut = None,
) -> None:
    """Diagnoses a recorded run again. Exit status: 0 healthy, 1 a fault was found, 2 cannot tell."""
    from unstuck.record import Run

    recorded = Run(folder or _latest())
    console = _console()
    if recorded.steps == 0:
        raise ValueError(f"a run with optimiser steps was needed, but {recorded.folder} has recorded none")
    raise typer.Exit(_verdict(recorded, console, json_out).status)


@app.command()
def report(
    folder: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="A run folder (default: the latest).")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file (default: report.html in the run folder).")
    ] = None,
) -> None:
    """Writes one HTML file with the verdict, its evidence and the run's curves; it opens without a network."""
    from unstuck.diagnosis import Diagnosis
    from unstuck.record import Run

    recorded = Run(folder or _latest())
    known = recorded.folder / DIAGNOSIS
    if known.is_file():
        result = Diagnosis.from_json(json.loads(known.read_text(encoding="utf-8")))
    else:
        result = _diagnosed(recorded, _console())
    typer.echo(_write_report(result, recorded, out))


@app.command()
def examine(
    task: Annotated[str, typer.Argument(metavar="FILE[:NAME]", help="A Python file and a name in it.")],
    json_out: JsonOut = None,
    tol: Annotated[float, typer.Option(help="Error of the two ends, relative to the larger.")] = 1e-3,
    max_products: Annotated[int, typer.Option(help="The most Hessian products for the two ends.")] = 300,
    seed: Annotated[int, typer.Option(help="Of the random vectors that the estimates start from.")] = 0,
) -> None:
    """Tells what kind of point the weights stand at: saddle, minimum or none, the spectrum's ends, the rate limit.

    FILE:NAME is an unstuck.Objective, or a function without arguments that returns one; NAME is `objective` where it
    is left out. Exit status: 0 told, 2 cannot.
    """
    import torch

    from unstuck.critical import examine
    from unstuck.report import point_table

    _check_json(json_out)
    console = _console()
    with loaded(task) as objective:
        generator = torch.Generator(objective.device).manual_seed(seed)
        with _bar(console, "the gradient") as progress:
            point = examine(objective, tol=tol, max_products=max_products, generator=generator, progress=progress)
    console.print(point_table(point, title=task))
    if json_out is not None:
        _write_json(point, json_out)


@app.command()
def demo(
    fault: Annotated[str, typer.Argument(help="Which fault to show; `healthy` has none.")] = "lr-bounces",
    names: Annotated[bool, typer.Option("--list", help="List the faults and leave.")] = False,
) -> None:
    """Shows the whole chain on a small network and scikit-learn's digits: watch, diagnose, try the cure, report."""
    from unstuck import demo as program
    from unstuck.record import run_script

    if names:
        width = max(map(len, program.FAULTS))
        for code, meaning in program.FAULTS.items():
            typer.echo(f"{code:{width}}  {meaning}")
        return
    if fault not in program.FAULTS and fault != "healthy":
        raise ValueError(f"a fault of `unstuck demo --list` was needed, got {fault!r}: choose one of these")
    done = run_script(program.__file__, [fault])
    if done.status or done.run is None:
        raise typer.Exit(done.status)
    console = _console()
    result = _verdict(done.run, console, None)
    if _is_fault(result):
        console.print(f"The report: {_write_report(result, done.run, None)}", soft_wrap=True)


DIAGNOSIS = "diagnosis.json"


def _verdict(recorded: "Run", console: Console, json_out: str | None) -> "Diagnosis":
    """Diagnoses, prints, and writes JSON where asked."""
    from unstuck.report import screen

    result = _diagnosed(recorded, console)
    console.print(screen(result))
    console.print(f"Run: {recorded.folder}   unstuck report {recorded.folder}", style="dim", soft_wrap=True)
    if json_out is not None:
        _write_json(result, json_out)
    return result


def _is_fault(result: "Diagnosis") -> bool:
    from unstuck.diagnosis import PROVED, SHOWN

    return any(f.word in (PROVED, SHOWN) for f in result.findings)


def _diagnosed(recorded: "Run", console: Console) -> "Diagnosis":
    from unstuck.diagnosis import diagnose, dumps

    with _bar(console, "reading the run") as progress:
        result = diagnose(recorded, progress=progress)
    try:
        (recorded.folder / DIAGNOSIS).write_text(dumps(result.to_json()), encoding="utf-8")
    except OSError as error:
        console.print(f"unstuck: the diagnosis could not be saved: {error}", markup=False, soft_wrap=True)
    return result


def _write_report(result: "Diagnosis", recorded: "Run", out: Path | None) -> Path:
    from unstuck.report import page

    place = out or recorded.folder / "report.html"
    place.write_text(page(result, recorded), encoding="utf-8")
    return place


def _check_json(out: str | None) -> None:
    if out not in (None, "-") and not Path(out).parent.is_dir():
        raise ValueError(f"--json needs a file in a folder that exists, got {out}")


def _write_json(result: "Diagnosis | CriticalPoint", out: str) -> None:
    from unstuck.diagnosis import dumps

    text = dumps(result.to_json())
    if out == "-":
        typer.echo(text)
    else:
        Path(out).write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def _bar(console: Console, text: str) -> Iterator:
    """A progress bar on a terminal, nothing in a pipe."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=1.0)
        yield lambda text, share: bar.update(task, description=text, completed=share)


def _latest() -> Path:
    from unstuck.record import FOLDER

    runs = sorted(FOLDER.glob("*/log.jsonl"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise ValueError(f"a run folder was needed, but there is none below {FOLDER}: `unstuck run SCRIPT` makes one")
    return runs[-1].parent


def _console() -> Console:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 loses a tick, not the verdict
    return Console(stderr=True)


def _with_json_default(argv: list[str]) -> list[str]:
    """`diagnose RUN --json` and `examine TASK --json` without a place mean stdout."""
    if argv[:1] not in (["diagnose"], ["examine"]):
        return argv
    done: list[str] = []
    for k, word in enumerate(argv):
        done.append(word)
        after = argv[k + 1] if k + 1 < len(argv) else ""
        if word == "--json" and after != "-" and not after.endswith(".json"):
            done.append("-")
    return done


def main() -> None:
    try:
        app(_with_json_default(sys.argv[1:]), prog_name="unstuck")
    except (ValueError, OSError) as error:
        print(f"unstuck: {error}", file=sys.stderr)
        sys.exit(CANNOT)
    except KeyboardInterrupt:
        sys.exit(130)
