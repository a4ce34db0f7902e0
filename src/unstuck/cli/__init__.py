"""The command: each subcommand parses, calls one public function and prints. Verdicts go to stderr, data to stdout."""

import contextlib
import dataclasses
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from unstuck.cli._task import CANNOT, found, loaded, share

if TYPE_CHECKING:
    from unstuck.diagnosis import Diagnosis
    from unstuck.record import Run, Summary

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Finds out why a neural network stops training, and proves the cure.",
)
PASS_ON = {"allow_interspersed_args": False, "ignore_unknown_options": True}
RunArg = Annotated[
    str | None,
    typer.Argument(metavar="[RUN]", help="A run folder, or its name below unstuck-runs (default: the latest)."),
]
JsonOut = Annotated[str | None, typer.Option("--json", metavar="OUT", help="Write the result as JSON; - is stdout.")]


@app.command(context_settings=PASS_ON)
def run(
    script: Annotated[str, typer.Argument(help="A Python script that trains, or with -m a module.")],
    args: Annotated[list[str] | None, typer.Argument(help="Its own arguments.")] = None,
    module: Annotated[bool, typer.Option("-m", help="Run a module, as `python -m MODULE`.")] = False,
    live: Annotated[bool, typer.Option("--live", help="Show the loss, the pulses and what is suspected.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="End the run at a fault that is PROVED or SHOWN.")] = False,
    out: Annotated[Path | None, typer.Option(help="The run folder (default: a new one below unstuck-runs).")] = None,
    json_out: JsonOut = None,
    budget: Annotated[str, typer.Option(metavar="SHARE", help="The share of the time that recording may take.")] = "2%",
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 when a fault is SHOWN or PROVED.")] = False,
) -> None:
    """Runs SCRIPT, or -m MODULE, with its arguments, watched, and says at the end why it is stuck, if it is.

    The script's own output and exit status pass through. A fault that is SHOWN on the way is told in a line on stderr;
    with --stop it ends the run, with status 1.
    """
    from unstuck import record
    from unstuck.cli._watching import watching
    from unstuck.diagnosis import diagnose

    _check_json(json_out)
    console, allowed = _console(), share(budget)
    start = record.run_module if module else record.run_script
    with watching(console, live=live, stop=stop) as (tick, lookout):
        done = start(script, args or [], folder=out, budget=allowed, tick=tick)
    if done.run is None:
        console.print("unstuck: the run folder could not be written: there is nothing to diagnose.", soft_wrap=True)
        raise typer.Exit(done.status)
    if done.run.rank:
        raise typer.Exit(done.status)  # the first rank tells the verdict
    if done.run.steps == done.run.skipped == 0:
        console.print(
            f"unstuck: no step of a torch.optim optimiser was seen in {script}: there is nothing to diagnose.",
            markup=False,
            soft_wrap=True,
        )
        if json_out is not None:
            _write_json(diagnose(done.run).to_json(), json_out)
        raise typer.Exit(done.status)
    if done.interrupted:
        console.print("unstuck: diagnosing… (Ctrl-C again leaves at once)")
    elif done.run.outcome.startswith("stopped"):
        told = done.run.outcome.replace("by unstuck", f"at step {done.run.steps}")
        console.print(f"unstuck: {told}.", markup=False, highlight=False, soft_wrap=True)
    try:
        fault = _is_fault(_verdict(done.run, console, json_out, known=lookout.verdict(done.run)))
    except Exception as error:  # whatever it is, the status stays the script's own
        console.print(f"unstuck: the diagnosis failed: {type(error).__name__}: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(done.status) from None
    raise typer.Exit(1 if check and fault and done.status == 0 else done.status)


@app.command()
def runs(json_out: JsonOut = None) -> None:
    """Lists the runs below unstuck-runs, newest first, with the verdict of those that were diagnosed."""
    from unstuck.record import runs
    from unstuck.report import runs_table

    _check_json(json_out)
    found = [(run, _known(run.folder)) for run in runs()]
    if json_out is not None:
        _write_json([_listed(run, known) for run, known in found], json_out)
    elif found:
        width = None if sys.stdout.isatty() else 10_000  # a pipe gets whole lines
        Console(width=width).print(runs_table(found))
    else:
        _console().print("unstuck: there are no runs below unstuck-runs: `unstuck run SCRIPT` makes one.")


@app.command()
def diagnose(
    run: RunArg = None,
    json_out: JsonOut = None,
) -> None:
    """Diagnoses a recorded run again. Exit status: 0 healthy, 1 a fault was found, 2 cannot tell."""
    from unstuck.record import Run

    recorded = Run(found(run))
    console = _console()
    if recorded.steps == recorded.skipped == 0:
        raise ValueError(f"a run with optimiser steps was needed, but {recorded.folder} has recorded none")
    raise typer.Exit(_verdict(recorded, console, json_out).status)


@app.command()
def explain(
    code: Annotated[
        str | None, typer.Argument(help="A cause, as a verdict names it; without it all are listed.")
    ] = None,
) -> None:
    """Tells of a cause what it looks like, what proves it, what cures it, and which rivals share its looks."""
    from unstuck.report import causes, explanation

    _console()  # for the streams
    Console(width=None if sys.stdout.isatty() else 100).print(causes() if code is None else explanation(code))


@app.command()
def report(
    run: RunArg = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file (default: report.html in the run folder).")
    ] = None,
) -> None:
    """Writes one HTML file with the verdict, its evidence and the run's curves; it opens without a network."""
    from unstuck.record import Run

    recorded = Run(found(run))
    result = _known(recorded.folder) or _diagnosed(recorded, _console())
    typer.echo(_write_report(result, recorded, out))


@app.command()
def examine(
    task: Annotated[
        str, typer.Argument(metavar="FILE[:NAME]|RUN", help="A Python file and a name in it, or a run folder.")
    ],
    json_out: JsonOut = None,
    tol: Annotated[float, typer.Option(help="Error of the two ends, relative to the larger.")] = 1e-3,
    max_products: Annotated[int, typer.Option(help="The most Hessian products for the two ends.")] = 300,
    seed: Annotated[int, typer.Option(help="Of the random vectors that the estimates start from.")] = 0,
) -> None:
    """Tells what kind of point the weights stand at: saddle, minimum or none, the spectrum's ends, the rate limit.

    FILE:NAME is an unstuck.Objective, or a function without arguments that returns one; NAME is `objective` where it
    is left out. RUN is a run folder or its name below unstuck-runs: then the loss is the mean over the steps that the
    run recorded, at its last finite weights. Exit status: 0 told, 2 cannot.
    """
    import torch

    from unstuck.critical import examine
    from unstuck.report import point_table

    _check_json(json_out)
    console = _console()
    with loaded(task) as (objective, title):
        generator = torch.Generator(objective.device).manual_seed(seed)
        with _bar(console, "the gradient") as progress:
            point = examine(objective, tol=tol, max_products=max_products, generator=generator, progress=progress)
    console.print(point_table(point, title=title))
    if json_out is not None:
        _write_json(point.to_json(), json_out)


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


def _verdict(
    recorded: "Run", console: Console, json_out: str | None, *, known: "Diagnosis | None" = None
) -> "Diagnosis":
    """Diagnoses where that was not done yet, prints, and writes JSON where asked."""
    from unstuck.diagnosis import non_finite
    from unstuck.report import screen

    result = _diagnosed(recorded, console, known=known)
    console.print(screen(result))
    blown = non_finite(recorded)
    if blown is not None and not any(f"since step {blown.step}" in f.claim for f in result.findings):
        console.print(f" {blown.claim}", markup=False, highlight=False)
    console.print(f"Run: {recorded.folder}   unstuck report {recorded.folder}", style="dim", soft_wrap=True)
    if json_out is not None:
        _write_json(result.to_json(), json_out)
    return result


def _is_fault(result: "Diagnosis") -> bool:
    from unstuck.diagnosis import PROVED, SHOWN

    return any(f.word in (PROVED, SHOWN) for f in result.findings)


def _known(folder: Path) -> "Diagnosis | None":
    """The diagnosis that a run folder keeps, if it can be read."""
    from unstuck.diagnosis import Diagnosis

    try:
        return Diagnosis.from_json(json.loads((folder / DIAGNOSIS).read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError):
        return None


def _listed(run: "Summary", known: "Diagnosis | None") -> dict[str, Any]:
    findings = None if known is None else [{"code": f.code, "word": f.word} for f in known.findings]
    verdict = None if known is None else {"status": known.status, "findings": findings}
    return {**dataclasses.asdict(run), "folder": str(run.folder), "verdict": verdict}


def _diagnosed(recorded: "Run", console: Console, *, known: "Diagnosis | None" = None) -> "Diagnosis":
    from unstuck.diagnosis import diagnose, dumps

    with _bar(console, "reading the run") as progress:
        result = known or diagnose(recorded, progress=progress)
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


def _write_json(data: Any, out: str) -> None:
    text = json.dumps(data, allow_nan=False, ensure_ascii=False)
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


def _console() -> Console:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 loses a tick, not the verdict
    return Console(stderr=True)


def _with_json_default(argv: list[str]) -> list[str]:
    """`diagnose RUN --json`, `examine TASK --json` and `runs --json` without a place mean stdout."""
    if argv[:1] not in (["diagnose"], ["examine"], ["runs"]):
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
