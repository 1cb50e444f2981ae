"""Projected gradient descent. Madry et al. 2017, arXiv:1706.06083, sec. 2.1; the paper's eq. 3."""

from sparsetrail.attacks.losses import loss_named
from sparsetrail.core import Problem, Streams, Threat

PACE = 0.01 / (8 / 255)


def own_step(ball: Threat, steps: int) -> float:
    """The length of a step where none is given: 0.01, in other norms that share of the radius that it is of 8/255."""
    return 0.01 if ball.norm == "linf" else PACE * ball.eps


def pgd(
    p: Problem, g: Streams, *, steps: int = 7, step: float | None = None, restarts: int = 1, loss: str = "ce"
) -> None:
    """`steps` steps of length `step` (input units) in the steepest direction, from `restarts` random starts.

    Defaults are the paper's: 7 steps of 0.01. In L2, where 0.01 is next to nothing, a step is the same share of the
    radius as 0.01 is of 8/255. The best point on the way counts, not the last.
    """
    length = own_step(p.ball, steps) if step is None else step
    while restarts > 0:
        with p.restarts(restarts) as (q, played):
            u = q.sample(g)
            for _ in range(steps):
                if q.over:
                    break
                u = q.project(u + length * q.steepest(q.grad(u, loss_named(loss))))
            q.loss(u)
        restarts -= played
