"""Square attack. Andriushchenko et al. 2020, arXiv:1912.00049, alg. 1 to 3; schedule of its published code."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sparsetrail.core import Problem, Streams

HALVED = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10000 queries: p halves after these


def square(p: Problem, g: Streams, *, queries: int = 5000, p_init: float = 0.8, restarts: int = 1) -> None:
    """Random squares, kept where the margin rises; asks for scores only. Encoded steps count as channels.

    In an L-infinity ball squares of +-eps; in an L2 ball the mass of one square moves to another, which gets a pair of
    bumps of opposite sign. `p_init` is the share of the image that the first squares cover. Where we differ: a tie is
    no success and stops nothing; what is drawn is drawn per image; places include the last row and column.
    """
    if p.ball.norm == "l0":
        raise ValueError(f"square: expected an L-infinity or L2 ball, got {p.ball}; use sda")
    for _ in range(restarts):
        (_squares if p.ball.norm == "linf" else _bumps)(p, g, queries, p_init)


def _squares(p: Problem, g: Streams, queries: int, p_init: float) -> None:
    c, h, w, spread = _maps(p)
    start = p.project(p.u0 + p.ball.eps * spread(p.noise(g, (c, 1, w)).sign()))

    def move(u: Tensor, share: float) -> Tensor:
        side = min(max(round(math.sqrt(share * h * w)), 1), h, w)
        draw = p.noise(g, (c + 2,))
        inside = _window(draw[:, :2], side, h, w)[0]
        return p.project(u + 2 * p.ball.eps * spread(inside * draw[:, 2:, None, None].sign()))

    _search(p, start, move, queries, p_init)


def _bumps(p: Problem, g: Streams, queries: int, p_init: float) -> None:
    c, h, w, spread = _maps(p)

    def allowed(delta: Tensor) -> Tensor:  # [n c h w], made as long as the ball allows
        return p.project(p.u0 + p.ball.eps * p.steepest(spread(delta)))

    side = max(min(h, w) // 5, 1)
    top, left = (max(size - 5 * side, 0) // 2 for size in (h, w))
    down, across = (h - top) // side, (w - left) // side
    draw = p.noise(g, (c + 1, down, across))
    start = p.u0.new_zeros(len(p.y), c, h, w)
    tiles = _pair(side, draw[:, 0].flatten(1)).view(-1, 1, down, across, side, side)
    tiles = tiles * draw[:, 1:, :, :, None, None].sign()
    tiles = tiles.permute(0, 1, 2, 4, 3, 5).reshape(-1, c, down * side, across * side)
    start[:, :, top : top + down * side, left : left + across * side] = tiles

    def move(u: Tensor, share: float) -> Tensor:
        side = max(round(math.sqrt(share * h * w)), 3)
        side = min(side + (side % 2 == 0), h, w)
        draw = p.noise(g, (c + 5,))
        delta = (u - p.u0).movedim(p.axis, 0).reshape(-1, c, h, w)
        here, rows, columns = _window(draw[:, :2], side, h, w)
        there = _window(draw[:, 2:4], side, h, w)[0]
        bump = _pair(side, draw[:, 4:5])[:, 0]
        bump = bump[torch.arange(len(bump), device=bump.device)[:, None, None], rows[:, :, None], columns[:, None, :]][
            :, None
        ]
        new = here * (bump * draw[:, 5:, None, None].sign() + delta / (1e-12 + _size(delta * here)))
        spare = (p.ball.eps**2 - _size(delta, (1, 2, 3)) ** 2).clamp(min=0) / c
        new = new / (1e-12 + _size(new)) * (spare + _size(delta * (here | there)) ** 2).sqrt()
        return allowed(torch.where(here, new, torch.where(there, 0.0, delta)))

    _search(p, allowed(start), move, queries, p_init)


def _search(p: Problem, u: Tensor, move: Callable[[Tensor, float], Tensor], queries: int, p_init: float) -> None:
    top = p.loss(u)
    for i in range(queries):
        if p.over:
            return
        new = move(u, _share(i, queries, p_init))
        m = p.loss(new)
        better = m > top
        u, top = torch.where(p.each(better), new, u), torch.where(better, m, top)


def _maps(p: Problem) -> tuple[int, int, int, Callable[[Tensor], Tensor]]:
    """Channels, height and width of what is attacked, and the way back from [n c h w] to its shape."""
    image = p.u0.movedim(p.axis, 0)
    *channels, h, w = (1, 1, *image.shape[1:])[-max(2, image.ndim - 1) :]  # features alone: one row of them
    c = math.prod(channels)
    return c, h, w, lambda values: values.expand(-1, c, h, w).reshape(image.shape).movedim(0, p.axis)


def _window(draw: Tensor, side: int, h: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
    """A square per image at the place drawn in -1..1 [n 2]: a mask [n 1 h w]; its rows and columns counted from it,
    held in 0..side-1."""
    unit = (draw + 1) / 2
    first = [(unit[:, k] * (size - side + 1)).long().clamp(max=size - side) for k, size in ((0, h), (1, w))]
    rows, columns = (
        torch.arange(size, device=draw.device) - at[:, None] for at, size in zip(first, (h, w), strict=True)
    )
    inside = (rows // side == 0)[:, None, :, None] & (columns // side == 0)[:, None, None, :]
    return inside, rows.clamp(0, side - 1), columns.clamp(0, side - 1)


def _pair(side: int, draw: Tensor) -> Tensor:
    """A bump above its negative, or beside it where `draw` [n k] is positive: [n k side side], each of length one."""
    upper = _bump(side // 2, side, draw)
    both = torch.cat([upper, -_bump(side - side // 2, side, draw)])
    both = both / both.norm()
    return torch.where(draw[..., None, None] > 0, both.T, both)


def _bump(rows: int, columns: int, like: Tensor) -> Tensor:
    """Rectangles around the middle, each a cell wider on every side, 1/k^2 of the k-th; of length one."""
    middle = rows // 2, columns // 2
    far = torch.maximum(
        (torch.arange(rows, device=like.device) - middle[0]).abs()[:, None],
        (torch.arange(columns, device=like.device) - middle[1]).abs(),
    )
    k = torch.arange(1, max(middle) + 2, device=like.device, dtype=like.dtype)
    heights = (1 / k**2).flip(0).cumsum(0).flip(0)[far]
    return heights / heights.norm() if rows else heights


def _size(delta: Tensor, dims: tuple[int, ...] = (2, 3)) -> Tensor:
    return (delta**2).sum(dims, keepdim=True).sqrt()


def _share(i: int, queries: int, p_init: float) -> float:
    """The share of the image that a square covers at query `i`: the published schedule, stretched to `queries`."""
    at = int(i / queries * 10000)
    return p_init / 2 ** sum(at > bound for bound in HALVED)
