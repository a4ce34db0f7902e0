"""Tests that need a GPU: `python -m pytest tests/gpu -m gpu`. With `--device cpu` they are tried out without one."""

import os

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # its products then repeat


def pytest_addoption(parser):
    parser.addoption("--device", default="cuda", help="where the tests of tests/gpu compute")


def pytest_collection_modifyitems(config, items):
    here = [item for item in items if item.path.parent.name == "gpu"]
    absent = config.getoption("--device", "cuda") == "cuda" and not torch.cuda.is_available()
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if absent:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is false"))


@pytest.fixture
def device(request):
    return torch.device(request.config.getoption("--device", "cuda"))


@pytest.fixture
def repeating():
    """Kernels that give the same numbers each time, where torch has them."""
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before
