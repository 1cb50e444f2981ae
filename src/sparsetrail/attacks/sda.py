"""Sparse dynamic attack on binary frames. Lun et al. 2025, arXiv:2503.03272 (SDA, beside PDSG)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsetrail.core import Problem, Streams, margin


def sda(p: Problem, g: Streams, *, steps: int = 30, first: int = 10, lean: bool = True) -> None:
    """Flip the entries whose single flips, measured, raise the margin; then undo as many as can be undone (`lean`).

    At step i the `first` * i entries of largest gradient are tried, among those that the gradient wants at the other
    end of the box; all that do not lower the margin are flipped at once. Where we differ: never more than eps entries
    differ from the clean input, the flips measured best are kept, and a full budget is probed with its weakest flip
    undone; each image is searched alone; 30 steps, not 500.
    """
    lo, hi = p.ball.box
    if p.ball.norm != "l0" or not bool(((p.u0 == lo) | (p.u0 == hi)).all()):
        raise ValueError(f"sda: expected an L0 ball around a binary input, got {p.ball}; give L0(...) and events")
    clean, budget = p.u0.movedim(p.axis, 0).flatten(1), int(p.ball.eps)
    taken, worth = torch.zeros_like(clean, dtype=torch.bool), torch.zeros_like(clean)
    if budget == 0:
        p.loss(p.u0)
        return
    for i in range(1, steps + 1):
        if p.over:
            break
        want = p.grad(_point(p, clean, taken), margin).movedim(p.axis, 0).flatten(1).nan_to_num(0.0)
        rank = _ranking(p, g, want, clean, taken)
        tried = rank.topk(min(first * i, rank.shape[1]), 1).indices
        base = taken & ~_weakest(taken, worth, (taken.sum(1) >= budget).long())
        found = p.losses(_point(p, clean, some) for some in _each_flipped(base, tried))
        rise = (found[1:] - found[0]).t().nan_to_num(-1.0, None, -1.0)
        free = ~taken.gather(1, tried)
        worth = worth.scatter(1, tried, torch.where(free, rise, worth.gather(1, tried)))
        taken = taken | torch.zeros_like(taken).scatter(1, tried, free & (rise >= 0))
        taken = taken & ~_weakest(taken, worth, taken.sum(1) - budget)
    p.loss(_point(p, clean, taken))
    if lean:
        _undo(p, clean, worth)


def _point(p: Problem, clean: Tensor, flipped: Tensor) -> Tensor:
    image = p.u0.movedim(p.axis, 0).shape
    return torch.where(flipped, p.ball.flipped(clean), clean).view(image).movedim(0, p.axis).contiguous()


def _ranking(p: Problem, g: Streams, want: Tensor, clean: Tensor, taken: Tensor) -> Tensor:
    """Size of the gradient where its direction is open, a random number below all those elsewhere; -1 where taken."""
    size = torch.where((want > 0) == (clean == p.ball.box[0]), want.abs(), 0.0)
    least = torch.where(size > 0, size, torch.inf).amin(1, keepdim=True)
    least = torch.where(least.isfinite(), least, 1.0)
    chance = (p.noise(g).movedim(p.axis, 0).flatten(1).abs() + 1e-7) / 2
    return torch.where(taken, -1.0, torch.where(size > 0, size / least, chance))


def _weakest(taken: Tensor, worth: Tensor, count: Tensor) -> Tensor:
    """The `count` [n] flips of least worth among those taken, per image."""
    order = torch.where(taken, worth, torch.inf).argsort(dim=1, stable=True)
    first = torch.arange(taken.shape[1], device=taken.device) < count.clamp(min=0)[:, None]
    return torch.zeros_like(taken).scatter(1, order, first) & taken


def _each_flipped(base: Tensor, tried: Tensor) -> Iterator[Tensor]:
    """The base itself, then the base with one entry more, or less, per image."""
    yield base
    for column in tried.unbind(1):
        yield base.scatter(1, column[:, None], ~base.gather(1, column[:, None]))


def _undo(p: Problem, clean: Tensor, worth: Tensor) -> None:
    """Binary search, per fooled image, for how many of the weakest flips can be undone."""
    taken = p.best.movedim(p.axis, 0).flatten(1) != clean
    least, most = torch.ones_like(p.y), taken.sum(1)
    while bool((p.fooled & (least <= most)).any()):
        half = (least + most) // 2
        still = p.lean(_point(p, clean, taken & ~_weakest(taken, worth, half)))
        least, most = torch.where(still, half + 1, least), torch.where(still, most, half - 1)
