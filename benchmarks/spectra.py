"""Ends of the spectrum, ours and the peers': who is right, who says so, and how long each takes beside the other."""

import functools
import gc
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import unstuck
from peers import Answer, Curvlinops, Eigenthings, OursBySciPy, PyHessian, conditions, missing, sentence
from unstuck.curvature import Eigenpairs, Krylov, Operator
from workloads import Workload

TOP, TOP_TOLERANCE, ENDS_TOLERANCE = 5, 1e-3, 1e-2
STARTS = 10
TOLERANCES = (1e-1, 1e-2, 1e-3)
STEPS = (10, 15, 20, 30, 40, 60, 80, 120)
# An error relative to the largest value is what a tolerance of ours promises; one relative to each value is the harder
CRITERIA = ("largest", "each")
REPEATS = {"mlp": 5, "cnn": 1, "gpt": 1}

Row = dict[str, Any]
Seconds = dict[str, float | None]  # of a run of ours, by criterion; None where it was wrong


@dataclass
class Bench:
    """A workload with what its measurements share."""

    given: Workload
    quick: bool
    relaxed: bool  # whether the peers' matrix products may take the faster library too
    patience: float  # seconds after which a peer's settings are tightened no further
    repeats: int
    absent: dict[str, str] = field(default_factory=missing)

    @functools.cached_property
    def reference(self) -> tuple[np.ndarray, np.ndarray]:
        report(f"{self.given.name}: reference")
        return self.given.reference()

    @functools.cached_property
    def kept(self) -> Operator:
        """Our Hessian with its graphs, for what is not timed."""
        return unstuck.hessian(self.given.objective())

    def has(self, package: str) -> bool:
        return package not in self.absent


@dataclass(frozen=True)
class Setting:
    """One way to call a peer; `prepare` takes a seed and returns what is timed."""

    tool: str
    label: str
    stops: str  # "by itself", "by default" or "told"
    prepare: Callable[[int], Callable[[], Answer]]
    least: int = 1  # pairs, whatever the network
    most: int = 5


@dataclass
class Start:
    """One of our runs for the five largest."""

    seed: int
    seconds: float
    products: int
    minimum: dict[str, int | None]  # products after which the Krylov space of this start holds the five
    errors: dict[str, float]
    bars_held: bool
    converged: bool


