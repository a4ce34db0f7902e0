"""A run of a GPU, read on a machine without one: as if it had come from there, by editing what was written."""

import struct
import zipfile

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unstuck
from unstuck.diagnosis import diagnose
from unstuck.objective._kernels import full_precision
from unstuck.record import Run
from unstuck.record._facts import StaleGradients
from unstuck.record._pulses import settled, total


def text(word):
    return b"X" + struct.pack("<I", len(word)) + word.encode()


def as_if_from_cuda(path):
    """Writes a file of torch.save anew, with "cuda:0" for every "cpu" that a storage or a call in it names."""
    with zipfile.ZipFile(path) as old:
        parts = [(info, old.read(info)) for info in old.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for info, content in parts:
            if info.filename.endswith("data.pkl"):
                assert text("cpu") in content
                content = content.replace(text("cpu"), text("cuda:0"))
            new.writestr(info.filename, content)


def trained(folder, *layers, steps=130, rate=0.1):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), *layers, nn.Linear(16, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    x, y = torch.randn(64, 6), torch.randint(0, 4, (64,))
    with unstuck.watch(folder=folder, budget=100.0):
        for _ in range(steps):
            rows = torch.randint(0, 64, (16,))
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]).to("cpu"), y[rows]).backward()
            optimizer.step()
    return Run(folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would be read onto the GPU that is here")
def test_a_run_of_a_gpu_is_the_same_run_on_a_cpu(tmp_path):
    run = trained(tmp_path / "run", steps=70)
    here = run.memory()
    verdict = diagnose(Run(run.folder))
    as_if_from_cuda(tmp_path / "run" / "tapes.pt")
    there = run.memory()
    assert there is not None
    assert there.left_out == ""
    assert len(there.tapes) == len(here.tapes) == 69  # the first step had begun
    for a, b in zip(here.states, there.states, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.weights, b.weights, strict=True))
    weights = here.states[-1].weights
    assert [float(t.replay(weights)) for t in there.tapes] == [float(t.replay(weights)) for t in here.tapes]
    assert str(diagnose(Run(run.folder))) == str(verdict)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would be read onto the GPU that is here")
def test_steps_with_masks_of_a_gpu_are_left_out_and_the_verdict_says_so(tmp_path):
    run = trained(tmp_path / "run", nn.Dropout(0.3), rate=3.0)
    assert [f.word for f in diagnose(run).findings] == ["PROVED"]
    path = tmp_path / "run" / "tapes.pt"
    data = torch.load(path, weights_only=True)
    for tape in data["tapes"]:
        tape["states"] = [torch.zeros(16, dtype=torch.uint8) for _ in tape["states"]]  # as a CUDA generator has it
    torch.save(data, path)
    as_if_from_cuda(path)
    memory = run.memory()
    assert memory.tapes == ()
    assert len(memory.states) > 1
    found = diagnose(Run(run.folder))
    assert all(f.word == "CANNOT TELL" for f in found.findings)
    assert any("random numbers" in reason for reason in found.not_checked.values())
    with pytest.raises(ValueError, match="random numbers"):
        run.objective()


def test_a_captured_optimiser_goes_on_without_a_graph_where_it_is_moved(tmp_path):
    run = trained(tmp_path / "run", steps=10)
    path = tmp_path / "run" / "tapes.pt"
    data = torch.load(path, weights_only=True)
    for state in data["states"]:
        for group in state["optimizer"]["groups"]:
            group["capturable"] = True
    torch.save(data, path)
    as_if_from_cuda(path)
    state = run.memory().states[-1]
    weights = [w.clone().requires_grad_() for w in state.weights]
    optimizer = state.optimizer.build(weights)
    run.memory().tapes[-1].replay(weights).backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(weights, state.weights, strict=True))


def test_a_whole_norm_is_that_of_its_parts_in_any_type():
    parts = [torch.tensor(3.0), torch.tensor(4.0, dtype=torch.bfloat16), torch.tensor(12.0, dtype=torch.float64)]
    assert total(parts) == 13.0
    assert total(20 * parts) == pytest.approx(13 * 20**0.5)
    assert total(20 * parts, 60 * [0.25]) == pytest.approx(26 * 20**0.5)
    (found,) = settled([{"step": 1, "a": parts[1], "b": parts[2]}])
    assert found == {"step": 1, "a": 4.0, "b": 12.0}


def test_old_gradients_are_asked_for_only_where_a_step_would_use_them(monkeypatch):
    """As in a GAN: the backward pass of the one finds what the other has left, which is then cleared."""
    asked = []
    real = torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda x: asked.append(1) or real(x))
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizers = [torch.optim.SGD([w], lr=0.1) for w in weights]
    stale = StaleGradients()

    def step(which, *, clear):
        if clear:
            optimizers[which].zero_grad()
        stale.note_backward()
        sum(w.square().sum() for w in weights).backward()
        used = stale.used_by(optimizers[which])
        optimizers[which].step()
        stale.note_step(optimizers[which])
        return used

    for _ in range(3):
        assert step(0, clear=True) is None
        assert step(1, clear=True) is None
    assert asked == []
    assert step(0, clear=False) is weights[0]
    assert asked


def test_the_precision_of_products_is_restored():
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    with full_precision([torch.device("cpu")]):
        assert (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision) == before
    with pytest.raises(ZeroDivisionError), full_precision([torch.device("cpu"), torch.device("cuda")]):
        assert torch.backends.cudnn.conv.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"
        raise ZeroDivisionError
    assert (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision) == before
    assert torch.get_float32_matmul_precision() == "highest"
