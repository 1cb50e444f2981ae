"""RayS. Chen & Gu 2020, arXiv:2006.12792, alg. 1 to 3: the shortest ray that ends in another class, from decisions."""

import math

import torch
from torch import Tensor

from sparsetrail.core import Problem, Streams


def rays(p: Problem, g: Streams, *, queries: int = 1000, tolerance: float = 1e-3) -> None:
    """Signs flipped block by block, blocks halved each round, kept where a shorter ray fools; asks for decisions only.

    Needs neither gradients nor scores: for a victim that tells classes without degrees, or whose scores mislead. Rays
    leave the ball, only ends inside it count. `queries` are those of one image, `tolerance` ends the bisection of a
    length, as a share of the box. Where we differ: until a first ray fools, the signs of the round's blocks are drawn
    (the published search flips blocks of one fixed ray, which may never fool); a ray that fools is asked at the radius
    before its length is bisected, and not at all below it; an L2 ray has the length of the uncut one.
    """
    if p.ball.norm == "l0":
        raise ValueError(f"rays: expected an L-infinity or L2 ball, got {p.ball}; use sda or sparse_rs")
    lo, hi = p.ball.box
    span = p.ball.span if p.ball.span < math.inf else 16 * p.ball.eps  # without ends: far enough to fool at all
    image = p.u0.movedim(p.axis, 0)
    n, entries = image.shape[0], image[0].numel()
    unit = 1.0 if p.ball.norm == "linf" else math.sqrt(entries)  # length of a ray of one in every entry
    sign = torch.ones(n, entries, dtype=p.u0.dtype, device=p.u0.device)
    length = torch.full((n,), span * unit, dtype=torch.float64, device=p.u0.device)  # reaches every corner
    started = torch.zeros(n, dtype=torch.bool, device=p.u0.device)
    left = torch.full((n,), queries, device=p.u0.device)

    def fooled(direction: Tensor, reach: Tensor, of: Tensor) -> Tensor:
        ray = (direction * (reach / unit).to(direction.dtype)[:, None]).view(image.shape).movedim(0, p.axis)
        left.sub_(of.long())
        return p.decides((p.u0 + ray).clamp(lo, hi), of)

    blocks, block = 1, 0
    while bool((asked := (left > 0) & ~p.fooled).any()):
        ends = torch.arange(blocks + 1, device=sign.device) * entries // blocks
        new = sign.clone()
        new[:, ends[block] : ends[block + 1]] *= -1
        if not bool(started[asked].all()):
            drawn = p.noise(g, (blocks,)).sign().repeat_interleave(ends.diff(), 1)
            new = torch.where(started[:, None], new, drawn)
        found = fooled(new, length, asked)
        sign, started = torch.where(found[:, None], new, sign), started | found
        short = torch.full_like(length, p.ball.eps)
        fooled(sign, short, found & (left > 0))
        found &= ~p.fooled
        while bool((wide := found & (left > 0) & (length - short > tolerance * span * unit)).any()):
            middle = (short + length) / 2
            inside = fooled(sign, middle, wide)
            length, short = torch.where(inside, middle, length), torch.where(wide & ~inside, middle, short)
        block += 1
        if block == blocks:
            blocks, block = min(2 * blocks, entries), 0