def report(text: str) -> None:
    """A line of progress, for those who watch."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    gc.collect()  # graphs that a peer has left in a cycle
    began = time.perf_counter()
    result = run()
    return result, time.perf_counter() - began


def errors(values: Sequence[float], truth: Sequence[float]) -> dict[str, float]:
    """The worst error of values against their true counterparts, relative to the largest and to each."""
    if len(values) != len(truth) or not np.isfinite(values).all():
        return dict.fromkeys(CRITERIA, math.inf)
    true = np.sort(np.asarray(truth))
    wrong = np.abs(np.sort(np.asarray(values, dtype=float)) - true)
    return {"largest": float((wrong / np.abs(true).max()).max()), "each": float((wrong / np.abs(true)).max())}


def compare(
    bench: Bench,
    setting: Setting,
    ours: Callable[[int], Seconds],
    seeds: Iterator[int],
    truth: Sequence[float],
    tolerance: float,
) -> Row:
    """A peer at one setting, each of its runs right after ours from the same seed; ratios need ours to be right."""
    row: Row = {"tool": setting.tool, "setting": setting.label, "stops": setting.stops}
    pairs, answers, used = [], [], []
    repeats = 1 if bench.quick else min(setting.most, max(setting.least, bench.repeats))
    for seed in itertools.islice(seeds, repeats):
        report(f"{bench.given.name}: {setting.tool}, {setting.label}, start {seed}")
        mine = ours(seed)
        try:
            with conditions(seed, relaxed=bench.relaxed):
                answer, seconds = timed(setting.prepare(seed))
        except Exception as error:
            return row | {"seed": seed, "failed": sentence(error)}
        pairs.append((mine, seconds))
        answers.append(answer)
        used.append(seed)
    found = [errors(answer.values, truth) for answer in answers]
    worst = {criterion: max(error[criterion] for error in found) for criterion in CRITERIA}
    return row | {
        "seeds": used,
        "seconds": [theirs for _, theirs in pairs],
        "ours": {c: [mine[c] for mine, _ in pairs] for c in CRITERIA},
        "ratio": {c: _median([theirs / mine[c] for mine, theirs in pairs if mine[c]]) for c in CRITERIA},
        "error": worst,
        "right": {criterion: worst[criterion] <= tolerance for criterion in CRITERIA},
        "products": [answer.products for answer in answers],
        "converged": [answer.converged for answer in answers],
        "values": [list(answer.values) for answer in answers],
    }


def tighten(bench: Bench, settings: Sequence[Setting], run: Callable[[Setting], Row], until: str = "each") -> list[Row]:
    """Rows from the loosest setting to the first that is right."""
    rows: list[Row] = []
    spent = 0.0
    for setting in settings[:1] if bench.quick else settings:
        if spent > bench.patience:
            rows.append({"tool": setting.tool, "setting": setting.label, "failed": f"not tried after {spent:.0f} s"})
            break
        rows.append(run(setting))
        spent += sum(rows[-1].get("seconds", []))
        if rows[-1].get("right", {}).get(until):
            break
    return rows


class Starts:
    """Our runs at default settings, each from a random vector of its own, kept by seed."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.truth = bench.reference[0][-TOP:]
        self.runs: list[Start] = []
        self.drawn: dict[int, dict[str, int | None]] = {}  # the least steps from the random vector of a seed

    def __call__(self, seed: int) -> Seconds:
        """Seconds of one more run, with all that a user's call does."""
        vectors: list[Tensor] = []
        images: list[Tensor] = []

        def run() -> Eigenpairs:
            H = unstuck.hessian(self.bench.given.objective())

            def matvec(v: Tensor) -> Tensor:
                image = H @ v
                vectors.append(v)
                images.append(image)
                return image

            seen = replace(H, matvec=matvec)
            return unstuck.eigenpairs(seen, largest=TOP, smallest=0, generator=torch.Generator().manual_seed(seed))

        found, seconds = timed(run)
        wrong = np.abs(found.values.numpy() - self.truth)
        self.runs.append(
            Start(
                seed=seed,
                seconds=seconds,
                products=found.products,
                minimum=self._minimum(vectors, images),
                errors=errors(found.values.tolist(), self.truth),
                bars_held=bool((wrong <= found.errors.numpy()).all()),
                converged=found.converged,
            )
        )
        wrong_by = self.runs[-1].errors
        return {c: seconds if wrong_by[c] <= TOP_TOLERANCE else None for c in CRITERIA}

    def told(self, seed: int, criterion: str, more: int) -> list[int]:
        """The steps that suffice from the random vector of this seed, which the peer draws alike, and `more`."""
        if seed not in self.drawn:
            drawn = torch.randn(self.bench.kept.size, generator=torch.Generator().manual_seed(seed))
            self.drawn[seed] = self._minimum([drawn], [])
        least = self.drawn[seed][criterion]
        if least is None:
            raise ValueError(f"the Krylov space of start {seed} does not hold the values in {STEPS[-1]} steps")
        return [least + more]

    def _minimum(self, vectors: Sequence[Tensor], images: Sequence[Tensor]) -> dict[str, int | None]:
        """The least steps in the Krylov space of the first vector, by what is known of it and as far as is needed."""
        found: dict[str, int | None] = dict.fromkeys(CRITERIA)
        if images:
            found = self._first_right((torch.stack(list(vectors)) @ torch.stack(list(images)).T).double())
        krylov = Krylov(self.bench.kept, rows=STEPS[-1], start=vectors[0])
        while not (krylov.full or krylov.closed) and None in found.values():
            krylov.grow()
            if len(krylov) > len(images):
                found = self._first_right(krylov.matrix[: len(krylov), : len(krylov)])
        return found

    def _first_right(self, matrix: Tensor) -> dict[str, int | None]:
        first: dict[str, int | None] = dict.fromkeys(CRITERIA)
        for count in range(TOP, len(matrix) + 1):
            values = torch.linalg.eigvalsh(matrix[:count, :count])[-TOP:].tolist()
            for criterion, error in errors(values, self.truth).items():
                if first[criterion] is None and error <= TOP_TOLERANCE:
                    first[criterion] = count
        return first

    def summary(self) -> Row:
        """What the runs say of ours; no two have the same start."""
        starts = self.runs
        result: Row = {
            "starts": len(starts),
            "runs": [asdict(start) for start in starts],
            "converged": _share(start.converged for start in starts),
            "bars_held": _share(start.bars_held for start in starts),
            "products": [start.products for start in starts],
            "seconds": statistics.median(start.seconds for start in starts),
        }
        for criterion in CRITERIA:
            least = [start.minimum[criterion] for start in starts]
            over = [start.products / m - 1 for start, m in zip(starts, least, strict=True) if m]
            result[criterion] = {
                "right": _share(start.errors[criterion] <= TOP_TOLERANCE for start in starts),
                "worst_error": max(start.errors[criterion] for start in starts),
                "krylov_minimum": least,
                "overhead_mean": statistics.mean(over) if over else None,
                "overhead_worst": max(over) if over else None,
            }
        return result


