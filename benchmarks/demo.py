"""Time and memory of `unstuck demo` once everything is set up: the figures in the README.

python benchmarks/demo.py        runs it three times, one after the other, and writes benchmarks/demo.json
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from environment import environment

RUNS = 3
QUIET = 1.5  # the load that a machine may have before: other work shows in the seconds


def measure() -> tuple[float, float]:
    """Wall seconds and peak resident MiB of one demonstration."""
    command = [sys.executable, "-c", "from unstuck.cli import main; main()", "demo"]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"`unstuck demo` left with status {process.returncode}: nothing is measured")
    return seconds, usage.ru_maxrss / 1024


def main() -> None:
    load = os.getloadavg()[0]
    if load > QUIET:
        raise SystemExit(f"the machine is busy (load {load:.1f}, at most {QUIET}): measure when it is quiet")
    runs = [measure() for _ in range(RUNS)]
    result = {
        "seconds": sorted(round(seconds, 1) for seconds, _ in runs),
        "peak_mib": sorted(round(mib) for _, mib in runs),
        "environment": environment(load),
    }
    place = Path(__file__).with_suffix(".json")
    place.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    seconds, mib = (result[key][RUNS // 2] for key in ("seconds", "peak_mib"))
    print(f"for the README: {seconds:.0f} seconds and {mib} MiB")


if __name__ == "__main__":
    main()
