"""What measured seconds and bytes depend on."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def environment(load: float, *packages: str) -> dict[str, Any]:
    """The machine and its software; `load` is that of the machine before the measurement, from `os.getloadavg`."""
    return {
        "processor": processor(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(load, 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: metadata.version(package) for package in packages},
    }


def processor() -> str:
    """The name of the processor, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