def top(bench: Bench) -> Row:
    """The five largest eigenvalues to 1e-3."""
    given = bench.given
    starts = Starts(bench)
    seeds = itertools.count()
    run = functools.partial(compare, bench, ours=starts, seeds=seeds, truth=starts.truth, tolerance=TOP_TOLERANCE)
    rows: list[Row] = []
    if bench.has("PyHessian"):
        settings = [Setting("PyHessian", "defaults", "by default", lambda seed: PyHessian(given).top, most=3)]
        settings += [
            Setting(
                "PyHessian",
                f"tol={tol:g}, maxIter=1000",
                "by itself",
                lambda seed, tol=tol: functools.partial(PyHessian(given).top, tol=tol, max_iter=1000),
                most=3,
            )
            for tol in (1e-4, 1e-5, 1e-6, 1e-7)
        ]
        rows += tighten(bench, settings, run)
    if bench.has("hessian-eigenthings"):
        for settings, until in _lanczos_settings(given, starts):
            if not _told_already(rows, until):
                rows += tighten(bench, settings, run, until)
    scipy = [("curvlinops + eigsh", Curvlinops)] if bench.has("curvlinops-for-pytorch") else []
    for tool, peer in [*scipy, ("our product + eigsh", OursBySciPy)]:
        rows += tighten(bench, _settings(tool, given, lambda g, peer=peer: peer(g).top), run)
        if given.name == "mlp" or peer is Curvlinops:  # to all digits, which takes long
            exact = Setting(
                tool,
                "defaults (tol=0)",
                "by default",
                lambda seed, peer=peer: functools.partial(peer(given).top, seed=seed),
                most=1,
            )
            rows.append(run(exact))
    while len(starts.runs) < (1 if bench.quick else STARTS):
        report(f"{given.name}: ours, start {len(starts.runs)}")
        starts(next(seeds))
    return {"ours": starts.summary(), "rows": rows, "best": best(rows)}


def _lanczos_settings(given: Workload, starts: Starts) -> list[tuple[list[Setting], str]]:
    """hessian-eigenthings at its defaults, by its own rule and told the number of steps."""
    name = "hessian-eigenthings"
    default = Setting(
        name,
        "lanczos(k=5)",
        "by default",
        lambda seed: functools.partial(Eigenthings(given).lanczos, seed=seed),
        most=1,
    )

    def told(criterion: str, more: int) -> Setting:
        def prepare(seed: int) -> Callable[[], Answer]:
            return functools.partial(Eigenthings(given).told, starts.told(seed, criterion, more), seed=seed)

        return Setting(name, f"told ({criterion})" + f" + {more}" * bool(more), "told", prepare, least=2)

    itself = _settings(name, given, lambda g: Eigenthings(g).doubling, "doubled until converged, ")
    return [
        ([default], "each"),
        (itself, "each"),
        *(([told(criterion, more) for more in (0, 1, 2)], criterion) for criterion in CRITERIA),
    ]


def _told_already(rows: Sequence[Row], criterion: str) -> bool:
    """Whether a run that was told its steps is right already: more of them would only take longer."""
    return any(row["stops"] == "told" and row["right"][criterion] for row in rows if "failed" not in row)


