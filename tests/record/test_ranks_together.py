"""Two gloo ranks with unequal shares of the data: what each records, and what is told of both."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from rank_styles import DDP, KEPT, SHARDED, STEPS
from tests.processes import fork, together
from torch import nn
from torch.nn import functional as F

import unstuck
from unstuck.diagnosis import PROVED, SHOWN
from unstuck.objective import joined, pack, unpack
from unstuck.record import Run
from unstuck.record._log import NAME, Log
from unstuck.record._memory import read_memory
from unstuck.record._ranks import ranked, wait_for_ends

PIECES = "the parameters are sharded over ranks: each has a piece, and the whole exists at times only"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def local(x):
    return getattr(x, "_local_tensor", x).detach().clone()


def moved(model, optimizer):
    """All numbers that training has left on this rank."""
    found = [local(x) for x in model.state_dict().values()]
    found += [local(p.grad) for p in model.parameters() if p.grad is not None]
    for kept in getattr(optimizer, "optim", optimizer).state.values():
        found += [local(x) for x in kept.values() if isinstance(x, torch.Tensor)]
    return found


def lying(model):
    """How the gradients lie in memory."""
    return [(g.stride(), g.storage_offset()) for p in model.parameters() if (g := p.grad) is not None]


def outcome(name, train, rank):
    """What this rank has to tell of a style: whether watching changed it, its tapes, facts and refusals."""
    torch.manual_seed(rank)
    model, optimizer = train(rank)
    plain, lay, state = moved(model, optimizer), lying(model), torch.get_rng_state()
    torch.manual_seed(rank)
    with unstuck.watch(folder=name, budget=100.0) as run:
        model, optimizer = train(rank)
    numbers = moved(model, optimizer)
    same = len(plain) == len(numbers) and all(map(torch.equal, plain, numbers)) and lay == lying(model)
    kept = own(run)
    return {
        "same": same and torch.equal(state, torch.get_rng_state()),
        "hooked": any(p._backward_hooks is not None for p in model.parameters()),
        "steps": run.steps,
        "rescaled": kept and torch.load(run.folder / ranked("tapes.pt", run.rank), weights_only=True)["rescaled"],
        "tapes": [] if kept is None else [t.step for t in kept.tapes],
        "refusals": list(run.of("end")[0]["refusals"]),
        "facts": [e["code"] for e in Run(name, rank=rank or None).of("fact")],
    }


def own(run):
    """What a rank has kept itself."""
    return read_memory(run.folder / ranked("tapes.pt", run.rank), run.rank)


def told_by_ranks(styles):
    def work(rank):
        told = {name: outcome(name, train, rank) for name, train in styles.items()}
        Path(f"told-{rank}.json").write_text(json.dumps(told))

    together(work)
    return [json.loads(Path(f"told-{rank}.json").read_text()) for rank in range(2)]


def test_every_way_to_average_gradients_keeps_its_tapes_and_its_bits():
    told = told_by_ranks(KEPT)
    for rank, name in [(rank, name) for rank in range(2) for name in KEPT]:
        found = told[rank][name]
        steps = STEPS + (4 * rank if name == "unequal_lengths" else 0)
        surprise = {"a_static_graph": 2, "unused_parameters": 0}.get(name)
        assert found["same"], (name, rank)
        assert not found["hooked"], (name, rank)
        assert not found["facts"], (name, rank)
        assert found["steps"] == steps, (name, rank)
        if name in ("averages", "gradients_as_views", "accumulation_without_sync", "recomputed_activations"):
            assert found["rescaled"] == pytest.approx(1), (name, rank)  # the average is no rescaling
        assert found["tapes"] == [k for k in range(1, steps + 1) if k != surprise], (name, rank, found["refusals"])


def test_sharded_parameters_are_refused_by_their_name_and_keep_their_bits():
    told = told_by_ranks(SHARDED)
    for rank, name in [(rank, name) for rank in range(2) for name in SHARDED]:
        expected = {"same": True, "hooked": False, "steps": STEPS, "tapes": [], "refusals": [PIECES], "facts": []}
        expected["rescaled"] = None
        assert told[rank][name] == expected, (name, rank)


SHARES = (9, 4)
FAULTS = {"healthy": [], "lr-diverges": [("lr-diverges", PROVED)], "zero-grad-missing": [("zero-grad-missing", SHOWN)]}


def parts(steps=60):
    """For each step the batches of both ranks."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        x = torch.randn(sum(SHARES), 6, generator=generator)
        yield list(zip(x.split(SHARES), x[:, :4].argmax(1).split(SHARES), strict=True))


