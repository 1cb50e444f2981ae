"""Does a gradient describe the score? Theorem 1 speaks of the score through its gradient, which a surrogate is not."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from sparsetrail._shapes import Float, Int
from sparsetrail.core import Streams
from sparsetrail.theory.vulnerability import OPEN, Box, Score, _draw, _seed


@torch.no_grad()
def gradient_fidelity(
    score: Score,
    g: Float[Tensor, "n ..."],
    x: Float[Tensor, "n ..."],
    y: Int[Tensor, " n"],
    eps: float,
    *,
    generator: torch.Generator,
    directions: int = 64,
    box: Box | None = None,
    indices: Sequence[int] | None = None,
    chunk: int = 256,
) -> Float[Tensor, " n"]:
    """Correlation about 0 of (f(x + eps u) - f(x - eps u)) / 2 with eps g.u over random u in the L-infinity ball.

    1: the gradient `g` tells which way the score moves at this size; near 0: it says nothing about it (standard error
    about 1/sqrt(directions)); nan where one of the two never moves. What the score does alike on both sides, curvature,
    is not seen: `linear_error` sees it. A point cut to `box` counts with the step it really took.
    """
    sums = _sums(score, g, x, y, eps, generator, directions, box, indices, chunk)
    return sums[0] / (sums[1].sqrt() * sums[2].sqrt())


@torch.no_grad()
def linear_error(
    score: Score,
    g: Float[Tensor, "n ..."],
    x: Float[Tensor, "n ..."],
    y: Int[Tensor, " n"],
    eps: float,
    *,
    generator: torch.Generator,
    directions: int = 64,
    box: Box | None = None,
    indices: Sequence[int] | None = None,
    chunk: int = 256,
) -> Float[Tensor, " n"]:
    """Root mean square of f(x + eps u) - f(x) - eps g.u over that of eps g.u, random u in the L-infinity ball.

    0: the score is linear wherever it was looked at, and `g` is its gradient; nan where neither moves, infinite where
    the score alone does. Directions and the rest as in `gradient_fidelity`.
    """
    sums = _sums(score, g, x, y, eps, generator, directions, box, indices, chunk)
    return sums[3].sqrt() / sums[4].sqrt()


def _sums(
    score: Score,
    g: Tensor,
    x: Tensor,
    y: Tensor,
    eps: float,
    generator: torch.Generator,
    directions: int,
    box: Box | None,
    indices: Sequence[int] | None,
    chunk: int,
) -> Tensor:
    """Over directions: what the score does times what is told, their squares; squares of what is left and of what is
    told on either side. [5 n]"""
    streams = Streams(_seed(generator), range(len(x)) if indices is None else indices).generators
    sums = torch.zeros(5, len(x), dtype=torch.float64)
    for i in range(0, len(x), chunk):
        rows = list(range(i, min(i + chunk, len(x))))
        per, done = max(1, chunk // (2 * len(rows))), 0
        clean, slope = score(x[rows], y[rows]).double(), g[rows].double()
        while done < directions:
            k = min(per, directions - done)
            u = eps * torch.stack([_draw(streams[j], k, x[0], "linf") for j in rows], 1)
            ends = [(x[rows] + side * u).clamp(*(box or OPEN)) for side in (1, -1)]
            up, down = (score(v.flatten(0, 1), y[rows].repeat(k)).view(k, -1).double() for v in ends)
            told = [((v.double() - x[rows].double()) * slope).flatten(2).sum(2) for v in ends]
            met, said = (up - down) / 2, (told[0] - told[1]) / 2
            left = (up - clean - told[0]).square() + (down - clean - told[1]).square()
            part = (met * said, met * met, said * said, left, told[0].square() + told[1].square())
            sums[:, rows] += torch.stack(part).sum(1).cpu()
            done += k
    return sums


@torch.no_grad()
def directional_gain(
    score: Score,
    g: Float[Tensor, "n ..."],
    x: Float[Tensor, "n ..."],
    y: Int[Tensor, " n"],
    eps: float,
    *,
    box: Box | None = None,
) -> Float[Tensor, " n"]:
    """Change of the score along sign(g), over that which `g` predicts: 1 for a linear score; nan where g is 0."""
    ends = [(x + side * eps * g.sign().to(x)).clamp(*(box or OPEN)) for side in (1, -1)]
    met = (score(ends[0], y) - score(ends[1], y)).double() / 2
    told = ((ends[0] - ends[1]).double() / 2 * g.double()).flatten(1).sum(1)
    return torch.where(told == 0, torch.nan, met / told).cpu()


RELIABLE = 0.5
Reliability = Literal["reliable", "unreliable"]


def reliability(median: float) -> Reliability:
    """Whether the gradient is relied on to describe the score at the radius, by its median fidelity: from 0.5 on.

    Our own line, not a published one: the gradient then tells more of the change than chance does by far. Below it,
    attacks that follow the gradient may still find what there is; nan is below.
    """
    return "reliable" if median >= RELIABLE else "unreliable"
