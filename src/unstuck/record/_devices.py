"""Devices other than the CPU: waiting for them, and reading files that were written from them."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

ROOM = 4  # times the files: what a trial takes, with its copies of the weights


def read(path: Path, beside: Sequence[Path] = ()) -> tuple[Any, bool]:
    """What torch.save wrote, and whether it lies on the CPU though it came from another device.

    That is where the device is not here, or has no room for the file and those `beside` it. Of a file from the CPU no
    other device is asked.
    """
    places: set[str] = set()

    def note(storage: Any, place: str) -> Any:
        places.add(place)
        return storage

    data = torch.load(path, map_location=note, weights_only=True)
    places.discard("cpu")
    if not places:
        return data, False
    size = ROOM * sum(p.stat().st_size for p in (path, *beside))
    if not all(_has_room(torch.device(place), size) for place in places):
        return data, True
    return torch.load(path, weights_only=True), False


def _has_room(device: torch.device, size: int) -> bool:
    if device.type != "cuda" or not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        return False
    return torch.cuda.mem_get_info(device)[0] >= size


def wait(devices: Iterable[torch.device]) -> float:
    """Waits until devices have done what was asked of them so far; the seconds, which are the script's."""
    began = perf_counter()
    waited = [torch.cuda.current_stream(device).synchronize() for device in devices if device.type == "cuda"]
    return perf_counter() - began if waited else 0.0
