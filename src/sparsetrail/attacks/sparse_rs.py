"""Sparse-RS on binary frames. Croce et al. 2022, arXiv:2006.12834, alg. 1 (its L0 version), schedule of its code."""

import torch
from torch import Tensor

from sparsetrail.core import Problem, Streams

FALLS = ((50, 2), (200, 4), (500, 5), (1000, 6), (2000, 8), (4000, 10), (6000, 12), (8000, 15))  # of 10000 queries


def sparse_rs(p: Problem, g: Streams, *, queries: int = 1000, share: float = 0.3) -> None:
    """Random search over which eps entries are flipped; asks for scores only.

    Every query takes a part of the flips back, `share` of them at first and fewer later, and flips as many other
    entries; kept where the margin does not fall. Where we differ: a flipped entry has one other value, so nothing else
    is drawn; a set of equal margin is kept too, since scores of spikes are often the same.
    """
    lo, hi = p.ball.box
    if p.ball.norm != "l0" or not bool(((p.u0 == lo) | (p.u0 == hi)).all()):
        raise ValueError(f"sparse_rs: expected an L0 ball around a binary input, got {p.ball}; give L0(...) and events")
    clean = p.u0.movedim(p.axis, 0).flatten(1)
    count = min(int(p.ball.eps), clean.shape[1])
    if count == 0:
        p.loss(p.u0)
        return
    image = p.u0.movedim(p.axis, 0).shape

    def draw() -> Tensor:
        return (p.noise(g).movedim(p.axis, 0).flatten(1) + 1) / 2

    def point(flipped: Tensor) -> Tensor:
        return torch.where(flipped, p.ball.flipped(clean), clean).view(image).movedim(0, p.axis).contiguous()

    def some(rank: Tensor, k: int) -> Tensor:
        return torch.zeros_like(rank, dtype=torch.bool).scatter(1, rank.topk(k, 1).indices, True)

    taken = some(draw(), count)
    top = p.loss(point(taken))
    for i in range(queries):
        if p.over:
            return
        k = min(max(1, round(_share(i, queries, share) * count)), clean.shape[1] - count)
        if k == 0:  # every entry is flipped
            return
        rank = draw()
        new = taken ^ some(torch.where(taken, rank, -1.0), k) ^ some(torch.where(taken, -1.0, rank), k)
        m = p.loss(point(new))
        better = m >= top
        taken, top = torch.where(better[:, None], new, taken), torch.where(better, m, top)


def _share(i: int, queries: int, share: float) -> float:
    """The share of the flips that query `i` exchanges: the published schedule, stretched to `queries`."""
    at = i / queries * 10000
    return share / max([1, *(by for bound, by in FALLS if at > bound)])
