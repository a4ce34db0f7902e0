"""trainproof, as `trainproof epoch run.jsonl` reads a log afterwards: a record of five steps, as in its own gallery.

It compares the last loss with the least, and the loss of a single batch is too noisy for that.
"""

from pathlib import Path

from trainproof.epoch import check_epoch

from clinic.rivals.lines import Means
from clinic.rivals.log import logged
from clinic.training import Training


def attach(t: Training, folder: Path):
    lines = Means(folder / "run.jsonl", 5)
    logged(t, lines.write)

    def said() -> list[str]:
        """Failures before warnings, as its report has them."""
        found = check_epoch(lines.close(), "jsonl")["findings"]
        return [f["id"] for level in ("FAIL", "WARN") for f in found if f["level"] == level]

    return said
