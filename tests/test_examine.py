"""`unstuck examine`: what it shows of points that are known in closed form, and what it says where it cannot."""

import io
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tests.processes import command, fork, one_sentence, start, strictly, write

from unstuck import cli
from unstuck.critical import examine
from unstuck.objective import Objective, Term
from unstuck.report import point_table

POINT = """
    import torch
    from torch import nn
    import unstuck

    class Point(nn.Module):
        def __init__(self, *w):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def at(surface, *w):
        return unstuck.Objective(Point(*w), lambda model, batch: surface(model.w), [torch.zeros(1)])

    objective = at(lambda w: (1 - w.prod()) ** 2, 0., 0.)
"""
NETWORK = """
    import torch
    from torch import nn
    import unstuck

    torch.manual_seed(0)
    x = torch.randn(40, 10)
    model = nn.Sequential(nn.Linear(10, 40), nn.Tanh(), nn.Linear(40, 10))  # 850 weights: only two ends
    mean = lambda model, batch: nn.functional.cross_entropy(model(batch), batch.argmax(1))
    objective = unstuck.Objective(model, mean, x.split(16))
"""


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def rows(text):
    """The lines of the table by their first column, each as its next two columns."""
    cells = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    return {line[0]: line[1:3] for line in cells if len(line) > 1}