def trained(fault, loss_of_step, wrap=lambda model: model):
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    model = wrap(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0 if fault == "lr-diverges" else 0.2)
    for step in parts():
        if fault != "zero-grad-missing":
            optimizer.zero_grad()
        loss_of_step(model, step).backward()
        optimizer.step()
    return inner


def of_both(model, step):
    return sum(F.cross_entropy(model(x), y) for x, y in step) / len(step)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same training in one process and in two, for each fault; the weights that it began with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("runs"))

        def work(rank):
            for fault in FAULTS:
                with unstuck.watch(folder=f"two-{fault}", budget=100.0):
                    trained(fault, lambda model, step: F.cross_entropy(model(step[rank][0]), step[rank][1]), DDP)

        together(work)
        for fault in FAULTS:
            with unstuck.watch(folder=f"one-{fault}", budget=100.0):
                trained(fault, of_both)
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_two_ranks_get_the_verdict_of_one_process_that_has_both_shares(runs, fault):
    one, two = (unstuck.Run(runs / f"{k}-{fault}") for k in ("one", "two"))
    assert sorted(path.name for path in two.folder.glob("*.*")) == [
        "log-rank1.jsonl",
        "log.jsonl",
        "tapes-rank1.pt",
        "tapes.pt",
    ]
    found = [run.diagnose().findings for run in (one, two)]
    assert [(f.code, f.word) for f in found[0]] == [(f.code, f.word) for f in found[1]] == FAULTS[fault]
    for a, b in zip(*found, strict=True):
        assert a.claim == b.claim
        if a.trial is not None:
            assert [arm.effect for arm in a.trial.arms] == pytest.approx([arm.effect for arm in b.trial.arms], abs=0.01)


def by_hand(values, x, y):
    """The network's loss without a module."""
    w, b, v, c = values
    return F.cross_entropy(F.linear(F.linear(x, w, b).relu(), v, c), y)


def test_the_tapes_of_both_ranks_give_loss_and_gradient_of_their_shares_and_their_mean(runs):
    run = Run(runs / "two-healthy")
    memory, shares = run.memory(), [own(one) for one in run.ranks.values()]
    assert (memory.apart, len(memory.tapes), {t.shares for t in memory.tapes}) == ("", 60, {2})
    values = [w.clone().requires_grad_() for w in memory.states[0].weights]
    for step, batch in zip(range(1, 61), parts(), strict=True):
        expected = [by_hand(values, *share) for share in batch]
        tapes = [*(share.tapes[step - 1] for share in shares), memory.tapes[step - 1]]
        for tape, loss in zip(tapes, [*expected, sum(expected) / 2], strict=True):
            assert tape.step == step
            replayed = tape.replay(values)
            torch.testing.assert_close(replayed, loss)
            found = torch.autograd.grad(replayed, values)
            torch.testing.assert_close(found, torch.autograd.grad(loss, values, retain_graph=True))
    first = sum(by_hand(values, *share) for share in next(parts())) / 2
    assert memory.tapes[0].loss == pytest.approx(first.item(), rel=1e-6)


def curved(tape, values):
    """The Hessian of a tape's loss times a vector of ones."""
    slopes = torch.autograd.grad(tape.replay(values), values, create_graph=True)
    return torch.autograd.grad(sum(slope.sum() for slope in slopes), values)


def test_a_joined_tape_has_second_derivatives_shows_every_call_and_can_be_written(runs):
    run = Run(runs / "two-healthy")
    memory, shares = run.memory(), [own(one) for one in run.ranks.values()]
    values = [w.clone().requires_grad_() for w in memory.states[0].weights]
    (tape,) = unpack(pack(memory.tapes[7:8]))
    each = [curved(share.tapes[7], values) for share in shares]
    torch.testing.assert_close(curved(tape, values), tuple((a + b) / 2 for a, b in zip(*each, strict=True)))
    calls = []
    tape.replay(values, observe=lambda call, args, result: calls.append(call))
    assert calls == 2 * list(tape.program.instructions)
    with pytest.raises(ValueError, match="one step and one program"):
        joined([shares[0].tapes[7], shares[1].tapes[8]])


