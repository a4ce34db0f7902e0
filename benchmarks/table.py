"""The table of docs/curvature.md, from curvature.json beside this file: python benchmarks/table.py prints it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Results = dict[str, Any]  # of one network, by part

NETWORKS = {"mlp": "MLP", "cnn": "CNN", "gpt": "transformer"}


def table(results: dict[str, Results]) -> list[str]:
    """Lines of Markdown: a row a question, a column a network."""
    lines = [f"| | {' | '.join(NETWORKS.values())} |", f"|---|{'---|' * len(NETWORKS)}"]
    lines += [
        f"| {question} | {' | '.join(answer(results[name]) for name in NETWORKS)} |"
        for question, answer in QUESTIONS.items()
    ]
    return lines


def _right(result: Results) -> str:
    ours = result["top"]["ours"]
    return f"{round(ours['starts'] * ours['largest']['right'])} of {ours['starts']}"


def _overhead(result: Results) -> str:
    found = result["top"]["ours"]["largest"]
    return f"{100 * found['overhead_mean']:+.0f} %, {100 * found['overhead_worst']:+.0f} %"


def _best(part: str, kind: str) -> Callable[[Results], str]:
    def ratio(result: Results) -> str:
        found = result[part]["best"]["largest"].get(kind)
        return "none was right" if found is None else f"{found['ratio']:.1f} ×"

    return ratio


def _row(part: str, tool: str, column: str, unit: str) -> Callable[[Results], str]:
    def cell(result: Results) -> str:
        row = next(row for row in result[part]["rows"] if row["tool"] == tool)
        return f"{row[column]:.2g}{unit}" if "failed" not in row else "failed"

    return cell


def _default(tool: str) -> Callable[[Results], str]:
    def word(result: Results) -> str:
        rows = [row for row in result["top"]["rows"] if row["tool"] == tool and row["stops"] == "by default"]
        return "right" if all(row["right"]["largest"] for row in rows) else "wrong"

    return word


QUESTIONS: dict[str, Callable[[Results], str]] = {
    "five largest to 10⁻³: right from so many starts": _right,
    "products beyond the least that would do, mean and worst": _overhead,
    "PyHessian at its defaults": _default("PyHessian"),
    "hessian-eigenthings' Lanczos at its defaults": _default("hessian-eigenthings"),
    "PyHessian, tightened until it is right": _best("top", "PyHessian"),
    "the best peer that stops by itself": _best("top", "peer that stops by itself"),
    "a peer told the right number of steps": _best("top", "peer told the steps"),
    "both ends to 10⁻²: the best peer that stops by itself": _best("ends", "peer that stops by itself"),
    "one Hessian product, in gradients": _row("product", "our product", "gradients", ""),
    "density: PyHessian, mended for this torch": _row("density", "PyHessian, torch.eig mended", "ratio", " ×"),
    "trace: probes saved by the ten largest pairs": lambda result: f"{result['trace']['probes_saved']:.1f} ×",
}


if __name__ == "__main__":
    print("\n".join(table(json.loads(Path(__file__).with_name("curvature.json").read_text(encoding="utf-8")))))
