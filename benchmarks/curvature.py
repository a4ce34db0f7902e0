"""Unstuck's numerical core beside its peers, on three networks: right answers first, then seconds, products, memory.

python benchmarks/curvature.py all                     every network, each in a process of its own
python benchmarks/curvature.py mlp --parts top,ends    some parts of one network
python benchmarks/curvature.py mlp --quick             one start, one repeat, the first setting of each peer

Ours runs right before each run of a peer, in the same process; a ratio is the median over such pairs of the peer's
seconds to ours, graphs included. Answers are compared with eigenvalues in float64. Numbers go to curvature.json beside
this file, by network and part, so that some can be measured again; a quick run writes nothing.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

import costs
import spectra
import unstuck
from environment import processor
from peers import versions
from spectra import CRITERIA, REPEATS, Bench, Row, report
from workloads import MODELS, workload

PLACE = Path(__file__).with_suffix(".json")
OURS = ("torch", "numpy", "scikit-learn")


def main() -> None:
    given = arguments()
    if given.workload == "all":
        rest = sys.argv[1:]
        rest.remove("all")
        codes = [subprocess.run([sys.executable, __file__, name, *rest], check=False).returncode for name in MODELS]
        raise SystemExit(max(map(abs, codes)))
    warnings.filterwarnings(
        "ignore", message="Using backward\\(\\) with create_graph=True"
    )  # PyHessian does, on a copy
    torch.set_num_threads(given.threads)
    threadpool_limits(1, user_api="blas")  # NumPy's own threads, which get into the way of torch's
    console = Console(width=None if sys.stdout.isatty() else 170)
    before = environment(given)
    report(f"{given.workload}: training")
    bench = Bench(
        given=workload(given.workload),
        quick=given.quick,
        relaxed=given.relaxed,
        patience=given.patience,
        repeats=given.repeats or REPEATS[given.workload],
    )
    console.print(f"{bench.given.name}: {bench.given.size} weights, loss over {len(bench.given.batches)} batches")
    for why in bench.absent.values():
        console.print(why)
    warm_up(bench)
    for part in given.parts or [p for p in PARTS if p != "memory" or given.workload == "cnn"]:
        measure, show = PARTS[part]
        load = os.getloadavg()[0]
        result, taken = spectra.timed(lambda measure=measure: measure(bench))
        report("")
        for shown in (*show(result), *_failures(result["rows"])):
            console.print(shown, soft_wrap=isinstance(shown, str), highlight=False, markup=False)
        if not given.quick:
            keep(
                given.workload,
                part,
                {"environment": before | {"load_before": round(load, 2), "part_took": round(taken)}, **result},
            )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("workload", choices=[*MODELS, "all"])
    parser.add_argument("--quick", action="store_true", help="one start, one repeat, one setting of each peer")
    parser.add_argument("--parts", type=_parts, help=f"some of {','.join(PARTS)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, help="pairs for each setting, instead of the network's own number")
    parser.add_argument(
        "--patience", type=float, default=150, help="seconds after which a peer's settings are tightened no further"
    )
    parser.add_argument(
        "--relaxed",
        action="store_true",
        help="let the peers' matrix products take oneDNN, as ours do where it is exact",
    )
    return parser.parse_args()


def warm_up(bench: Bench) -> None:
    """What a process does once, as the trial of matrix products, belongs to no run."""
    H = unstuck.hessian(bench.given.objective())
    H @ torch.zeros(H.size)


def environment(given: argparse.Namespace) -> Row:
    """What the seconds depend on."""
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": processor(),
        "processors": os.cpu_count(),
        "threads": given.threads,
        "system": platform.platform(),
        "python": platform.python_version(),
        "peers_relaxed": given.relaxed,
        "versions": {package: metadata.version(package) for package in OURS} | versions(),
    }


def keep(name: str, part: str, result: Row) -> None:
    """Replaces one part of one network in the file."""
    known = json.loads(PLACE.read_text(encoding="utf-8")) if PLACE.is_file() else {}
    known.setdefault(name, {})[part] = _finite(result)
    PLACE.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def show_top(result: Row) -> list[Any]:
    ours = result["ours"]
    table = _table(f"Ours at default settings: top {spectra.TOP} from {ours['starts']} starts")
    for name in ("errors relative to", "right", "worst error", "products", "Krylov minimum", "over it, mean", "worst"):
        table.add_column(name)
    for criterion in CRITERIA:
        found = ours[criterion]
        table.add_row(
            criterion,
            f"{100 * found['right']:.0f} %",
            _number(found["worst_error"]),
            _range(ours["products"]),
            _range(found["krylov_minimum"]),
            _percent(found["overhead_mean"]),
            _percent(found["overhead_worst"]),
        )
    wrong = [run["seed"] for run in ours["runs"] if run["errors"]["largest"] > spectra.TOP_TOLERANCE]
    said = f"{100 * ours['bars_held']:.0f} % of the error bars held, {100 * ours['converged']:.0f} % said converged"
    said += f", {ours['seconds']:.3g} s in the median" + f"; WRONG from seeds {wrong}" * bool(wrong)
    return [table, said, _compared("Top 5 to 1e-3", result), _best(result)]


def show_ends(result: Row) -> list[Any]:
    table = _table("Ours, both ends from one run")
    for name in ("errors relative to", "tol", "runs", "right", "worst error", "bars held", "products", "seconds"):
        table.add_column(name)
    for criterion in CRITERIA:
        runs = result["ours"][criterion]
        worst = max(run["error"][criterion] for run in runs)
        table.add_row(
            criterion,
            f"{result['tolerances'][criterion]:g}",
            str(len(runs)),
            _yes(worst <= spectra.ENDS_TOLERANCE),
            _number(worst),
            f"{sum(run['bars_held'] for run in runs)} of {len(runs)}",
            _range([run["products"] for run in runs]),
            _range([run["seconds"] for run in runs]),
        )
    return [table, _compared("Both ends to 1e-2", result), _best(result)]


def show_product(result: Row) -> list[Any]:
    columns = {
        "seconds": "seconds",
        "gradients": "in gradients",
        "ratio": "× our product",
        "difference": "from the truth",
    }
    table = _plain(f"One product, {result['rounds']} rounds", columns, result["rows"], right=True)
    plan = result["plan"]
    truth = "the truth: the gradient by hand, and a finite difference of gradients in float64"
    return [
        table,
        truth,
        f"ours keeps {plan['kept']} graphs of {plan['bytes'] / 1e6:.3g} MB and rebuilds {plan['rebuilt']}",
    ]


def show_density(result: Row) -> list[Any]:
    columns = {
        "seconds": "seconds",
        "ours": "ours",
        "ratio": "× ours",
        "mass": "mass",
        "trace": "trace",
        "squares": "‖H‖²",
        "largest_error": "error of λmax",
    }
    check = result["check"]
    word = "agree with" if check["right"] else "DIFFER from"
    moments = f"{check['first_moment']:.2g} and {check['second_moment']:.2g}"
    title = f"Density, {result['samples']} probes of {result['steps']} steps"
    return [
        _plain(title, columns, result["rows"]),
        f"our first two moments {word} products by hand ({moments} relative)",
    ]


def show_trace(result: Row) -> list[Any]:
    columns = {"seconds": "s a probe", "ours": "ours", "ratio": "× ours", "estimate": "estimate"}
    table = _plain(f"Trace by random signs, {costs.PEER_PROBES} probes, graphs included", columns, result["rows"])
    plain, known = (f"{result['estimate'][name]:.4g} ± {result['stderr'][name]:.2g}" for name in ("plain", "known"))
    word = "agree" if result["agree"] else "DIFFER"
    return [
        table,
        f"{result['probes']} probes of ours: {plain}; with the ten largest pairs known {known}; the two {word}",
        f"known pairs save {result['probes_saved']:.3g} × in probes, for {result['products_for_pairs']} products",
    ]


def show_memory(result: Row) -> list[Any]:
    columns = {"peak_mb": "peak MB", "gradient_mb": "a gradient MB", "above_gradient_mb": "above it", "note": "note"}
    word = "within" if result["within_limit"] else "ABOVE"
    return [
        _plain("Resident memory above the model's, ten products", columns, result["rows"]),
        f"ours stays {word} the {result['limit_mb']:.0f} MB that it was given",
    ]


PARTS: dict[str, tuple[Callable[[Bench], Row], Callable[[Row], list[Any]]]] = {
    "top": (spectra.top, show_top),
    "ends": (spectra.ends, show_ends),
    "product": (costs.product, show_product),
    "density": (costs.spectrum, show_density),
    "trace": (costs.hutchinson, show_trace),
    "memory": (costs.memory, show_memory),
}


def _parts(text: str) -> list[str]:
    unknown = [part for part in text.split(",") if part not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"parts are some of {','.join(PARTS)}, got {','.join(unknown)}")
    return text.split(",")


def _compared(title: str, result: Row) -> Table:
    table = _table(f"{title}: the peers, errors and ratios relative to the largest | each")
    for name in (
        "tool",
        "setting",
        "stops",
        "right",
        "error",
        "products",
        "seconds",
        "ours",
        "× ours",
        "says converged",
    ):
        table.add_column(name, overflow="fold", no_wrap=name == "tool")
    for row in result["rows"]:
        if "failed" in row:
            table.add_row(row["tool"], row["setting"], "failed")
            continue
        claims = row["converged"]
        table.add_row(
            row["tool"],
            row["setting"],
            row["stops"],
            _both(row["right"], _yes),
            _both(row["error"], _number),
            _range(row["products"]),
            _range(row["seconds"]),
            _both({c: _range(row["ours"][c]) for c in CRITERIA}, str),
            _both(row["ratio"], _number),
            "–" if None in claims else _yes(all(claims)),
        )
    return table


def _best(result: Row) -> str:
    lines = [
        f"right relative to {criterion}: {kind} takes {found['ratio']:.3g} × ours ({found['tool']}, {found['setting']})"
        for criterion, kinds in result["best"].items()
        for kind, found in kinds.items()
    ]
    return "\n".join(lines) or "no peer was right"


def _plain(title: str, columns: dict[str, str], rows: Sequence[Row], *, right: bool = False) -> Table:
    table = _table(title)
    for name in ("tool", *columns.values(), *["right"] * right):
        table.add_column(name, overflow="fold", no_wrap=name == "tool")
    for row in rows:
        cells = ["failed"] if "failed" in row else [_number(row.get(key)) for key in columns]
        table.add_row(row["tool"], *cells, *([_yes(row["right"])] if "right" in row else []))
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)


def _failures(rows: Sequence[Row]) -> list[str]:
    return [
        f"{row['tool']}{', ' * ('setting' in row)}{row.get('setting', '')}: {row['failed']}"
        for row in rows
        if "failed" in row
    ]


def _both(values: dict[str, Any], shape: Callable[[Any], str]) -> str:
    shown = [shape(values[criterion]) for criterion in CRITERIA]
    return shown[0] if shown[0] == shown[1] else " | ".join(shown)


def _range(values: Sequence[float | None]) -> str:
    known = sorted(value for value in values if value is not None)
    if not known:
        return "–"
    return _number(known[0]) if known[0] == known[-1] else f"{_number(known[0])} to {_number(known[-1])}"


def _number(value: Any) -> str:
    return value if isinstance(value, str) else "–" if value is None else f"{value:.3g}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:+.0f} %"


def _yes(right: bool) -> str:  # noqa: FBT001 it is what is shown
    return "yes" if right else "NO"


def _finite(value: Any) -> Any:
    """The same without NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