def test_the_objective_of_the_run_is_the_mean_over_the_shares_of_all_ranks(runs):
    objective = Run(runs / "two-healthy").objective()
    values = [w.clone() for w in Run(runs / "two-healthy").memory().states[-1].weights]
    losses = [by_hand(values, *share) for step in parts() for share in step]
    assert float(objective.value()) == pytest.approx(float(sum(losses) / len(losses)), rel=1e-5)


def of_rank(rank, ranks=2, *, steps=50, seed=0, width=5, skip=0):
    """Trains as one of several ranks that all have the same data, of which some steps are not recorded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(ranks))
        patch.setenv("RANK", str(rank))
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, width), nn.Dropout(0.5), nn.Linear(width, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(seed)
        with unstuck.watch(model, optimizer, folder="run", budget=100.0):
            for k in range(steps):
                optimizer.zero_grad()
                loss = model(torch.randn(8, 3)).square().mean()
                (loss if k >= skip else loss + 0 * model[0].weight.detach().sum().item()).backward()
                optimizer.step()


def told_apart(**other):
    of_rank(0)
    of_rank(1, **other)
    memory = Run("run").memory()
    assert all(t.shares == 1 for t in memory.tapes) is bool(memory.apart)
    return memory.apart


def test_ranks_that_do_the_same_are_joined_with_their_own_chances():
    assert told_apart() == ""
    memory = Run("run").memory()
    assert [t.step for t in memory.tapes] == list(range(1, 51))
    alone = own(Run("run"))
    w = memory.states[0].weights
    for whole, share in zip(memory.tapes, alone.tapes, strict=True):
        assert float(whole.replay(w)) == float(share.replay(w))  # dropout too


def test_ranks_that_train_apart_are_not_joined():
    assert told_apart(seed=1) == "the weights of the ranks differ"


def test_ranks_with_other_parameters_are_not_joined():
    assert told_apart(width=7) == "the weights of the ranks differ"


def test_ranks_that_stopped_at_other_steps_are_not_joined():
    assert told_apart(steps=30) == "the ranks kept no weights of the same step, to be compared"


def test_a_few_steps_of_all_ranks_are_not_enough():
    assert told_apart(skip=45) == "only 5 of the steps were recorded on all ranks"


def test_more_ranks_than_a_process_replays_are_not_joined():
    of_rank(0, 9)
    assert Run("run").memory().apart == "9 ranks are more than one process replays"


def test_a_verdict_on_the_share_of_one_rank_says_so(runs):
    shutil.copytree(runs / "two-lr-diverges", "run")
    Path("run/tapes-rank1.pt").unlink()
    (found,) = Run("run").diagnose().findings
    share = "This rests on rank 0's share of each batch alone, since not all ranks left recorded steps."
    assert (found.code, found.word) == ("lr-diverges", PROVED)
    assert found.claim.endswith(share)


def test_a_log_that_is_being_written_is_waited_for_and_no_other():
    def write():
        log = Log(Path("run"), ranked(NAME, 1))
        log.write("start")
        time.sleep(0.4)
        log.write("end", outcome="finished")
        log.close()

    (path,) = logs = [Path("run") / ranked(NAME, 1)]
    began = time.monotonic()
    wait_for_ends(logs)  # there is none yet
    assert time.monotonic() - began < 0.2
    writer = fork(write)
    while not path.exists():
        time.sleep(0.005)
    wait_for_ends(logs)
    assert json.loads(path.read_text().splitlines()[-1])["kind"] == "end"
    assert writer.wait() == 0
    path.write_text(path.read_text().replace('"end"', '"fact"'))
    os.utime(path, (time.time() - 60,) * 2)
    began = time.monotonic()
    wait_for_ends(logs)  # killed a minute ago
    assert time.monotonic() - began < 0.2
