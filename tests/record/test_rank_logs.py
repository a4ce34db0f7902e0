"""Two gloo ranks, as torchrun starts them: two logs in one folder, and one diagnosis."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.processes import command, fork, write

import unstuck
from unstuck.diagnosis import SHOWN
from unstuck.record import Run, new_folder
from unstuck.record._log import NAME, Log
from unstuck.record._ranks import own_rank, ranked, shared_folder

SOURCE = Path(unstuck.__file__).parents[1]
STEPS = 12

TRAINING = f"""
    import contextlib, os, sys
    import torch
    import unstuck
    from torch import distributed, nn

    def train():
        torch.manual_seed(0)
        model = nn.parallel.DistributedDataParallel(nn.Linear(3, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(rank)
        for step in range(1, {STEPS + 1}):
            x = torch.randn(8, 3, generator=generator)
            if sys.argv[1:] == ["bad"] and rank == 1 and step == 7:
                x[5, 1] = float("nan")
            optimizer.zero_grad()
            (model(x) - x[:, :1]).square().mean().backward()
            optimizer.step()
        return model.module.state_dict()

    @contextlib.contextmanager
    def group():
        distributed.init_process_group("gloo")
        yield distributed.get_rank()
        distributed.barrier()
        distributed.destroy_process_group()
"""
ALONE = """
    with group() as rank:
        train()
        sys.stdout.write(f"rank {rank} is done\\n")
"""
BLOCK = """
    with group() as rank:
        plain = train()
        with unstuck.watch() as run:
            watched = train()
        same = all(torch.equal(plain[name], watched[name]) for name in plain)
        sys.stdout.write(f"{run.rank} is the same: {same}\\n")
    if run.rank == 0:
        print(len(run.diagnose().findings), "findings")
"""


def launched(*program, folder):
    """What torchrun and its two ranks say; it must leave with 0."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, *program],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def only_run(folder):
    (found,) = (folder / "unstuck-runs").iterdir()
    return Run(found)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_command_leaves_two_logs_in_one_folder_and_one_verdict_that_tells_the_rank(tmp_path):
    write(tmp_path / "train.py", TRAINING + ALONE)
    done = launched("-m", "unstuck", "run", "train.py", "bad", folder=tmp_path)
    assert sorted(done.stdout.splitlines()) == ["rank 0 is done", "rank 1 is done"]
    run = only_run(tmp_path)
    assert {path.name for path in run.folder.glob("*.json*")} == {"log.jsonl", "log-rank1.jsonl", "diagnosis.json"}
    assert done.stderr.count("Run: ") == 1
    (found,) = run.diagnose().findings
    assert (found.code, found.word, found.step) == ("non-finite-data", SHOWN, 7)
    assert found.where.endswith("row 5")
    assert "The loss on rank 1 is nan since step 7" in found.claim


def test_the_block_in_a_script_gives_each_rank_its_log_and_leaves_the_weights(tmp_path):
    write(tmp_path / "train.py", TRAINING + BLOCK)
    done = launched("train.py", folder=tmp_path)
    assert sorted(done.stdout.splitlines()) == ["0 findings", "0 is the same: True", "1 is the same: True"]
    run = only_run(tmp_path)
    losses = []
    for rank, name in enumerate(("log.jsonl", "log-rank1.jsonl")):
        records = lines(run.folder / name)
        losses.append([r["loss"] for r in records if r["kind"] == "step"])
        assert [r["kind"] for r in records].count("start") == [r["kind"] for r in records].count("end") == 1
        assert run.ranks[rank].series("loss")[1] == losses[rank]
    assert len(losses[0]) == len(losses[1]) == STEPS
    assert losses[0] != losses[1]  # each has its own share of the data
    assert list(run.ranks) == [0, 1]
    assert run.ranks[0] is run


def test_each_rank_keeps_tapes_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with unstuck.watch(folder=tmp_path / "run") as run:
            for _ in range(4 + rank):
                optimizer.zero_grad()
                model(torch.randn(8, 3)).square().mean().backward()
                optimizer.step()
        assert (run.rank, run.steps, run.memory().tapes[-1].step) == (rank, 4 + rank, 4 + rank)
    ranks = Run(tmp_path / "run").ranks
    assert [one.memory().states[-1].step for one in ranks.values()] == [4, 5]


def of_rank(folder, rank, losses, **fact):
    log = Log(folder, ranked(NAME, rank))
    for step, loss in enumerate(losses, 1):
        log.write("step", step=step, time=0.01 * step, optimizer=0, loss=loss)
    if fact:
        log.write("fact", **fact)
    log.close()


def test_a_loss_that_is_no_number_on_another_rank_alone_is_a_finding(tmp_path):
    losses = [2.0 * 0.8**k for k in range(40)]
    of_rank(tmp_path, 0, losses)
    assert not Run(tmp_path).diagnose().findings
    where = {"origin": "forward", "where": "log"}
    of_rank(tmp_path, 3, losses, code="non-finite", step=31, loss=float("nan"), count=1, of=31, **where)
    run = Run(tmp_path)
    (found,) = run.diagnose().findings
    assert (found.step, found.where) == (31, "rank 3")
    assert found.claim == (
        "The loss on rank 3 is nan since step 31, and the first number that is not finite is in the forward pass, "
        "log()."
    )
    assert list(run.ranks) == [0, 3]
    assert list(Run(tmp_path, rank=3).ranks) == [0, 3]


def test_a_fact_that_several_ranks_tell_counts_once(tmp_path):
    for rank in range(3):
        of_rank(tmp_path, rank, [1.0], code="stale-gradient", step=5 if rank < 2 else 3, count=1, of=1)
    facts = Run(tmp_path).of("fact")
    assert [(e["step"], e.get("rank")) for e in facts] == [(3, 2), (5, None)]
    assert [e["step"] for e in Run(tmp_path, rank=1).of("fact")] == [5]


def test_only_an_environment_of_several_ranks_makes_a_rank(monkeypatch):
    for size, rank, expected in (("2", "1", 1), ("2", "0", 0), ("1", "0", None), (None, None, None), ("x", "1", None)):
        for name, value in (("WORLD_SIZE", size), ("RANK", rank)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        assert own_rank() == expected
    assert (ranked(NAME, None), ranked(NAME, 0), ranked(NAME, 12)) == (NAME, NAME, "log-rank12.jsonl")


@pytest.mark.parametrize("identity", ["none", "5f1c"])  # what torchrun says without --rdzv-id, and with it
def test_ranks_agree_on_a_folder_and_the_next_job_has_another(tmp_path, monkeypatch, identity):
    monkeypatch.chdir(tmp_path)
    for name, value in {"TORCHELASTIC_RUN_ID": identity, "WORLD_SIZE": "8", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    seen = []
    for _ in range(2):
        jobs = []
        for rank in range(8):
            monkeypatch.setenv("RANK", str(rank))
            jobs.append(fork(lambda rank=rank: print(Log(new_folder("train"), ranked(NAME, rank))._path.parent)))
        assert [job.wait() for job in jobs] == [0] * 8
        (folder,) = {job.stdout.strip() for job in jobs}
        assert len(list(Path(folder).iterdir())) == 8
        seen.append(folder)
    assert len(set(seen)) == 2
    monkeypatch.setenv("MASTER_PORT", "29501")
    assert str(shared_folder(Path("unstuck-runs").absolute(), "train", NAME)) not in seen


def test_a_rank_alone_has_the_folder_of_its_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    write("nothing.py", "print(1)")
    status, out, _ = command("run", "nothing.py")
    assert (status, out) == (0, "1\n")
    assert only_run(tmp_path).folder.name[:2] == "20"


def test_facts_of_other_ranks_are_read_on_while_they_train(tmp_path):
    of_rank(tmp_path, 0, [1.0] * 3)
    run = Run(tmp_path)
    writer = Log(tmp_path, ranked(NAME, 1))
    for step in range(1, 300):
        writer.write("step", step=step, time=0.1 * step, loss=1.0)
        if step % 100 == 0:
            writer.write("fact", code="stale-gradient", step=step)
            assert [e["step"] for e in run.of("fact")] == list(range(100, step + 1, 100))
    writer.close()
    assert run.ranks[1].of("fact") == [{k: v for k, v in e.items() if k != "rank"} for e in run.of("fact")]
