"""Sums over the ranks of a process group, which all learn of it where one of them fails."""

from collections.abc import Callable

import torch
from torch import Tensor, distributed


def total(
    compute: Callable[[], Tensor], like: Tensor, group: "distributed.ProcessGroup | None", *, mark: float = 0.0
) -> Tensor:
    """The sum over ranks of what `compute` returns, flat and like `like`, by one all-reduce.

    Ranks that give another `mark` were asked for something else, and their sum would mean nothing.
    """
    if group is None:
        return compute()
    sent = like.new_zeros(like.numel() + 3)
    try:
        sent[:-3] = compute()
        sent[-2], sent[-1] = mark, mark**2
    except Exception:
        sent[-3] = 1  # the others wait for this rank
        distributed.all_reduce(sent, group=group)
        raise
    distributed.all_reduce(sent, group=group)
    failed, marks, squares = sent[-3:].tolist()
    if failed:
        raise RuntimeError("all ranks are needed for a sum over data, got one that failed: its own message says why")
    ranks = distributed.get_world_size(group)
    if abs(squares / ranks - (marks / ranks) ** 2) > 1e-4 * (squares / ranks):
        raise ValueError(
            "all ranks must multiply the same vector, got several: give each a generator with the same seed"
        )
    return sent[:-3]


def total_weight(weight: float, like: Tensor, group: "distributed.ProcessGroup | None") -> float:
    if group is None:
        return weight
    sent = torch.tensor(weight, dtype=torch.float64, device=like.device)
    distributed.all_reduce(sent, group=group)
    return sent.item()


def check_same(point: Tensor, group: "distributed.ProcessGroup | None") -> None:
    """Raises on all ranks unless they hold the same weights."""
    if group is None:
        return
    sums = torch.stack([torch.full_like(point[0], point.numel()), point.sum()]).double()
    ends = torch.cat([sums, -sums])
    distributed.all_reduce(ends, distributed.ReduceOp.MAX, group=group)
    if not torch.equal(ends[:2], -ends[2:]) and not bool(ends.isnan().any()):
        raise ValueError(
            "all ranks need the same weights, got some that differ: wrap the model in DistributedDataParallel, or "
            "broadcast its weights first"
        )


def rank_of(group: "distributed.ProcessGroup | None") -> int:
    return 0 if group is None else distributed.get_rank(group)
