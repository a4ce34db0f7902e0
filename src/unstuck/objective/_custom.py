"""Autograd functions with a backward of the user's own: whether what it computes can be differentiated once more.

torch cannot tell: a backward that detaches a tensor, calls NumPy or uses what its forward has computed on the way gives
the right gradient and, without a word, a wrong derivative of it.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from unstuck.objective._term import own_functions

Results = list[Tensor | None]


def check_custom(
    loss: Tensor, leaves: Sequence[Tensor], moved: Iterable[tuple[Tensor, Sequence[Tensor]]], seen: set[type]
) -> None:
    """Raises where a custom function behind the loss, of no class in `seen`, has no true second derivatives.

    `moved` are the loss and its leaves a little to the one and to the other side. Cost: two losses and a gradient, once
    for each class.
    """
    if _fresh([loss], seen):
        _check_moves(loss, leaves, moved, seen)
        check_linear([loss], seen)


def check_linear(roots: Sequence[Tensor], seen: set[type]) -> None:
    """Raises where a backward behind the roots, of no class in `seen`, does not pass on how it depends on the slope.

    It is linear in the slope: so its derivative along the slope must be itself.
    """
    for node in _fresh(roots, seen).values():
        slopes = [s.requires_grad_(s.is_floating_point()) for s in _slopes(node)]
        known = [s for s in slopes if s.requires_grad]
        results = [r for r in _backward(node, slopes) if r is not None]
        tracked = [r for r in results if r.requires_grad]
        passed, whole = 0.0, _dot(results, results)
        if tracked:
            ways = [r.detach() for r in tracked]
            found = torch.autograd.grad(tracked, known, ways, retain_graph=True, materialize_grads=True)
            passed = _dot(found, known)
        if not abs(passed - whole) <= 0.1 * whole:
            raise _refusal(node)
        seen.add(_kind(node))


def _check_moves(
    loss: Tensor, leaves: Sequence[Tensor], moved: Iterable[tuple[Tensor, Sequence[Tensor]]], seen: set[type]
) -> None:
    """Raises where a backward behind the loss hides how it depends on what its function was given.

    Where its results at fixed slopes move smoothly from the one side to the other, autograd must see the movement.
    Jumps, as those of x > 0, are left out.
    """
    fresh = _fresh([loss], seen)
    slopes = {place: _slopes(node) for place, node in fresh.items()}
    sides, ends = [], []
    for other, there in moved:
        nodes = dict(enumerate(own_functions([other])))
        if not all(place in nodes and _kind(nodes[place]) is _kind(node) for place, node in fresh.items()):
            return  # the loss took another path
        with torch.no_grad():
            sides.append({place: _backward(nodes[place], slopes[place]) for place in fresh})
        ends.append([leaf.detach() for leaf in there])
    motion = [(ahead - behind) / 2 for ahead, behind in zip(*ends, strict=True)]
    for kind in {_kind(node) for node in fresh.values()}:
        pairs, count = [], 0
        for place in (place for place, node in fresh.items() if _kind(node) is kind):
            results = _backward(fresh[place], slopes[place])
            ways = _smooth_ways(results, sides[0][place], sides[1][place])
            count += bool(ways)
            pairs += [(r, w) for r, w in zip(results, ways, strict=False) if r is not None and r.requires_grad]
        passed = 0.0
        if pairs:
            tracked, ways = zip(*pairs, strict=True)
            found = torch.autograd.grad(tracked, leaves, ways, retain_graph=True, materialize_grads=True)
            passed = _dot(found, motion)
        if not _seen(passed, count, leaves[0].dtype):
            raise _refusal(next(node for node in fresh.values() if _kind(node) is kind))


def both_sides(leaves: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The leaves moved by the cube root of their rounding, which is best for differences, to one side and the other."""
    here = [leaf.detach() for leaf in leaves]
    steps = [_random(leaf, _size(leaf) * torch.finfo(leaf.dtype).eps ** (1 / 3)) for leaf in here]
    for sign in (1, -1):
        yield [(leaf + sign * step).requires_grad_() for leaf, step in zip(here, steps, strict=True)]


def _fresh(roots: Sequence[Tensor], seen: set[type]) -> dict[int, Any]:
    return {place: node for place, node in enumerate(own_functions(roots)) if _kind(node) not in seen}


def _smooth_ways(now: Results, ahead: Results, behind: Results) -> Results:
    """Directions along which the results moved by 1 in all, where they moved smoothly; none if they did so nowhere."""
    ways, total = [], 0.0
    for here, right, left in zip(now, ahead, behind, strict=True):
        if here is None or right is None or left is None or not here.numel():
            ways.append(None)
            continue
        here = here.detach()
        first, second = right - here, here - left
        move = (first + second) / 2
        least = 10 * torch.finfo(here.dtype).eps * here.abs().max()
        smooth = (first - second).abs() <= (0.2 if _is_low(here.dtype) else 0.05) * move.abs()
        way = move.sign() * (smooth & (move.abs() > least))
        total += _dot([way], [move])
        ways.append(way)
    return [None if way is None else way / total for way in ways] if total > 0 else []


def _seen(passed: float, whole: float, dtype: torch.dtype) -> bool:
    """Whether autograd saw a movement; in low precision, where differences are rough, whether it saw anything of it."""
    return abs(passed) >= whole / 20 if _is_low(dtype) else abs(passed - whole) <= whole / 20


def _is_low(dtype: torch.dtype) -> bool:
    return torch.finfo(dtype).eps > 1e-4


def _backward(node: Any, slopes: Sequence[Tensor]) -> Results:
    found = node.apply(*slopes)
    return list(found) if isinstance(found, tuple) else [found]


def _slopes(node: Any) -> list[Tensor]:
    """Random slopes for the outputs of a function, small so that one that clips them does not."""
    outputs = [torch.zeros(m.shape, dtype=m.dtype, device=m.device) for m in node._input_metadata]  # noqa: SLF001
    return [_random(z, 1e-3) if z.is_floating_point() else z for z in outputs]


def _random(like: Tensor, size: float) -> Tensor:
    drawn = torch.empty_like(like).normal_(generator=torch.Generator(like.device).manual_seed(0))
    return drawn * size


def _size(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt()) or 1.0 if tensor.numel() else 1.0


def _kind(node: Any) -> type:
    return node._forward_cls  # noqa: SLF001


def _dot(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> float:
    return sum(float((x.detach().double() * y.detach().double()).sum()) for x, y in zip(xs, ys, strict=True))


def _refusal(node: Any) -> ValueError:
    if _kind(node).__name__ == "CompiledFunction":
        return ValueError(
            "curvature needs second derivatives, got a graph that torch.compile() made: compute it uncompiled"
        )
    return ValueError(
        f"curvature needs second derivatives, got the custom function {_kind(node).__name__}, which hides some of them "
        "from autograd: compute its backward from the slope and from saved inputs and outputs, without detach()"
    )
