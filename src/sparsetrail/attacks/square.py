"""Square attack. Andriushchenko et al. 2020, arXiv:1912.00049, alg. 1 and 2; schedule of its published code."""

import math

import torch
from torch import Tensor

from sparsetrail.core import Problem, Streams

HALVED = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10000 queries: p halves after these


def square(p: Problem, g: Streams, *, queries: int = 5000, p_init: float = 0.8, restarts: int = 1) -> None:
    """Random squares of +-eps, kept where the margin rises; asks for scores only. Encoded steps count as channels.

    `p_init` is the share of the image that the first squares cover. Where we differ: a tie is no success and stops
    nothing, positions are drawn per image and include the last row and column.
    """
    if p.ball.norm != "linf":
        raise ValueError(f"square: expected an L-infinity ball, got {p.ball}; use spsa or noise")
    for _ in range(restarts):
        _search(p, g, queries, p_init)


def _search(p: Problem, g: Streams, queries: int, p_init: float) -> None:
    image = p.u0.movedim(p.axis, 0)
    *channels, h, w = image.shape[1:]
    c = math.prod(channels)

    def spread(values: Tensor) -> Tensor:  # [n c h w] to the attacked tensor
        return values.expand(-1, c, h, w).reshape(image.shape).movedim(0, p.axis)

    rows, columns = torch.arange(h, device=image.device), torch.arange(w, device=image.device)
    u = p.project(p.u0 + p.ball.eps * spread(p.noise(g, (c, 1, w)).sign()))
    top = p.loss(u)
    for i in range(queries):
        if p.over:
            return
        side = min(max(round(math.sqrt(_share(i, queries, p_init) * h * w)), 1), h, w)
        draw = p.noise(g, (c + 2,))
        unit = (draw[:, :2] + 1) / 2
        top_row, left = ((unit[:, k] * (size - side + 1)).long().clamp(max=size - side) for k, size in ((0, h), (1, w)))
        inside = ((rows - top_row[:, None]) // side == 0)[:, None, :, None]
        inside = inside & ((columns - left[:, None]) // side == 0)[:, None, None, :]
        new = p.project(u + 2 * p.ball.eps * spread(inside * draw[:, 2:, None, None].sign()))
        m = p.loss(new)
        better = m > top
        u, top = torch.where(p.each(better), new, u), torch.where(better, m, top)


def _share(i: int, queries: int, p_init: float) -> float:
    """The share of the image that a square covers at query `i`: the published schedule, stretched to `queries`."""
    at = int(i / queries * 10000)
    return p_init / 2 ** sum(at > bound for bound in HALVED)
