"""`unstuck run` tells of a script on a GPU what it tells of the same on a CPU."""

import json
import subprocess
import sys
import textwrap

import pytest

SCRIPT = """
    import torch
    from torch import nn
    from torch.nn import functional as F

    device = "{device}"
    torch.manual_seed(0)
    x = torch.randn(1024, 20, device=device)
    y = (x[:, :10].pow(2).sum(1) > x[:, 10:].pow(2).sum(1)).long()
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Dropout(0.1), nn.Linear(64, 2)).to(device)
    optimizer = {optimizer}
    for step in range({steps}):
        rows = torch.randint(0, 1024, (64,), device=device)
        inputs = x[rows]
        {before}
        loss = F.cross_entropy(model(inputs), y[rows])
        {clear}
        loss.backward()
        optimizer.step()
    print("last loss", float(loss.detach()))
"""
HEALTHY = {
    "optimizer": "torch.optim.Adam(model.parameters(), lr=1e-2)",
    "steps": 600,
    "before": "pass",
    "clear": "optimizer.zero_grad()",
}
POISON = "inputs = inputs * float('nan') if step == 137 else inputs"


def verdict(tmp_path, device, **changes):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT).format(**{**HEALTHY, **changes, "device": device}))
    command = [sys.executable, "-W", "ignore", "-m", "unstuck", "run", "--json", "out.json", "--out", "run", "train.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "last loss" in done.stdout
    found = json.loads((tmp_path / "out.json").read_text())
    print(done.stderr[-3000:])
    facts = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert not [e for e in facts if e.get("code") in ("watcher-failed", "not-saved")]
    return {f["code"]: f for f in found["findings"]}, [e for e in facts if e["kind"] == "fact"]


def test_a_healthy_run_has_no_finding(device, tmp_path):
    assert verdict(tmp_path, device)[0] == {}


def test_a_missing_zero_grad_is_shown(device, tmp_path):
    found, _ = verdict(tmp_path, device, clear="pass")
    assert found["zero-grad-missing"]["word"] == "SHOWN"


@pytest.mark.parametrize("optimizer", ["SGD(model.parameters(), lr=300.0)", "Adam(model.parameters(), lr=3.0)"])
def test_a_rate_much_too_large_is_proved(optimizer, device, tmp_path):
    found, _ = verdict(tmp_path, device, optimizer=f"torch.optim.{optimizer}", steps=400)
    assert "PROVED" in [f["word"] for code, f in found.items() if code.startswith("lr-")], found


def test_a_loss_that_becomes_nan_is_told_with_its_step_though_it_is_read_late(device, tmp_path):
    found, facts = verdict(tmp_path, device, before=POISON)
    blown = next(e for e in facts if e["code"] == "non-finite")
    assert blown["step"] == 138
    assert found