class Ends:
    """Our runs for both ends, for each criterion at the tolerance that it takes."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.truth = [bench.reference[1][0], bench.reference[0][-1]]
        self.tolerances = self._tolerances()
        self.runs: dict[str, list[Row]] = {criterion: [] for criterion in CRITERIA}

    def __call__(self, seed: int) -> Seconds:
        """Seconds of one more run for each criterion."""
        result: Seconds = {}
        for criterion, tol in self.tolerances.items():
            found, seconds = timed(lambda tol=tol: _ends(unstuck.hessian(self.bench.given.objective()), tol, seed))
            self.runs[criterion].append(
                {
                    "seed": seed,
                    "products": found.products,
                    "converged": found.converged,
                    "bars_held": bool((np.abs(found.values.numpy() - self.truth) <= found.errors.numpy()).all()),
                    "error": errors(found.values.tolist(), self.truth),
                    "seconds": seconds,
                }
            )
            right = self.runs[criterion][-1]["error"][criterion] <= ENDS_TOLERANCE
            result[criterion] = seconds if right else None
        return result

    def _tolerances(self) -> dict[str, float]:
        """1e-2 for errors relative to the largest; for those relative to each the loosest decade that is right."""
        tols = (1e-2, 1e-3, 1e-4, 1e-5)
        each = (errors(_ends(self.bench.kept, tol, 0).values.tolist(), self.truth)["each"] for tol in tols)
        fits = (tol for tol, error in zip(tols, each, strict=True) if error <= ENDS_TOLERANCE)
        return {"largest": ENDS_TOLERANCE, "each": next(fits, tols[-1])}

    def told(self, seed: int, criterion: str) -> list[int]:
        """The first steps of the ladder that give the largest, and the smallest, within tolerance."""
        krylov = Krylov(self.bench.kept, rows=STEPS[-1], generator=torch.Generator().manual_seed(seed))
        found: dict[int, int] = {}
        for steps in STEPS:
            while len(krylov) < steps:
                krylov.grow()
            values = torch.linalg.eigvalsh(krylov.matrix[:steps, :steps])
            for end, true in ((-1, self.truth[1]), (0, self.truth[0])):
                unit = max(map(abs, self.truth)) if criterion == "largest" else abs(true)
                if abs(float(values[end]) - true) <= ENDS_TOLERANCE * unit:
                    found.setdefault(end, steps)
            if len(found) == 2:
                break
        return [found.get(end, STEPS[-1]) for end in (-1, 0)]


def ends(bench: Bench) -> Row:
    """The largest and the smallest eigenvalue to 1e-2, from one run of ours."""
    given, ours, seeds = bench.given, Ends(bench), itertools.count()
    run = functools.partial(compare, bench, ours=ours, seeds=seeds, truth=ours.truth, tolerance=ENDS_TOLERANCE)
    rows: list[Row] = []
    if bench.has("curvlinops-for-pytorch"):
        for label, way in (("BE", Curvlinops.both_ends), ("LA, then SA", Curvlinops.one_by_one)):
            named = _settings("curvlinops + eigsh", given, lambda g, way=way: functools.partial(way, Curvlinops(g)))
            named = [replace(setting, label=f"{label}, {setting.label}") for setting in named]
            if given.name == "mlp" or not any(row.get("right", {}).get("each") for row in rows):
                rows += tighten(bench, named, run)  # two runs take longer than one that does, where that is right
    if bench.has("hessian-eigenthings"):
        name = "hessian-eigenthings"
        itself = _settings(name, given, lambda g: Eigenthings(g).ends, "LA, then SA, doubled, ")
        rows += tighten(bench, itself, run)
        for criterion in CRITERIA:

            def prepare(seed: int, criterion: str = criterion) -> Callable[[], Answer]:
                return functools.partial(Eigenthings(given).told_ends, ours.told(seed, criterion), seed=seed)

            if not _told_already(rows, criterion):
                rows.append(run(Setting(name, f"LA, then SA, told ({criterion})", "told", prepare)))
    if not any(ours.runs.values()):
        ours(next(seeds))
    return {"tolerances": ours.tolerances, "ours": ours.runs, "rows": rows, "best": best(rows)}


def best(rows: Sequence[Row]) -> Row:
    """For each criterion the smallest ratio to ours among the rows that are right, by how they stop."""
    result: Row = {}
    for criterion in CRITERIA:
        right = [row for row in rows if row.get("right", {}).get(criterion) and row["ratio"][criterion]]
        itself = [row for row in right if row["stops"] != "told" and not row["tool"].startswith("our ")]
        kinds = {
            "PyHessian": [row for row in right if row["tool"] == "PyHessian"],
            "peer that stops by itself": itself,
            "peer told the steps": [row for row in right if row["stops"] == "told"],
        }
        for kind, chosen in kinds.items():
            if chosen:
                row = min(chosen, key=lambda row: row["ratio"][criterion])
                named = {"tool": row["tool"], "setting": row["setting"], "ratio": row["ratio"][criterion]}
                result.setdefault(criterion, {})[kind] = named
    return result


def _settings(tool: str, given: Workload, method: Callable[[Workload], Any], label: str = "") -> list[Setting]:
    """A peer that takes a seed and a tolerance, at tolerances from loose to tight."""

    def prepare(seed: int, tol: float) -> Callable[[], Answer]:
        return functools.partial(method(given), seed=seed, tol=tol)

    return [
        Setting(tool, f"{label}tol={tol:g}", "by itself", functools.partial(prepare, tol=tol)) for tol in TOLERANCES
    ]


def _ends(H: Operator, tol: float, seed: int) -> Eigenpairs:
    return unstuck.eigenpairs(H, largest=1, smallest=1, tol=tol, generator=torch.Generator().manual_seed(seed))


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _share(of: Any) -> float:
    return statistics.mean(map(bool, of))