def shown(point, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(point_table(point, title="task.py"))
    return console.file.getvalue()


def surface(f, *w):
    term = Term(lambda values: f(values[0]), weight=1)
    return Objective.of_terms([term], {"w": torch.tensor(w, dtype=torch.float64)})


# What it tells


def test_the_saddle_of_the_product_pair_is_told_with_its_numbers():
    # (1 − w₁w₂)² at the origin: the Hessian is [[0, −2], [−2, 0]]
    write("task.py", POINT)
    code, stdout, stderr = command("examine", "task.py:objective")
    assert (code, stdout) == (0, "")
    table = rows(stderr)
    assert stderr.split()[:2] == ["saddle", "task.py:objective"]
    assert "2 weights" in stderr
    assert [table[name][0] for name in ("loss", "gradient norm", "negative", "flat")] == ["1", "0", "1", "0"]
    assert [table[name][0] for name in ("smallest eigenvalue", "largest eigenvalue")] == ["−2", "2"]
    assert table["positive"][0] == "50 %"
    assert (table["rate limit"][0], table["with momentum 0.9"][0]) == ("1", "1.9")
    assert table["condition number"] == ["–", "none: some eigenvalues are negative"]
    assert "of all 2 eigenvalues" in stderr
    assert "The weights stand at a saddle" in stderr


def test_the_json_is_strict_and_its_numbers_are_those_of_the_closed_form():
    write("task.py", POINT + "    bowl = at(lambda w: 1 + w[0]**2 + 5 * w[1]**2, 0., 0.)\n")
    for order in (("task.py", "--json"), ("--json", "task.py"), ("task.py:objective", "--json", "-")):
        code, stdout, _ = command("examine", *order)
        assert code == 0
        saddle = strictly(stdout)
    assert command("examine", "task.py:bowl", "--json", "point.json")[:2] == (0, "")
    bowl = strictly(Path("point.json").read_text())
    assert saddle.keys() == bowl.keys()
    assert (saddle["version"], saddle["kind"], saddle["size"], saddle["noise"]) == (1, "saddle", 2, None)
    assert [pair["value"] for pair in saddle["eigenvalues"]] == pytest.approx([-2, 2])
    assert (saddle["condition"], saddle["flatness"]) == ("nan", "nan")
    assert (bowl["kind"], bowl["condition"]) == ("minimum", pytest.approx(5))
    assert [r["limit"] for r in bowl["rate_limits"]] == pytest.approx([0.2, 0.38])
    assert (bowl["positive"], bowl["products"]) == ({"estimate": 1.0, "error": 0.0}, 2)


def test_what_was_not_measured_is_left_out_and_what_is_infinite_says_so():
    hill = examine(surface(lambda w: 1 - w.square().sum(), 0, 0))
    assert hill.to_json()["rate_limits"][0]["limit"] == "inf"
    assert rows(shown(hill))["rate limit"] == ["∞", "none: no curvature is positive"]
    valley = examine(surface(lambda w: (1 - w.prod()) ** 2, 1, 1))
    assert valley.to_json()["condition"] == "inf"
    assert rows(shown(valley))["condition number"] == ["∞", "some eigenvalues are zero"]
    assert "minimum (1 flat direction)" in shown(valley)
    unasked = examine(surface(lambda w: 1 + w.square().sum(), *[0.0] * 6), dense_up_to=0, samples=0)
    assert unasked.to_json()["positive"] is None
    assert "positive" not in rows(shown(unasked))
    assert "its sampling error is unknown" in " ".join(shown(unasked).split())


def test_the_noise_of_the_gradient_is_that_of_the_batches():
    # batch means 1 ± 3 of one weight: the standard error of their mean is 3
    write(
        "task.py",
        POINT + "    noisy = unstuck.Objective(Point(1.), lambda m, b: 9 + (m.w * b).mean(), "
        "[torch.tensor([4.]).double(), torch.tensor([-2.]).double()])\n",
    )
    code, stdout, stderr = command("examine", "task.py:noisy", "--json")
    assert code == 0
    data = strictly(stdout)
    assert data["noise"] == {"stderr": pytest.approx(3), "batches": 2}
    assert data["within_noise"] is True
    assert rows(stderr)["gradient norm"] == ["1", "± 3"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_number_is_cut_off_on_a_narrow_screen(width):
    point = examine(surface(lambda w: (w - 0.123).square().sum() + 4e-7 * w[0] ** 4, *[0.5] * 20), dense_up_to=0)
    wide, narrow = rows(shown(point, 200)), " ".join(shown(point, width).split())
    for name, (value, *_) in wide.items():
        assert "…" not in narrow
        if name not in ("task.py", "Point"):
            assert value in narrow
    assert max(map(len, shown(point, width).splitlines())) <= width


def test_what_has_not_converged_is_impossible_to_miss():
    write("task.py", NETWORK)
    code, stdout, stderr = command("examine", "task.py", "--max-products", "3", "--json")
    assert code == 0
    assert strictly(stdout)["converged"] is False
    assert "NOT converged" in stderr
    converged = command("examine", "task.py")[2]
    assert "NOT converged" not in converged


def test_a_seed_repeats_the_answer_and_another_one_agrees_within_the_errors():
    write("task.py", NETWORK)
    first, again, other = (command("examine", "task.py", "--seed", seed, "--json")[1] for seed in (3, 3, 4))
    assert first == again != other
    first, other = strictly(first), strictly(other)
    for a, b in zip(first["eigenvalues"], other["eigenvalues"], strict=True):
        assert abs(a["value"] - b["value"]) <= a["error"] + b["error"]


def test_a_looser_tolerance_takes_fewer_products():
    write("task.py", NETWORK)
    tight, loose = (strictly(command("examine", "task.py", "--tol", tol, "--json")[1]) for tol in (1e-4, 0.1))
    assert loose["products"] < tight["products"]


# How far it is


@pytest.mark.parametrize("dense_up_to", [0, 500])
def test_progress_counts_the_products_and_never_goes_back(dense_up_to):
    told = []
    objective = surface(lambda w: (w.cos() * torch.arange(1, 41)).sum(), *[0.3] * 40)
    point = examine(objective, dense_up_to=dense_up_to, progress=lambda text, share: told.append((text, share)))
    shares = [share for _, share in told]
    assert len(told) == point.products - 1  # one more tells of the gradient's direction
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert 0.9 < shares[-1] < 1
    assert {text.partition(",")[0] for text, _ in told} == {"spectrum"} | (
        set() if dense_up_to else {"share of positive eigenvalues"}
    )


def test_a_pipe_gets_no_progress_bar():
    write("task.py", NETWORK)
    stderr = command("examine", "task.py")[2]
    assert not re.search(r"[\x1b\r━]", stderr)
    assert stderr.lstrip().startswith("critical within noise")


# The file


def test_the_file_is_a_module_of_its_own_beside_its_siblings():
    write("lib/sibling.py", "WORD = 'found'")
    write(
        "lib/task.py",
        POINT
        + """
    import dataclasses, pickle, sys
    import sibling

    @dataclasses.dataclass
    class Kept:
        x: "int"

    def later():
        import second
        assert pickle.loads(pickle.dumps(Kept(3))) == Kept(3)
        print(__name__, __file__, sibling.WORD, second.WORD)
        return objective
""",
    )
    write("lib/second.py", "WORD = 'too'")
    code, stdout, stderr = command("examine", "lib/task.py:later", "--json")
    assert code == 0, stderr
    assert strictly(stdout)["kind"] == "saddle"  # what the file prints does not get into it
    assert stderr.splitlines()[0] == f"task {Path('lib/task.py').resolve()} found too"
    assert not list(Path("lib/__pycache__").glob("task*"))


def test_the_model_and_the_process_are_left_as_they_were():
    write("task.py", NETWORK + "    import keeper\n    keeper.model = model\n")
    write("keeper.py", "model = None")

    def work():
        before = sys.path[:], sys.stdout
        torch.manual_seed(5)
        sys.argv = ["unstuck", "examine", "task.py"]
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 0
        assert (sys.path, sys.stdout) == before
        assert "task" not in sys.modules
        torch.manual_seed(0)  # the file seeds, draws its data and its weights: then nothing more is drawn
        torch.randn(40, 10)
        same = torch.nn.Sequential(torch.nn.Linear(10, 40), torch.nn.Tanh(), torch.nn.Linear(40, 10))
        drawn = torch.randn(3)
        torch.manual_seed(0)
        cli.app(["examine", "task.py"], standalone_mode=False)
        assert torch.equal(torch.randn(3), drawn)
        model = sys.modules["keeper"].model
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert model.training

    done = fork(work)
    assert done.wait() == 0, done.stderr


def test_a_file_may_have_the_name_of_a_module_that_is_in_use():
    write("torch.py", POINT)
    code, stdout, _ = command("examine", "torch.py", "--json")
    assert (code, strictly(stdout)["kind"]) == (0, "saddle")


WRONG = {
    "task.py:number": "number in task.py needs to be an unstuck.Objective, or a function that returns one, got int",
    "task.py:nothing": "nothing() in task.py needs to be an unstuck.Objective",
    "task.py:network": "network in task.py needs to be an unstuck.Objective",
    "task.py:wants": "wants needs to be a function without arguments, got wants(seed)",
    "task.py:gone": "it has objective, rising",
    "bare.py": "build an unstuck.Objective under this name",
    "task.py:frozen": "needs a parameter with requires_grad=True",
    "task.py:rising": "finite loss",
    "task.py:vector": "a tensor with one real number",
    "task.py:leaves": "sys.exit('no data')",
    "torn.py": "torn.py does not compile",
    "binary.py:objective": "binary.py does not compile",
    "nowhere.py:objective": "nowhere.py cannot be read",
    "folder": "folder cannot be read",
}


@pytest.mark.parametrize("task", WRONG)
def test_what_is_wrong_with_the_task_is_one_sentence(task):
    write(
        "task.py",
        POINT
        + """
    import sys
    number = 3
    network = nn.Linear(2, 1)
    rising = at(lambda w: w.sum() * float("inf"), 1., 1.)

    def nothing(): pass
    def wants(seed): return objective
    def frozen(): return unstuck.Objective(network.requires_grad_(False), lambda m, b: m(b).mean(), [torch.ones(1, 2)])
    def vector(): return at(lambda w: w, 1., 1.)
    def leaves(): sys.exit("no data")
""",
    )
    write("bare.py", "x = 3")
    write("torn.py", "import torch\nfor\n")
    Path("binary.py").write_bytes(b"\0\1\2\xff")
    Path("folder").mkdir()
    code, stdout, stderr = command("examine", task, "--json")
    assert (code, stdout) == (2, "")
    assert WRONG[task] in one_sentence(stderr)


@pytest.mark.parametrize("option", [("--json", "no/such/folder.json"), ("--json=no/such/folder.json",)])
def test_a_place_that_cannot_be_written_is_told_before_the_work(option):
    write("task.py", "raise AssertionError('was run')")
    code, stdout, stderr = command("examine", "task.py", *option)
    assert (code, stdout) == (2, "")
    assert "no/such/folder.json" in one_sentence(stderr)


@pytest.mark.parametrize(
    ("name", "culprit"), [("raises", "raise KeyError('lost')"), ("shape", "torch.ones(5)"), ("labels", "cross_entropy")]
)
def test_an_error_in_the_file_shows_its_own_traceback(name, culprit):
    write(
        "task.py",
        POINT
        + """
    def raises():
        raise KeyError('lost')

    def shape():
        return at(lambda w: (w @ torch.ones(5)).mean(), 1., 1.)

    def labels():
        return at(lambda w: nn.functional.cross_entropy(w[None], torch.tensor([1, 2])), 1., 1.)
""",
    )
    code, stdout, stderr = command("examine", f"task.py:{name}")
    assert (code, stdout) == (2, "")
    lines = stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1].lstrip().startswith('File "task.py"')
    assert culprit in stderr


@pytest.mark.parametrize("module", ["helper", "lib.helper"])
def test_an_error_in_what_the_file_imports_shows_its_traceback(module):
    write(f"{module.replace('.', '/')}.py", POINT + "    broken = at(lambda w: (w @ torch.ones(5)).mean(), 1., 1.)\n")
    write("task.py", f"from {module} import broken")
    code, stdout, stderr = command("examine", "task.py:broken")
    assert (code, stdout) == (2, "")
    assert re.search(r'File ".*helper\.py", line \d+, in <lambda>', stderr)
    assert stderr.startswith("Traceback")
    if module == "helper":
        assert "helper.py" in stderr.splitlines()[1], "from the user's code on"


@pytest.mark.parametrize("name", ["slow", "objective"])
def test_an_interrupt_leaves_with_130(name):
    wait = "print('ready', flush=True)\n        time.sleep(60)\n"
    write("task.py", POINT + f"    import time\n    def slow():\n        {wait}")
    write("loss.py", POINT + f"    import time\n    def f(w):\n        {wait}    objective = at(f, 0., 0.)\n")
    running = start("examine", "task.py:slow" if name == "slow" else "loss.py")
    running.until("ready")
    running.send(signal.SIGINT)
    assert running.wait() == 130
    assert "Traceback" not in running.stderr
