"""What several attacks share: gradients freed of their size, starts on the surface, restarts, checkpoints of APGD."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsetrail._shapes import Int
from sparsetrail.core import Problem, Streams


def by_mean(g: Tensor, axis: int) -> Tensor:
    """`g` over its mean magnitude, per example along `axis`. Zero stays zero, NaN counts as zero.

    Divided by the largest entry first: neither 1e-30 nor 1e30 is lost on the way.
    """
    g = g.nan_to_num(0.0)
    dims = [d for d in range(g.ndim) if d != axis]
    g = g / _or_one(g.abs().amax(dims, keepdim=True))
    return g / _or_one(g.abs().mean(dims, keepdim=True))


def surface(p: Problem, g: Streams) -> Tensor:
    """A random start on the surface of the ball, cut to the box: in L-infinity noise over its largest entry."""
    if p.ball.norm != "linf":
        return p.sample(g, corners=True)
    noise = p.noise(g)
    return p.project(p.u0 + p.ball.eps * noise / p.each(_or_one(noise.movedim(p.axis, 0).flatten(1).abs().amax(1))))


def restarted(
    p: Problem, restarts: int, classes: Int[Tensor, "n c"] | None = None
) -> Iterator[tuple[Problem, Int[Tensor, " n"] | None, Int[Tensor, " n"]]]:
    """The problems to play for so many restarts, with `classes` so many towards each of an image's classes.

    Gives each problem, the class that every example of it aims at (None without `classes`), and the number of the
    restart that it is; as many run at once as images left out leave room for.
    """
    each = 1 if classes is None else classes.shape[1]
    done = 0
    while done < restarts * each:
        with p.restarts(restarts * each - done) as (q, played):
            n = len(q.y)
            turn = done + torch.arange(n, device=q.y.device) // max(n // played, 1)
            aim = None
            if classes is not None:
                own = classes if q.whose is None else classes[q.whose]
                aim = own.gather(1, (turn % each)[:, None]).squeeze(1)
            yield q, aim, turn // each
        done += played


def checkpoints(steps: int) -> dict[int, int]:
    """Steps after which APGD and SA-PGD look back, and how many steps each looks back on.

    Croce & Hein 2020, arXiv:2003.01690, sec. 3.1: the first .22 of the steps, each window .03 shorter, down to .06.
    """
    length, least, less = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    found, at = {}, length
    while at <= steps:
        found[at] = length
        length = max(length - less, least)
        at += length
    return found


def _or_one(size: Tensor) -> Tensor:
    return torch.where(size > 0, size, torch.ones_like(size))
