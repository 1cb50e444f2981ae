"""Stable adaptive PGD. Wang et al. 2025, arXiv:2512.22522 (SA-PGD)."""

from sparsetrail.attacks.losses import loss_named
from sparsetrail.attacks.moves import by_mean, checkpoints, surface
from sparsetrail.core import Problem, Streams


def sapgd(p: Problem, g: Streams, *, steps: int = 100, loss: str = "ce", restarts: int = 1) -> None:
    """Steps along running mean over root of running square, each entry cut at a length halved at every checkpoint.

    No sign is taken: components that are small or change sign make small steps, which suits the sparse, noisy gradients
    of spiking networks. Where we differ: a zero gradient adds nothing, the published division gives NaN; the point of
    largest margin counts, not the last that fools; in L2 the quotient gives the direction of a step of full length.
    """
    of = loss_named(loss)
    while restarts > 0:
        with p.restarts(restarts) as (q, played):
            u, length, windows = surface(q, g), q.ball.eps, checkpoints(steps)
            mean = square = None
            for i in range(1, steps + 1):
                if q.over:
                    break
                d = by_mean(q.grad(u, of), q.axis)
                d2 = by_mean(d.square(), q.axis)
                mean, square = (d, d2) if mean is None or square is None else (0.5 * mean + d, 0.8 * square + d2)
                ratio = mean / (square.sqrt() + 1e-12)
                move = length * (ratio.clamp(-1, 1) if q.ball.norm == "linf" else q.steepest(ratio))
                u = q.project(u + move)
                length = length / 2 if i in windows else length
            q.loss(u)
        restarts -= played
