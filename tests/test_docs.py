"""The pages are true: their code runs, their screen is the demo's, their numbers are those of the scripts."""

import contextlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clinic.rivals.board import table
from torch import nn

import unstuck
from unstuck.diagnosis import HYPOTHESES, Diagnosis
from unstuck.diagnosis._exact import EXACT
from unstuck.diagnosis._validation import CHECKS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CURVATURE = (ROOT / "docs/curvature.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODES = {*EXACT, *CHECKS, *(h.code for h in HYPOTHESES)}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.S | re.M)


def readers_own() -> dict[str, Any]:
    """What the README takes as given: a reader's model, optimiser, loop, loss and batches."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(64, 4), torch.randint(3, (64,))
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def train():
        for _ in range(20):
            optimizer.zero_grad()
            loss(model, (inputs, labels)).backward()
            optimizer.step()

    return {
        "model": model,
        "optimizer": optimizer,
        "train": train,
        "loss": loss,
        "batches": [(inputs, labels)],
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = {"__name__": page.stem, **(readers_own() if page.name == "README.md" else {})}
    for code in blocks(page.read_text(encoding="utf-8"), "python"):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code, str(page), "exec"), space)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', text):
        target, _, anchor = "".join(link).partition("#")
        if target.startswith("https://"):
            continue
        file = page.parent / target if target else page
        assert file.is_file(), link
        titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.M) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w-]", "", t.lower().replace(" ", "-")) for t in titles}, link


# The demonstration and its screen


def printed_by(folder: Path, *args: str) -> str:
    """What `unstuck ARGS` prints on a terminal of 96 columns."""
    command = [sys.executable, "-c", "from unstuck.cli import main; main()", *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "96", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True
    )
    return done.stdout.decode()


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[str, dict[str, Any]]:
    """What `unstuck demo` prints, and its diagnosis."""
    folder = tmp_path_factory.mktemp("demo")
    printed = printed_by(folder, "demo")
    diagnosis = next(folder.glob("unstuck-runs/*/diagnosis.json"))
    return printed, json.loads(diagnosis.read_text(encoding="utf-8"))


def without_numbers(text: str) -> str:
    return re.sub(r"[\d.,⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", "#", " ".join(text.split()))


def test_the_screen_in_the_readme_is_what_the_demo_prints(demo):
    printed, diagnosis = demo
    finding = diagnosis["findings"][0]
    (screen,) = blocks(README, "text")
    stable = [f"{finding['word']} {finding['code']}", finding["claim"], "Evidence value interval n what it means"]
    stable += ["Ruled out because", "Trial loss ends interval, %", "Every arm starts from the same weights", "→"]
    stable += [part for e in finding["evidence"] for part in (f" {e['name']} ", e["meaning"][:40])]
    stable += [f" {r['code']} " for r in finding["ruled_out"]]
    stable += [f" {arm['remedy']} " for arm in finding["trial"]["arms"]]
    stable += ["Run: unstuck-runs/", "The report: unstuck-runs/"]
    for text in map(without_numbers, stable):
        assert text in without_numbers(printed), "the screen shows the diagnosis"
        assert text in without_numbers(screen), "the README shows the screen"


def test_the_picture_of_the_report_is_small_enough_to_load():
    assert (ROOT / "docs/report.png").read_bytes().startswith(b"\x89PNG")
    assert (ROOT / "docs/report.png").stat().st_size <= 300_000


# A point and its screen


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """A folder with the file that the page on curvature looks at."""
    folder = tmp_path_factory.mktemp("examine")
    file = next(code for code in blocks(CURVATURE, "python") if code.startswith("# task.py\n"))
    (folder / "task.py").write_text(file, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def examined(task) -> tuple[str, dict[str, Any]]:
    """What `unstuck examine` prints of that file, and its JSON."""
    printed = printed_by(task, "examine", "task.py:objective", "--json", "point.json")
    return printed, json.loads((task / "point.json").read_text(encoding="utf-8"))


def test_the_screen_on_the_page_is_what_examine_prints(examined):
    (screen,) = blocks(CURVATURE, "text")
    number = r"[−-]?\d[\d.,e×⁻⁰¹²³⁴⁵⁶⁷⁸⁹-]*"  # a sign or a power of ten may depend on the machine
    printed, shown = (re.sub(number, "#", " ".join(text.split())) for text in (examined[0], screen))
    assert printed == shown


@pytest.mark.slow
def test_two_processes_tell_what_one_tells(task, examined):
    (code,) = blocks(CURVATURE, "py")
    (task / "curvature.py").write_text(code, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "curvature.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, cwd=task, env=environment, capture_output=True, check=True)
    ends = r"go from (\S+) ± (\S+) to (\S+) ± (\S+):"
    two, one = (re.search(ends, text) for text in (done.stdout.decode(), examined[1]["words"]))
    assert two is not None and one is not None
    small, small_error, large, large_error = map(float, one.groups())
    assert float(two[1]) == pytest.approx(small, abs=2 * small_error)
    assert float(two[3]) == pytest.approx(large, abs=2 * large_error + 1e-4 * large)


# Faults and words


def test_every_code_has_its_place_in_the_pages():
    faults = (ROOT / "src/unstuck/report/faults.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^## ([a-z0-9-]+)$", faults, flags=re.M)) == CODES | {"unknown"}
    assert set(re.findall(r"^\| `([\w-]+)` \|", README, flags=re.M)) == CODES


# The JSON


def paths(value: Any, at: str = "") -> set[tuple[str, str]]:
    """Every field of a JSON value with its type; lists are entered, `[]` marks them."""
    if isinstance(value, dict):
        inner = {pair for key, child in value.items() for pair in paths(child, f"{at}.{key}" if at else key)}
        return inner | ({(at, "object")} if at else set())
    if isinstance(value, list):
        inner = {pair for child in value if isinstance(child, dict) for pair in paths(child, f"{at}[]")}
        return {pair for pair in inner if pair[0] != f"{at}[]"} | {(at, "list")}
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
    return {(at, kinds[type(value)])}


def documented(page: str) -> dict[str, set[str]]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.\[\]]+)` \| ([a-z ]+) \|", text, flags=re.M)
    return {path: set(kinds.split(" or ")) for path, kinds in rows}


def check_fields(found: set[tuple[str, str]], page: str) -> None:
    """Every field that was written is documented with its type, and every documented one was written."""
    wanted = documented(page)
    assert {path for path, _ in found} == wanted.keys()
    for path, kind in found:
        assert kind in wanted[path] or (kind == "integer" and "number" in wanted[path]), path


def test_the_fields_of_a_diagnosis_are_the_documented_ones(demo):
    (example,) = blocks((ROOT / "docs/diagnosis-json.md").read_text(encoding="utf-8"), "json")
    proved, exact = demo[1], json.loads(example)
    assert Diagnosis.from_json(exact).to_json() == exact
    check_fields(paths(proved) | paths(exact), "diagnosis-json.md")


def test_the_fields_of_a_point_are_the_documented_ones(examined):
    w = nn.ParameterDict({"w": nn.Parameter(torch.zeros(2))})
    flat = unstuck.Objective(w, lambda model, batch: (1 - model["w"].prod()) ** 2, [torch.zeros(1)])
    steep = unstuck.Objective(w, lambda model, batch: -model["w"].square().sum(), [torch.zeros(1)])
    found = [unstuck.examine(objective).to_json() for objective in (flat, steep)]
    found.append(unstuck.examine(flat, dense_up_to=0, samples=0).to_json())
    check_fields(set().union(paths(examined[1]), *map(paths, found)), "curvature.md")


def test_a_number_that_is_not_finite_is_a_string_where_the_page_says_so():
    read = Diagnosis("train.py", 3, float("nan"), float("inf"), (), ())
    assert (read.to_json()["seconds"], read.to_json()["overhead"]["share"]) == ("nan", "inf")
    assert {"seconds", "overhead.share"} <= {
        path for path, kinds in documented("diagnosis-json.md").items() if "string" in kinds
    }


# Figures that scripts have measured


def test_the_scoreboard_in_the_readme_is_the_measured_one():
    place = ROOT / "clinic/results.json"
    if not place.is_file():
        pytest.skip("the clinic has not been measured yet")
    board = json.loads(place.read_text(encoding="utf-8"))
    known, every, healthy = board["of causes that it knows"], board["faulty"], board["healthy"]
    said = (
        f"the right cause came first in {known['first']} of {known['runs']} runs with a fault that this version knows, "
        f"in {every['first']} of {every['runs']} with any of the {len(board['faults'])} in the clinic, and "
        f"{healthy['runs'] - healthy['alarmed']} of {healthy['runs']} healthy runs stayed silent"
    )
    assert said in " ".join(README.split()), f"the README must say: {said}"


def test_the_time_and_memory_in_the_readme_are_the_measured_ones():
    place = ROOT / "benchmarks/demo.json"
    if not place.is_file():
        pytest.skip("the demonstration has not been measured yet")
    measured = json.loads(place.read_text(encoding="utf-8"))
    seconds, mib = measured["seconds"][1], measured["peak_mib"][1]  # the medians of three
    said = f"{seconds:.0f} seconds and {mib} MiB"
    assert said in " ".join(README.split()), f"the README must say: {said}"


def test_the_cost_of_watching_on_the_page_is_the_measured_one():
    measured = json.loads((ROOT / "benchmarks/watch.json").read_text(encoding="utf-8"))
    costs = {name: row["overhead"] for name, row in measured["programs"].items()}
    large = [c for name, c in costs.items() if measured["programs"][name]["step_ms"] >= 5]
    small = [c for name, c in costs.items() if measured["programs"][name]["step_ms"] < 5]
    record = [1 + row["tape"]["record"] for row in measured["programs"].values()]
    ratios = {kind: [row["ratio"] for row in rows.values()] for kind, rows in measured["peers"].items()}
    cockpit, collects, checks = (
        f"{min(r):.0f} to {max(r):.0f} times"
        for r in (ratios["Cockpit, economy"], ratios["TrainCheck, all"], ratios["TrainCheck, by invariants"])
    )
    page = " ".join((ROOT / "docs/concepts.md").read_text(encoding="utf-8").split())
    assert all(row["pair"]["identical"] for row in measured["programs"].values())
    for said in (
        f"+{np.median(large):.1%} in the median of {len(large)} programs and +{np.quantile(large, 0.95):.1%} at the",
        f"+{np.median(small):.1%} in the median of {len(small)}",
        f"adversarial pair of networks rings as well (+{costs['adversarial']:.1%})",
        f"takes {min(record):.1f} to {max(record):.1f} times as long",
        f"took {cockpit} as long as the plain one; with TrainCheck {collects} where it collects all, {checks} where",
        f"{measured['memory']['extra_training']:.1f} times the parameters",
    ):
        assert said in page, f"the page must say: {said}"


def test_the_products_of_tracking_on_the_page_are_the_measured_ones():
    place = ROOT / "benchmarks/tracking.json"
    if not place.is_file():
        pytest.skip("tracking has not been measured yet")
    measured = json.loads(place.read_text(encoding="utf-8"))
    networks = list(measured["networks"].values())
    asked = sum(measured["points"] * network["starts"] for network in networks)
    assert len(networks) == 3, "the page tells of three"
    for way in ("cold", "both", "warm"):
        told = [network["ways"][way] for network in networks]
        medians = "{:g}, {:g} and {:g} products".format(*(t["products_median"] for t in told))
        wrong = sum(len(t["wrong_at"]) for t in told)
        worst = 100 * max(t["worst"] for t in told)
        said = f"{medians}; {wrong} of {asked} answers were off by more, by up to {worst:.0f} %"
        assert said in " ".join(CURVATURE.split()), f"the page must say of {way}: {said}"


def test_the_cost_of_a_large_network_on_the_page_is_the_measured_one():
    place = ROOT / "benchmarks/scale.json"
    if not place.is_file():
        pytest.skip("scale has not been measured yet")
    measured = json.loads(place.read_text(encoding="utf-8"))
    case, most = measured["cases"][3], measured["bound"]  # 10⁸ parameters, default memory
    assert case["parameters"] > 9e7 and case["memory"] == 4e9
    for said in (
        f"{case['top']['products']} products, {case['top']['seconds']:.0f} seconds and {case['peak_mb'] / 1e3:.1f} GB",
        f"(rows of the basis + {most['constant']}) + {most['fixed_mb']} MB",
    ):
        assert said in " ".join(CURVATURE.split()), f"the page must say: {said}"


def test_the_comparison_with_peers_on_the_page_is_the_measured_one():
    folder = ROOT / "benchmarks"
    script = runpy.run_path(str(folder / "table.py"))
    measured = json.loads((folder / "curvature.json").read_text(encoding="utf-8"))
    assert "\n".join(script["table"](measured)) in CURVATURE


def test_the_rivals_on_the_page_are_the_measured_ones():
    measured = json.loads((ROOT / "clinic/rivals/results.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/clinic.md").read_text(encoding="utf-8")
    for part in ("all", "held out"):
        assert "\n".join(table(measured, part)) in page
    names = [by_tool["NeuralDBG"] for by_tool in measured["said"].values()]
    shifted = sum("data_distribution_shift" in n for n in names)
    programs = ", ".join(f"`{name}`" for name in measured["programs"])
    for said in (f"the programs ({programs})", f"finds that the data shift in {shifted} of its {len(names)} runs"):
        assert said in " ".join(page.split()), f"the page must say: {said}"


def test_the_races_of_optimisers_on_the_page_are_the_measured_ones():
    measured = json.loads((ROOT / "benchmarks/optim.json").read_text(encoding="utf-8"))
    steps, saddle, fit = (measured[part] for part in ("steps", "saddle", "fit"))
    ours = ("Quickprop", "RpropPlus", "RMSAdagrad", "RMSpropFirst")
    rows = [row for name, row in steps.items() if name != "environment"]
    adam = min(found["loss"] for name, found in fit.items() if name.startswith("Adam"))
    free, damped, quasi, plain = (
        saddle[name] for name in ("saddle-free Newton", "damped Newton", "L-BFGS", "gradient descent")
    )
    page = " ".join((ROOT / "docs/optimisers.md").read_text(encoding="utf-8").split())
    for said in (
        f"at most {max(row[name] / row['torch Rprop'] for row in rows for name in ours):.2f} of the time",
        f"a loss of {free['loss']:.1e} after 25 seconds, damped Newton at {damped['loss']:.1e}, L-BFGS at "
        f"{quasi['loss']:.1e} and gradient descent at {plain['loss']:.1e}",
        f"L-BFGS takes {quasi['seconds to 1e-5']} s, saddle-free Newton {free['seconds to 1e-5']} s and damped Newton "
        f"{damped['seconds to 1e-5']} s",
        f"is at {fit['Levenberg–Marquardt']['loss']:.1e} after 30 seconds, L-BFGS at {fit['L-BFGS']['loss']:.1e}",
        f"at the best of three rates, at {adam:.1e}",
    ):
        assert said in page, f"the page must say: {said}"


def test_the_names_on_the_pages_can_be_imported_from_the_package():
    used = set(re.findall(r"unstuck\.(\w+)\(", README + CURVATURE))
    operators = set(re.findall(r"^\| `(\w+)\(", CURVATURE, flags=re.M))
    assert len(operators) == 6
    assert used | operators <= set(unstuck.__all__)
